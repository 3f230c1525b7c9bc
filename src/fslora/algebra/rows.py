"""Taking, scattering and averaging rank-one parts. Every pair is rank-major, so a part is a row of A and of Bt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from fslora.algebra.adapters import add, add_into, zeros_like
from fslora.types import Adapter, LoRA, Rows, Tensor

AverageOver = Literal["cohort", "holders"]
Padded = Literal["factor", "delta"]
"""What is filled up with zeros before a mean over the cohort: the factors themselves, or their changes."""


def take(adapter: Adapter, rows: Rows) -> Adapter:
    """Returns the submatrices A[I] [k i] and Bt[I] [k o] of every layer, scale kept; dense tensors are shared."""
    layers = {
        name: LoRA(pair.A.index_select(0, rows[name]), pair.Bt.index_select(0, rows[name]), pair.scale)
        for name, pair in adapter.layers.items()
    }
    return Adapter(layers, adapter.dense)


def leading(adapter: Adapter, rank: int) -> Adapter:
    """Returns the first ``rank`` parts of every layer (all, where a layer has fewer), scale kept; views, not copies."""
    layers = {name: LoRA(pair.A[:rank], pair.Bt[:rank], pair.scale) for name, pair in adapter.layers.items()}
    return Adapter(layers, adapter.dense)


def padded(adapter: Adapter, rank: int) -> Adapter:
    """Returns the adapter filled up with zero parts to ``rank``, scale kept."""

    def fill(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.new_zeros(rank - len(tensor), tensor.shape[1])])

    layers = {name: LoRA(fill(pair.A), fill(pair.Bt), pair.scale) for name, pair in adapter.layers.items()}
    return Adapter(layers, adapter.dense)


def zero_filled(old: Adapter, deltas: Sequence[Adapter]) -> list[Adapter]:
    """Returns old + delta for clients that hold the first parts of ``old``, as many as each changed, at one rank.

    That is the largest client's; the parts that a smaller one does not hold are zero in both factors.
    """
    ranks = [delta.rank for delta in deltas]
    return [padded(add(leading(old, rank), delta), max(ranks)) for rank, delta in zip(ranks, deltas, strict=True)]


def with_leading(adapter: Adapter, layers: Mapping[str, LoRA]) -> Adapter:
    """Returns the adapter with its first parts replaced by those of ``layers``, scale and all else kept."""

    def over(old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([new, old[len(new) :]])

    pairs = adapter.layers.items()
    replaced = {n: LoRA(over(pair.A, layers[n].A), over(pair.Bt, layers[n].Bt), pair.scale) for n, pair in pairs}
    return Adapter(replaced, adapter.dense)


def others(adapter: Adapter, rows: Rows) -> dict[str, LoRA]:
    """Returns the parts that ``rows`` leaves out, by layer, in their order, scale kept; no entry where that is none."""
    left = {}
    for name, pair in adapter.layers.items():
        mask = torch.ones(pair.rank, dtype=torch.bool).index_fill_(0, rows[name].long(), False)
        if mask.any():
            left[name] = LoRA(pair.A[mask], pair.Bt[mask], pair.scale)
    return left


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

    Memory is one global adapter, however many updates are added: the sums themselves become the mean, which can
    therefore be asked for once. ``mean("cohort")`` divides every part by the weight of the whole cohort, so a part
    that few clients hold moves little; ``mean("holders")`` divides it by the weight of its own holders, and leaves a
    part that nobody holds at zero.
    """

    def __init__(self, like: Adapter) -> None:
        self._sum: Adapter | None = zeros_like(like)
        self._held = {name: torch.zeros(pair.rank) for name, pair in like.layers.items()}
        self._weights = dict.fromkeys(like.layers, 0.0)
        self._weight = 0.0

    def add(
        self, part: Adapter, rows: Rows | None, weight: float = 1.0, by_layer: Mapping[str, float] | None = None
    ) -> None:
        """Adds ``weight · part`` at ``rows`` (None: at the first ``part.rank``); a factor without rows adds nothing.

        Where ``by_layer`` names a layer, its pair has that weight instead; dense tensors keep ``weight``.

        Raises:
            ValueError: The mean was taken already.
        """
        sums = self._sums()
        weights = {name: (by_layer or {}).get(name, weight) for name in self._weights}
        for name, pair in part.layers.items():
            total, held, own = sums.layers[name], self._held[name], weights[name]
            factors = ((total.A, pair.A), (total.Bt, pair.Bt))
            if rows is None:
                for target, source in factors:
                    target[: len(source)].add_(source, alpha=own)
                held[: pair.rank].add_(own)
            else:
                index = rows[name].long()  # otherwise converted anew for each of the three
                for target, source in factors:
                    if len(source):
                        target.index_add_(0, index, source, alpha=own)
                held.index_add_(0, index, torch.full((len(index),), float(own)))
        for name, own in weights.items():
            self._weights[name] += own
        for name, tensor in part.dense.items():
            sums.dense[name].add_(tensor, alpha=weight)
        self._weight += weight

    @property
    def weight(self) -> float:
        """The sum of all weights added; 0 when no update came in."""
        return self._weight

    def mean(self, over: AverageOver) -> Adapter:
        """Returns the mean and ends the sum; dense tensors are divided by the cohort's weight either way.

        Raises:
            ValueError: Nothing was added, or the mean was taken already.
        """
        mean = self._sums()
        if not self._weight:
            raise ValueError("the mean of no updates does not exist")
        for name, pair in mean.layers.items():
            divisor = self._divisor(name, over)
            pair.A.div_(divisor)
            pair.Bt.div_(divisor)
        for tensor in mean.dense.values():
            tensor.div_(self._weight)
        self._sum = None
        return mean

    def _sums(self) -> Adapter:
        if self._sum is None:
            raise ValueError("the mean was taken already: the sums have become it")
        return self._sum

    def shares(self) -> dict[str, Tensor]:
        """Returns by layer the share q_j of the cohort's weight that holds part j, [r]: 0 where nobody does."""
        return {name: held / self._weights[name] for name, held in self._held.items()}

    def _divisor(self, layer: str, over: AverageOver) -> Tensor:
        held = self._held[layer]
        if over == "cohort":
            return torch.full((len(held), 1), self._weights[layer])
        return torch.where(held > 0, held, 1.0).unsqueeze(1)


def zero_padded(old: Adapter, deltas: ScatterMean, what: Padded) -> Adapter:
    """Returns the cohort's mean where a client without a part counts as zero: its change, or the factor itself.

        "delta":   old_j + Σ_i p_i Δ_ij           i over the holders of part j, Σ p_i = 1 over the cohort
        "factor":  q_j old_j + Σ_i p_i Δ_ij  =  Σ_i p_i (old_j + Δ_ij),   q_j = Σ_i p_i over the holders

    A part that nobody holds keeps its value either way: zero in both factors, it could never be trained again.
    Dense tensors take the mean change. The result is in memory of its own: that of the sums.
    """
    mean = deltas.mean("cohort")
    if what == "delta":
        return add_into(mean, old)
    kept = {name: torch.where(q > 0, q, 1.0).unsqueeze(1) for name, q in deltas.shares().items()}
    layers = {}
    for name, pair in old.layers.items():
        sums = mean.layers[name]
        layers[name] = LoRA(sums.A.add_(pair.A * kept[name]), sums.Bt.add_(pair.Bt * kept[name]), pair.scale)
    return Adapter(layers, {name: mean.dense[name].add_(tensor) for name, tensor in old.dense.items()})


def holders(rows: Rows, rank: int) -> Tensor:
    """Returns which of the ``rank`` parts ``rows`` holds in which layer: int64 [layers r], of 0 and 1."""
    return torch.stack([torch.bincount(index.long(), minlength=rank) for index in rows.values()])
