"""A user's own table: formats, columns, labels, sides, and every way in which it can be wrong."""

from __future__ import annotations

import gzip
import json
import socket
from pathlib import Path

import numpy as np
import pytest

from fslora.config import DataConfig
from fslora.data import load_dataset
from fslora.data.types import Dataset
from fslora.errors import DataError
from fslora.rng import Rng

ROWS = [{"text": f"row number {i}", "label": i % 3, "who": f"site{i % 5}"} for i in range(60)]


def load(source: Path | str, seed: int = 0, **fields) -> Dataset:
    return load_dataset(DataConfig(task="table", source=str(source), **fields), Rng(seed))


def jsonl(path: Path, rows) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())
    return path


def csv(path: Path, rows) -> Path:
    names = list(rows[0])
    lines = [",".join(names), *(",".join(f'"{row[name]}"' for name in names) for row in rows)]
    text = "\n".join(lines) + "\n"
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())
    return path


def parquet(path: Path, rows) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def everything(data: Dataset) -> dict[str, int]:
    sides = (data.train, data.validation, data.test)
    return {text: int(label) for side in sides for text, label in zip(side.texts, side.labels, strict=True)}


@pytest.mark.parametrize(
    ("write", "name"),
    [(csv, "a.csv"), (csv, "a.csv.gz"), (jsonl, "a.jsonl"), (jsonl, "a.jsonl.gz"), (parquet, "a.parquet")],
)
def test_formats_give_the_same_without_network_cache_or_noise(write, name, tmp_path, monkeypatch, capfd):
    def refuse(*args):
        raise AssertionError("a local file must not touch the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    data = load(write(tmp_path / name, ROWS), group="who")
    assert data.label_names == ("0", "1", "2")
    assert everything(data) == {row["text"]: row["label"] for row in ROWS}
    assert [len(side) for side in (data.train, data.validation, data.test)] == [45, 6, 9]
    assert data.train.groups[0].startswith("site")
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_sides_are_stratified_and_the_same_for_the_same_seed_only(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    first, again, other = load(path), load(path), load(path, seed=1)
    assert np.bincount(first.test.labels).tolist() == [3, 3, 3]
    assert first.test.texts == again.test.texts != other.test.texts


def test_own_files_for_validation_and_test(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    test = csv(tmp_path / "t.csv", [{"text": "new", "label": 2}, {"text": "row number 0", "label": 0}])
    data = load(path, test=str(test), validation=str(test))
    assert len(data.train) == 60
    assert data.test.texts == data.validation.texts == ("new", "row number 0")
    assert data.test.labels.tolist() == [2, 0]
    assert data.statistics["test texts that are also in train"] == 1


def test_names_of_classes_are_sorted_as_text_or_as_numbers(tmp_path):
    def names(*labels):
        rows = [{"text": f"{i}", "label": label} for i, label in enumerate(labels * 10)]
        return load(jsonl(tmp_path / "a.jsonl", rows)).label_names

    assert names(10, 9, -1) == ("-1", "9", "10")
    assert names(1.0, 0.0) == ("0", "1")
    assert names("spam", "ham") == ("ham", "spam")
    assert names("10", "9") == ("9", "10")
    assert names(True, False) == ("False", "True")


def test_declared_names_of_classes_are_used_in_their_order(tmp_path, capfd):
    import datasets

    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["low", "high", "absent", "average"])
    )
    columns = {"text": [str(i) for i in range(41)], "label": [0, 1, 1, 3] * 10 + [-1]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")
    data = load(tmp_path / "a.parquet")
    assert data.label_names == ("low", "high", "average")
    assert everything(data)["3"] == 2
    assert data.statistics["train rows dropped: no label"] == 1


def test_unusable_rows_are_dropped_and_counted(tmp_path):
    bad = [
        {"text": None, "label": 1, "who": "x"},
        {"text": " \t", "label": 1, "who": "x"},
        {"label": 1, "who": "x"},
        {"text": "no label", "label": None, "who": "x"},
        {"text": "nobody's", "label": 1, "who": None},
    ]
    data = load(jsonl(tmp_path / "a.jsonl", ROWS + bad), group="who")
    assert len(everything(data)) == 60
    assert data.statistics["train rows dropped: no text"] == 3
    assert data.statistics["train rows dropped: no label"] == 1
    assert data.statistics["train rows dropped: no who"] == 1


def test_csv_cells_stay_what_they_are(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + 'NA,none\nNone,some\n007,none\n1.50,some\n"a, b",none\n,some\n' * 5)
    data = load(path, validation_share=0.2, test_share=0.2)
    assert set(everything(data)) == {"NA", "None", "007", "1.50", "a, b"}
    assert data.label_names == ("none", "some")
    assert data.statistics["train rows dropped: no text"] == 5


def test_pairs_and_bom(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,other,label\n" + "one,two,0\nthree,four,1\nfive,,1\n" * 9, encoding="utf-8-sig")
    data = load(path, text_pair="other")
    assert set(zip(data.train.texts, data.train.pairs, strict=True)) == {("one", "two"), ("three", "four")}
    assert data.statistics["train rows dropped: no other"] == 9


def test_labels_that_train_does_not_know_are_dropped(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    test = jsonl(tmp_path / "t.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": 9}])
    data = load(path, test=str(test))
    assert data.test.texts == ("a",)
    assert data.statistics["test rows dropped: label not in train"] == 1
    test = jsonl(tmp_path / "t.jsonl", [{"text": "b", "label": 9}])
    with pytest.raises(DataError, match=r"test has no usable row: .*label not in train: 1.* give data.test"):
        load(path, test=str(test))


@pytest.mark.parametrize("key", ["text", "text_pair", "label", "group"])
def test_missing_column_is_an_error(key, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    message = rf"no column 'gone'; it has 'text', 'label', 'who'. Set data\.{key} to the right one"
    with pytest.raises(DataError, match=message):
        load(path, **{key: "gone"})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": "a", "label": 0.5}, {"text": "b", "label": 1.0}],
            "numbers such as 0.5, which are no classes. Set data.task to 'regression'",
        ),
        ([{"text": "a", "label": "0.25"}, {"text": "b", "label": "3"}], "numbers such as 0.25, which are no classes"),
        (
            [{"text": "a", "label": 1}, {"text": "b", "label": 1}],
            "only the class '1'; a classifier needs two",
        ),
        ([{"text": "", "label": 1}, {"text": None, "label": 1}], "no usable row; .* no text: 2"),
        ([{"text": ["a"], "label": 1}], r"column 'text' \(data.text\) holds a list, e.g. \['a'\]"),
        ([{"text": "a", "label": 0}, {"text": "b", "label": 1}], "test has no usable row: train gives 2"),
    ],
)
def test_labels_and_texts_that_cannot_be_used(rows, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load(jsonl(tmp_path / "a.jsonl", rows))


GOOD = b'{"text": "a", "label": 0}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            GOOD + b'{"text": "caf\xe9", "label": 1}\n',
            "a.jsonl cannot be read: line 2 is not UTF-8, at byte 39",
        ),
        ("a.csv", b"text,label\na,0\ncaf\xe9,1\n", "line 3 is not UTF-8, at byte 18; save the file as UTF-8"),
        ("a.csv", b"t\xe9xt,label\na,0\n", "line 1 is not UTF-8, at byte 1"),
        ("a.jsonl", GOOD + b"{oops\n", "line 2 is not valid JSON"),
        ("a.jsonl", GOOD + b"[1]\n", "line 2 is not a JSON object"),
        ("a.jsonl", b"", "the file is empty"),
        ("a.csv", b"", "the file is empty"),
        ("a.csv", b"text,label\n", "there is no row below the header"),
        ("a.csv", b"text,label\none, two,0\n", "3 cells under 2 column names; quote cells"),
        ("a.csv", b"text,label\none,0\none, two,0\n", "Expected 2 fields in line 3, saw 3"),
        ("a.jsonl.gz", b"plain", "Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(GOOD, mtime=0)[:-9], "ended before the end-of-stream"),
        ("a.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_damaged_files(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / name)


def test_no_such_file_or_format(tmp_path):
    with pytest.raises(DataError, match=r"data.source is '.*gone.csv', but there is no such file"):
        load(tmp_path / "gone.csv")
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(DataError, match=r"a table is one file that ends in \.csv, \.csv\.gz, \.jsonl"):
        load(tmp_path / "a.xlsx")
    with pytest.raises(DataError, match=r"in which there is no file that ends in \.csv, \.csv\.gz, \.jsonl"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"data.test is 'test', but there is no such file"):
        load(jsonl(tmp_path / "a.jsonl", ROWS), test="test")


def test_hub_out_of_reach_is_an_error(capfd):
    with pytest.raises(DataError, match=r"'glue' \(data.subset 'sst2', split 'train'\) is no file .*Couldn't reach"):
        load("glue", subset="sst2")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "fields", "classes", "examples"),
    [
        ("trec6", {}, 6, 5452),
        ("rte", {"text": "text1", "text_pair": "text2"}, 2, 2489),
        ("clinc150", {"label": "label_text", "group": "domain"}, 150, 15000),
        ("cola", {"group": "source"}, 2, 8551),
    ],
)
def test_public_sets(name, fields, classes, examples, shared):
    folder = shared / "data" / name
    data = load(folder / "train.jsonl.gz", test=str(folder / "test.jsonl.gz"), max_validation=0, max_test=0, **fields)
    assert len(data.label_names) == classes
    assert len(data.train) + len(data.validation) == examples
    assert sum(len(side) for side in (data.train, data.validation, data.test)) > examples
