"""What happens at clients: a request comes, is trained on with the client's data, is answered. No method's name.

The same in a simulation and at a site: neither sees of the server more than the requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from fslora.cost import client_flops, client_memory
from fslora.data.batches import length_order, local_batches
from fslora.engine.cohort import CohortEngine
from fslora.engine.sequential import SequentialEngine
from fslora.errors import WireError
from fslora.methods import Method
from fslora.prepare import Federation
from fslora.rng import Rng
from fslora.types import Broadcast, Client, ClientMemory, LocalProblem, Site, Start
from fslora.wire import Payload, Wire, remembering


@dataclass(frozen=True)
class Request:
    """What goes down to one client in a round."""

    client: Client
    payload: Payload


@dataclass(frozen=True)
class Answer:
    """What comes of one request: an update and what it cost, or the reason why there is none."""

    client: int
    payload: Payload | None = None
    """None: there is no update."""
    refused: str = ""
    """Why."""
    losses: tuple[float, ...] = ()
    """Mean loss of each local step."""
    rank: int = 0
    flops: float = 0.0
    memory: int = 0
    """Bytes that training took."""
    keeps: ClientMemory | None = None
    """What the client keeps if its update is used; None where that is what it kept before. It never travels."""


class Clients:
    """The clients of one process: their data, one base for all, and an engine."""

    def __init__(self, federation: Federation, wire: Wire) -> None:
        self.federation = federation
        self.wire = wire
        self.template = federation.template
        self.trainers, self.shares = federation.trainers, federation.shares
        self.lengths = federation.train.lengths
        local, engine = federation.experiment.local, federation.experiment.engine
        dropout = federation.experiment.adapter.dropout
        self.engine = (
            CohortEngine(federation.base, local, dropout, engine.chunk)
            if engine.name == "cohort"
            else SequentialEngine(federation.base, local, dropout)
        )

    def answers(
        self,
        requests: Iterable[Request],
        memories: Mapping[int, ClientMemory],
        method: Method,
        rng: Rng,
        lr: float,
    ) -> Iterator[Answer]:
        """Yields the answer to each request, training a chunk of clients at a time.

        The base has to be the one that the requests are about (``Base.changed``).

        Args:
            requests: By increasing client id.
            memories: What clients kept from earlier rounds.
            method: What they train with.
            rng: The round's own stream.
            lr: Learning rate.
        """
        pending: dict[int, tuple[Broadcast, Start, Site, LocalProblem]] = {}
        refused: dict[int, str] = {}

        def problems() -> Iterator[LocalProblem]:
            for request in requests:
                client = request.client
                try:
                    received = self.wire.unpack_broadcast(request.payload, self.template)
                except WireError as error:
                    refused[client.id] = f"it refused its broadcast: {error}"
                    continue
                site = Site(client, self.template, memories.get(client.id, ClientMemory()))
                start = method.start(received, site)
                problem = self.problem(client, start, rng)
                pending[client.id] = received, start, site, problem
                yield problem

        for trained in self.engine.train(problems(), lr):
            received, start, site, problem = pending.pop(trained.client)
            update = method.client_update(received, start, trained, site)
            payload, unsent = self.wire.pack_update(
                update, self.template, site.memory, rng.child("wire", trained.client)
            )
            memory = remembering(method.remember(received, start, trained, site), unsent)
            yield Answer(
                trained.client,
                payload,
                losses=trained.losses,
                rank=start.adapter.rank,
                flops=client_flops(self.federation.base, start, problem.batches),
                memory=client_memory(start, site.memory, self.federation.experiment.local),
                keeps=None if memory is site.memory else memory,
            )
        for client, reason in refused.items():
            yield Answer(client, refused=reason)

    def problem(self, client: Client, start: Start, rng: Rng) -> LocalProblem:
        """Returns what the engine trains for one client: its start and the batches of its local steps."""
        local, index = self.federation.experiment.local, self.shares[client.id]
        stream, size = rng.child("batches", client.id), self.federation.batch_size
        parts = local_batches(self.lengths, index, size, local.steps, local.epochs, stream)
        order = length_order(len(parts), rng.child("order"))
        batches = [self.federation.train.batch(parts[i]) for i in order.tolist()]
        return LocalProblem(client.id, start, batches, rng.child("dropout", client.id))
