"""Peers timed in turn in one process, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fslora.memory import keep_freed_memory, peak_memory


@dataclass
class Timed:
    """Seconds of each repetition of one peer."""

    wall: list[float] = field(default_factory=list)
    """What a user waits."""
    cpu: list[float] = field(default_factory=list)
    """Processor time of all threads of this process; steadier on a shared machine."""

    def ratios(self, ours: Timed, kind: str) -> list[float]:
        """Returns how often ours fits into this peer's time, repetition by repetition."""
        return [theirs / mine for theirs, mine in zip(getattr(self, kind), getattr(ours, kind), strict=True)]


def alternate(peers: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timed]:
    """Returns the times of all peers, after one unmeasured turn of each; every other turn goes backwards."""
    keep_freed_memory()  # as a run does; every peer profits
    times = {name: Timed() for name in peers}
    for repeat in range(repeats + 1):
        for name in list(peers) if repeat % 2 else reversed(peers):
            _wait()
            wall, cpu = time.perf_counter(), time.process_time()
            peers[name]()
            _wait()
            if repeat:
                times[name].wall.append(time.perf_counter() - wall)
                times[name].cpu.append(time.process_time() - cpu)
    return times


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak() -> int:
    """Returns the largest memory of this process so far, in bytes; a GPU's where there is one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()


def peak_of(script: str, arguments: Sequence[object]) -> int:
    """Returns the number of bytes that a script prints last, run in a fresh process."""
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def spread(values: Sequence[float]) -> str:
    """Returns median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns a Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
