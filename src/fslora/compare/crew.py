"""The parent's side of the worker processes: hand out cells, hear how they ended, survive a worker that dies."""

from __future__ import annotations

import json
import selectors
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fslora.compare.plan import Cell
from fslora.config import to_toml
from fslora.processes import Child, threads_each


class Worker(Child):
    """One process that runs cells, one after the other."""

    def ask(self, cell: Cell, folder: Path) -> None:
        """Hands it a cell. A worker that is gone is noticed when its answer is read."""
        with suppress(BrokenPipeError):
            request = {"folder": str(folder), "experiment": to_toml(cell.experiment)}
            self.requests.write(json.dumps(request).encode() + b"\n")
            self.requests.flush()

    def answer(self) -> str | None:
        """Returns what went wrong with its cell, or None; raises EOFError when it died over it."""
        line = self.answers.readline()
        if not line.endswith(b"\n"):
            raise EOFError(self.cause_of_death("fewer --jobs"))
        error = json.loads(line)["error"]
        return None if error is None else str(error)


class Crew:
    """At most so many workers, each with one cell at a time. A worker that died is replaced by a new one."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._idle: list[Worker] = []
        self._busy: dict[Worker, Cell] = {}
        self._selector = selectors.DefaultSelector()

    @property
    def cells(self) -> list[Cell]:
        """The cells that run now."""
        return list(self._busy.values())

    @property
    def free(self) -> int:
        """How many more cells it can take."""
        return self._jobs - len(self._busy)

    def run(self, cell: Cell, folder: Path) -> None:
        """Lets a free worker run a cell in a folder."""
        worker = self._idle.pop() if self._idle else Worker.start("fslora.compare.worker", threads_each(self._jobs))
        self._busy[worker] = cell
        self._selector.register(worker.answers, selectors.EVENT_READ, worker)
        worker.ask(cell, folder)

    def ended(self, timeout: float) -> Iterator[tuple[Cell, str | None]]:
        """Yields the cells that ended, and what went wrong with each; waits so many seconds for the first."""
        for entry, _ in self._selector.select(timeout):
            worker: Worker = entry.data
            cell = self._busy.pop(worker)
            self._selector.unregister(worker.answers)
            try:
                error = worker.answer()
                self._idle.append(worker)
            except EOFError as death:
                worker.stop()
                error = str(death)
            yield cell, error

    def stop(self) -> None:
        """Ends all workers at once. Run folders bear that: what a cell had done is in its checkpoint."""
        for worker in [*self._busy, *self._idle]:
            worker.stop()
        self._selector.close()
