"""Numbers, tagged sentences and images: good rows, bad rows, and what the other parts are told of them."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fslora import config
from fslora.config import DataConfig, PartitionConfig
from fslora.data import TASKS, load_dataset
from fslora.data.partition import partition
from fslora.data.regression import fifths
from fslora.data.tags import label_of
from fslora.data.types import Dataset
from fslora.errors import DataError
from fslora.prepare import prepare_sites
from fslora.rng import Rng

SIDES = ("train", "validation", "test")


def load(task: str, source: Path | str, seed: int = 0, **fields) -> Dataset:
    return load_dataset(DataConfig(task=task, source=str(source), **fields), Rng(seed))


def jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def everything(data: Dataset, column: str) -> dict[str, object]:
    sides = [getattr(data, side) for side in SIDES]
    return {text: value for side in sides for text, value in zip(side.texts, side.columns[column], strict=True)}


# --- numbers ---


def scored(scores, **more) -> list[dict]:
    return [{"text": f"text {i}", "other": f"other {i}", "label": score, **more} for i, score in enumerate(scores)]


def test_a_number_per_pair_of_texts(tmp_path):
    scores = [i / 20 for i in range(100)]
    data = load("regression", jsonl(tmp_path / "a.jsonl", scored(scores)), text_pair="other")
    assert (data.name, data.kind) == ("regression", "value")
    assert everything(data, "value") == {f"text {i}": score for i, score in enumerate(scores)}
    assert data.train.pairs[0].startswith("other")
    assert data.label_names == ("0 to 0.95", "1 to 1.95", "2 to 2.95", "3 to 3.95", "4 to 4.95")
    assert [np.bincount(getattr(data, side).labels).tolist() for side in SIDES] == [[15] * 5, [2] * 5, [3] * 5]
    assert data.statistics["largest value in train"] == 4.95
    parts = partition(PartitionConfig(kind="dirichlet", alpha=0.1, min_examples=1), data.train, 4, Rng(0))
    assert parts.notes["smallest client"] >= 1


def test_numbers_that_tie_make_fewer_ranges(tmp_path):
    data = load("regression", jsonl(tmp_path / "a.jsonl", scored([0.0] * 30 + [2.5] * 20 + [5] * 10)))
    assert data.label_names == ("0", "2.5", "5")
    assert set(zip(data.train.columns["value"], data.train.labels.tolist(), strict=True)) == {(0, 0), (2.5, 1), (5, 2)}
    close = [1 + i * 1e-9 for i in range(10)] * 5
    names = load("regression", jsonl(tmp_path / "b.jsonl", scored(close))).label_names
    assert names[0] == "1.0 to 1.000000001"
    assert len(set(names)) == 5


FINITE = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6))


@given(st.lists(FINITE, min_size=2, max_size=40).filter(lambda values: len(set(values)) > 1))
def test_fifths_are_ordered_and_never_empty(values):
    values = np.array(values)
    edges = fifths(values)
    labels = np.searchsorted(edges, values)
    assert len(edges) <= 4
    assert sorted(set(labels.tolist())) == list(range(len(edges) + 1))
    assert (np.diff(labels[np.argsort(values)]) >= 0).all()
    if len(set(values.tolist())) == len(values) >= 5:
        assert len(edges) == 4


def test_what_is_no_finite_number_is_dropped(tmp_path):
    bad = ["high", None, "", "nan", "-inf", "1e999", "1_0"]
    good = [*map(str, range(58)), " 2.5 ", "-1e1"]
    data = load("regression", jsonl(tmp_path / "a.jsonl", scored([*good, *bad])))
    assert sum(len(getattr(data, side)) for side in SIDES) == 60
    assert data.statistics["train rows dropped: no number in label"] == len(bad)
    assert min(everything(data, "value").values()) == -10
    path = jsonl(tmp_path / "b.jsonl", [*scored([True]), *scored([False])])
    with pytest.raises(DataError, match=r"gives no number; .* no number in label: 2\. Set data\.label to a column of"):
        load("regression", path)


def test_sides_of_their_own_have_the_ranges_of_train(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", scored(range(50)))
    test = jsonl(tmp_path / "t.jsonl", [*scored([-7, 25, 99]), {"text": "x", "other": "y", "label": "none"}])
    data = load("regression", path, test=str(test), group="other")
    assert data.test.labels.tolist() == [0, 2, 4]
    assert data.test.columns["value"] == (-7.0, 25.0, 99.0)
    assert data.statistics["test rows dropped: no number in label"] == 1
    assert data.statistics["test texts that are also in train"] == 3
    assert data.train.groups[0].startswith("other")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (scored([2.5] * 9), r"column 'label' \(data\.label\) of .* gives only the number 2\.5; there is nothing to"),
        (scored([[1.0]] * 9), r"column 'label' \(data\.label\) holds a list, e\.g\. \[1\.0\]"),
        ([{"text": "a"}], "no column 'label'; it has 'text'. Set data.label to the right one"),
        (scored([1, 2]), "test has no usable row: train gives 2; dropped: none"),
    ],
)
def test_numbers_that_cannot_be_used(rows, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load("regression", jsonl(tmp_path / "a.jsonl", rows), test_share=0.4)


# --- tags ---


def tagged(count: int, **more) -> list[dict]:
    """Sentences of 3 to 6 words: person or place, the rest O."""
    rows = []
    for i in range(count):
        others = 1 + i % 4
        words = ["ann" if i % 2 else "rome", "went", *(f"w{i}{j}" for j in range(others))]
        rows.append({"text": words, "label": ["B-PER" if i % 2 else "B-LOC", "O", *["O"] * others], **more})
    return rows


def test_a_tag_per_word(tmp_path):
    rows = tagged(60, who="s")
    data = load("tags", jsonl(tmp_path / "a.jsonl", rows), group="who")
    assert (data.name, data.kind) == ("tags", "tags")
    assert data.label_names == ("B-LOC", "B-PER", "O")
    words, tags = everything(data, "words"), everything(data, "tags")
    for row in rows:
        sentence = " ".join(row["text"])
        assert words[sentence] == tuple(row["text"])
        assert tuple(data.label_names[tag] for tag in tags[sentence]) == tuple(row["label"])
    assert set(data.train.labels.tolist()) == {0, 1}
    assert np.bincount(data.test.labels).tolist() in ([4, 5], [5, 4])
    assert data.train.groups == ("s",) * len(data.train)
    assert data.statistics["most frequent tag"] == "O"


def test_the_label_of_a_sentence():
    assert label_of([2, 2, 2, 0, 1, 1], commonest=2) == 1
    assert label_of([1, 0, 2], commonest=2) == 0
    assert label_of([2, 2], commonest=2) == 2


def test_declared_tags_are_used_in_their_order(tmp_path, capfd):
    import datasets

    tag = datasets.ClassLabel(names=["O", "B-PER", "I-PER", "B-LOC"])
    features = datasets.Features(tokens=datasets.List(datasets.Value("string")), ner_tags=datasets.List(tag))
    columns = {"tokens": [[f"a{i}", "b"] for i in range(41)], "ner_tags": [[3, 0], [1, 0]] * 20 + [[-1, 0]]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")
    data = load("tags", tmp_path / "a.parquet", text="tokens", label="ner_tags")
    assert data.label_names == ("O", "B-PER", "B-LOC")
    assert everything(data, "tags")["a0 b"] == (2, 0)
    assert data.statistics["train rows dropped: missing or blank entries in ner_tags"] == 1


def test_tags_that_are_numbers_are_sorted_by_value(tmp_path):
    rows = [{"text": ["a", f"b{i}"], "label": [10, i % 2 + 8]} for i in range(30)]
    assert load("tags", jsonl(tmp_path / "a.jsonl", rows)).label_names == ("8", "9", "10")


def test_sentences_that_cannot_be_used_are_dropped(tmp_path):
    bad = [
        {"text": ["one", "two"], "label": ["O"]},
        {"text": [], "label": []},
        {"text": None, "label": ["O"]},
        {"text": ["one", " "], "label": ["O", "O"]},
        {"text": ["one", "two"], "label": ["O", None]},
    ]
    data = load("tags", jsonl(tmp_path / "a.jsonl", tagged(60) + bad))
    assert sum(len(getattr(data, side)) for side in SIDES) == 60
    assert data.statistics["train rows dropped: text and label differ in length"] == 1
    assert data.statistics["train rows dropped: missing or blank entries in text"] == 3
    assert data.statistics["train rows dropped: missing or blank entries in label"] == 1
    assert data.statistics["test texts that are also in train"] == 0


def test_tags_that_train_does_not_know_are_dropped(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", tagged(60))
    test = jsonl(tmp_path / "t.jsonl", [*tagged(2), {"text": ["x"], "label": ["B-ORG"]}])
    data = load("tags", path, test=str(test), validation=str(test))
    assert len(data.test) == 2
    assert data.statistics["test rows dropped: tag not in train"] == 1
    assert data.statistics["test texts that are also in train"] == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": "a b", "label": ["O", "O"]}],
            r"\(data\.text\) holds a str, e\.g\. 'a b'; .* a list of words per row",
        ),
        ([{"text": ["a"], "label": "O"}], r"\(data\.label\) holds a str, e\.g\. 'O'; .* a list of tags per row"),
        ([{"text": [["a"]], "label": ["O"]}], r"column 'text' \(data\.text\) holds a list"),
        (
            [{"text": ["a"], "label": ["O"]}],
            r"gives only the tag 'O'; a tagger needs two tags at least\. Dropped: none",
        ),
        ([{"text": ["a"], "label": []}], "gives no usable row; .* entries in label: 1"),
        ([{"tokens": ["a"], "label": []}], "no column 'text'; it has 'tokens', 'label'. Set data.text to"),
    ],
)
def test_tags_that_cannot_be_used(rows, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load("tags", jsonl(tmp_path / "a.jsonl", rows))


# --- images ---


def image(path: Path, shade: int) -> Path:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 24), (shade, 255 - shade, 7)).save(path)
    return path


@pytest.fixture
def birds(tmp_path) -> Path:
    """Two classes of 20 images in four formats, one of them with a folder of its own below."""
    for i in range(20):
        suffix = (".png", ".jpg", ".bmp", ".webp")[i % 4]
        image(tmp_path / "birds" / "owl" / f"{i}{suffix}", 2 * i)
        image(tmp_path / "birds" / "kite" / "more" / f"{i}{suffix.upper()}", 101 + 2 * i)
    (tmp_path / "birds" / "owl" / "notes.txt").write_text("none")
    image(tmp_path / "birds" / ".hidden" / "a.png", 1)
    return tmp_path / "birds"


def test_a_folder_per_class(birds, monkeypatch):
    before = sorted(birds.rglob("*"))
    monkeypatch.chdir(birds.parent)
    data = load("images", "birds")
    assert (data.name, data.kind) == ("images", "images")
    assert data.label_names == ("kite", "owl")
    assert [len(getattr(data, side)) for side in SIDES] == [30, 4, 6]
    for path, label in zip(data.test.texts, data.test.labels, strict=True):
        assert Path(path).is_absolute()
        assert data.label_names[label] in path
    assert data.train.groups is None
    assert data.statistics["test images that are also in train"] == 0
    assert sorted(birds.rglob("*")) == before


def test_damaged_images_are_found_before_training(birds):
    content = (birds / "owl" / "1.jpg").read_bytes()
    (birds / "owl" / "half.jpg").write_bytes(content[: len(content) // 2])
    content = (birds / "owl" / "0.png").read_bytes()
    (birds / "owl" / "half.png").write_bytes(content[: len(content) // 2])
    (birds / "owl" / "empty.png").write_bytes(b"")
    (birds / "owl" / "text.png").write_text("no image")
    data = load("images", birds)
    assert sum(len(getattr(data, side)) for side in SIDES) == 40
    assert data.statistics["train images dropped: damaged, or no image"] == 4


def test_tables_of_paths_relative_to_the_table(birds):
    paths = sorted(path.relative_to(birds) for path in birds.rglob("*.*") if path.suffix.lower() in (".png", ".jpg"))
    rows = [
        {"path": f"../birds/{path}", "kind": path.parts[0], "who": i % 3}
        for i, path in enumerate(paths)
        if path.parts[0] in ("owl", "kite")
    ]
    rows.append({"path": "owl/gone.png", "kind": "owl", "who": 1})
    fields = {"text": "path", "label": "kind", "test_share": 0.2}
    data = load("images", jsonl(birds / "table.jsonl", rows), group="who", **fields)
    assert data.label_names == ("kite", "owl")
    assert sum(len(getattr(data, side)) for side in SIDES) == 20
    assert str(birds) in data.train.texts[0]
    assert ".." not in data.train.texts[0]
    assert set(data.train.groups) == {"0", "1", "2"}
    assert data.statistics["train images dropped: no such file"] == 1


def test_tables_in_several_folders_are_sites(tmp_path):
    for site in ("north", "south"):
        rows = [{"text": f"{i}.png", "label": i % 2} for i in range(10)]
        for i in range(10):
            image(tmp_path / site / f"{i}.png", 20 * i + (site == "south"))
        jsonl(tmp_path / site / "labels.jsonl", rows)
    data = load("images", tmp_path / "*" / "labels.jsonl")
    assert data.statistics["files of train"] == 2
    assert all(f"/{group}/" in path for path, group in zip(data.train.texts, data.train.groups, strict=True))


def test_with_known_classes_a_folder_of_such_folders_has_one_for_each_client(tmp_path):
    for n, (client, kind) in enumerate(product(("north", "south"), ("kite", "owl"))):
        for i in range(4):
            image(tmp_path / "wards" / client / kind / f"{i}.png", 20 * n + i)
    (tmp_path / "wards" / "empty").mkdir()
    data = load("images", tmp_path / "wards", labels=["kite", "owl"], test_share=0.2)
    assert data.label_names == ("kite", "owl")
    assert set(data.train.groups) == {"north", "south"}
    for path, label, group in zip(data.train.texts, data.train.labels, data.train.groups, strict=True):
        assert f"/{group}/{data.label_names[label]}/" in path
    image(tmp_path / "wards" / "south" / "crow" / "a.png", 99)
    with pytest.raises(DataError, match=r"has the class 'crow', which is not in data\.labels"):
        load("images", tmp_path / "wards", labels=["kite", "owl"])
    image(tmp_path / "birds" / "hawk" / "owl" / "a.png", 1)  # a class's folder may have folders
    image(tmp_path / "birds" / "owl" / "a.png", 2)
    with pytest.raises(DataError, match=r"has the class 'hawk', which is not in data\.labels"):
        load("images", tmp_path / "birds", labels=["kite", "owl"])


def test_images_of_several_clients_at_one_site(tmp_path):
    sizes = {"a": 8, "b": 12}
    for client, kind in product(sizes, ("kite", "owl")):
        for i in range(sizes[client]):
            image(tmp_path / client / kind / f"{i}.png", 20 * (client == "a") + i)
    items = ["data.task=images", f"data.source={tmp_path}", "data.labels=['kite', 'owl']", "partition.kind=sites"]
    experiment = config.load(
        None, [*items, "run.eval_on=clients", "fleet.clients=4", "fleet.cohort=2", "partition.holdout=0.25"]
    )
    sites = prepare_sites(experiment, frozenset({1, 3}))
    assert sites.partition.train.sizes.tolist() == [0, 12, 0, 18]
    assert sites.partition.holdout.sizes.tolist() == [0, 4, 0, 6]
    for client, name in ((1, "a"), (3, "b")):
        assert {sites.dataset.train.groups[i] for i in sites.partition.train[client]} == {name}
    with pytest.raises(DataError, match=r"2 files .* 3 clients \(0, 1, 3\); give .*of images, a folder of one folder"):
        prepare_sites(experiment, frozenset({0, 1, 3}))


def test_equal_images_in_train_and_test_are_counted_by_their_bytes(birds):
    image(birds.parent / "test" / "owl" / "copy.png", 0)
    image(birds.parent / "test" / "owl" / "new.png", 255)
    image(birds.parent / "test" / "crow" / "a.png", 254)
    data = load("images", birds, test=str(birds.parent / "test"))
    assert len(data.test) == 2
    assert data.statistics["test images that are also in train"] == 1
    assert data.statistics["test rows dropped: label not in train"] == 1


def test_images_that_cannot_be_used(birds, tmp_path):
    with pytest.raises(DataError, match=r"data\.group is 'who', but data\.source '.*birds' is a folder of images"):
        load("images", birds, group="who")
    (tmp_path / "flat").mkdir()
    image(tmp_path / "flat" / "a.png", 1)
    with pytest.raises(DataError, match=r"data\.test is '.*flat', a folder without images .* one sub-folder per class"):
        load("images", birds, test=str(tmp_path / "flat"))
    image(tmp_path / "one" / "owl" / "a.png", 1)
    with pytest.raises(DataError, match=r"gives only the class 'owl'"):
        load("images", tmp_path / "one")
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a.png", "label": i} for i in range(4)])
    with pytest.raises(
        DataError, match=r"none of the 4 images of .* can be used, e\.g\. /.*/a\.png: no such file\. Paths"
    ):
        load("images", path)
    with pytest.raises(DataError, match=r"data\.source 'cifar10' is no file here; data\.task 'images' reads local"):
        load("images", "cifar10")
    with pytest.raises(DataError, match=r"data\.source is '.*gone\.csv', but there is no such file"):
        load("images", tmp_path / "gone.csv")


def test_every_kind_gives_the_same_for_the_same_seed(birds, tmp_path):
    sources = {
        "regression": jsonl(tmp_path / "r.jsonl", scored(range(50))),
        "tags": jsonl(tmp_path / "t.jsonl", tagged(50)),
        "images": birds,
    }
    for task, source in sources.items():
        assert task in TASKS
        first, again, other = load(task, source), load(task, source), load(task, source, seed=1)
        assert first.test.texts == again.test.texts != other.test.texts


def test_trec_s_questions_as_numbers(shared):
    """A public set whose column holds numbers: the six ranges tie to fewer, and nothing is lost."""
    data = load("regression", shared / "data" / "trec6" / "train.jsonl.gz", max_validation=0)
    assert sum(len(getattr(data, side)) for side in SIDES) == 5452 - max(0, round(0.15 * 5452) - 1000)
    assert 2 <= len(data.label_names) <= 5
