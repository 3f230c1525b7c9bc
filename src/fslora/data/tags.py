"""A class for every word of a sentence: named entities, parts of speech.

A row holds a list of words and a list of as many tags. What a Dirichlet partition skews, and the sides are stratified
by, is one tag per sentence: the most frequent one apart from the most frequent one of all of train, which (as 'O'
does) says little; that one for a sentence that has no other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from fslora.config import DataConfig
from fslora.data.rows import (
    Cell,
    Columns,
    Dropped,
    Task,
    class_cell,
    files_read,
    in_order,
    listed,
    optional,
    picked,
    read_table,
    text_cell,
)
from fslora.data.table import check_agreed
from fslora.data.types import Dataset, Examples
from fslora.errors import DataError
from fslora.rng import Rng


def load_tags(config: DataConfig, rng: Rng) -> Dataset:
    """Returns the task on tables; rows that lack a word or tag, or have unequal numbers of them, are counted.

    Raises:
        DataError: A side cannot be read, lacks a column or has no usable rows; or train has fewer than two tags.
    """
    dropped: Dropped = Counter()
    rows, declared = _read(config, "train", dropped)
    counts = Counter(tag for tags in rows["label"] for tag in tags)
    names = in_order(counts, declared)
    if config.labels is not None:
        check_agreed(set(counts), config.labels, f"column {config.label!r} (data.label) of {config.source}")
        names = config.labels
    if len(names) < 2:
        held = f"only the tag {names[0]!r}" if names else "no usable row"
        raise DataError(
            f"column {config.label!r} (data.label) of {config.source} gives {held}; a tagger needs two tags at "
            f"least. Dropped: {listed(dropped)}. Check data.label and data.text"
        )
    index = {name: i for i, name in enumerate(names)}
    commonest = max(names, key=counts.__getitem__)  # the first of those equally frequent

    def own(side: str) -> Examples:
        found, _ = _read(config, side, dropped)
        known = [i for i, tags in enumerate(found["label"]) if index.keys() >= set(tags)]
        if len(known) < len(found["label"]):
            dropped[f"{side} rows dropped: tag not in train"] += len(found["label"]) - len(known)
        return _examples(picked(found, known), index, index[commonest])

    train = _examples(rows, index, index[commonest])
    facts: dict[str, int | float | str] = {**files_read(config), "tags": len(names), "most frequent tag": commonest}
    return Task(config, "tags", names, train, own, facts, lambda examples: examples.texts).dataset(dropped, rng)


def label_of(tags: Sequence[int], commonest: int) -> int:
    """Returns a sentence's most frequent tag apart from ``commonest``; of several the first, ``commonest`` if none."""
    counts = Counter(tag for tag in tags if tag != commonest)
    return max(sorted(counts), key=counts.__getitem__, default=commonest)


def _read(config: DataConfig, side: str, dropped: Dropped) -> tuple[Columns, tuple[str, ...] | None]:
    table = read_table(config, side, keys=("text", "label"))
    declared = table.declared("label")
    cells = {"text": _each(text_cell, "words"), "label": _each(class_cell(declared), "tags")}
    rows = table.usable(cells, dropped, lacking="missing or blank entries in {}")
    equal = [
        i for i, (words, tags) in enumerate(zip(rows["text"], rows["label"], strict=True)) if len(words) == len(tags)
    ]
    if len(equal) < len(rows["text"]):
        dropped[f"{side} rows dropped: {config.text} and {config.label} differ in length"] += len(rows["text"]) - len(
            equal
        )
    return picked(rows, equal), declared


def _each(cell: Cell, what: str) -> Cell:
    """The reader of a list, all of whose entries the given reader can use."""

    def entries(value: Any, column: str, key: str) -> tuple[Any, ...] | None:
        if value is None:
            return None
        if not isinstance(value, list):
            raise DataError(
                f"column {column!r} ({key}) holds a {type(value).__name__}, e.g. {value!r:.60}; for data.task 'tags' "
                f"it has to hold a list of {what} per row, as JSONL and Parquet files can"
            )
        found = tuple(cell(entry, column, key) for entry in value)
        return None if None in found or not found else found

    return entries


def _examples(rows: Columns, index: dict[str, int], commonest: int) -> Examples:
    tags = [tuple(index[tag] for tag in row) for row in rows["label"]]
    return Examples(
        tuple(" ".join(words) for words in rows["text"]),
        np.array([label_of(row, commonest) for row in tags], dtype=np.int64),
        groups=optional(rows, "group"),
        columns={"words": tuple(rows["text"]), "tags": tuple(tags)},
    )
