"""The experiment: what is accepted comes back unchanged, what cannot be is refused before anything runs."""

from __future__ import annotations

import itertools
import tomllib
from math import cos, pi
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from fslora.config import (
    Experiment,
    LocalConfig,
    build,
    commented_toml,
    load,
    merged,
    parse_override,
    to_toml,
)
from fslora.errors import ConfigError, FsloraError
from fslora.methods import METHODS
from fslora.methods.fedit import FedIT
from fslora.methods.fslora import FSLoRA

# One or two float64 roundings of numbers near the learning rate.
ROUNDING = 1e-15
LAWS = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "experiment.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --- defaults ---


def test_the_defaults_are_an_experiment():
    """An empty table is valid: FSLoRA, ranks as ratios, a fixed number of local steps, no variants."""
    experiment = build({}, "nothing")
    assert isinstance(experiment.method, FSLoRA)
    assert experiment.fleet.ratios
    assert (experiment.fleet.ranks, experiment.fleet.distribution) == (None, None)
    assert experiment.local.steps
    assert experiment.local.epochs is None
    assert experiment.variants == {}
    assert experiment == Experiment()


def test_the_embedded_default_compares_with_two_references():
    """Without a file: the field defaults, and FedIT at the smallest and at the server's rank as variants."""
    experiment = load(None)
    assert experiment.model_copy(update={"variants": {}}) == Experiment()
    assert list(experiment.variants) == ["fedit-low", "fedit-full"]
    assert experiment.variant("fedit-low").method == FedIT(rank="smallest")
    assert experiment.variant("fedit-full").method == FedIT(rank="server")


def test_an_empty_file_is_the_field_defaults(tmp_path):
    """A file says what differs from the field defaults; the embedded default's variants are not in it."""
    assert load(written(tmp_path, "")) == Experiment()


def test_an_experiment_is_frozen():
    """No section can be changed in place."""
    experiment = build({}, "nothing")
    for table, field in ((experiment, "run"), (experiment.run, "seed"), (experiment.method, "average")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(table, field, getattr(table, field))


# --- there and back ---

names = st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True)
words = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12)
positive = st.floats(1e-9, 1e9)
servers = st.fixed_dictionaries(
    {},
    optional={
        "optimizer": st.sampled_from(["sgd", "adam", "adamw"]),
        "lr": positive,
        "momentum": st.floats(0, 0.99),
        "eps": st.floats(1e-12, 1),
    },
)
methods = st.one_of(
    st.fixed_dictionaries(
        {"name": st.just("fslora")},
        optional={
            "sketch": st.sampled_from(["independent", "balanced", "nested"]),
            "shared_rows": st.booleans(),
            "average": st.sampled_from(["cohort", "holders"]),
            "server": servers,
        },
    ),
    st.fixed_dictionaries(
        {"name": st.just("fedit")},
        optional={
            "rank": st.one_of(st.integers(1, 8), st.sampled_from(["smallest", "server"])),
            "weighting": st.sampled_from(["uniform", "examples"]),
            "server": servers,
        },
    ),
)
fleets = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"clients": st.just(20), "ranks": st.lists(st.integers(1, 8), min_size=20, max_size=20)}),
    st.fixed_dictionaries({"ratios": st.lists(st.floats(0.01, 1), min_size=1, max_size=4)}),
    st.fixed_dictionaries(
        {
            "distribution": st.sampled_from(["uniform", "normal", "heavy-tail-low"]),
            "max_rank": st.integers(2, 8),
        }
    ),
)
lengths = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"steps": st.integers(1, 50)}),
    st.fixed_dictionaries({"epochs": st.integers(1, 5), "lr": positive}),
)
variants = st.dictionaries(
    names,
    st.fixed_dictionaries(
        {},
        optional={
            "method": methods,
            "local": lengths,
            "fleet": fleets,
            "run": st.fixed_dictionaries({"seed": st.integers(0, 2**40)}),
        },
    ),
    max_size=3,
)
experiments = st.fixed_dictionaries(
    {"adapter": st.fixed_dictionaries({"rank": st.integers(8, 99)}, optional={"alpha": positive})},
    optional={
        "run": st.fixed_dictionaries({"seed": st.integers(0, 2**62), "rounds": st.integers(1, 10**6)}),
        "model": st.fixed_dictionaries({"name": words}),
        "data": st.fixed_dictionaries({"source": words}, optional={"subset": words, "group": words}),
        "method": methods,
        "fleet": fleets,
        "local": lengths,
        "variants": variants,
    },
)


@LAWS
@given(experiments)
def test_toml_gives_back_an_equal_experiment(tmp_path_factory, fields):
    """load(to_toml(e)) = load(commented_toml(e)) = e, and so are all its variants."""
    experiment = build(fields, "drawn")
    for text in (to_toml(experiment), commented_toml(experiment)):
        path = written(tmp_path_factory.getbasetemp(), text)
        again = load(path)
        assert again == experiment
        assert type(again.method) is type(experiment.method)
        assert to_toml(again) == to_toml(experiment)
        for name in experiment.variants:
            assert again.variant(name) == experiment.variant(name)


@LAWS
@given(experiments)
def test_a_variant_changes_only_what_it_names(fields):
    """variant(name) has the keys it names, and every other section of the main experiment as it is."""
    experiment = build(fields, "drawn")
    for name, changes in experiment.variants.items():
        variant = experiment.variant(name)
        assert variant.variants == {}
        for section in Experiment.model_fields:
            if section not in changes and section != "variants":
                assert getattr(variant, section) == getattr(experiment, section)
        for section, table in changes.items():
            dumped = getattr(variant, section).model_dump(mode="json")
            for key, value in table.items():
                if not isinstance(value, dict):
                    assert dumped[key] == value


def test_the_commented_form_explains_every_key():
    """Each key stands in the commented TOML under its own description; one without a value as a comment."""
    experiment = load(None, ["method.name=fedit"])
    text = commented_toml(experiment)
    prose = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("# "))
    for key, info in fields_of(experiment):
        assert info.description, key
        assert " ".join(info.description.split()) in prose, key
        assert f"\n{key} = " in text or f"\n# {key} = ..." in text, key
    assert all(name in text for name in ("[method.server]", "[variants.fedit-low.method]"))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_written_and_read(tmp_path, name):
    """The commented TOML of each registered method loads as that method with its defaults."""
    experiment = build({"method": {"name": name}}, "here")
    text = commented_toml(experiment)
    assert METHODS[name].paper in text
    assert load(written(tmp_path, text)).method == METHODS[name]()


def fields_of(table: BaseModel):
    for key, info in type(table).model_fields.items():
        value = getattr(table, key)
        if isinstance(value, BaseModel):
            yield from fields_of(value)
        elif key != "variants":
            yield key, info


# --- refusals ---

REFUSED = {
    "unknown section, with the known ones": (
        {"x": {}},
        r"x: unknown key .*Known here: adapter, compare, data, engine, fleet, local, method, model, partition, run, "
        r"variants, wire\.",
    ),
    "unknown section, with a suggestion": ({"fleets": {}}, r"fleets: unknown key .*did you mean 'fleet'\?"),
    "unknown key, with a suggestion": (
        {"run": {"round": 3}},
        r"run\.round: .*value 3.*did you mean 'rounds'\?",
    ),
    "unknown key, with the known ones": (
        {"engine": {"xyz": 1}},
        r"engine\.xyz: unknown key .*Known here: chunk, name, workers\.",
    ),
    "unknown key of a method": (
        {"method": {"sktch": "x"}},
        r"method\.sktch: .*did you mean 'sketch'\?.*Known here: .*name",
    ),
    "a key of another method": (
        {"method": {"name": "fedit", "sketch": "nested"}},
        r"method\.sketch: unknown key",
    ),
    "unknown key of a server": (
        {"method": {"server": {"lrr": 1}}},
        r"method\.server\.lrr: .*did you mean 'lr'\?",
    ),
    "unknown method": (
        {"method": {"name": "fedt"}},
        r"'fedt'; did you mean 'fedit'\? Known methods: .*fslora",
    ),
    "method's name is a number": ({"method": {"name": 3}}, r"method\.name is 3"),
    "method is not a table": ({"method": "fedit"}, r"method is 'fedit'"),
    "section is not a table": ({"run": 3}, r"run is 3"),
    "variants is not a table": ({"variants": 3}, r"variants is 3"),
    "text for a number": ({"run": {"rounds": "many"}}, r"run\.rounds is 'many': .*valid integer"),
    "a fraction for a whole number": ({"run": {"rounds": 2.5}}, r"run\.rounds is 2\.5: .*integer"),
    "a number for a text": ({"data": {"subset": 1}}, r"data\.subset is 1: .*valid string"),
    "a number in a list of texts": ({"adapter": {"targets": ["query", 3]}}, r"adapter\.targets.* is 3"),
    "no choice of this name": (
        {"engine": {"name": "gpu"}},
        r"engine\.name is 'gpu': .*'cohort' or 'sequential'",
    ),
    "r = 0": ({"adapter": {"rank": 0}}, r"adapter\.rank is 0"),
    "no alpha": ({"adapter": {"alpha": 0.0}}, r"adapter\.alpha is 0\.0"),
    "dropout of everything": ({"adapter": {"dropout": 1.0}}, r"adapter\.dropout is 1\.0"),
    "no targets": ({"adapter": {"targets": []}}, r"adapter\.targets is .*: name at least one module"),
    "an empty target": ({"adapter": {"targets": ["query", ""]}}, r"name at least one module"),
    "targets that are no regular expression": (
        {"adapter": {"targets": "(query"}},
        r"'\(query' is no regular expression",
    ),
    "k = 0": (
        {"fleet": {"clients": 2, "cohort": 2, "ranks": [4, 0]}},
        r"ranks holds 0; a rank is at least 1",
    ),
    "a rank above the server's": (
        {"adapter": {"rank": 64}, "fleet": {"clients": 2, "cohort": 2, "ranks": [4, 65]}},
        r"adapter\.rank is 64 but fleet\.ranks gives client 1 rank 65.*Raise adapter\.rank or lower fleet\.ranks",
    ),
    "too few ranks": ({"fleet": {"clients": 3, "cohort": 2, "ranks": [4, 4]}}, r"2 entries for 3 clients"),
    "a ratio of 0": ({"fleet": {"ratios": [0.5, 0.0]}}, r"every ratio lies in \(0, 1\]"),
    "a ratio above 1": ({"fleet": {"ratios": [1.5]}}, r"every ratio lies in \(0, 1\]"),
    "no ratios": ({"fleet": {"ratios": []}}, r"ratios"),
    "min_rank above max_rank": (
        {"adapter": {"rank": 64}, "fleet": {"distribution": "normal", "min_rank": 9, "max_rank": 8}},
        r"min_rank 9, fleet\.max_rank 8 and adapter\.rank 64",
    ),
    "max_rank above the server's": (
        {"adapter": {"rank": 64}, "fleet": {"distribution": "uniform", "max_rank": 65}},
        r"max_rank 65",
    ),
    "min_rank above the server's": (
        {"adapter": {"rank": 64}, "fleet": {"distribution": "uniform", "min_rank": 65}},
        r"min_rank 65",
    ),
    "FedIT's rank above the server's": (
        {"adapter": {"rank": 64}, "method": {"name": "fedit", "rank": 65}},
        r"rank",
    ),
    "cohort above clients": (
        {"fleet": {"clients": 5, "cohort": 10}},
        r"cohort is 10 but there are 5 clients; lower cohort",
    ),
    "an empty cohort": ({"fleet": {"cohort": 0}}, r"fleet\.cohort.* is 0"),
    "no clients": ({"fleet": {"clients": 0}}, r"fleet\.clients is 0"),
    "two ways to give ranks": (
        {"fleet": {"ratios": [0.5], "distribution": "normal"}},
        r"ratios and distribution are both",
    ),
    "all ways to give ranks": (
        {"fleet": {"clients": 1, "cohort": 1, "ranks": [1], "ratios": [0.5], "distribution": "normal"}},
        r"ranks and ratios and distribution",
    ),
    "steps and epochs": ({"local": {"steps": 1, "epochs": 1}}, r"steps and epochs are both given"),
    "no steps": ({"local": {"steps": 0}}, r"local\.steps is 0"),
    "lr not a number": ({"local": {"lr": float("nan")}}, r"local\.lr is nan"),
    "lr infinite": ({"local": {"lr": float("inf")}}, r"local\.lr is inf"),
    "negative seed": ({"run": {"seed": -1}}, r"run\.seed is -1"),
    "chapters of another source": (
        {"data": {"task": "chapters", "source": "x"}},
        r"'chapters' exists for 'stdlib' only",
    ),
    "a table without a source": ({"data": {"task": "table"}}, r"data\.task 'table' needs a file"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_run_is_refused(fields, message):
    """A ConfigError says where, what was given, and what is possible."""
    with pytest.raises(ConfigError, match=message) as caught:
        build(fields, "experiment.toml")
    assert str(caught.value).startswith("experiment.toml: ")
    assert isinstance(caught.value, FsloraError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", [["fslora"], {"is": "fslora"}], ids=str)
def test_a_methods_name_of_any_type_is_refused_in_words(name):
    """A list or a table as the method's name is a ConfigError, not a TypeError from inside."""
    with pytest.raises(ConfigError, match=r"method"):
        build({"method": {"name": name}}, "experiment.toml")


@pytest.mark.parametrize(
    "fields",
    [
        {"run": {"rounds": True}},
        {"run": {"rounds": "30"}},
        {"local": {"lr": True}},
        {"adapter": {"rslora": "yes"}},
    ],
    ids=str,
)
def test_a_value_of_another_type_is_not_reinterpreted(fields):
    """TOML has types: true is not 1, "30" is not 30 and "yes" is not true."""
    with pytest.raises(ConfigError):
        build(fields, "experiment.toml")


@pytest.mark.parametrize(
    "fields", [{"fleet": {"cohort": "some"}}, {"method": {"name": "fedit", "rank": 0}}, {"run": 3}], ids=str
)
def test_errors_speak_of_the_experiment_only(fields):
    """The place named is a key that a user can find in the file, without the checking library's own words."""
    with pytest.raises(ConfigError) as caught:
        build(fields, "experiment.toml")
    assert "constrained" not in str(caught.value)
    assert "instance of" not in str(caught.value)


def test_every_problem_is_named_at_once():
    """Two mistakes give two lines."""
    with pytest.raises(ConfigError) as caught:
        build({"run": {"rounds": 0}, "local": {"lr": -1.0}}, "here")
    assert "run.rounds is 0" in str(caught.value)
    assert "local.lr is -1.0" in str(caught.value)


FILES = {
    "not TOML": (b"[run\nseed = 1", r"is not valid TOML: .*line 1"),
    "a key twice": (b"[run]\nseed = 1\nseed = 2\n", r"is not valid TOML"),
    "not UTF-8": (b"[model]\nname = '\xff\xfe'\n", r"cannot be read: .*utf-8"),
    "a date for a number": (b"[run]\nseed = 1979-05-27\n", r"run\.seed is datetime"),
    "an unknown section": (b"[fleeet]\n", r"fleeet: unknown key .*did you mean 'fleet'"),
    "null byte": (b"[model]\nname = 'a\x00b'\n", r"is not valid TOML"),
}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES.keys())
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, message):
    """Whatever is wrong with a file, the error is a ConfigError that names it."""
    path = written(tmp_path, content)
    with pytest.raises(ConfigError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    """No file: the error says how to get one; a folder cannot be read."""
    with pytest.raises(ConfigError, match=r"there is no file .*fslora init"):
        load(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=r"cannot be read"):
        load(tmp_path)


VARIANTS = {
    "unknown key": ({"wrong": {"run": {"sed": 1}}}, r"variants\.wrong: run\.sed: .*did you mean 'seed'\?"),
    "unknown section": ({"good": {}, "wrong": {"runn": {}}}, r"variants\.wrong: runn"),
    "unknown method": ({"wrong": {"method": {"name": "fedt"}}}, r"variants\.wrong: .*did you mean 'fedit'\?"),
    "other method's key kept": (
        {"wrong": {"method": {"name": "fedit", "sketch": "nested"}}},
        r"method\.sketch",
    ),
    "not a table": ({"wrong": 3}, r"variants\.wrong is 3"),
    "section not a table": ({"wrong": {"run": 3}}, r"variants\.wrong: run is 3"),
    "impossible with the rest": (
        {"wrong": {"adapter": {"rank": 4}}},
        r"variants\.wrong: adapter\.rank is 4 but",
    ),
    "variants of a variant": ({"wrong": {"variants": {"inner": {}}}}, r"variants"),
}


@pytest.mark.parametrize(("variants", "message"), VARIANTS.values(), ids=VARIANTS.keys())
def test_a_wrong_variant_is_found_before_anything_runs(tmp_path, variants, message):
    """load checks every variant as it will run, and names the one that is wrong."""
    fields = {"fleet": {"clients": 2, "cohort": 2, "ranks": [2, 8]}, "variants": variants}
    text = tomlkit_text(fields)
    with pytest.raises(ConfigError, match=message):
        load(written(tmp_path, text))


@pytest.mark.parametrize("name", ["../outside", "a/b", "..", "", "/tmp/x"])
def test_a_variants_name_is_a_folders_name(tmp_path, name):
    """A variant runs in variants/NAME of the run folder: a name that leads elsewhere is refused."""
    with pytest.raises(ConfigError, match="variant"):
        load(written(tmp_path, tomlkit_text({"variants": {name: {"run": {"seed": 1}}}})))


def test_an_unknown_variant_is_refused_with_the_known_ones():
    """variant(name) of a name that is not there lists those that are."""
    with pytest.raises(ConfigError, match=r"no variant 'fedit'; there are \['fedit-full', 'fedit-low'\]"):
        load(None).variant("fedit")


def tomlkit_text(fields: dict) -> str:
    import tomlkit

    return tomlkit.dumps(fields)


# --- overrides and laying tables over each other ---

OVERRIDES = {
    "adapter.rank=32": {"adapter": {"rank": 32}},
    "local.lr = 1e-3": {"local": {"lr": 1e-3}},
    "adapter.rslora=true": {"adapter": {"rslora": True}},
    "adapter.targets=['query', 'value']": {"adapter": {"targets": ["query", "value"]}},
    "model.name=some/folder": {"model": {"name": "some/folder"}},
    'model.name="quoted"': {"model": {"name": "quoted"}},
    "model.name=a=b": {"model": {"name": "a=b"}},
    "model.name=": {"model": {"name": ""}},
    "method.server.lr=2": {"method": {"server": {"lr": 2}}},
    "run={seed = 3}": {"run": {"seed": 3}},
}


@pytest.mark.parametrize(("item", "fields"), OVERRIDES.items(), ids=OVERRIDES.keys())
def test_an_override_is_a_nested_table(item, fields):
    """section.key=value, the value read as TOML, and as plain text where it is not TOML."""
    assert parse_override(item) == fields


@pytest.mark.parametrize("item", ["adapter.rank", "=3", "adapter.=3", ".rank=3", "adapter..rank=3", "", "="])
def test_an_override_of_another_form_is_refused(item):
    """The error repeats the item and shows the form."""
    with pytest.raises(ConfigError, match=r"--set .* is not of the form section\.key=value"):
        parse_override(item)


def test_overrides_apply_in_order_and_are_checked(tmp_path):
    """The last one wins; a wrong key in one is refused like in a file."""
    path = written(tmp_path, "[adapter]\nrank = 16\nalpha = 4.0\n")
    experiment = load(path, ["adapter.rank=8", "run.seed=1", "adapter.rank=12"])
    assert (experiment.adapter.rank, experiment.adapter.alpha, experiment.run.seed) == (12, 4.0, 1)
    with pytest.raises(ConfigError, match=r"adapter\.rnk: .*did you mean 'rank'"):
        load(path, ["adapter.rnk=8"])
    with pytest.raises(ConfigError, match=r"run is 3"):
        load(path, ["run=3"])


def test_an_override_reaches_the_variants():
    """A variant is the overridden experiment with its own keys changed."""
    experiment = load(None, ["adapter.rank=8", "variants.fedit-low.run.seed=5", "variants.new.local.steps=2"])
    low = experiment.variant("fedit-low")
    assert (low.adapter.rank, low.run.seed, low.method) == (8, 5, FedIT())
    assert experiment.variant("new").local.steps == 2


def test_merging_is_deep_and_changes_neither_table():
    """Tables are laid over each other key by key; other values replace; the arguments stay as they were."""
    fields = {"a": {"x": 1, "y": {"z": 2}}, "b": [1, 2]}
    changes = {"a": {"y": {"w": 3}}, "b": [3], "c": 4}
    assert merged(fields, changes) == {"a": {"x": 1, "y": {"z": 2, "w": 3}}, "b": [3], "c": 4}
    assert fields == {"a": {"x": 1, "y": {"z": 2}}, "b": [1, 2]}
    assert changes == {"a": {"y": {"w": 3}}, "b": [3], "c": 4}
    assert merged({"a": {"x": 1}}, {"a": 2}) == {"a": 2}
    assert merged({"a": 2}, {"a": {"x": 1}}) == {"a": {"x": 1}}


def test_switching_the_method_drops_the_other_ones_keys():
    """Another method.name starts from that method's defaults; the same name, or none, keeps what is set."""
    fslora = {"method": {"sketch": "nested", "weighting": "examples"}}
    assert merged(fslora, {"method": {"name": "fedit", "rank": 4}}) == {"method": {"name": "fedit", "rank": 4}}
    kept = {"sketch": "nested", "weighting": "uniform"}
    assert merged(fslora, {"method": {"weighting": "uniform"}}) == {"method": kept}
    assert merged(fslora, {"method": {"name": "fslora", "weighting": "uniform"}}) == {
        "method": {"name": "fslora", **kept}
    }
    fedit = {"method": {"name": "fedit", "rank": 4}}
    assert merged(fedit, {"method": {"name": "fslora"}}) == {"method": {"name": "fslora"}}


@pytest.mark.parametrize(
    ("section", "before", "change", "after"),
    [
        ("fleet", {"clients": 3, "ratios": [0.5]}, {"ranks": [1, 2, 3]}, {"clients": 3, "ranks": [1, 2, 3]}),
        ("fleet", {"ranks": [1], "ratios": None}, {"distribution": "normal"}, {"distribution": "normal"}),
        (
            "fleet",
            {"distribution": "normal", "min_rank": 2},
            {"ratios": [1.0]},
            {"min_rank": 2, "ratios": [1.0]},
        ),
        ("fleet", {"ratios": [0.5]}, {"clients": 4}, {"ratios": [0.5], "clients": 4}),
        ("local", {"steps": 4, "lr": 0.1}, {"epochs": 1}, {"lr": 0.1, "epochs": 1}),
        ("local", {"epochs": 1}, {"steps": 2}, {"steps": 2}),
        ("local", {"epochs": 1}, {"lr": 0.1}, {"epochs": 1, "lr": 0.1}),
        (
            "run",
            {"steps": 1, "ranks": 1},
            {"epochs": 2, "ratios": 2},
            {"steps": 1, "ranks": 1, "epochs": 2, "ratios": 2},
        ),
    ],
)
def test_naming_one_rival_drops_the_others(section, before, change, after):
    """fleet: ranks, ratios, distribution; local: steps, epochs. The one named replaces the one there was."""
    assert merged({section: before}, {section: change}) == {section: after}


def test_a_fleet_of_the_default_can_be_given_ranks_by_an_override():
    """The same through load: the default ratios give way to ranks, and steps to epochs."""
    experiment = load(None, ["fleet.clients=2", "fleet.cohort=2", "fleet.ranks=[4, 1]", "local.epochs=2"])
    assert (experiment.fleet.ranks, experiment.fleet.ratios) == ((4, 1), None)
    assert (experiment.local.epochs, experiment.local.steps) == (2, None)


# --- the learning rate over the rounds ---


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.4, 0.8, 1.2, 1.2, 1.2, 1.2]),
        ("linear", [0.4, 0.8, 1.2, 0.9, 0.6, 0.3]),
        ("cosine", [0.4, 0.8, 1.2, 0.6 * (1 + cos(pi / 4)), 0.6, 0.6 * (1 - cos(pi / 4))]),
    ],
)
def test_the_learning_rate_by_hand(schedule, expected):
    """lr 1.2, two warm-up rounds of six: 1/3, 2/3, then 1 falling over the four rounds that are left."""
    local = LocalConfig(lr=1.2, schedule=schedule, warmup_rounds=2)
    assert [local.lr_at(number, 6) for number in range(6)] == pytest.approx(expected, rel=10 * ROUNDING)


@LAWS
@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 6), st.integers(1, 12))
def test_the_learning_rate_stays_in_its_range(schedule, warmup, rounds):
    """0 < lr_at <= lr in every round; it rises through the warm-up and never rises after it."""
    local = LocalConfig(lr=0.5, schedule=schedule, warmup_rounds=warmup)
    rates = [local.lr_at(number, rounds) for number in range(rounds)]
    assert all(0 < rate <= 0.5 for rate in rates)
    rising, falling = rates[: warmup + 1], rates[warmup:]
    assert all(a < b for a, b in itertools.pairwise(rising))
    assert all(a >= b - ROUNDING for a, b in itertools.pairwise(falling))
    if warmup < rounds:
        assert rates[warmup] == 0.5


def test_the_resolved_toml_is_plain():
    """to_toml writes every key that has a value, and nothing that TOML cannot say."""
    document = tomllib.loads(to_toml(load(None)))
    assert document["fleet"]["ratios"] == list(load(None).fleet.ratios)
    assert "ranks" not in document["fleet"]
    assert document["method"]["server"]["eps"] == 1e-8
    assert document["variants"]["fedit-low"] == {"method": {"name": "fedit", "rank": "smallest"}}


def test_an_empty_table_clears_what_was_there():
    """`--set variants={}` runs the main run alone."""
    assert load(None).variants
    assert load(None, ["variants={}"]).variants == {}


def test_a_grid_may_be_written_with_or_without_quotes(tmp_path):
    """[compare.grid] "local.lr" = [...] and local.lr = [...] are the same grid, and so below compare.grids."""
    quoted = '[compare.grid]\n"local.lr" = [0.1, 0.2]\n[compare.grids.flora]\n"method.weighting" = ["uniform"]\n'
    grids = [load(written(tmp_path, text)).compare for text in (quoted, quoted.replace('"local.lr"', "local.lr"))]
    assert grids[0] == grids[1]
    assert grids[0].grid == {"local.lr": (0.1, 0.2)}
    assert load(written(tmp_path, quoted.replace('"method.weighting"', "method.weighting"))).compare == grids[0]
