"""HetLoRA: unequal ranks by truncation down and zero padding up, weights by norm, ranks that clients prune themselves.

Paper: Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, Cho, Liu, Xu, Fahrezi, Barnes,
Joshi, arXiv 2401.06432. No official code; the symbols are those of the paper.

    client k:  A[:r_k], B[:, :r_k] of the server's pair, trained on
               F_k(B, A) + λ Σ_layers T,   T = ‖B[:, m:]‖ ‖A[m:, :]‖,   m = max(r_min, floor(γ r_k))
               if Σ T is smaller after training than before:  r_k ← m, and the parts from m on are dropped
    server:    A ← Σ_k p_k pad(A_k),   B ← Σ_k p_k pad(B_k),   p_k = ‖B_k A_k‖ / Σ_j ‖B_j A_j‖ in each layer

| paper | here |
| --- | --- |
| r_max, r_k | ``template.rank``; what is left of ``client.rank``, in ``ServerState.scalars["rank.ID"]`` |
| ‖ΔW_k‖ = ‖B_k A_k‖ (Frobenius) | `product_norm` of what the client trained, from Gram matrices |
| pad | `zero_padded`: a client without part j counts as zero there, so part j of the product shrinks by q_j² |

What the notes leave open, and what we do:

- One rank for a whole client, pruned on the sum of T over the layers: r_k is one number in the paper, and Σ T is what
  the penalty trains. The server remembers it and tells the client by the number of rows that it gets.
- Every factor has the scale alpha / r_max whatever its rank; factors of unequal scale cannot be averaged.
- The head, which has no norm of this kind, is averaged by numbers of examples.
- Where every ‖B_k A_k‖ of a layer is zero, clients count equally there.
- A part that nobody holds in a round keeps its value, since one whose two factors are zero has no gradient ever again;
  parts that every client of the fleet has pruned become zero, as in the paper.
- Parts that r_min keeps from being pruned are not penalised. λ, γ and r_min = 5 are from memory in the notes that
  we have. With floor and γ = 0.99 every pruning takes at least one part, so that r_min = 1 ends at rank 1. In the first
  round B is zero before training, so nobody prunes.
- Clients send differences, the server adds them to what it sent; the numbers are those of the paper.

Public re-implementations take round(γ r_k), which empties the tail of every rank below 50 at γ = 0.99, never prune,
weight by examples or average deltas. ``weighting``, ``average`` and ``prune`` name those variants.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from fslora.algebra.lowrank import product_norm
from fslora.algebra.rows import Padded, ScatterMean, leading, zero_padded
from fslora.methods.base import Method
from fslora.rng import Rng
from fslora.types import (
    Adapter,
    Broadcast,
    Client,
    ClientUpdate,
    LoRA,
    Round,
    ServerState,
    Site,
    Start,
    Template,
    Tensor,
    Trained,
)

LEAST = 1e-20
"""The least weight of a client: far below any norm, so that it counts only where all norms are zero."""


class HetLoRA(Method):
    """Heterogeneous LoRA."""

    name: ClassVar[str] = "hetlora"
    paper: ClassVar[str] = "Heterogeneous LoRA (HetLoRA), arXiv 2401.06432"
    differs: ClassVar[str] = "the first parts, as many as its rank, which it may lower"
    travels: ClassVar[str] = "both factors of those parts, down and up; its new rank up"

    weighting: Literal["frobenius", "examples", "uniform"] = Field(
        "frobenius", description="Clients count by the norm of their B A (the paper's), by examples, or equally."
    )
    norm: Literal["layer", "adapter"] = Field(
        "layer", description="frobenius: the norm in each 'layer' by itself, or of the whole 'adapter'."
    )
    average: Padded = Field(
        "factor",
        description="What a client without a part counts as: a zero 'factor' (the paper's), or a zero 'delta'.",
    )
    prune: bool = Field(True, description="Whether clients lower their rank when training made their tail smaller.")
    gamma: float = Field(0.99, gt=0, lt=1, description="Share of its rank that a client keeps; the rest is its tail.")
    penalty: float = Field(5e-4, ge=0, description="Weight of the tail's norm in the client's loss.")
    r_min: int = Field(5, ge=1, description="No client prunes itself below this rank.")

    def init(self, template: Template, fleet: Sequence[Client], rng: Rng) -> ServerState:
        """Returns a fresh adapter, and every client's rank where ranks can change."""
        state = super().init(template, fleet, rng)
        return replace(state, scalars={_key(c.id): float(c.rank) for c in fleet}) if self.prune else state

    def broadcast(self, state: ServerState, client: Client, round: Round) -> Broadcast:
        """Returns the first parts, as many as the client's rank is by now."""
        return Broadcast(leading(state.adapter, int(state.scalars.get(_key(client.id), client.rank))))

    def start(self, broadcast: Broadcast, site: Site) -> Start:
        """Returns what came, to be trained under the tail's penalty."""
        return Start(broadcast.adapter, penalty=self._penalty if self.penalty else None)

    def client_update(self, broadcast: Broadcast, start: Start, trained: Trained, site: Site) -> ClientUpdate:
        """Returns the differences of the parts that the client keeps, and how many these are."""
        update = super().client_update(broadcast, start, trained, site)
        if not self.prune:
            return update
        rank = start.adapter.rank
        if self._tail(trained.adapter) < self._tail(start.adapter):
            rank = self._kept(rank)
        extras = {"rank": torch.tensor([rank], dtype=torch.int32)}
        return replace(update, adapter=leading(update.adapter, rank), extras=extras)

    def aggregate(self, state: ServerState, updates: Iterator[ClientUpdate], round: Round) -> ServerState:
        """Returns the state after the weighted mean of the padded factors, with the clients' new ranks."""
        total, ranks = ScatterMean(state.adapter), dict(state.scalars)
        for update in updates:
            weight = 1.0 if self.weighting == "uniform" else float(update.examples)
            total.add(update.adapter, None, weight, self._norms(state, update))
            if self.prune:
                ranks[_key(update.client)] = float(update.extras["rank"].item())
        adapter = zero_padded(state.adapter, total, self.average)
        if self.prune:
            largest = int(max(ranks.values()))
            for pair in adapter.layers.values():  # the sums' memory: the old state keeps its own
                pair.A[largest:].zero_()
                pair.Bt[largest:].zero_()
        return replace(state, adapter=adapter, scalars=ranks)

    def _norms(self, state: ServerState, update: ClientUpdate) -> dict[str, float] | None:
        if self.weighting != "frobenius":
            return None
        norms = {}
        for name, delta in update.adapter.layers.items():
            sent = state.adapter.layers[name]
            A, Bt = sent.A[: delta.rank] + delta.A, sent.Bt[: delta.rank] + delta.Bt
            norms[name] = product_norm(LoRA(A, Bt, sent.scale))
        if self.norm == "adapter":
            norms = dict.fromkeys(norms, sum(norm**2 for norm in norms.values()) ** 0.5)
        return {name: max(norm, LEAST) for name, norm in norms.items()}

    def _kept(self, rank: int) -> int:
        # 0.29 · 100 is a little below 29 in floating point.
        return max(self.r_min, int(self.gamma * rank + 1e-9))

    def _tail(self, adapter: Adapter) -> Tensor:
        kept, norm = self._kept(adapter.rank), torch.linalg.vector_norm
        tails = [norm(pair.Bt[kept:]) * norm(pair.A[kept:]) for pair in adapter.layers.values()]
        return torch.stack(tails).sum()

    def _penalty(self, adapter: Adapter) -> Tensor:
        return self.penalty * self._tail(adapter)


def _key(client: int) -> str:
    return f"rank.{client}"
