"""FedSA-LoRA: both factors are trained, A is shared, B and the head stay with the client.

Paper: Selective Aggregation for Low-Rank Adaptation in Federated Learning, Guo, Zeng, Wang, Fan, Wang, Qu,
arXiv 2410.01463.

    client i:  trains (A, B_i) from A = Ā and its own B_i, keeps B_i and its head, sends A_i
    server:    Ā ← Ā + Σ_i p_i (A_i - Ā) = Σ_i p_i A_i
    client i serves  W0 + s B_i Ā

| paper | here |
| --- | --- |
| Ā | ``state.adapter``'s A; its B stays zero and is nobody's |
| B_i, head | slot ``own`` of the client's memory; at first B_i = 0 and the head is the template's |
| p_i | equal: the public code counts the examples *processed*, which are the same for all |

Unequal ranks (beyond the paper): client i holds the first k_i rows of Ā; each row is averaged over its holders and
keeps its value where there are none. All clients have the server's scale; a B_i absorbs whatever scale there is.

There is no global model. A synchronisation changes what a client serves by s B_i (Ā - A_i), and a client that was
absent meets a newer Ā with its old B_i. A client that never took part serves B_i = 0 and an untrained head.

The public code lets all simulated clients share one model object while B and the head are left out of what is
synchronised: by reading it, client i starts from the B of the client trained just before. Here each has its own.
The head is local in the paper's main comparison; ``share_head`` averages it, as some of its baselines do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from fslora.algebra.adapters import add_into, completed
from fslora.algebra.rows import ScatterMean, leading
from fslora.methods.base import Method
from fslora.types import (
    Adapter,
    Broadcast,
    Client,
    ClientMemory,
    ClientUpdate,
    LoRA,
    Round,
    ServerState,
    Site,
    Start,
    Trained,
)


class FedSALoRA(Method):
    """Share A, keep B."""

    name: ClassVar[str] = "fedsa-lora"
    paper: ClassVar[str] = "Selective Aggregation for Low-Rank Adaptation (FedSA-LoRA), arXiv 2410.01463"
    differs: ClassVar[str] = "how many leading rows of A; its own B and head"
    travels: ClassVar[str] = "those rows of A, down and up"
    personal: ClassVar[bool] = True

    share_head: bool = Field(False, description="Average the head too, instead of leaving it with each client.")
    weighting: Literal["uniform", "examples"] = Field(
        "uniform", description="Clients count equally (as in the public code), or by their number of examples."
    )

    def broadcast(self, state: ServerState, client: Client, round: Round) -> Broadcast:
        """Returns the client's rows of A."""
        return Broadcast(self._shared(state.adapter, client.rank))

    def start(self, broadcast: Broadcast, site: Site) -> Start:
        """Returns A as it came, with the client's own B and head."""
        return Start(self._with_own(broadcast.adapter, site))

    def client_update(self, broadcast: Broadcast, start: Start, trained: Trained, site: Site) -> ClientUpdate:
        """Returns the change of A, and of the head where it is shared."""
        update = super().client_update(broadcast, start, trained, site)
        return replace(update, adapter=self._shared(update.adapter, site.client.rank))

    def remember(self, broadcast: Broadcast, start: Start, trained: Trained, site: Site) -> ClientMemory:
        """Returns B and the head as the client trained them."""
        own = trained.adapter.only("B")
        return ClientMemory({"own": Adapter(own.layers) if self.share_head else own})

    def aggregate(self, state: ServerState, updates: Iterator[ClientUpdate], round: Round) -> ServerState:
        """Returns the state after adding the mean change of A, each row's over its holders."""
        total = ScatterMean(state.adapter)
        for update in updates:
            total.add(update.adapter, None, update.weight(self.weighting))
        return replace(state, adapter=add_into(total.mean("holders"), state.adapter))

    def client_adapter(self, state: ServerState, site: Site) -> Adapter:
        """Returns the client's own B and head with the newest A."""
        return self._with_own(self._shared(state.adapter, site.client.rank), site)

    def _shared(self, adapter: Adapter, rank: int) -> Adapter:
        part = leading(adapter, rank).only("A")
        return part if self.share_head else Adapter(part.layers)

    def _with_own(self, shared: Adapter, site: Site) -> Adapter:
        own = site.memory.slots.get("own") or _untrained(shared, site)
        return Adapter(completed(shared, own).layers, {**own.dense, **shared.dense})


def _untrained(shared: Adapter, site: Site) -> Adapter:
    """Returns what a client has before its first round: B = 0 and the template's head."""
    layers = {
        name: LoRA(pair.A[:0], torch.zeros(pair.rank, site.template.layers[name][1]), pair.scale)
        for name, pair in shared.layers.items()
    }
    return Adapter(layers, {name: tensor.clone() for name, tensor in site.template.dense.items()})
