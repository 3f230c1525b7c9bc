"""Processes of our own: started with a share of the cores, ended at once, and what they died of."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Self

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def threads_each(jobs: int) -> int:
    """Returns the threads of one of so many workers: its share of the cores, or of what OMP_NUM_THREADS allows."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, (int(allowed) if allowed.isdigit() else cores) // jobs)


@dataclass(frozen=True)
class Child:
    """One process, pipes to and from it, and where what it complains of is kept."""

    process: subprocess.Popen[bytes]
    complaints: IO[bytes]

    @classmethod
    def start(cls, module: str, threads: int, *words: str) -> Self:
        """Returns a new process that runs a module's ``main``, with these words in ``sys.argv``.

        It has a session of its own: a terminal's Ctrl-C is for the parent alone.
        """
        complaints = tempfile.TemporaryFile()  # noqa: SIM115 (closed by stop)
        process = subprocess.Popen(
            [sys.executable, "-c", f"from {module} import main; main()", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env={**os.environ, **dict.fromkeys(THREADS, str(threads))},
            start_new_session=True,
        )
        return cls(process, complaints)

    @property
    def requests(self) -> IO[bytes]:
        """Where it listens."""
        assert self.process.stdin
        return self.process.stdin

    @property
    def answers(self) -> IO[bytes]:
        """Where it answers."""
        assert self.process.stdout
        return self.process.stdout

    def stop(self) -> None:
        """Ends it at once."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.answers, self.complaints):
            with suppress(OSError):
                if stream:
                    stream.close()

    def cause_of_death(self, remedy: str) -> str:
        """Returns how a process that is gone ended, with the last line of what it complained of.

        Args:
            remedy: What to try where it was killed.
        """
        code = self.process.wait()
        how = f"exit code {code}"
        if code < 0:
            with suppress(ValueError):
                how = signal.Signals(-code).name
            if code == -signal.SIGKILL:
                how += f", which is how a system out of memory ends a process; try {remedy}"
        self.complaints.seek(0)
        last = self.complaints.read().decode("utf-8", "replace").strip().splitlines()[-1:]
        return f"its worker process died ({how})" + "".join(f": {line}" for line in last)
