"""What this process holds in memory: sizes that fit again, and giving back what it no longer needs."""

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


def common_size(size: int, most: int) -> int:
    """Returns ``size`` rounded up to one of 16 per octave, 3 % more in the mean; itself where that passes ``most``.

    Tensors then come in fewer sizes: freed ones fit again, and the processor's library keeps fewer kernels.
    """
    grain = 1 << max(0, (size // 16).bit_length() - 1)
    rounded = -(-size // grain) * grain
    return rounded if rounded <= most else size


class Heap:
    """Gives memory back once gaps have made this process much larger than its steps do.

    Steps of many different shapes leave gaps that the next ones do not fit into: `configs/tiny-causal.toml` grew by
    some 100 MB a round. Where steps are alike nothing happens, and the pages stay for the next one.
    """

    GROWTH = 1.1

    def __init__(self) -> None:
        self._usual = 0
        """The most that was held after a step without gaps, in bytes."""
        self._trimmed = True

    def settle(self) -> None:
        """Is to be called after every pass of a step."""
        held = resident()
        if self._trimmed:
            self._usual, self._trimmed = max(self._usual, held), False
        elif held > self.GROWTH * self._usual:
            trim()
            self._trimmed = True


def release_memory() -> None:
    """Gives freed memory back to the system, that of circles of objects too, where that can be done."""
    gc.collect()
    trim()


def trim() -> None:
    """Gives freed memory back to the system, where the C library is glibc, which keeps it."""
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
