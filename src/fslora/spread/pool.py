"""The run's side of its worker processes: chunks go to whoever is free, answers come back in their order."""

from __future__ import annotations

import fcntl
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import islice
from queue import SimpleQueue
from typing import Any

from fslora.config import Experiment
from fslora.errors import DataError, TrainingError
from fslora.processes import Child, threads_each
from fslora.spread.frames import Frame, receive, send
from fslora.spread.letters import error_of, setup

PIPE = 2**20
"""Bytes that a pipe holds, where the system lets it: fewer turns between the two processes."""


class Worker(Child):
    """One worker process."""

    def ask(self, *frames: Frame) -> Frame:
        """Returns its answer to frames of which the last is answered.

        Raises:
            FsloraError: What went wrong in it; a TrainingError where it died.
        """
        try:
            for frame in frames:
                send(self.requests, frame)
            answer = receive(self.answers)
        except (EOFError, OSError):
            raise TrainingError(self.cause_of_death("fewer engine.workers or a smaller engine.chunk")) from None
        error = error_of(answer)
        if error:
            raise error
        return answer


class Pool:
    """Worker processes, one for each device; ``use`` prepares them for a run, ``stop`` ends them."""

    def __init__(self, devices: Sequence[str]) -> None:
        self.devices = tuple(devices)
        self._threads = ThreadPoolExecutor(len(devices), thread_name_prefix="worker")
        self.workers: list[Worker] = []
        self._ready: list[Future[None]] = []
        self._free: SimpleQueue[Worker] = SimpleQueue()
        self._rounds: dict[int, Frame] = {}
        """Process → the letter of the round that it was told of."""
        self._peaks: dict[int, int] = {}
        self.stopped = False
        try:
            for _ in devices:
                self.workers.append(Worker.start("fslora.spread.process", threads_each(len(devices))))
        except BaseException:
            self.stop()
            raise
        for worker in self.workers:
            for stream in (worker.requests, worker.answers):
                with suppress(OSError, AttributeError):
                    fcntl.fcntl(stream, fcntl.F_SETPIPE_SZ, PIPE)

    def use(self, experiment: Experiment, digest: str) -> None:
        """Lets all workers prepare a run, each on its device; returns before they have.

        Args:
            experiment: The run's.
            digest: Of the partition of its data.
        """
        self._rounds.clear()
        self._peaks.clear()
        self._free = SimpleQueue()
        self._ready = [
            self._threads.submit(self._prepare, worker, _at(experiment, device), digest)
            for worker, device in zip(self.workers, self.devices, strict=True)
        ]

    def _prepare(self, worker: Worker, experiment: Experiment, digest: str) -> None:
        found = worker.ask(setup(experiment)).head["digest"]
        if found != digest:
            raise DataError(
                f"a worker process reads other data than the run (partition {found}, here {digest}): what data.source "
                "names has changed in between. Start the run anew"
            )
        self._free.put(worker)

    def answers(self, round_letter: Frame, chunks: Iterator[Frame]) -> Iterator[Frame]:
        """Yields the answers to a round's chunks, in their order; no more than two for each worker are held.

        Raises:
            FsloraError: What went wrong in a worker, as soon as it does.
        """
        self._wait_for_all()
        window = 2 * len(self.workers)
        pending = deque(self._submit(round_letter, chunk) for chunk in islice(chunks, window))
        while pending:
            _wait_for_first(list(pending))
            answer = pending.popleft().result()
            pending.extend(self._submit(round_letter, chunk) for chunk in islice(chunks, 1))
            yield answer

    def _submit(self, round_letter: Frame, chunk: Frame) -> Future[Frame]:
        return self._threads.submit(self._ask, round_letter, chunk)

    def _ask(self, round_letter: Frame, chunk: Frame) -> Frame:
        worker = self._free.get()
        told = self._rounds.get(worker.process.pid) is round_letter
        answer = worker.ask(chunk) if told else worker.ask(round_letter, chunk)
        self._rounds[worker.process.pid] = round_letter
        self._peaks[worker.process.pid] = answer.head["peak"]
        self._free.put(worker)
        return answer

    @property
    def peak_memory(self) -> int:
        """The most bytes that each worker has held in this run, summed."""
        return sum(self._peaks.values())

    def _wait_for_all(self) -> None:
        while self._ready:
            _wait_for_first(self._ready)
            self._ready.pop(0)

    def stop(self) -> None:
        """Ends all workers at once: they hold nothing that is not in the run folder."""
        self.stopped = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self.workers:
            worker.process.kill()
            self._free.put(worker)  # so that no thread waits for one that is free
        self._threads.shutdown(wait=True)
        for worker in self.workers:
            worker.stop()


def _wait_for_first(pending: Sequence[Future[Any]]) -> None:
    """Waits for the first of these; raises what went wrong with any of them meanwhile."""
    while True:
        running = [future for future in pending if not future.done()]
        for future in pending:
            if future.done():
                future.result()
        if pending[0].done():
            return
        wait(running, return_when=FIRST_COMPLETED)


def _at(experiment: Experiment, device: str) -> Experiment:
    """Returns the experiment with its base on a device."""
    if not device:
        return experiment
    return experiment.model_copy(update={"model": experiment.model.model_copy(update={"device": device})})
