"""What a task hands on: labelled texts, and three sides of them with the figures a user should see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]
"""Positions of examples, [n]."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Labelled texts in a fixed order; all columns have the same length n."""

    texts: tuple[str, ...]
    labels: NDArray[np.int64]
    """[n] classes, counted from 0."""
    pairs: tuple[str, ...] | None = None
    """The second text of each example, for tasks over two texts."""
    groups: tuple[str, ...] | None = None
    """Whose example it is; what the natural partition keeps together."""

    def __post_init__(self) -> None:
        """Checks that the columns fit together."""
        for name in ("labels", "pairs", "groups"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.texts):
                raise ValueError(f"{len(self.texts)} texts but {len(column)} {name}")

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.texts)

    def take(self, index: Sequence[int] | Index) -> Examples:
        """Returns the examples at these positions, in this order."""
        positions = np.asarray(index, dtype=np.int64)
        return replace(
            self,
            texts=_pick(self.texts, positions),
            labels=self.labels[positions],
            pairs=None if self.pairs is None else _pick(self.pairs, positions),
            groups=None if self.groups is None else _pick(self.groups, positions),
        )


@dataclass(frozen=True, eq=False)
class Dataset:
    """A task's examples on their three sides."""

    name: str
    label_names: tuple[str, ...]
    """The classes, in the order that labels count them."""
    train: Examples
    validation: Examples
    test: Examples
    statistics: Mapping[str, int | float | str]
    """What was read, dropped and treated on the way, in words, for the user to see."""


def _pick(column: tuple[str, ...], positions: Index) -> tuple[str, ...]:
    return tuple(column[position] for position in positions.tolist())
