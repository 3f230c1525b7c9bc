"""Where rows come from: many files as one table, LEAF's files, and what they are called."""

from __future__ import annotations

import gzip
import json
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fslora.config import DataConfig, PartitionConfig, build
from fslora.data import load_dataset
from fslora.data.partition import partition
from fslora.data.sources import default_group, file_names, files_by_name, read_rows
from fslora.data.types import Dataset
from fslora.errors import ConfigError, DataError
from fslora.rng import Rng


def config(source: Path | str, **fields) -> DataConfig:
    return DataConfig(source=str(source), **{"task": "table", **fields})


def load(source: Path | str, **fields) -> Dataset:
    return load_dataset(config(source, **fields), Rng(0))


def rows(source: Path | str, side: str = "train", **fields) -> dict[str, list]:
    return read_rows(config(source, **fields), side)[:]


def write(path: Path, *records) -> Path:
    """Records as JSONL or CSV, by the suffix; gzipped if that says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".csv" in path.name:
        lines = [",".join(records[0]), *(",".join(str(value) for value in record.values()) for record in records)]
    else:
        lines = [json.dumps(record) for record in records]
    text = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
    return path


def row(text: str, label=0, **more) -> dict:
    return {"text": text, "label": label, **more}


# --- names of files ---


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ("data/boolq/train.jsonl.gz data/arc_easy/train.jsonl.gz", "boolq arc_easy"),
        ("data/boolq/train.jsonl data/siqa/train.csv", "boolq siqa"),
        ("sites/a.csv sites/b.csv", "a b"),
        ("/far/sites/a.csv /far/sites/b.csv", "a b"),
        ("a.csv b.jsonl.gz c.PARQUET", "a b c"),
        ("sites/a.csv", "a"),
        ("sites/a.csv sites/a.jsonl", "a.csv a.jsonl"),
        ("x/a/1.csv x/b.csv", "a/1 b"),
        ("x/train.csv x/more/train.csv", "train more/train"),
        ("x/a/de/train.csv x/b/de/train.csv x/b/en/train.csv", "a/de b/de b/en"),
        ("x/leaf_1.json x/leaf_2.json", "leaf_1 leaf_2"),
        ("x/v1.0/a.csv x/v1.1/a.csv", "v1.0 v1.1"),
    ],
)
def test_files_are_called_by_what_differs(paths, names):
    assert file_names([Path(path) for path in paths.split()]) == names.split()


PARTS = st.sampled_from(["a", "b", "a.csv", "train", "a/b"])
SUFFIXES = st.sampled_from([".csv", ".csv.gz", ".jsonl", ".parquet", ".json", ".CSV"])
PATHS = st.builds(
    lambda folders, name, suffix: Path(*folders, name + suffix), st.lists(PARTS, max_size=3), PARTS, SUFFIXES
)


@given(st.lists(PATHS, min_size=1, max_size=8, unique=True), st.booleans(), st.randoms())
def test_names_are_unique_whatever_the_order_and_the_place(paths, absolute, random):
    names = file_names(paths)
    assert len(set(names)) == len(paths)
    assert all(names)
    order = random.sample(range(len(paths)), len(paths))
    assert file_names([paths[i] for i in order]) == [names[i] for i in order]
    place = Path("/some/where" if absolute else "there")
    assert file_names([place / path for path in paths]) == names


# --- folders and patterns ---


@pytest.fixture
def sites(tmp_path) -> Path:
    """Three sites of 20 rows, one of them two folders down, in three formats; and files that are none."""
    for site, name in enumerate(["a.csv", "b.jsonl.gz", "more/c.jsonl"]):
        write(tmp_path / "sites" / name, *(row(f"row {i} of {site}", i % 2) for i in range(20)))
    (tmp_path / "sites" / "README.md").write_text("about")
    (tmp_path / "sites" / "manifest.json").write_text("{}")
    write(tmp_path / "sites" / ".hidden" / "d.csv", row("hidden"))
    return tmp_path / "sites"


def test_a_folder_is_all_its_files_without_network_or_cache(sites, monkeypatch, capfd):
    def refuse(*args):
        raise AssertionError("a local file must not touch the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    before = sorted(sites.parent.rglob("*"))
    found = rows(sites)
    assert list(found) == ["text", "label", "file"]
    assert found["file"] == ["a"] * 20 + ["b"] * 20 + ["more/c"] * 20
    assert found["text"][20] == "row 0 of 1"
    assert set(found["label"]) == {"0", "1"}  # CSV has texts, JSONL numbers: texts where they meet
    assert capfd.readouterr() == ("", "")
    assert sorted(sites.parent.rglob("*")) == before


def test_one_client_per_file_is_what_a_folder_gives(sites):
    data = load(sites)
    assert data.statistics["files of train"] == 3
    assert data.label_names == ("0", "1")
    assert set(data.train.groups) == {"a", "b", "more/c"}
    parts = partition(PartitionConfig(kind="natural", holdout=0.0), data.train, 3, Rng(0))
    assert {frozenset(data.train.groups[i] for i in part) for part in parts.train} == {
        frozenset({"a"}),
        frozenset({"b"}),
        frozenset({"more/c"}),
    }


def test_a_pattern_takes_the_files_it_matches_and_those_in_folders_it_matches(sites):
    assert set(rows(sites / "*.csv")["file"]) == {"a"}
    assert set(rows(sites / "[ab].*")["file"]) == {"a", "b"}
    assert set(rows(sites / "mor?")["file"]) == {"c"}
    assert set(rows(sites / "**")["file"]) == {"a", "b", "more/c"}


def test_a_name_with_brackets_is_a_name_where_there_is_such_a_file(tmp_path):
    write(tmp_path / "[a].jsonl", row("x"))
    write(tmp_path / "[b]" / "y.jsonl", row("y"))
    assert "file" not in rows(tmp_path / "[a].jsonl")
    assert rows(tmp_path / "[b]")["text"] == ["y"]


def test_a_file_is_read_once_whatever_links_lead_to_it(sites):
    (sites / "loop").symlink_to(sites)
    (sites / "z.csv").symlink_to(sites / "a.csv")
    (sites.parent / "far").mkdir()
    write(sites.parent / "far" / "d.jsonl", row("far"))
    (sites / "site").symlink_to(sites.parent / "far")
    assert set(rows(sites)["file"]) == {"a", "b", "more/c", "site/d"}


def test_the_file_can_be_the_class_on_all_sides(tmp_path):
    for name in ("boolq", "siqa"):
        write(tmp_path / name / "train.jsonl", *(row(f"{name} {i}") for i in range(20)))
        write(tmp_path / name / "test.csv", *(row(f"{name} test {i}") for i in range(5)))
    data = load(tmp_path / "*" / "train.jsonl", test=str(tmp_path / "*" / "test.csv"), label="file")
    assert data.label_names == ("boolq", "siqa")
    assert len(data.test) == 10
    assert data.test.groups == ("boolq",) * 5 + ("siqa",) * 5
    assert data.statistics["test texts that are also in train"] == 0


def test_columns_that_only_some_files_have(tmp_path):
    write(tmp_path / "a.jsonl", row("x", note="n", score=1))
    write(tmp_path / "b.jsonl", row("y", score={"deep": 1}))
    assert list(rows(tmp_path)) == ["text", "label", "file"]
    message = r"b\.jsonl has no column 'note' \(data\.group\), but .*a\.jsonl has one; it has 'text', 'label', 'score'"
    with pytest.raises(DataError, match=message):
        rows(tmp_path, group="note")
    with pytest.raises(DataError, match=r"column 'score' \(data\.text_pair\) holds .*int64.* but .*'deep'"):
        rows(tmp_path, text_pair="score")
    with pytest.raises(DataError, match=r"has no column 'gone'; it has 'text', 'label', 'file'. Set data\.group"):
        load(tmp_path, group="gone")


def test_an_instruction_s_input_may_be_missing_in_some_files(tmp_path):
    write(tmp_path / "a.jsonl", {"instruction": "i", "input": "given", "output": "o"})
    write(tmp_path / "b.jsonl", {"instruction": "j", "output": "p"})
    assert rows(tmp_path, task="instruct")["input"] == ["given", None]
    write(tmp_path / "c.jsonl", {"instruction": "j", "output": "p", "topic": "t"})
    with pytest.raises(DataError, match=r"a\.jsonl has no column 'topic' \(data\.prompt\)"):
        rows(tmp_path, task="instruct", prompt="{instruction} on {topic}:")
    with pytest.raises(DataError, match=r"a\.jsonl has no column 'topic' \(data\.label\)"):
        rows(tmp_path, task="instruct", label="topic")


def test_types_that_differ_become_text_and_declared_classes_their_names(tmp_path):
    import datasets

    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]))
    columns = {"text": ["p", "q", "r"], "label": [1, 0, -1]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")
    write(tmp_path / "b.jsonl", row("x", "yes"), row("y", None))
    write(tmp_path / "c.jsonl", row("z", None))  # a column of nothing has any type
    found = rows(tmp_path)
    assert found["label"] == ["yes", "no", None, "yes", None, None]
    assert found["file"] == ["a", "a", "a", "b", "b", "c"]


def test_lists_of_nothing_have_any_type(tmp_path):
    write(tmp_path / "a.jsonl", {"text": [], "label": []})
    write(tmp_path / "b.jsonl", {"text": ["w"], "label": [3]})
    assert rows(tmp_path, task="tags")["label"] == [[], [3]]


def test_a_column_file_of_their_own(tmp_path):
    write(tmp_path / "a.jsonl", row("x", file="mine"))
    write(tmp_path / "b.jsonl", row("y", file="mine"))
    assert rows(tmp_path)["file"] == ["a", "b"]
    assert rows(tmp_path / "a.jsonl", group="file")["file"] == ["mine"]
    with pytest.raises(DataError, match=r"a\.jsonl has a column 'file' of its own, but data\.group is 'file'"):
        rows(tmp_path, group="file")


def test_files_without_a_column_in_common(tmp_path):
    write(tmp_path / "a.jsonl", {"one": 1})
    write(tmp_path / "b.jsonl", {"two": 2})
    with pytest.raises(DataError, match=r"have no column in common, e\.g\. .*a\.jsonl has 'one'\. Name fewer"):
        rows(tmp_path)


def test_folders_and_patterns_without_tables(tmp_path):
    with pytest.raises(DataError, match=r"data\.source is '.*', in which there is no file that ends in \.csv, "):
        rows(tmp_path)
    with pytest.raises(DataError, match=r"data\.test is '.*\*\.csv', to which there is no file that ends in \.csv, "):
        rows(tmp_path, "test", test=str(tmp_path / "*.csv"))
    with pytest.raises(DataError, match=r"data\.test is '', but there is no such file"):
        rows(tmp_path, "test", test="")
    write(tmp_path / "a.jsonl", row("x"))
    (tmp_path / "b.jsonl").write_text("{oops\n")
    with pytest.raises(DataError, match=r"data\.source: .*b\.jsonl cannot be read: line 1 is not valid JSON"):
        rows(tmp_path)


# --- LEAF ---


def leaf(path: Path, samples: dict, **changes) -> Path:
    data = {user: {"x": [x for x, _ in pairs], "y": [y for _, y in pairs]} for user, pairs in samples.items()}
    content = {"users": list(samples), "num_samples": [len(pairs) for pairs in samples.values()], "user_data": data}
    content |= changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


def test_leaf_rows_are_users_samples(tmp_path):
    leaf(tmp_path / "a.json", {"ann": [("to b", "e"), ("or n", "o")], "bob": []})
    leaf(tmp_path / "b.json", {"cid": [("x y", "z")]}, hierarchies=["play"])
    assert rows(tmp_path / "a.json") == {"user": ["ann", "ann"], "x": ["to b", "or n"], "y": ["e", "o"]}
    found = rows(tmp_path)
    assert found["user"] == ["ann", "ann", "cid"]
    assert found["file"] == ["a", "a", "b"]
    assert default_group(config(tmp_path)) == default_group(config(tmp_path / "a.json")) == "user"


def test_leaf_samples_that_are_lists_have_a_column_per_place(tmp_path):
    path = leaf(tmp_path / "a.json", {f"u{i % 7}": [] for i in range(7)})
    samples = {f"u{u}": [([i, None, f"tweet {u} {i}", 0.5], i % 2 * 4) for i in range(9)] for u in range(5)}
    path = leaf(path, samples)
    assert list(rows(path)) == ["user", "x0", "x1", "x2", "x3", "y"]
    data = load(path, text="x2", label="y")
    assert data.label_names == ("0", "4")
    assert set(data.train.groups) == set(samples)
    assert data.train.texts[0].startswith("tweet")


def test_leaf_values_of_several_types_become_text(tmp_path):
    path = leaf(tmp_path / "a.json", {"u": [("a", 1), (2, None), ("c", "n")]})
    assert rows(path) == {"user": ["u"] * 3, "x": ["a", "2", "c"], "y": ["1", None, "n"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"users": None}, r"it has no 'users'"),
        ({"users": None, "user_data": None}, "it has no 'users' and no 'user_data'"),
        ({"users": "ann"}, "'users' and 'num_samples' have to be lists"),
        ({"num_samples": [1, 2]}, "there are 1 users but 2 entries of 'num_samples'"),
        ({"num_samples": [3]}, "user 'ann' has 1 samples, but 'num_samples' says 3"),
        ({"users": ["bob"]}, "user 'ann' has user_data, but is not among 'users'"),
        ({"users": ["ann", "ann"], "num_samples": [1, 1]}, "user 'ann' is listed twice"),
        ({"user_data": {}}, "user 'ann' has no object in 'user_data'"),
        ({"user_data": {"ann": {"x": ["a"]}}}, "user 'ann' has no list 'y'"),
        ({"user_data": {"ann": {"x": ["a"], "y": [1, 2]}}}, "user 'ann' has 1 entries of x, but 2 of y"),
        ({"user_data": {"ann": {"x": [], "y": []}}, "num_samples": [0]}, "no user has a sample"),
        (
            {"user_data": {"ann": {"x": [["a"], ["b", "c"]], "y": [1, 2]}}, "num_samples": [2]},
            "user 'ann' has a sample whose x is a list of 2, where others have a list of 1",
        ),
        (
            {"user_data": {"ann": {"x": ["a", ["b"]], "y": [1, 2]}}, "num_samples": [2]},
            "user 'ann' has a sample whose x is a list of 1, where others have one value",
        ),
    ],
)
def test_leaf_files_that_are_wrong(changes, message, tmp_path):
    path = leaf(tmp_path / "a.json", {"ann": [("a", 1)]}, **changes)
    with pytest.raises(DataError, match=rf"data\.source: .*a\.json cannot be read: .*{message}"):
        rows(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b'{"users": [', "Expecting value: line 1 column 12"),
        (b'{"text": "a"}', "has to be a list of rows, or of LEAF's form"),
        (b'[{"text": "a"}, 3]', "entry 2 is no JSON object"),
        (b"[]", "it is an empty list"),
        (b'\n{"users": ["caf\xe9"]}', "line 2 is not UTF-8"),
    ],
)
def test_json_files_that_are_wrong(content, message, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        rows(tmp_path / "a.json")


def test_json_files_with_a_list_of_rows(tmp_path):
    """As LLM-Adapters writes its tasks; what is missing in a row is empty, and every file is a site."""
    for name, answer in (("boolq", "true"), ("piqa", "solution1")):
        (tmp_path / name).mkdir()
        rows_of = [{"text": f"{name} {i}", "label": answer} for i in range(3)] + [{"text": "last", "extra": 1}]
        (tmp_path / name / "train.json").write_text(json.dumps(rows_of))
    table = rows(tmp_path / "*" / "train.json")
    assert table["file"][:] == ["boolq"] * 4 + ["piqa"] * 4
    assert table["label"][:] == ["true"] * 3 + [None] + ["solution1"] * 3 + [None]
    config = DataConfig(task="table", source=str(tmp_path / "*" / "train.json"))
    assert default_group(config) == "file"
    assert default_group(config.model_copy(update={"source": str(tmp_path / "boolq" / "train.json")})) is None


# --- what the experiment is told before anything is read ---


@pytest.mark.parametrize("source", ["sites", "data/*/train.csv", "a.json", "[ab].csv", "owner/name"])
def test_sources_that_may_tell_whose_rows_they_are(source):
    assert build({"data": {"task": "table", "source": source}}, "test").data.group is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": "a.csv"}, r"data\.group names no column .* or give a folder or pattern of files, one per client"),
        ({"source": "glue", "subset": "sst2"}, "data.group names no column"),
        ({"task": "regression", "source": "A.PARQUET"}, "data.group names no column"),
        ({"task": "instruct", "source": "a.jsonl.gz"}, "data.group names no column"),
        ({"task": "images", "source": "birds"}, r"a folder of images \(birds\) does not tell whose they are; set data"),
        ({"task": "images", "source": "birds.csv"}, "data.group names no column"),
        ({"task": "images"}, r"needs a file, a folder or pattern of files \(or of images\)"),
        ({"task": "tags"}, r"data\.task 'tags' needs a file, a folder .* or a data set's hub name"),
        (
            {"task": "tags", "source": "a", "text_pair": "b"},
            "data.text_pair is 'b', but data.task 'tags' has no second",
        ),
    ],
)
def test_sources_that_do_not_fit_the_partition_or_the_task(data, message):
    with pytest.raises(ConfigError, match=message):
        build({"data": {"task": "table", **data}}, "test")


def test_files_of_a_hub_set_are_an_error():
    with pytest.raises(DataError, match=r"'owner/name' is no file here; data\.task 'table' reads local"):
        files_by_name(config("owner/name"), "train")


def test_commonsense_sets_side_by_side(shared):
    """Eight tasks as eight sites, as published comparisons over unlike clients have them."""
    names = ["arc_challenge", "arc_easy", "boolq"]
    found = rows(shared / "data" / "[ab][ro][co][_l]*" / "test.jsonl.gz", task="instruct", label="file")
    assert sorted(set(found["file"])) == names
    assert list(found) == ["instruction", "input", "output", "answer", "file"]
    assert len(found["file"]) == 1172 + 2376 + 3270
