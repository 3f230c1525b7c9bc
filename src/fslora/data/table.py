"""The task of a user's own table: classify the rows of files, or of a data set on the Hugging Face hub.

Rows without text or label are dropped and counted. Classes are told apart by their names: 1, 1.0 and '1' are
one class. The names that a data set declares (ClassLabel) are kept, in its order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from fslora.config import DataConfig
from fslora.data.rows import (
    NUMBER,
    Columns,
    Dropped,
    Task,
    both_texts,
    class_cell,
    files_read,
    in_order,
    listed,
    optional,
    read_table,
    where_known,
)
from fslora.data.types import Dataset, Examples
from fslora.errors import DataError
from fslora.rng import Rng


def load_table(config: DataConfig, rng: Rng) -> Dataset:
    """Returns the task on tables; ``sources`` says which there are.

    Sides without a file or split of their own are shares of train, stratified by class.

    Raises:
        DataError: A side cannot be read, lacks a column, or has no usable rows; or the labels are no classes.
    """
    dropped: Dropped = Counter()
    rows, declared = _read(config, "train", dropped)
    place = f"column {config.label!r} (data.label) of {config.source}"
    names = class_names(rows["label"], declared, place, dropped, config.labels)

    def own(side: str) -> Examples:
        return _examples(where_known(_read(config, side, dropped)[0], set(names), side, dropped), names)

    train = _examples(rows, names)
    facts = {**files_read(config), "classes": len(names)}
    return Task(config, "classes", names, train, own, facts, both_texts).dataset(dropped, rng)


def class_names(
    labels: Sequence[str],
    declared: Sequence[str] | None,
    place: str,
    dropped: Mapping[str, int],
    agreed: tuple[str, ...] | None = None,
) -> tuple[str, ...]:
    """Returns the classes: those that were agreed on, or that occur, as declared, or sorted, numbers by value.

    Args:
        labels: The class of every usable row of train.
        declared: The classes in the order of the data set, if it declares them.
        place: Where the classes were read, for messages.
        dropped: Why rows could not be used, for messages.
        agreed: ``data.labels``, if it is given.

    Raises:
        DataError: There are fewer than two, or they are fractions, or not among those that were agreed on.
    """
    if agreed is not None:
        check_agreed(set(labels), agreed, place)
        return agreed
    names = in_order(set(labels), declared)
    if declared is None and all(NUMBER.fullmatch(name) for name in names):
        fraction = next((name for name in names if not float(name).is_integer()), None)
        if fraction is not None:
            raise DataError(
                f"{place} holds numbers such as {fraction}, which are no classes. Set data.task to 'regression' "
                "to predict the number, or data.label to a column of classes"
            )
    if len(names) < 2:
        held = f"only the class {names[0]!r}" if names else "no usable row"
        raise DataError(
            f"{place} gives {held}; a classifier needs two classes at least. Dropped: {listed(dropped)}. "
            "Check data.label and data.text"
        )
    return names


def check_agreed(names: set[str], agreed: Sequence[str], place: str) -> None:
    """Raises DataError where a class is not among those of ``data.labels``."""
    strange = sorted(names - set(agreed))
    if strange:
        raise DataError(
            f"{place} has the class {strange[0]!r}, which is not in data.labels ({', '.join(map(repr, agreed))}); "
            "rename it in the data, or add it to data.labels"
        )


def _read(config: DataConfig, side: str, dropped: Dropped) -> tuple[Columns, tuple[str, ...] | None]:
    table = read_table(config, side)
    declared = table.declared("label")
    return table.usable({"label": class_cell(declared)}, dropped), declared


def _examples(rows: Columns, names: Sequence[str]) -> Examples:
    index = {name: i for i, name in enumerate(names)}
    labels = np.array([index[label] for label in rows["label"]], dtype=np.int64)
    return Examples(tuple(rows["text"]), labels, optional(rows, "text_pair"), optional(rows, "group"))
