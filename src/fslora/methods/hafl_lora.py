"""HAFL-LoRA: every client trains the rank-one parts that matter most, as many as it can afford.

Paper: Federated LLMs Fine-tuned with Adaptive Importance-Aware LoRA, Su, Yan, Deng, arXiv 2411.06581 (v2: HAFLQ).
**The equations of the paper's body could not be read**, and there is no public code: what follows is our definition in
the spirit of the abstracts of v1 and v2. The rule by which v2 quantises messages is not published in what we have, and
is left out.

    down:      S_i = the k_i most important parts j (column b_j of B, row a_j of A) of each layer
               "freezing": all parts travel, those outside S_i stay frozen in the forward pass
               "truncation": only those of S_i travel, and the client starts off by s Σ_{j ∉ S_i} b_j a_jᵀ
    client i:  trains b_j, a_j of j ∈ S_i at the server's scale s = alpha / r, and measures
               I_ij = mean over the entries of b_j and a_j and over the local steps of |w ∂loss/∂w|
    server:    b_j ← Σ_{i: j ∈ S_i} p_i b_ij / q_j,   a_j likewise,   q_j = Σ_{i: j ∈ S_i} p_i;   q_j = 0: as it was
               Ī_j ← beta Ī_j + (1 - beta) Σ_{i: j ∈ S_i} p_i I_ij / q_j

| paper | here |
| --- | --- |
| rank-one matrix | a part |
| smoothed sensitivity Ī | slot ``importance``: one column per layer |
| adaptive aggregation | ``ScatterMean.mean("holders")`` |

Ours where the abstracts say nothing: the sensitivity is AdaLoRA's (arXiv 2303.10512) without its uncertainty factor,
and so is beta; a first measurement counts as it is (under AdaLoRA's start from zero a part that was measured once would
lose against one measured often, and here, unlike there, not all parts are measured); the choice is per layer, and of
equal parts it takes the lower index. Before anything is measured (all B = 0) the sets are random.

Parts that nobody trains are not measured, so the same few may be chosen for ever. ``random_share`` draws that share of
every client's set from all other parts instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from fslora.algebra.adapters import add_into, combine
from fslora.algebra.rows import ScatterMean, others, take
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
    Tensor,
    Trained,
)


class HAFLLoRA(Method):
    """HAFL-LoRA."""

    name: ClassVar[str] = "hafl-lora"
    paper: ClassVar[str] = "Adaptive Importance-Aware LoRA (HAFL), arXiv 2411.06581"
    differs: ClassVar[str] = "the most important rank-one parts, as many as its rank"
    travels: ClassVar[str] = "all parts (truncation: its own) and their indices down; its own parts and their scores up"

    mode: Literal["freezing", "truncation"] = Field(
        "freezing", description="What becomes of the other parts: frozen in the forward pass, or not sent at all."
    )
    beta: float = Field(0.85, ge=0, lt=1, description="How much of the old importance a new measurement leaves.")
    random_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of a client's parts that is drawn at random, against starvation of the others.",
    )
    weighting: Literal["uniform", "examples"] = Field(
        "examples", description="Those who trained a part count by their number of examples, or equally."
    )

    def broadcast(self, state: ServerState, client: Client, round: Round) -> Broadcast:
        """Returns the parts that travel, and which of the server's this client trains."""
        known = state.slots.get("importance")
        rows = {}
        for layer, pair in state.adapter.layers.items():
            importance = known.layers[layer].A[:, 0] if known else torch.zeros(pair.rank)
            rows[layer] = self._chosen(importance, client.rank, round.rng.child("parts", layer, client.id))
        return Broadcast(state.adapter if self.mode == "freezing" else take(state.adapter, rows), rows)

    def start(self, broadcast: Broadcast, site: Site) -> Start:
        """Returns the client's parts to train, and the others frozen beside them where they came."""
        assert broadcast.rows is not None
        if self.mode == "truncation":
            return Start(broadcast.adapter, measures_sensitivity=True)
        frozen = others(broadcast.adapter, broadcast.rows)
        return Start(take(broadcast.adapter, broadcast.rows), frozen=frozen, measures_sensitivity=True)

    def client_update(self, broadcast: Broadcast, start: Start, trained: Trained, site: Site) -> ClientUpdate:
        """Returns the differences of its parts and their sensitivities."""
        return replace(super().client_update(broadcast, start, trained, site), extras=trained.sensitivity)

    def aggregate(self, state: ServerState, updates: Iterator[ClientUpdate], round: Round) -> ServerState:
        """Returns the state after the mean of every part, and of its sensitivity, over those who trained it."""
        total = ScatterMean(state.adapter)
        blank = columns({name: torch.zeros(pair.rank) for name, pair in state.adapter.layers.items()})
        scores = ScatterMean(blank)
        for update in updates:
            weight = update.weight(self.weighting)
            total.add(update.adapter, update.rows, weight)
            scores.add(columns(update.extras), update.rows, weight)
        old, new = state.slots.get("importance", blank), scores.mean("holders")
        importance = combine(self._smoothed, old, new, columns(scores.shares()))
        adapter = add_into(total.mean("holders"), state.adapter)
        return replace(state, adapter=adapter, slots={**state.slots, "importance": importance})

    def _smoothed(self, old: Tensor, new: Tensor, share: Tensor) -> Tensor:
        measured = torch.where(old > 0, self.beta * old + (1 - self.beta) * new, new)
        return torch.where(share > 0, measured, old)

    def _chosen(self, importance: Tensor, k: int, rng: Rng) -> Tensor:
        """Returns which parts a client trains in one layer: int32 [k], increasing."""
        stream = rng.torch()
        share = self.random_share if importance.any() else 1.0
        drawn = int(share * k + torch.rand((), generator=stream).item())  # share · k in expectation
        order = importance.argsort(descending=True, stable=True)
        best, rest = order[: k - drawn], order[k - drawn :]
        some = rest[torch.randperm(len(rest), generator=stream)[:drawn]]
        return torch.cat([best, some]).sort().values.to(torch.int32)


def columns(scores: Mapping[str, Tensor]) -> Adapter:
    """Returns scores [k] by layer as an adapter of one column, to be scattered and averaged as the parts are."""
    return Adapter(
        {name: LoRA(score.unsqueeze(1), score.new_zeros(len(score), 0), 1.0) for name, score in scores.items()}
    )
