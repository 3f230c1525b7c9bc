"""The parent's side of the worker processes: hand out cells, hear how they ended, survive a worker that dies."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fslora.compare.plan import Cell
from fslora.config import to_toml

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def threads_each(jobs: int) -> int:
    """Returns the threads of one of so many workers: its share of the cores, or of what OMP_NUM_THREADS allows."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, (int(allowed) if allowed.isdigit() else cores) // jobs)


@dataclass(frozen=True)
class Worker:
    """One process, and where what it complains of is kept."""

    process: subprocess.Popen[str]
    complaints: IO[str]

    @classmethod
    def start(cls, threads: int) -> Worker:
        """Returns a new worker. It has a session of its own: a terminal's Ctrl-C is for the parent alone."""
        complaints = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed by stop)
        process = subprocess.Popen(
            [sys.executable, "-c", "from fslora.compare.worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            env={**os.environ, **dict.fromkeys(THREADS, str(threads))},
            start_new_session=True,
        )
        return cls(process, complaints)

    @property
    def answers(self) -> IO[str]:
        """Where it answers."""
        assert self.process.stdout
        return self.process.stdout

    def ask(self, cell: Cell, folder: Path) -> None:
        """Hands it a cell. A worker that is gone is noticed when its answer is read."""
        assert self.process.stdin
        with suppress(BrokenPipeError):
            request = {"folder": str(folder), "experiment": to_toml(cell.experiment)}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()

    def answer(self) -> str | None:
        """Returns what went wrong with its cell, or None; raises EOFError when it died over it."""
        line = self.answers.readline()
        if not line.endswith("\n"):
            raise EOFError(self._cause_of_death())
        error = json.loads(line)["error"]
        return None if error is None else str(error)

    def stop(self) -> None:
        """Ends it at once. Run folders bear that: what it had done is in its checkpoint."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.answers, self.complaints):
            with suppress(OSError):
                if stream:
                    stream.close()

    def _cause_of_death(self) -> str:
        code = self.process.wait()
        how = f"exit code {code}"
        if code < 0:
            with suppress(ValueError):
                how = signal.Signals(-code).name
            if code == -signal.SIGKILL:
                how += ", which is how a system out of memory ends a process; try fewer --jobs"
        self.complaints.seek(0)
        last = self.complaints.read().strip().splitlines()[-1:]
        return f"its worker process died ({how})" + "".join(f": {line}" for line in last)


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
        worker = self._idle.pop() if self._idle else Worker.start(threads_each(self._jobs))
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
        """Ends all workers at once."""
        for worker in [*self._busy, *self._idle]:
            worker.stop()
        self._selector.close()
