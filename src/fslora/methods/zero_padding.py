"""FedIT with zero padding: every client trains the first parts of the server's LoRA, as many as it can afford.

Paper: none of its own; the baseline that papers on unequal ranks call "FedIT with zero padding" or "zero padding"
(FedIT: arXiv 2305.05644; HetLoRA's aggregation without its weights and its pruning: arXiv 2401.06432).

    client i:  A[:k_i], B[:, :k_i] of the server's pair
    server:    A ← Σ_i p_i pad(A_i),   B ← Σ_i p_i pad(B_i),   p_i = n_i / Σ_j n_j over the cohort

The rule is "zero": a client without part j counts as a zero there, hence part j of either factor shrinks by q_j, the
weight of its holders, and of the product by q_j², in every round, even if nobody trains. ``average = "delta"`` is the
rule "keep": an absent client counts as no change, and only the step is smaller.

We keep a part that no client of the round holds, because a part whose two factors are zero has no gradient and would
be lost for the rest of the run. The literature books the server's whole pair downwards; only the client's own rows
travel here, since it can train no others. Public code averages factors of scale alpha / k_i as if they were of one
scale; here it is the server's alpha / r for everybody.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from fslora.algebra.rows import Padded, ScatterMean, leading, zero_padded
from fslora.methods.base import Method
from fslora.types import Broadcast, Client, ClientUpdate, Round, ServerState


class ZeroPadding(Method):
    """FedIT with zero padding."""

    name: ClassVar[str] = "zero-padding"
    paper: ClassVar[str] = (
        "FedIT (arXiv 2305.05644) with zero-padded factors, a baseline of arXiv 2401.06432 and others"
    )
    differs: ClassVar[str] = "the first parts, as many as its rank"
    travels: ClassVar[str] = "both factors of those parts, down and up"

    average: Padded = Field(
        "factor",
        description="What a client without a part counts as: a zero 'factor' (the baseline), or a zero 'delta'.",
    )
    weighting: Literal["uniform", "examples"] = Field(
        "examples", description="Clients count by their number of examples (FedIT's), or equally."
    )

    def broadcast(self, state: ServerState, client: Client, round: Round) -> Broadcast:
        """Returns the first parts, at the server's scale."""
        return Broadcast(leading(state.adapter, client.rank))

    def aggregate(self, state: ServerState, updates: Iterator[ClientUpdate], round: Round) -> ServerState:
        """Returns the state after the mean of the padded factors, or of their padded changes."""
        total = ScatterMean(state.adapter)
        for update in updates:
            total.add(update.adapter, None, update.weight(self.weighting))
        return replace(state, adapter=zero_padded(state.adapter, total, self.average))
