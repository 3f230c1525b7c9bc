"""FSLoRA: each round every client trains a random part of the server's LoRA, of the rank it can afford.

Paper: Federated Sketching LoRA, Fang, Han, Yuan, Hosseinalipour, Brinton, arXiv 2501.19389, algorithm 1.

    client i:  W0 + (alpha / r) B S_i A,   S_i = (r / k_i) · Σ_{j ∈ I_i} e_j e_jᵀ,   E[S_i] = identity
    server:    B, A  ←  B, A  +  (1 / M) Σ_i scatter(ΔB_i, ΔA_i)

| paper | here |
| --- | --- |
| r, k_i | ``template.rank``, ``client.rank`` |
| I_i | ``Broadcast.rows``, one draw per layer, the same for A and B |
| (alpha / r)(r / k_i) | the scale of the pair that travels |
| M | the cohort |

Only the submatrices travel (the paper books the whole pair downwards; entries outside I never enter the
client's forward pass, so leaving them out is exact).

Beyond the paper, by option: ``average = "holders"`` divides each part by the clients that trained it. With a
local optimizer that normalises its gradient (AdamW) the factor r / k cancels, and the paper's mean then
under-steps each part by about k / r; docs/averaging.md holds what was measured and why the default is what it
is. With the rank-stabilised scale alpha / sqrt(r) the client's scale is (alpha / sqrt(r))(r / k), not
alpha / sqrt(k).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from fslora.algebra.adapters import rescaled
from fslora.algebra.rows import AverageOver, ScatterMean, take
from fslora.algebra.sketch import Sketch, draw_rows
from fslora.methods.base import Method
from fslora.methods.server import ServerOptimizer, server_step
from fslora.types import Broadcast, Client, ClientUpdate, Round, Rows, ServerState


class FSLoRA(Method):
    """Federated Sketching LoRA."""

    name: ClassVar[str] = "fslora"
    paper: ClassVar[str] = "Federated Sketching LoRA, arXiv 2501.19389"
    differs: ClassVar[str] = "random rank-one parts, drawn anew each round, as many as its rank"
    travels: ClassVar[str] = "both factors of those parts and their indices, down and up"

    sketch: Sketch = Field(
        "independent",
        description="'independent' (the paper's), 'balanced' (the cohort covers all parts evenly) or 'nested'.",
    )
    shared_rows: bool = Field(False, description="One index set for all layers instead of one per layer.")
    average: AverageOver = Field(
        "holders", description="Divide by the 'cohort' (the paper's mean) or by the 'holders' of each part."
    )
    weighting: Literal["uniform", "examples"] = Field(
        "uniform", description="Clients count equally (the paper's), or by their number of examples."
    )
    server: ServerOptimizer = ServerOptimizer()

    def broadcast(self, state: ServerState, client: Client, round: Round) -> Broadcast:
        """Returns the client's random submatrices, scaled so that their expectation is the global layer."""
        rank = state.adapter.rank
        rows = self._rows(tuple(state.adapter.layers), rank, client, round)
        return Broadcast(rescaled(take(state.adapter, rows), rank / client.rank), rows)

    def aggregate(self, state: ServerState, updates: Iterator[ClientUpdate], round: Round) -> ServerState:
        """Returns the state after adding the mean of the scattered deltas."""
        total = ScatterMean(state.adapter)
        for update in updates:
            total.add(update.adapter, update.rows, update.weight(self.weighting))
        return server_step(state, total.mean(self.average), self.server)

    def _rows(self, layers: tuple[str, ...], rank: int, client: Client, round: Round) -> Rows:
        ids = [member.id for member in round.cohort]
        ranks = [member.rank for member in round.cohort]
        position = ids.index(client.id)
        streams = {layer: round.rng.child("sketch", "all" if self.shared_rows else layer) for layer in layers}
        return {layer: draw_rows(self.sketch, rank, ranks, position, ids, streams[layer]) for layer in layers}
