"""raFLoRA: FlexLoRA whose mean at each rank index counts only the clients that reach it.

Paper: Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity, Wu, Hu, Min, Wang,
arXiv 2602.13486.

    per segment h of the sorted ranks:  ΔW_h = Σ_{i: k_i ≥ r_h} (p_i / Σ_{j: k_j ≥ r_h} p_j) s_i B_i[:, seg] A_i[seg]
    the same by index j:                ΔW = Σ_i s_i B_i diag(p_i / q_j) A_i,   q_j = Σ p_i over clients with k_i > j
    SVD of ΔW, cut to rank r_L; client i gets the leading k_i triples

| paper | here |
| --- | --- |
| r_L | the largest rank of the fleet, which the server's may exceed |
| segments | not needed: rows of B_i divided by q_j, then all is FlexLoRA |
| p_i | by examples |

Nobody trains: ΔW stays as it is, where FlexLoRA shrinks index j to q_j of itself. The price is that it is not the mean
of products: a single large client owns the tail, whatever its number of examples, and the result depends on how a
client's product is factored (clients must not decompose or permute their parts).

We had the abstract, summaries and a public re-implementation, no official code. Where these leave it open:

- Singular values go into B (``split = "B"``), as in FlexLoRA and in the first author's earlier code; "sqrt" puts their
  roots into both factors, as the re-implementation does: at the server's scale, since the conversion to a client's
  scale always goes into B.
- Indices that no client of the round reaches keep what they had (``absent = "keep"``): the re-implementation adds
  nothing there ("drop"), so that a round without large clients cuts the global update for good.
- Parts that ΔW does not fill are drawn afresh with B = 0, as in FlexLoRA here; the head is the mean over all clients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from fslora.algebra.adapters import grown
from fslora.algebra.lowrank import Split, decomposed, mean_product, stacked
from fslora.algebra.rows import leading
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


class RaFLoRA(Method):
    """FlexLoRA with rank-partitioned aggregation."""

    name: ClassVar[str] = "raflora"
    paper: ClassVar[str] = "Preventing Rank Collapse in Federated Low-Rank Adaptation (raFLoRA), arXiv 2602.13486"
    differs: ClassVar[str] = "how many leading singular triples of the global update it gets"
    travels: ClassVar[str] = "both factors at the client's rank, down and up"
    streams: ClassVar[bool] = False
    error_feedback: ClassVar[bool] = False

    absent: Literal["keep", "drop"] = Field(
        "keep", description="Indices that no client of the round reaches 'keep' their part of the update, or 'drop' it."
    )
    split: Split = Field(
        "B", description="Singular values are carried by 'B', or their roots ('sqrt') by both factors."
    )
    weighting: Literal["uniform", "examples"] = Field(
        "examples", description="Clients count by their number of examples (the paper's), or equally."
    )

    def init(self, template: Template, fleet: Sequence[Client], rng: Rng) -> ServerState:
        """Returns a fresh adapter, and the largest rank of the fleet: no client could ever change what lies beyond."""
        state, largest = super().init(template, fleet, rng), max(client.rank for client in fleet)
        return replace(state, adapter=leading(state.adapter, largest), scalars={"largest_rank": float(largest)})

    def broadcast(self, state: ServerState, client: Client, round: Round) -> Broadcast:
        """Returns the leading singular triples as factors, at the client's rank and scale."""
        return Broadcast(grown(state.adapter, round.template, client.rank, round.rng.child("fresh")))

    def client_update(self, broadcast: Broadcast, start: Start, trained: Trained, site: Site) -> ClientUpdate:
        """Returns both factors as they are: a product needs all of them."""
        return ClientUpdate(site.client.id, trained.adapter, site.client.examples)

    def aggregate(self, state: ServerState, updates: Iterator[ClientUpdate], round: Round) -> ServerState:
        """Returns the state with the SVD of the index-normalised mean."""
        sent = list(updates)
        weights = [update.weight(self.weighting) for update in sent]
        rank_of = {client.id: client.rank for client in round.cohort}
        ranks = [rank_of[update.client] for update in sent]
        mean = normalised_mean([update.adapter for update in sent], ranks, weights)
        if self.absent == "keep":
            mean = beside(mean, state.adapter, max(ranks))
        scale, most = round.template.scale(round.template.rank), int(state.scalars["largest_rank"])
        adapter, error = decomposed(mean, most, scale, round.rng.child("svd"), self.split)
        return replace(state, adapter=adapter, scalars={**state.scalars, "report.svd_error": error})


def normalised_mean(adapters: Sequence[Adapter], ranks: Sequence[int], weights: Sequence[float]) -> Adapter:
    """Returns Σ_i s_i B_i diag(p_i / q_j) A_i, in stacked factors, and the plain means of dense tensors."""
    reach = shares_by_index(ranks, weights)
    return mean_product([divided(adapter, reach) for adapter in adapters], weights)


def shares_by_index(ranks: Sequence[int], weights: Sequence[float]) -> Tensor:
    """Returns q_j, the share of the weight of those whose rank is above j: float32 [largest rank], decreasing."""
    weight = torch.tensor(weights, dtype=torch.float64)
    held = torch.arange(max(ranks)) < torch.tensor(ranks).unsqueeze(1)
    return (weight @ held.double() / weight.sum()).float()


def divided(adapter: Adapter, shares: Tensor) -> Adapter:
    """Returns the adapter with row j of every B divided by the j-th share."""
    layers = {
        name: LoRA(pair.A, pair.Bt / shares[: pair.rank].unsqueeze(1), pair.scale)
        for name, pair in adapter.layers.items()
    }
    return Adapter(layers, adapter.dense)


def beside(mean: Adapter, old: Adapter, first: int) -> Adapter:
    """Returns the mean and, added to its products, the parts of ``old`` from index ``first`` on."""
    layers = {}
    for name, pair in mean.layers.items():
        before = old.layers[name]
        layers[name] = stacked([pair, LoRA(before.A[first:], before.Bt[first:], before.scale)])
    return Adapter(layers, mean.dense)
