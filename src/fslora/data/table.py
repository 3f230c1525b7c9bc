"""The task of a user's own table: classify the rows of a file, or of a data set on the Hugging Face hub.

Rows without text or label are dropped and counted. Classes are told apart by their names: 1, 1.0 and '1' are
one class. The names that a data set declares (ClassLabel) are kept, in its order.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fslora.config import DataConfig
from fslora.data.partition import stratified_shares
from fslora.data.types import Dataset, Examples, Index
from fslora.errors import DataError
from fslora.rng import Rng

_NUMBER = re.compile(r"-?\d*\.?\d+(e[-+]?\d+)?", re.IGNORECASE)
_WHOLE_AS_DECIMAL = re.compile(r"(-?\d+)\.0+")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SUFFIXES = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class Rows:
    """The usable rows of one side, column by column."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[str]
    """The names of the classes."""
    groups: list[str] | None
    classes: tuple[str, ...] | None
    """The names that the data set declares, in order, if it does."""

    def take(self, index: Sequence[int] | Index) -> Rows:
        """Returns the rows at these positions."""

        def pick(column: list[str]) -> list[str]:
            return [column[i] for i in index]

        return Rows(
            pick(self.texts),
            None if self.pairs is None else pick(self.pairs),
            pick(self.labels),
            None if self.groups is None else pick(self.groups),
            self.classes,
        )


def load_table(config: DataConfig, rng: Rng) -> Dataset:
    """Returns the task on a CSV, JSONL or Parquet file, or on a hub data set.

    Sides without a file or split of their own are shares of train, stratified by class.

    Raises:
        DataError: A side cannot be read, lacks a column, or has no usable rows; or the labels are no classes.
    """
    dropped: Counter[str] = Counter()
    train = _side(config, "train", dropped)
    names = _class_names(train, config, dropped)
    sides: dict[str, Rows] = {}
    shares: dict[str, float] = {}
    for side, share in (("test", config.test_share), ("validation", config.validation_share)):
        if getattr(config, side) is None:
            shares[side] = share
        else:
            sides[side] = _known(_side(config, side, dropped), set(names), side, dropped)
    *cut, rest = stratified_shares(_classes(train, names), list(shares.values()), rng.child("sides"))
    sides |= {side: train.take(index) for side, index in zip(shares, cut, strict=True)}
    sides["train"] = train.take(rest)
    for side, rows in sides.items():
        if not rows.texts:
            raise DataError(
                f"{side} has no usable row: train gives {len(train.texts)}; dropped: {_listed(dropped)}. "
                f"Give more rows, or give data.{side} a file or split whose rows have text and label"
            )
    examples = {side: _examples(rows, names) for side, rows in sides.items()}
    seen = set(_inputs(examples["train"]))
    statistics: dict[str, int | float | str] = {
        "source": config.source,
        **dropped,
        "classes": len(names),
        "test texts that are also in train": sum(row in seen for row in _inputs(examples["test"])),
    }
    return Dataset("table", names, examples["train"], examples["validation"], examples["test"], statistics)


def _side(config: DataConfig, side: str, dropped: Counter[str]) -> Rows:
    if _is_local(config.source):
        key = "data.source" if side == "train" else f"data.{side}"
        where: str = config.source if side == "train" else getattr(config, side)
        table = _read_file(where, key)
    else:
        split: str = config.train_split if side == "train" else getattr(config, side)
        where = f"split {split!r} of {config.source!r}"
        table = _read_hub(config.source, config.subset, split)
    return _rows(table, where, config, side, dropped)


def _rows(table: Any, where: str, config: DataConfig, side: str, dropped: Counter[str]) -> Rows:
    """The rows of a table of the library ``datasets`` that have all they need; the others are counted."""
    wanted = {"data.text": config.text, "data.text_pair": config.text_pair, "data.label": config.label}
    if side == "train" or config.group in table.column_names:
        wanted["data.group"] = config.group
    used = {key: column for key, column in wanted.items() if column is not None}
    for key, column in used.items():
        if column not in table.column_names:
            raise DataError(
                f"{where} has no column {column!r}; it has {', '.join(map(repr, table.column_names))}. "
                f"Set {key} to the right one"
            )
    declared = getattr(table.features[config.label], "names", None)
    columns = table.select_columns(list(dict.fromkeys(used.values())))[:]
    kept: dict[str, list[str]] = {key: [] for key in used}
    for values in zip(*(columns[column] for column in used.values()), strict=True):
        row = {key: _as_text(value, used[key], key, declared) for key, value in zip(used, values, strict=True)}
        missing = next((key for key, value in row.items() if not value), None)
        if missing is not None:
            dropped[f"{side} rows dropped: no {used[missing]}"] += 1
            continue
        for key, value in row.items():
            kept[key].append(value)
    return Rows(
        kept["data.text"],
        kept.get("data.text_pair"),
        kept["data.label"],
        kept.get("data.group"),
        None if declared is None else tuple(declared),
    )


def _as_text(value: Any, column: str, key: str, declared: Sequence[str] | None) -> str:
    """The cell as text, empty where it is missing or blank; a class as its name."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, (str, int, float)):
        raise DataError(
            f"column {column!r} ({key}) holds a {type(value).__name__}, e.g. {value!r:.60}; it has to hold "
            "one text or number per row"
        )
    if key != "data.label":
        return str(value) if str(value).strip() else ""
    if declared is not None and isinstance(value, int):
        return declared[value] if 0 <= value < len(declared) else ""
    name = str(value).strip()
    whole = _WHOLE_AS_DECIMAL.fullmatch(name)
    return whole[1] if whole else name


def _class_names(train: Rows, config: DataConfig, dropped: Mapping[str, int]) -> tuple[str, ...]:
    """The classes that occur in train: as declared, or sorted, numbers by value."""
    present = set(train.labels)
    if train.classes is not None:
        names = [name for name in train.classes if name in present]
    elif all(_NUMBER.fullmatch(name) for name in present):
        names = sorted(present, key=float)
        fraction = next((name for name in names if not float(name).is_integer()), None)
        if fraction is not None:
            raise DataError(
                f"column {config.label!r} (data.label) holds numbers such as {fraction}; regression is not "
                "supported yet, only classes. Set data.label to a column of classes, or name the numbers"
            )
    else:
        names = sorted(present)
    if len(names) < 2:
        held = f"only the class {names[0]!r}" if names else "no usable row"
        raise DataError(
            f"column {config.label!r} (data.label) of {config.source} gives {held}; a classifier needs two "
            f"classes at least. Dropped: {_listed(dropped)}. Check data.label and data.text"
        )
    return tuple(names)


def _known(rows: Rows, names: set[str], side: str, dropped: Counter[str]) -> Rows:
    kept = [i for i, label in enumerate(rows.labels) if label in names]
    if len(kept) < len(rows.labels):
        dropped[f"{side} rows dropped: label not in train"] += len(rows.labels) - len(kept)
    return rows.take(kept)


def _classes(rows: Rows, names: Sequence[str]) -> Index:
    index = {name: i for i, name in enumerate(names)}
    return np.array([index[label] for label in rows.labels], dtype=np.int64)


def _examples(rows: Rows, names: Sequence[str]) -> Examples:
    return Examples(
        tuple(rows.texts),
        _classes(rows, names),
        None if rows.pairs is None else tuple(rows.pairs),
        None if rows.groups is None else tuple(rows.groups),
    )


def _inputs(examples: Examples) -> Iterator[tuple[str, str]]:
    return zip(examples.texts, examples.pairs or examples.texts, strict=True)


def _listed(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{what}: {count}" for what, count in dropped.items()) or "none"


def _is_local(source: str) -> bool:
    looks_local = source.lower().endswith(_SUFFIXES) or not _HUB_NAME.fullmatch(source) or source.startswith(".")
    return looks_local or Path(source).expanduser().exists()


def _read_file(source: str, key: str) -> Any:
    """The table of a local file, in memory. Nothing but the file is touched, and no cache is left behind."""
    path = Path(source).expanduser()
    suffix = next((suffix for suffix in _SUFFIXES if path.name.lower().endswith(suffix)), None)
    if not path.exists():
        raise DataError(f"{key} is {source!r}, but there is no such file")
    if suffix is None or path.is_dir():
        raise DataError(f"{key} is {source!r}; a table is one file that ends in {', '.join(_SUFFIXES)}")
    reader = _FILE_READERS[suffix.removesuffix(".gz")]
    try:
        # load_dataset would count the call at the hub even for a local file; these readers do not.
        with _quiet(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            return reader(path, cache)
    except Exception as error:  # parsers raise what they like, wrapped by the library
        raise DataError(f"{key}: {source} cannot be read: {_fault(path, suffix) or _innermost(error)}") from error


def _read_csv(path: Path, cache: str) -> Any:
    """Every cell is text, so 'NA', 'None' and '007' stay what they are; only an empty cell is missing."""
    import datasets

    with _opened(path) as raw:
        lines = csv.reader(io.TextIOWrapper(raw, encoding="utf-8-sig", newline=""))
        header, first = next(lines), next(lines, None)
    if first is None:
        raise ValueError("there is no row below the header")
    if len(first) > len(header):  # pandas would take the first cells for row names
        raise ValueError(f"{len(first)} cells under {len(header)} column names; quote cells that hold a comma")
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return datasets.Dataset.from_csv(
        str(path),
        features=features,
        cache_dir=cache,
        keep_in_memory=True,
        keep_default_na=False,
        na_values=[""],
    )


def _read_jsonl(path: Path, cache: str) -> Any:
    import datasets

    with _opened(path) as lines:
        for line in lines:
            line.decode()  # the reader below does not look, and would fail later
    return datasets.Dataset.from_json(str(path), cache_dir=cache, keep_in_memory=True)


def _read_parquet(path: Path, cache: str) -> Any:
    import datasets

    return datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)


_FILE_READERS: Mapping[str, Callable[[Path, str], Any]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _read_hub(name: str, subset: str | None, split: str) -> Any:
    """The table of one split of a hub data set, from the hub's own cache where it has been loaded before."""
    import datasets

    try:
        with _quiet():
            return datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the network, the hub and the data set's builder raise what they like
        raise DataError(
            f"data.source {name!r} (data.subset {subset!r}, split {split!r}) is no file here and cannot be "
            f"loaded from the hub: {_first_line(error)}. Check the names and the network, or download the "
            f"data set and give one of its files ({', '.join(_SUFFIXES)})"
        ) from error


def _fault(path: Path, suffix: str) -> str | None:
    """What is wrong with a file that could not be read, with its place, if a look at its lines shows it."""
    start = 0
    try:
        with _opened(path) as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    if ".parquet" not in suffix:
                        line.decode("utf-8-sig")
                    if ".jsonl" in suffix and line.strip() and not isinstance(json.loads(line), dict):
                        return f"line {number} is not a JSON object"
                except UnicodeDecodeError as error:
                    return f"line {number} is not UTF-8, at byte {start + error.start}; save the file as UTF-8"
                except ValueError as error:
                    return f"line {number} is not valid JSON: {error}"
                start += len(line)
    except (OSError, EOFError, zlib.error) as error:
        return str(error)
    return None if start else "the file is empty"


def _opened(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _innermost(error: BaseException) -> str:
    """What started it all: the library wraps what its parsers raise in words of its own."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the libraries' bars, log lines and warnings; what matters is raised, and said in our words."""
    import datasets
    import huggingface_hub.utils as hub

    libraries = [(datasets.logging, datasets), (hub.logging, hub)]
    before = [(log, log.get_verbosity(), bars, bars.are_progress_bars_disabled()) for log, bars in libraries]
    for log, _, bars, _ in before:
        log.set_verbosity(log.CRITICAL)
        bars.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, verbosity, bars, disabled in before:
            log.set_verbosity(verbosity)
            if not disabled:
                bars.enable_progress_bars()
