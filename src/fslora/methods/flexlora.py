"""FlexLoRA: average the products, decompose them, give each client the best approximation of its own rank.

Paper: Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources, Bai, Chen, Qian,
Yao, Li, arXiv 2402.11505.

    server:    ΔW = Σ_i p_i s_i B_i A_i = U Σ Vᵀ,   p_i = n_i / Σ_j n_j over the cohort
    client i:  B = U[:, :k_i] Σ[:k_i] / s_i,   A = Vᵀ[:k_i]   hence s_i B A is the best ΔW of rank k_i

| paper | here |
| --- | --- |
| alpha / r_k | s_i = ``template.scale(client.rank)``, another one for every rank |
| ΔW | its SVD as a pair at the server's scale: A = Vᵀ, B = U Σ / s |
| SVD of the d_out x d_in matrix | `svd_of` on the stacked factors, which is the same and never needs that matrix |

Choices where the paper leaves them, or that go beyond it:

- The server keeps and serves all of ΔW (``keep = "all"``), as in the paper: at most min(Σ k_i, d_in, d_out) parts. No
  client can get more than the server's rank of them, so ``keep = "server"`` changes nothing for clients; what is
  served is then no larger than the other methods', and large cohorts may take the randomised SVD.
- Where ΔW has fewer singular values than a client has parts, the rest of its A is drawn afresh and B is zero there, so
  that the rank can grow again (an SVD leaves these rows open; some libraries would fill them with rounding noise).
- Before the first aggregation everybody gets the leading rows of one common A, and B = 0. The base is never merged.
- Clients start a new optimizer each round: the basis has changed.

Under unequal ranks, what lies at index j of the SVD shrinks by the share of clients that reach it, in every round,
even if nobody trains: the rank collapse that raFLoRA is against.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from fslora.algebra.adapters import grown
from fslora.algebra.lowrank import decomposed, mean_product
from fslora.methods.base import Method
from fslora.types import Broadcast, Client, ClientUpdate, Round, ServerState, Site, Start, Trained


class FlexLoRA(Method):
    """Mean of products, SVD, truncation to each client's rank."""

    name: ClassVar[str] = "flexlora"
    paper: ClassVar[str] = "FlexLoRA: Heterogeneous Tasks and Client Resources, arXiv 2402.11505"
    differs: ClassVar[str] = "how many leading singular triples of the global update it gets"
    travels: ClassVar[str] = "both factors at the client's rank, down and up"
    streams: ClassVar[bool] = False
    error_feedback: ClassVar[bool] = False

    keep: Literal["all", "server"] = Field(
        "all", description="The server keeps and serves 'all' singular values, or as many as the 'server' rank."
    )
    weighting: Literal["uniform", "examples"] = Field(
        "examples", description="Clients count by their number of examples (the paper's), or equally."
    )

    def broadcast(self, state: ServerState, client: Client, round: Round) -> Broadcast:
        """Returns the leading singular triples as factors, at the client's rank and scale."""
        return Broadcast(grown(state.adapter, round.template, client.rank, round.rng.child("fresh")))

    def client_update(self, broadcast: Broadcast, start: Start, trained: Trained, site: Site) -> ClientUpdate:
        """Returns both factors as they are: a product needs all of them."""
        return ClientUpdate(site.client.id, trained.adapter, site.client.examples)

    def aggregate(self, state: ServerState, updates: Iterator[ClientUpdate], round: Round) -> ServerState:
        """Returns the state with the SVD of the mean product."""
        sent = list(updates)
        weights = [update.weight(self.weighting) for update in sent]
        mean = mean_product([update.adapter for update in sent], weights)
        rank = round.template.rank if self.keep == "server" else None
        adapter, error = decomposed(mean, rank, round.template.scale(round.template.rank), round.rng.child("svd"))
        return replace(state, adapter=adapter, scalars={**state.scalars, "report.svd_error": error})
