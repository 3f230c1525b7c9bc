"""What the loaders of both causal tasks share: cells as text, strata by name, and the three sides put together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fslora.config import DataConfig
from fslora.data.rows import class_cell, text_cell
from fslora.data.sources import default_group
from fslora.data.types import Dataset, Examples, Index
from fslora.errors import DataError

NO_STRATA = ("all",)

Statistics = Mapping[str, int | float | str]


@dataclass(frozen=True, eq=False)
class Part:
    """Examples whose strata are not numbered yet: numbers depend on all sides."""

    examples: Examples
    """With labels 0."""
    strata: tuple[str, ...] | None
    """The name of each example's stratum; None where the data have none."""

    def take(self, index: Sequence[int] | Index) -> Part:
        """Returns the examples at these positions."""
        strata = None if self.strata is None else tuple(self.strata[i] for i in index)
        return Part(self.examples.take(index), strata)

    def numbers(self) -> Index:
        """Returns [n] the examples' strata, counted from 0 in the order of their names."""
        return _numbered(self, sorted(set(self.strata or ())))


def assemble(name: str, sides: Mapping[str, Part], statistics: Statistics) -> Dataset:
    """Returns the data set of a causal task: strata numbered, and test texts that are also in train counted.

    Raises:
        DataError: Train has strata, and another side has none.
    """
    if sides["train"].strata is None:
        sides = {side: Part(part.examples, None) for side, part in sides.items()}
    elif (bare := next((side for side, part in sides.items() if part.strata is None), None)) is not None:
        raise DataError(
            f"train has the column that data.label names, but {bare} has not; give it that column, or set data.label "
            "to a name that no column has"
        )
    names = tuple(sorted({stratum for part in sides.values() for stratum in part.strata or ()})) or NO_STRATA
    examples = {side: replace(part.examples, labels=_numbered(part, names)) for side, part in sides.items()}
    train, test = (_contents(examples[side]) for side in ("train", "test"))
    seen = set(train)
    groups = examples["train"].groups
    counts = {} if groups is None else {"groups in train": len(set(groups))}
    counts["test texts that are also in train"] = sum(content in seen for content in test)
    return Dataset(
        name=name,
        label_names=names,
        train=examples["train"],
        validation=examples["validation"],
        test=examples["test"],
        statistics={**statistics, **counts},
        kind="causal",
    )


def usable(side: str, part: Part, dropped: Mapping[str, int], remedy: str) -> Part:
    """Returns the part, or raises DataError if it is empty."""
    if not len(part.examples):
        raise DataError(f"{side} has no usable example. Dropped: {listed(dropped)}. {remedy}")
    return part


def listed(counts: Mapping[str, int]) -> str:
    """Returns counts in words."""
    return ", ".join(f"{what}: {count}" for what, count in counts.items()) or "none"


def group_column(config: DataConfig, side: str, columns: Sequence[str]) -> str | None:
    """Returns the column that tells whose row it is; only train has to have it."""
    column = default_group(config)
    return column if side == "train" or column in columns else None


def stratum_column(config: DataConfig, columns: Sequence[str]) -> str | None:
    """Returns the column data.label, if there is one: causal tasks have no labels, so none has to be there."""
    return config.label if config.label in columns else None


def text_columns(table: Any, where: str, keys: Mapping[str, str]) -> dict[str, list[str]]:
    """Returns columns of a table of the library ``datasets`` as texts, '' where a cell is missing or blank.

    Args:
        table: The table.
        where: What to call it in an error.
        keys: Column → the key of [data] that asks for it.

    Raises:
        DataError: A column is missing, or holds something other than a text or a number.
    """
    for column, key in keys.items():
        if column not in table.column_names:
            raise DataError(
                f"{where} has no column {column!r}; it has {', '.join(map(repr, table.column_names))}. "
                f"Set {key} so that it names the right one"
            )
    columns = table.select_columns(list(keys))[:]
    names = {column: getattr(table.features[column], "names", None) for column in keys}
    return {
        column: [_text(value, column, key, names[column]) for value in columns[column]] for column, key in keys.items()
    }


def dropped_for(columns: Mapping[str, Sequence[str]], row: int, side: str, dropped: Counter[str]) -> bool:
    """Returns whether a row lacks one of these columns, and counts it if so."""
    missing = next((column for column, cells in columns.items() if not cells[row]), None)
    if missing is not None:
        dropped[f"{side} rows dropped: no {missing}"] += 1
    return missing is not None


def _text(value: Any, column: str, key: str, declared: Sequence[str] | None) -> str:
    """The cell as text, '' where there is none: a class that the data set declares as its name, 3.0 as '3'."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    read = text_cell if declared is None else class_cell(declared)
    return read(value, column, key) or ""


def _numbered(part: Part, names: Sequence[str]) -> Index:
    if part.strata is None:
        return np.zeros(len(part.examples), dtype=np.int64)
    number = {name: i for i, name in enumerate(names)}
    return np.array([number[stratum] for stratum in part.strata], dtype=np.int64)


def _contents(examples: Examples) -> list[tuple[str, str]]:
    return list(zip(examples.texts, examples.columns["target"], strict=True))
