"""What a task hands on: examples with their labels, and three sides of them with the figures a user should see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]
"""Positions of examples, [n]."""
Kind = Literal["classes", "value", "tags", "images", "causal"]
"""What is learnt: a class or a number per text, a class per word, a class per image, or text token by token."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Labelled texts in a fixed order; all columns have the same length n."""

    texts: tuple[str, ...]
    """The text; the prompt of an instruction; a tagged sentence's words with spaces between; an image's path."""
    labels: NDArray[np.int64]
    """[n] classes, counted from 0; where examples have none, what a Dirichlet partition skews (0 for all, at least)."""
    pairs: tuple[str, ...] | None = None
    """The second text of each example, for tasks over two texts."""
    groups: tuple[str, ...] | None = None
    """Whose example it is; what the natural partition keeps together."""
    columns: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """What else the kind of task needs: ``value`` (float), ``words`` and ``tags`` (tuples of str and of int, equally
    long), ``target`` (what a causal model writes after the text), ``choices`` (every target that it may choose from),
    ``answer`` (what is looked for in the text that it writes), ``options`` (the answers that the choices give)."""

    def __post_init__(self) -> None:
        """Checks that the columns fit together."""
        for name in ("labels", "pairs", "groups"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.texts):
                raise ValueError(f"{len(self.texts)} texts but {len(column)} {name}")
        for name, entries in self.columns.items():
            if len(entries) != len(self.texts):
                raise ValueError(f"{len(self.texts)} texts but {len(entries)} entries of {name}")

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
            columns={name: _pick(column, positions) for name, column in self.columns.items()},
        )


@dataclass(frozen=True, eq=False)
class Dataset:
    """A task's examples on their three sides."""

    name: str
    label_names: tuple[str, ...]
    """The classes (or tags), in the order that labels count them."""
    train: Examples
    validation: Examples
    test: Examples
    statistics: Mapping[str, int | float | str]
    """What was read, dropped and treated on the way, in words, for the user to see."""
    kind: Kind = "classes"


def _pick(column: tuple[Any, ...], positions: Index) -> tuple[Any, ...]:
    return tuple(column[position] for position in positions.tolist())
