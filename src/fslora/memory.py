"""What this process holds in memory, and giving back what it no longer needs."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from contextlib import suppress
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Names of glibc's mallopt(3)."""


def keep_freed_memory() -> None:
    """Lets a training step reuse what the step before has freed, where the C library is glibc.

    Left to itself, glibc gives large blocks back to the system, and every step faults the same pages in again: with
    MiniLM, some 90,000 page faults a round of 16 clients, and none with this (docs/performance.md). The peak stays.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, 2**25)  # the largest that glibc takes
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(M_TOP_PAD, 2**26)


def release_memory() -> None:
    """Gives freed memory back to the system, where that can be done.

    glibc keeps what was freed. Steps of many different shapes leave gaps that the next ones do not fit into: a run of
    `configs/tiny-causal.toml` came to hold 3.9 GB, of which 0.6 GB were in use between rounds.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory() -> int:
    """Returns this process's largest resident set so far, in bytes."""
    try:
        # Not getrusage: on Linux a child process inherits its parent's peak there.
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def forget_peak_memory() -> None:
    """Lets ``peak_memory`` begin anew, so that a run is not charged with those before it; where the system can."""
    release_memory()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
