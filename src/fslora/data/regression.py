"""A number for every row of a table, e.g. how alike two sentences are.

The numbers themselves are the column ``value`` of the examples. Their labels are the fifths of train in which they
lie: with them the sides have like distributions, and a Dirichlet partition gives some clients the high numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fslora.config import DataConfig
from fslora.data.rows import Columns, Dropped, Task, both_texts, files_read, listed, optional, read_table, text_cell
from fslora.data.types import Dataset, Examples
from fslora.errors import DataError
from fslora.rng import Rng

Values = NDArray[np.float64]


def load_regression(config: DataConfig, rng: Rng) -> Dataset:
    """Returns the task on tables; rows without a finite number are dropped and counted.

    Raises:
        DataError: A side cannot be read, lacks a column, or has no usable rows; or train holds one number only.
    """
    dropped: Dropped = Counter()
    rows = _read(config, "train", dropped)
    values = np.array(rows["label"], dtype=np.float64)
    if len(np.unique(values)) < 2:
        held = f"only the number {values[0]:g}" if len(values) else "no number"
        raise DataError(
            f"column {config.label!r} (data.label) of {config.source} gives {held}; there is nothing to predict. "
            f"Dropped: {listed(dropped)}. Set data.label to a column of numbers, or data.task to 'table' for classes"
        )
    edges = fifths(values)
    facts = {
        **files_read(config),
        "smallest value in train": float(values.min()),
        "largest value in train": float(values.max()),
    }
    return Task(
        config,
        "value",
        _ranges(values, edges),
        _examples(rows, edges),
        lambda side: _examples(_read(config, side, dropped), edges),
        facts,
        both_texts,
    ).dataset(dropped, rng)


def fifths(values: Values) -> Values:
    """Returns the upper ends of the values' fifths [at most 4], the last one's excepted, each a value itself.

    Fewer where values tie: no fifth is empty, and equal values lie in the same one.
    """
    ends: Values = np.unique(np.quantile(values, [0.2, 0.4, 0.6, 0.8], method="inverted_cdf"))
    below: Values = ends[ends < values.max()]
    return below


def number_cell(value: Any, column: str, key: str) -> float | None:
    """Returns the cell as a finite number; None for anything else, truth values included."""
    found = text_cell(value, column, key)
    if found is None or isinstance(value, bool) or "_" in found:
        return None
    try:
        result = float(found)
    except ValueError:
        return None
    return result if math.isfinite(result) else None


def _read(config: DataConfig, side: str, dropped: Dropped) -> Columns:
    return read_table(config, side).usable({"label": number_cell}, dropped, lacking="no number in {}")


def _examples(rows: Columns, edges: Values) -> Examples:
    return Examples(
        tuple(rows["text"]),
        np.searchsorted(edges, np.array(rows["label"], dtype=np.float64)).astype(np.int64),
        optional(rows, "text_pair"),
        optional(rows, "group"),
        {"value": tuple(rows["label"])},
    )


def _ranges(values: Values, edges: Values) -> tuple[str, ...]:
    """The smallest and largest value of each fifth, in words; in as many digits as tell them apart."""
    members = [values[np.searchsorted(edges, values) == fifth] for fifth in range(len(edges) + 1)]
    ranges = [(float(member.min()), float(member.max())) for member in members]
    short = tuple(_range(f"{low:g}", f"{high:g}") for low, high in ranges)
    return short if len(set(short)) == len(short) else tuple(_range(repr(low), repr(high)) for low, high in ranges)


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"
