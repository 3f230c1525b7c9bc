"""Replication padding: what a weak client lacks is filled with the strong clients' own values before averaging.

Paper: Towards Federated Low-Rank Adaptation of Language Models with Rank Heterogeneity, Byun, Lee, arXiv 2406.17477.
No official code.

    client i:  A[:k_i], B[:, :k_i] of the server's pair
    server:    (A_H, B_H) = p-weighted mean over the strong clients;  pad every weak (A_i, B_i) with rows of (A_H, B_H);
               A ← Σ_i p_i A_i,   B ← Σ_i p_i B_i

Filling up with the mean of those who have a part, and then averaging with the same weights, is averaging each part
over its holders:

    a_j ← Σ_{i: k_i > j} p_i a_ij / Σ_{i: k_i > j} p_i,   b_j likewise

which is what is computed here; it holds for any number of ranks where the paper has two, r_L and r_H.

The paper finds its strong clients by itself: all train rank r_L in round 0 and report how well they do, and the best
10 % get r_H. ``best`` asks for that; by default the fleet's ranks are what counts. Our form of it:

- r_H is what the client can afford, r_L is ``low``.
- The score is the mean loss of a client's local steps, each before its step: clients hold no validation data here. It
  travels in every round (4 bytes, once in the paper), because a client that keeps nothing cannot know that it has one.
- Only a part of the fleet takes part in round 0. A client is judged in its first round, against those new in the same
  round, since only their losses are of the same model; a round has as many winners as bring all judged so far to the
  share ``best``.

A part that nobody holds in a round keeps its value. Every factor has the scale alpha / r whatever its rank; the paper
does not say which it has. The head is the weighted mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from fslora.algebra.adapters import add_into
from fslora.algebra.rows import ScatterMean, leading
from fslora.methods.base import Method
from fslora.types import Broadcast, Client, ClientUpdate, Round, ServerState, Site, Start, Trained


class Replication(Method):
    """Replication padding."""

    name: ClassVar[str] = "replication"
    paper: ClassVar[str] = "Towards Federated Low-Rank Adaptation with Rank Heterogeneity, arXiv 2406.17477"
    differs: ClassVar[str] = "the first parts, as many as its rank"
    travels: ClassVar[str] = "both factors of those parts, down and up"

    weighting: Literal["uniform", "examples"] = Field(
        "examples", description="Clients count by their number of examples (the paper's), or equally."
    )
    best: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of clients, by their first loss, that train above rank 'low'; 0: no judging.",
    )
    low: int = Field(5, ge=1, description="With 'best': the rank of all clients at first, and of the others for good.")

    def broadcast(self, state: ServerState, client: Client, round: Round) -> Broadcast:
        """Returns the first parts, at the server's scale."""
        rank = client.rank
        if self.best and not state.scalars.get(_won(client.id)):
            rank = min(rank, self.low)
        return Broadcast(leading(state.adapter, rank))

    def client_update(self, broadcast: Broadcast, start: Start, trained: Trained, site: Site) -> ClientUpdate:
        """Returns the differences, and the score that clients are judged by, where they are."""
        update = super().client_update(broadcast, start, trained, site)
        score = torch.tensor([sum(trained.losses) / len(trained.losses)])
        return replace(update, extras={"score": score}) if self.best else update

    def aggregate(self, state: ServerState, updates: Iterator[ClientUpdate], round: Round) -> ServerState:
        """Returns the state after the mean of every part over its holders; new clients are judged."""
        total, scores = ScatterMean(state.adapter), {}
        for update in updates:
            total.add(update.adapter, None, update.weight(self.weighting))
            if self.best and _won(update.client) not in state.scalars:
                scores[update.client] = float(update.extras["score"].item())
        adapter = add_into(total.mean("holders"), state.adapter)
        return replace(state, adapter=adapter, scalars={**state.scalars, **self._judged(state, scores)})

    def _judged(self, state: ServerState, scores: dict[int, float]) -> dict[str, float]:
        """Which of the new clients win, 1.0, and which do not, 0.0."""
        due = round(self.best * (len(state.scalars) + len(scores))) - int(sum(state.scalars.values()))
        winners = sorted(scores, key=lambda client: (scores[client], client))[: max(due, 0)]
        return {_won(client): float(client in winners) for client in scores}


def _won(client: int) -> str:
    return f"won.{client}"
