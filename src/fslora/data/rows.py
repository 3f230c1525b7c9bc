"""What the tasks over tables share: usable rows of a table, names of classes, three sides, and the figures of them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fslora.config import DataConfig
from fslora.data.partition import stratified_shares
from fslora.data.sources import default_group, files_by_name, is_local, read_rows, where
from fslora.data.types import Dataset, Examples, Kind
from fslora.errors import DataError
from fslora.rng import Rng

Dropped = Counter[str]
"""Why rows could not be used → how many."""
Cell = Callable[[Any, str, str], Any]
"""(value, column, key) → what is kept of a cell; None if its row cannot be used."""
Columns = dict[str, list[Any]]
"""Usable rows, column by column, under the keys of [data] that name the columns: 'text', 'label', 'group', ..."""

NUMBER = re.compile(r"-?\d*\.?\d+(e[-+]?\d+)?", re.IGNORECASE)
_WHOLE_AS_DECIMAL = re.compile(r"(-?\d+)\.0+")


@dataclass(frozen=True)
class Table:
    """The rows of one side as they were read, and the columns of them that the experiment uses."""

    rows: Any
    """A table of the library ``datasets``."""
    side: str
    used: Mapping[str, str]
    """Key of [data] → column."""

    def declared(self, key: str) -> tuple[str, ...] | None:
        """Returns the names of the classes that a column's type declares, for one class or a list of them per row."""
        kind = self.rows.features[self.used[key]]
        names = getattr(getattr(kind, "feature", kind), "names", None)
        return None if names is None else tuple(names)

    def usable(self, cells: Mapping[str, Cell], dropped: Dropped, lacking: str = "no {}") -> Columns:
        """Returns the rows all of whose cells can be used; the others are counted.

        Args:
            cells: How the cells of a key are read; ``text_cell`` for keys that are not named.
            dropped: Where rows that cannot be used are counted.
            lacking: What is said of an unusable cell of a key in ``cells``; {} is the column.
        """
        columns = self.rows.select_columns(list(dict.fromkeys(self.used.values())))[:]
        readers: dict[str, Cell] = {**dict.fromkeys(self.used, text_cell), **cells}
        kept: Columns = {key: [] for key in self.used}
        for values in zip(*(columns[column] for column in self.used.values()), strict=True):
            row = {
                key: readers[key](value, column, f"data.{key}")
                for (key, column), value in zip(self.used.items(), values, strict=True)
            }
            missing = next((key for key, value in row.items() if value is None), None)
            if missing is not None:
                reason = (lacking if missing in cells else "no {}").format(self.used[missing])
                dropped[f"{self.side} rows dropped: {reason}"] += 1
                continue
            for key, value in row.items():
                kept[key].append(value)
        return kept


def read_table(config: DataConfig, side: str, keys: Iterable[str] = ("text", "text_pair", "label")) -> Table:
    """Returns the rows of a side; the columns that these keys name, and the group's, are there.

    Raises:
        DataError: The source cannot be read, or lacks a column.
    """
    rows = read_rows(config, side)
    wanted = {key: getattr(config, key) for key in keys}
    group = default_group(config)
    if side == "train" or group in rows.column_names:
        wanted["group"] = group
    used = {key: column for key, column in wanted.items() if column is not None}
    for key, column in used.items():
        if column not in rows.column_names:
            raise DataError(
                f"{where(config, side)} has no column {column!r}; it has "
                f"{', '.join(map(repr, rows.column_names))}. Set data.{key} to the right one"
            )
    return Table(rows, side, used)


def text_cell(value: Any, column: str, key: str) -> str | None:
    """Returns the cell as text; None where it is missing or blank."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, (str, int, float)):
        raise DataError(
            f"column {column!r} ({key}) holds a {type(value).__name__}, e.g. {value!r:.60}; it has to hold "
            "one text or number per row"
        )
    return str(value) if str(value).strip() else None


def class_cell(declared: Sequence[str] | None) -> Cell:
    """Returns the reader of a class's name: 1, 1.0 and '1' are one class; a declared class has its declared name."""

    def cell(value: Any, column: str, key: str) -> str | None:
        found = text_cell(value, column, key)
        if found is None:
            return None
        if declared is not None and isinstance(value, int):
            return declared[value] if 0 <= value < len(declared) else None
        name = found.strip()
        whole = _WHOLE_AS_DECIMAL.fullmatch(name)
        return whole[1] if whole else name

    return cell


def in_order(present: Collection[str], declared: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the names that occur: as declared, or sorted, numbers by value."""
    if declared is not None:
        return tuple(name for name in declared if name in present)
    numbers = all(NUMBER.fullmatch(name) for name in present)
    return tuple(sorted(present, key=float) if numbers else sorted(present))


def picked(columns: Columns, positions: Sequence[int]) -> Columns:
    """Returns the rows at these positions."""
    return {key: [column[i] for i in positions] for key, column in columns.items()}


def where_known(columns: Columns, names: Collection[str], side: str, dropped: Dropped) -> Columns:
    """Returns the rows whose label is one of these names; the others are counted."""
    kept = [i for i, label in enumerate(columns["label"]) if label in names]
    if len(kept) < len(columns["label"]):
        dropped[f"{side} rows dropped: label not in train"] += len(columns["label"]) - len(kept)
    return picked(columns, kept)


def optional(columns: Columns, key: str) -> tuple[str, ...] | None:
    """Returns a column of ``Examples`` that not every source has."""
    return tuple(columns[key]) if key in columns else None


@dataclass(frozen=True)
class Task:
    """What a loader knows once it has read train: enough to make the data set of it."""

    config: DataConfig
    kind: Kind
    label_names: tuple[str, ...]
    train: Examples
    """All that the source of train gives."""
    own: Callable[[str], Examples]
    """Reads a side that has a source of its own."""
    facts: Mapping[str, int | float | str]
    """Figures of the task itself."""
    identity: Callable[[Examples], Iterable[Hashable]]
    """What makes an example of test the same as one of train."""
    inputs: str = "texts"

    def dataset(self, dropped: Dropped, rng: Rng) -> Dataset:
        """Returns the three sides; those without a source of their own are shares of train, stratified by label.

        Raises:
            DataError: A side has no usable row.
        """
        sides: dict[str, Examples] = {}
        shares: dict[str, float] = {}
        for side, share in (("test", self.config.test_share), ("validation", self.config.validation_share)):
            if getattr(self.config, side) is None:
                shares[side] = share
            else:
                sides[side] = self.own(side)
        *cut, rest = stratified_shares(self.train.labels, list(shares.values()), rng.child("sides"))
        sides |= {side: self.train.take(index) for side, index in zip(shares, cut, strict=True)}
        sides["train"] = self.train.take(rest)
        for side, examples in sides.items():
            if not len(examples):
                raise DataError(
                    f"{side} has no usable row: train gives {len(self.train)}; dropped: {listed(dropped)}. "
                    f"Give more rows, or give data.{side} a file or split whose rows have text and label"
                )
        seen = set(self.identity(sides["train"]))
        statistics: dict[str, int | float | str] = {
            "source": self.config.source,
            **dropped,
            **self.facts,
            f"test {self.inputs} that are also in train": sum(one in seen for one in self.identity(sides["test"])),
        }
        return Dataset(
            self.config.task,
            self.label_names,
            sides["train"],
            sides["validation"],
            sides["test"],
            statistics,
            self.kind,
        )


def both_texts(examples: Examples) -> Iterable[tuple[str, str]]:
    """Returns what makes two examples the same text, or the same pair of texts."""
    return zip(examples.texts, examples.pairs or examples.texts, strict=True)


def listed(dropped: Mapping[str, int]) -> str:
    """Returns the counts in words, for a message."""
    return ", ".join(f"{what}: {count}" for what, count in dropped.items()) or "none"


def files_read(config: DataConfig) -> dict[str, int]:
    """Returns how many files the source stands for, as a figure; none where that is one file or a hub data set."""
    files = files_by_name(config, "train") if is_local(config.source) else {"": None}
    return {} if "" in files else {"files of train": len(files)}
