"""Taking, scattering and averaging rank-one parts. Every pair is rank-major, so a part is a row of A and of Bt."""

from __future__ import annotations

from typing import Literal

import torch

from fslora.algebra.adapters import zeros_like
from fslora.types import Adapter, LoRA, Rows, Tensor

AverageOver = Literal["cohort", "holders"]


def take(adapter: Adapter, rows: Rows) -> Adapter:
    """Returns the submatrices A[I] [k i] and Bt[I] [k o] of every layer, scale kept; dense tensors are shared."""
    layers = {
        name: LoRA(pair.A.index_select(0, rows[name]), pair.Bt.index_select(0, rows[name]), pair.scale)
        for name, pair in adapter.layers.items()
    }
    return Adapter(layers, adapter.dense)


def scatter(part: Adapter, rows: Rows, rank: int) -> Adapter:
    """Returns the adapter of ``rank`` parts that holds ``part`` at ``rows`` and zeros elsewhere."""
    layers = {}
    for name, pair in part.layers.items():
        A = pair.A.new_zeros(rank, pair.A.shape[1]).index_copy_(0, rows[name].long(), pair.A)
        Bt = pair.Bt.new_zeros(rank, pair.Bt.shape[1]).index_copy_(0, rows[name].long(), pair.Bt)
        layers[name] = LoRA(A, Bt, pair.scale)
    return Adapter(layers, part.dense)


class ScatterMean:
    """A streaming weighted mean of adapters that hold different rank-one parts of one global adapter.

    Memory is one global adapter, however many updates are added. ``mean("cohort")`` divides every part by
    the weight of the whole cohort, so a part that few clients hold moves little; ``mean("holders")`` divides
    it by the weight of its own holders, and leaves a part that nobody holds at zero.
    """

    def __init__(self, like: Adapter) -> None:
        self._sum = zeros_like(like)
        self._held = {name: torch.zeros(pair.rank) for name, pair in like.layers.items()}
        self._weight = 0.0

    def add(self, part: Adapter, rows: Rows | None, weight: float = 1.0) -> None:
        """Adds ``weight · part`` at ``rows`` (at all parts when None)."""
        for name, pair in part.layers.items():
            total, held = self._sum.layers[name], self._held[name]
            if rows is None:
                total.A.add_(pair.A, alpha=weight)
                total.Bt.add_(pair.Bt, alpha=weight)
                held.add_(weight)
            else:
                index = rows[name]
                total.A.index_add_(0, index, pair.A, alpha=weight)
                total.Bt.index_add_(0, index, pair.Bt, alpha=weight)
                held.index_add_(0, index, torch.full((len(index),), float(weight)))
        for name, tensor in part.dense.items():
            self._sum.dense[name].add_(tensor, alpha=weight)
        self._weight += weight

    @property
    def weight(self) -> float:
        """The sum of all weights added; 0 when no update came in."""
        return self._weight

    def mean(self, over: AverageOver) -> Adapter:
        """Returns the mean; dense tensors are divided by the cohort's weight either way.

        Raises:
            ValueError: Nothing was added.
        """
        if not self._weight:
            raise ValueError("the mean of no updates does not exist")
        layers = {}
        for name, pair in self._sum.layers.items():
            divisor = self._divisor(self._held[name], over)
            layers[name] = LoRA(pair.A / divisor, pair.Bt / divisor, pair.scale)
        return Adapter(layers, {name: tensor / self._weight for name, tensor in self._sum.dense.items()})

    def _divisor(self, held: Tensor, over: AverageOver) -> Tensor:
        if over == "cohort":
            return torch.full((len(held), 1), self._weight)
        return torch.where(held > 0, held, 1.0).unsqueeze(1)


def holders(rows: Rows, rank: int) -> Tensor:
    """Returns which of the ``rank`` parts ``rows`` holds in which layer: int64 [layers r], of 0 and 1."""
    return torch.stack([torch.bincount(index.long(), minlength=rank) for index in rows.values()])
