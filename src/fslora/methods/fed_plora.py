"""Fed-PLoRA: LoRA as parallel rank-one modules; a client trains some and folds the others into its frozen base.

Paper: Heterogeneous Federated Fine-Tuning with Parallel One-Rank Adaptation, Zhang, Hu, Xu, arXiv 2602.16936. Its
code is announced but was not to be had; what follows is from public summaries of the text, with the paper's symbols.

    down:      all R modules (b_j, a_j), and K_i: k_i of them at random ("select-N-fold")
    client i:  W_i = W0 + s Σ_{j ∉ K_i} b_j a_jᵀ frozen ("fold"); it trains b_j, a_j of j ∈ K_i at scale s = alpha / R
    server:    b_j ← mean over {i: j ∈ K_i} of b_ij,   a_j likewise;   a module that nobody trained stays as it is

| paper | here |
| --- | --- |
| R, k_i | ``template.rank``, ``client.rank`` |
| module j | part j: row j of A and of Bt |
| K_i | ``Broadcast.rows`` |
| the folded part of W_i | ``Start.frozen``: a second pair in the forward pass; W0 itself is never changed |

Every client starts from exactly the global model, whatever its rank; the scale is that of the server and no r / k
belongs here (both unlike FSLoRA, from whose stream the random sets are drawn, so that comparisons are paired).

What the summaries leave open: K_i is drawn per layer by default (``shared_rows``: one for all layers); the server
draws it and sends the indices; the head is the mean over all clients of the round, with the same weights as a module.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from fslora.algebra.adapters import add_into
from fslora.algebra.rows import ScatterMean, others, take
from fslora.algebra.sketch import draw_rows
from fslora.methods.base import Method
from fslora.types import Broadcast, Client, ClientUpdate, Round, ServerState, Site, Start


class FedPLoRA(Method):
    """Fed-PLoRA."""

    name: ClassVar[str] = "fed-plora"
    paper: ClassVar[str] = "Parallel One-Rank Adaptation (Fed-PLoRA), arXiv 2602.16936"
    differs: ClassVar[str] = "random rank-one parts, as many as its rank, trained beside the others, which are frozen"
    travels: ClassVar[str] = "all parts and the indices of its own down; both factors of its own parts up"

    shared_rows: bool = Field(False, description="One index set for all layers instead of one per layer.")
    weighting: Literal["uniform", "examples"] = Field(
        "uniform", description="Those who trained a module count equally (the paper's), or by their number of examples."
    )

    def broadcast(self, state: ServerState, client: Client, round: Round) -> Broadcast:
        """Returns all modules, and which of them this client trains."""
        rows = {}
        for layer, pair in state.adapter.layers.items():
            stream = round.rng.child("sketch", "all" if self.shared_rows else layer)
            rows[layer] = draw_rows("independent", pair.rank, [client.rank], 0, [client.id], stream)
        return Broadcast(state.adapter, rows)

    def start(self, broadcast: Broadcast, site: Site) -> Start:
        """Returns the client's modules to train, the others frozen beside them."""
        assert broadcast.rows is not None
        return Start(take(broadcast.adapter, broadcast.rows), frozen=others(broadcast.adapter, broadcast.rows))

    def aggregate(self, state: ServerState, updates: Iterator[ClientUpdate], round: Round) -> ServerState:
        """Returns the state after adding every module's mean difference over those who trained it."""
        total = ScatterMean(state.adapter)
        for update in updates:
            total.add(update.adapter, update.rows, update.weight(self.weighting))
        return replace(state, adapter=add_into(total.mean("holders"), state.adapter))
