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


class Heap:
    """Gives memory back between rounds once it has come to hold much more than a round takes.

    Steps of many different shapes leave gaps that the next ones do not fit into: `configs/tiny-causal.toml` grew by
    some 100 MB a round. Where rounds are alike nothing happens, and the pages stay for the next one.
    """

    GROWTH = 1.2

    def __init__(self) -> None:
        self._usual = 0
        """What was held after the first round since memory was last given back, in bytes."""

    def settle(self) -> None:
        """Is to be called after every round."""
        held = resident()
        self._usual = self._usual or held
        if held > self.GROWTH * self._usual:
            self.release()

    def release(self) -> None:
        """Gives back what is not in use."""
        release_memory()
        self._usual = 0


def release_memory() -> None:
    """Gives freed memory back to the system, where that can be done.

    glibc keeps what was freed.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    """Returns this process's resident set now, in bytes; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * resource.getpagesize()


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
