"""A process beside a lab, which outlives it: once the lab's own is gone, however it went, it ends what that started.

It is told the lab's folder when it starts, and waits for its pipe to close, which the system does for a process that
was killed too.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import suppress
from pathlib import Path

import psutil


def sweep(home: Path) -> None:
    """Ends every process that was told to keep Flower's files in this folder, and removes the folder."""
    killed = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("FLWR_HOME") == str(home):
                process.kill()
                killed.append(process)
    psutil.wait_procs(killed, timeout=10)
    shutil.rmtree(home, ignore_errors=True)


def main() -> None:
    """Waits for the end of its input, and clears up the folder that it was given."""
    sys.stdin.read()
    sweep(Path(sys.argv[1]))
