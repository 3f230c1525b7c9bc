"""FedIT: FedAvg on LoRA factors of one common rank; the reference that every other method is held against.

Paper: Towards Building the Federated GPT: Federated Instruction Tuning, Zhang et al., arXiv 2305.05644.

    A ← Σ_i p_i A_i,   B ← Σ_i p_i B_i,   p_i = n_i / Σ_j n_j over the cohort

Averaging deltas instead of values is the same thing, because the weights sum to one. All clients train the
same rank, whatever they can afford: ``rank = "smallest"`` is what the weakest client allows (FedIT-low), and
``rank = "server"`` asks every client for the server's rank (FedIT-full, a reference beyond most budgets).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fslora.algebra.rows import ScatterMean
from fslora.methods.base import Method, initial_adapter
from fslora.methods.server import ServerOptimizer, server_step
from fslora.rng import Rng
from fslora.types import Broadcast, Client, ClientUpdate, Round, ServerState, Template


class FedIT(Method):
    """FedAvg of equal-rank LoRA."""

    name: ClassVar[str] = "fedit"
    paper: ClassVar[str] = "Towards Building the Federated GPT (FedIT), arXiv 2305.05644"
    differs: ClassVar[str] = "nothing: one rank for all"
    travels: ClassVar[str] = "both factors, down and up"

    rank: Annotated[int, Field(ge=1)] | Literal["smallest", "server"] = Field(
        "smallest", description="Everybody's rank: a number, the 'smallest' client's, or the 'server' rank."
    )
    weighting: Literal["uniform", "examples"] = Field(
        "examples", description="Clients count by their number of examples (the paper's), or equally."
    )
    server: ServerOptimizer = ServerOptimizer()

    def check(self, rank: int) -> None:
        """Raises ValueError when the common rank exceeds the server's."""
        if isinstance(self.rank, int) and self.rank > rank:
            raise ValueError(
                f"method.rank is {self.rank} but adapter.rank is {rank}; lower method.rank or raise adapter.rank"
            )

    def init(self, template: Template, fleet: Sequence[Client], rng: Rng) -> ServerState:
        """Returns a fresh adapter of the common rank."""
        if self.rank == "smallest":
            rank = min(client.rank for client in fleet)
        elif self.rank == "server":
            rank = template.rank
        else:
            rank = self.rank
        return ServerState(initial_adapter(template, rank, rng))

    def broadcast(self, state: ServerState, client: Client, round: Round) -> Broadcast:
        """Returns the whole adapter."""
        return Broadcast(state.adapter)

    def aggregate(self, state: ServerState, updates: Iterator[ClientUpdate], round: Round) -> ServerState:
        """Returns the state after adding the weighted mean of the deltas."""
        total = ScatterMean(state.adapter)
        for update in updates:
            total.add(update.adapter, None, update.weight(self.weighting))
        return server_step(state, total.mean("cohort"), self.server)
