"""A simulation: the server's rounds and all of its clients in one process, a chunk of clients at a time."""

from __future__ import annotations

from collections.abc import Generator, Iterator

from fslora.clients import Answer, Clients, Request
from fslora.prepare import Federation
from fslora.rounds import Rounds, Watcher
from fslora.runfolder import RunFolder
from fslora.types import Round, ServerState


class Simulation(Rounds):
    """Runs a federation's rounds in this process."""

    def __init__(self, federation: Federation, folder: RunFolder, watcher: Watcher) -> None:
        super().__init__(federation, folder, watcher)
        self.clients = Clients(federation, self.wire)
        self.engine = self.clients.engine

    def exchange(
        self, requests: Iterator[Request], state: ServerState, plan: Round, lr: float
    ) -> Generator[Answer, None, None]:
        """Yields the clients' answers as they train; what they have to add to the base is added once for all."""
        changes = self.method.base(state)
        with self.federation.base.changed(changes.layers if changes else {}):
            yield from self.clients.answers(requests, self.memories, self.method, plan.rng, lr)

    def keep(self, answer: Answer, rounds: int) -> None:
        """Writes what a client keeps, as a client of its own would."""
        if answer.keeps is not None:
            self.memories.put(answer.client, answer.keeps, rounds)
