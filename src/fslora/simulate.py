"""A simulation: the server's rounds in this process, its clients here too or in worker processes, by the chunk."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import suppress
from itertools import islice
from types import TracebackType
from typing import Self

import torch

from fslora.clients import Answer, Clients, Request
from fslora.config import Experiment
from fslora.errors import FsloraError
from fslora.memory import peak_memory
from fslora.models.load import device_of
from fslora.prepare import Federation
from fslora.rounds import Rounds, Watcher
from fslora.runfolder import RunFolder
from fslora.spread.letters import answers_of, chunk_letter, round_letter
from fslora.spread.pool import Pool
from fslora.types import Round, ServerState


class Simulated(Rounds):
    """Rounds with clients on this machine."""

    def keep(self, answer: Answer, rounds: int) -> None:
        """Writes what a client keeps, as a client of its own would."""
        if answer.keeps is not None:
            self.memories.put(answer.client, answer.keeps, rounds)


class Simulation(Simulated):
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
            for chunk in chunks_of(requests, self.experiment.engine.together):
                yield from self.clients.answers(chunk, self.memories, self.method, plan.rng, lr)


class Spread(Simulated):
    """Runs a federation's rounds with its clients in worker processes.

    Chunks are those of a single process, and so are their sums, if a worker has as many threads: the same bits.
    """

    def __init__(self, federation: Federation, folder: RunFolder, watcher: Watcher, pool: Pool) -> None:
        super().__init__(federation, folder, watcher)
        self.pool = pool

    def run(self) -> ServerState:
        """Runs every round that is not yet in the folder's checkpoint; the workers prepare meanwhile.

        Raises:
            FsloraError: As `Rounds.run`, and whatever went wrong in a worker; the workers are then ended.
        """
        try:
            self.pool.use(self.experiment, self.federation.sites.partition.digest)
            return super().run()
        except BaseException:
            self.pool.stop()
            raise

    def exchange(
        self, requests: Iterator[Request], state: ServerState, plan: Round, lr: float
    ) -> Generator[Answer, None, None]:
        """Yields the clients' answers as their chunks are trained, in order."""
        shared = round_letter(plan.number, lr, self.method.base(state))
        chunks = chunks_of(requests, self.experiment.engine.together)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the cores are the workers', and threads that wait for each other would take them
        try:
            for frame in self.pool.answers(shared, (chunk_letter(chunk, self.memories) for chunk in chunks)):
                yield from answers_of(frame)
        except FsloraError as error:
            raise self._explained(error, plan.number + 1) from None
        finally:
            torch.set_num_threads(threads)

    def peak_memory(self) -> int:
        """Returns what this process and its workers have held at most, in bytes."""
        return peak_memory() + self.pool.peak_memory

    def _explained(self, error: FsloraError, number: int) -> FsloraError:
        """Says where the rounds before are, and leaves the worker's traceback there, where there is one."""
        trace = "\n".join(getattr(error, "__notes__", ()))
        where = self.folder.path
        if trace:
            with suppress(FsloraError):
                self.folder.write_text("traceback.txt", trace)
        see = f"; its traceback is in {where}/traceback.txt" if trace else ""
        return type(error)(f"round {number}: {error}{see}. The rounds before are in {where}; resume it")


def chunks_of(requests: Iterator[Request], size: int) -> Iterator[list[Request]]:
    """Yields the requests that are trained together: so many at a time, whoever trains them."""
    while chunk := list(islice(requests, size)):
        yield chunk


class Simulations:
    """Makes simulations as experiments ask for them, and keeps their worker processes for the next one."""

    def __init__(self) -> None:
        self._pool: Pool | None = None

    def __call__(self, federation: Federation, folder: RunFolder, watcher: Watcher) -> Rounds:
        """Returns the rounds of a run: in this process, or over workers."""
        devices = worker_devices(federation.experiment)
        if not devices:
            return Simulation(federation, folder, watcher)
        if self._pool is None or self._pool.devices != devices or self._pool.stopped:
            self.close()
            self._pool = Pool(devices)
        return Spread(federation, folder, watcher, self._pool)

    def close(self) -> None:
        """Ends the worker processes."""
        if self._pool is not None:
            self._pool.stop()
            self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def worker_devices(experiment: Experiment) -> tuple[str, ...]:
    """Returns the device of each worker process that an experiment's rounds occupy; empty where there is none.

    Raises:
        ModelError: There is no such device.
    """
    devices = experiment.engine.devices(cohort_size(experiment))
    for device in filter(None, devices):
        device_of(experiment.model, device, "engine.workers")
    return devices


def cohort_size(experiment: Experiment) -> int:
    """Returns how many clients train in a round."""
    fleet = experiment.fleet
    return 1 if fleet.pooled else fleet.clients if fleet.cohort == "all" else fleet.cohort
