"""FFA-LoRA: A is random, common and frozen for good; only B is trained and averaged, which is exact.

Paper: Improving LoRA in Privacy-preserving Federated Learning, Sun, Li, Li, Ding, arXiv 2403.12313.

    B ← Σ_k p_k B_k,   (Σ_k p_k B_k) A0 = Σ_k p_k (B_k A0)

| paper | here |
| --- | --- |
| A0 | drawn once from a seed that travels in every message; A0 itself never does |
| p_k | ``examples`` over their sum |
| alpha / r | ``template.scale(template.rank)``, for every client: alpha is only a step size here |

Unequal ranks (beyond the paper): client i trains the columns of B that belong to its k_i rows of A0, and the changes
of each column are averaged. Every column multiplies one common row, so for any subsets the mean change of the product
is s (Σ_i p_i ΔB_i) A0 exactly, with zeros for the columns that a client lacks: hence ``average = "cohort"``.
``holders`` divides each column by the clients that train it; it steps further, and is no longer that mean.
``subset = "random"`` draws the rows anew each round, an FSLoRA whose A is frozen (at the server's scale, without its
factor r / k, as A0 is common to all); ``leading`` leaves the last rows to the strongest clients.

The draw of A0 is not the one that other methods begin with: a client has to repeat it, and is told a seed of its own
for that rather than the run's. There is no server optimizer: weight decay would move A0. Public code of another
method (fedex-lora) freezes before it wraps the model, so that nothing is frozen and only B averaged; here what is
frozen is no leaf of the local problem at all. The head is trained and averaged in every round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from fslora.algebra.adapters import add_into, completed
from fslora.algebra.rows import AverageOver, ScatterMean, leading, take
from fslora.algebra.sketch import draw_rows
from fslora.methods.base import Method, initial_adapter
from fslora.rng import Rng
from fslora.types import Adapter, Broadcast, Client, ClientUpdate, Round, Rows, ServerState, Site, Start, Template


class FFALoRA(Method):
    """Federated freeze-A LoRA."""

    name: ClassVar[str] = "ffa-lora"
    paper: ClassVar[str] = "Improving LoRA in Privacy-preserving Federated Learning (FFA-LoRA), arXiv 2403.12313"
    differs: ClassVar[str] = "how many columns of B it trains"
    travels: ClassVar[str] = "those columns of B, down and up; a seed"

    subset: Literal["leading", "random"] = Field(
        "leading", description="Which rows of the frozen A a client has: the first ones, or others in every round."
    )
    average: AverageOver = Field(
        "cohort", description="Divide each column by the 'cohort' (exact mean product) or by its own 'holders'."
    )
    weighting: Literal["uniform", "examples"] = Field(
        "examples", description="Clients count by their number of examples (the paper's), or equally."
    )

    def init(self, template: Template, fleet: Sequence[Client], rng: Rng) -> ServerState:
        """Returns A0 of the server's rank, B = 0 and the seed that A0 was drawn from."""
        seed = rng.child("frozen").integer() % 2**53  # scalars are floats, exact up to here
        return ServerState(initial_adapter(template, template.rank, Rng(seed)), scalars={"seed": float(seed)})

    def broadcast(self, state: ServerState, client: Client, round: Round) -> Broadcast:
        """Returns the client's columns of B, which these are, and the seed of A0."""
        rows = self._rows(client, round)
        part = _part(state.adapter, rows, client.rank).only("B")
        return Broadcast(part, rows, extras={"seed": torch.tensor(int(state.scalars["seed"]))})

    def start(self, broadcast: Broadcast, site: Site) -> Start:
        """Returns the pair, its rows of A0 drawn again."""
        frozen = initial_adapter(site.template, site.template.rank, Rng(int(broadcast.extras["seed"])))
        return Start(completed(broadcast.adapter, _part(frozen, broadcast.rows, site.client.rank)), "B")

    def aggregate(self, state: ServerState, updates: Iterator[ClientUpdate], round: Round) -> ServerState:
        """Returns the state after adding the mean change of B and of the head."""
        total = ScatterMean(state.adapter)
        for update in updates:
            total.add(update.adapter, update.rows, update.weight(self.weighting))
        return replace(state, adapter=add_into(total.mean(self.average), state.adapter))

    def _rows(self, client: Client, round: Round) -> Rows | None:
        if self.subset == "leading":
            return None
        rng, rank = round.rng.child("sketch"), round.template.rank
        return {
            layer: draw_rows("independent", rank, [client.rank], 0, [client.id], rng.child(layer))
            for layer in round.template.layers
        }


def _part(adapter: Adapter, rows: Rows | None, rank: int) -> Adapter:
    return leading(adapter, rank) if rows is None else take(adapter, rows)
