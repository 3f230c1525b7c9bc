"""RoLoRA: rounds alternate between the factors; the one that rests is common to all, so averaging is exact.

Paper: Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA, Chen, Guo, Ju, Dalal, Zhu, Khisti,
arXiv 2502.01755 (earlier: 2409.02346).

    rounds 1, 3, 5, ...:  B ← B + Σ_i p_i ΔB_i   with A at rest
    rounds 2, 4, 6, ...:  A ← A + Σ_i p_i ΔA_i   with B at rest

| paper | here |
| --- | --- |
| alpha A B (A [d r], B [r d]) | scale · B A: same roles, transposed |
| first B, then A | with B = 0 the gradient of A is zero, and the other order would lose a round |
| 1/N | ``weighting = "uniform"`` |

Only the factor that the last round changed travels down, to clients of that round: they keep the other, which rested
on both sides. A client that was absent gets both. So two rounds together send what one of FedIT sends.

Unequal ranks (beyond the paper): client i holds the first k_i parts, and deltas are averaged: the mean change of the
product is then s (Σ_i p_i ΔB_i) A exactly, with zeros for absent parts, and nobody training changes nothing. (The mean
of zero-padded *values* would shrink every part that some client lacks.) ``average = "holders"`` divides each part by
the clients that hold it. All clients have the server's scale: they train parts of one common pair.

Rounds are counted where they end well, not by their number: a failed round is repeated with the same factor. The head
is trained and averaged in every round. There is no server optimizer: its momentum would move the factor at rest. The
optimizer of the clients starts anew each round, as for every method here. No public code was found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from fslora.algebra.adapters import add_into, combine, completed
from fslora.algebra.rows import AverageOver, ScatterMean, leading
from fslora.methods.base import Method
from fslora.types import (
    Adapter,
    Broadcast,
    Client,
    ClientMemory,
    ClientUpdate,
    Factors,
    Round,
    ServerState,
    Site,
    Start,
    Trained,
)

OTHER: dict[Factors, Factors] = {"A": "B", "B": "A"}


class RoLoRA(Method):
    """Alternating optimization of the two factors."""

    name: ClassVar[str] = "rolora"
    paper: ClassVar[str] = "Robust Federated Finetuning via Alternating Optimization of LoRA, arXiv 2502.01755"
    differs: ClassVar[str] = "how many leading parts it trains, of one factor at a time"
    travels: ClassVar[str] = "the factor changed last down (both after an absence), the one trained up"

    average: AverageOver = Field(
        "cohort", description="Divide each part by the 'cohort' (exact mean product) or by its own 'holders'."
    )
    weighting: Literal["uniform", "examples"] = Field(
        "uniform", description="Clients count equally (the paper's), or by their number of examples."
    )

    def broadcast(self, state: ServerState, client: Client, round: Round) -> Broadcast:
        """Returns the client's parts of what it does not have, and which factor is trained."""
        rounds = state.scalars.get("rounds", 0.0)
        trains: Factors = "A" if rounds % 2 else "B"
        present = state.scalars.get(_answered(client.id)) == rounds
        part = leading(state.adapter, client.rank).only(OTHER[trains] if present else "both")
        return Broadcast(part, extras={"trains_A": torch.tensor(trains == "A")})

    def start(self, broadcast: Broadcast, site: Site) -> Start:
        """Returns the whole pair: what did not travel rested in the last round, and is in the client's memory."""
        kept = site.memory.slots.get("rested", Adapter({}))
        return Start(completed(broadcast.adapter, kept), "A" if broadcast.extras["trains_A"] else "B")

    def remember(self, broadcast: Broadcast, start: Start, trained: Trained, site: Site) -> ClientMemory:
        """Returns the factor that rested; the next round will train it."""
        rested = Adapter(start.adapter.layers).only(OTHER[start.trains])
        return ClientMemory({"rested": combine(torch.clone, rested)})  # not the server's own memory

    def aggregate(self, state: ServerState, updates: Iterator[ClientUpdate], round: Round) -> ServerState:
        """Returns the state after adding the mean change of the trained factor and of the head."""
        rounds = state.scalars.get("rounds", 0.0) + 1
        total, answered = ScatterMean(state.adapter), {}
        for update in updates:
            total.add(update.adapter, None, update.weight(self.weighting))
            answered[_answered(update.client)] = rounds
        adapter = add_into(total.mean(self.average), state.adapter)
        return replace(state, adapter=adapter, scalars={**state.scalars, **answered, "rounds": rounds})


def _answered(client: int) -> str:
    return f"answered.{client}"
