"""Local training: every client alone with its own adapter and head; what federating has to beat.

No paper: the baseline of personalised federated learning. Nothing is averaged, so a client's model does not depend on
who else takes part. Nothing travels but the run's seed, from which a client draws what it starts from: the leading
parts of the adapter that every other method starts from, at its own rank and scale.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import ClassVar

import torch

from fslora.algebra.adapters import at_scale
from fslora.algebra.rows import leading
from fslora.methods.base import Method, initial_adapter
from fslora.rng import Rng
from fslora.types import (
    Adapter,
    Broadcast,
    Client,
    ClientMemory,
    ClientUpdate,
    Round,
    ServerState,
    Site,
    Start,
    Trained,
)

OWN = "own"


class Local(Method):
    """Every client trains alone."""

    name: ClassVar[str] = "local"
    paper: ClassVar[str] = "none: the baseline without federation"
    differs: ClassVar[str] = "everything: each has a model of its own, of its own rank"
    travels: ClassVar[str] = "nothing (the run's seed)"
    personal: ClassVar[bool] = True

    def broadcast(self, state: ServerState, client: Client, round: Round) -> Broadcast:
        """Returns no tensors, and the seed of the start: the run's, of which ``init`` and every round have streams."""
        return Broadcast(_nothing(state.adapter), extras={"seed": torch.tensor(round.rng.seed)})

    def start(self, broadcast: Broadcast, site: Site) -> Start:
        """Returns the client's own adapter, as its last round left it."""
        if OWN in site.memory.slots:
            return Start(site.memory.slots[OWN])
        rng = Rng(int(broadcast.extras["seed"]))
        return Start(_cut(initial_adapter(site.template, site.template.rank, rng), site))

    def client_update(self, broadcast: Broadcast, start: Start, trained: Trained, site: Site) -> ClientUpdate:
        """Returns no tensors."""
        return ClientUpdate(site.client.id, _nothing(trained.adapter), site.client.examples)

    def remember(self, broadcast: Broadcast, start: Start, trained: Trained, site: Site) -> ClientMemory:
        """Returns what was trained."""
        return ClientMemory({OWN: trained.adapter})

    def aggregate(self, state: ServerState, updates: Iterator[ClientUpdate], round: Round) -> ServerState:
        """Returns the state as it is, once every client has trained."""
        deque(updates, maxlen=0)  # a simulated client trains when its update is asked for
        return state

    def client_adapter(self, state: ServerState, site: Site) -> Adapter:
        """Returns the client's own adapter; before its first round, what it will start from."""
        return site.memory.slots[OWN] if OWN in site.memory.slots else _cut(state.adapter, site)


def _nothing(adapter: Adapter) -> Adapter:
    return Adapter(leading(adapter, 0).layers)


def _cut(adapter: Adapter, site: Site) -> Adapter:
    """Returns what a client starts from: its leading parts of the common draw, at its own scale."""
    part, scale = leading(adapter, site.client.rank), site.template.scale(site.client.rank)
    return Adapter({name: at_scale(pair, scale) for name, pair in part.layers.items()}, part.dense)
