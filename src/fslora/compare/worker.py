"""One cell after the other, in a process of its own (see `fslora.compare.crew`).

A line of JSON on standard input asks for a cell ({"folder", "experiment" as TOML}); a line on standard output answers
it ({"error"}). Base and tokens are kept from cell to cell. The process ends with its input, at once: no worker outlives
its parent.
"""

from __future__ import annotations

import json
import os
import sys
import tomllib
import traceback
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import torch

from fslora.compare.ledger import FAILED
from fslora.config import Experiment, build
from fslora.console import Silent
from fslora.errors import ArtifactError, FsloraError
from fslora.prepare import Workshop
from fslora.report.text import plain
from fslora.rounds import Watcher
from fslora.runfolder import RunFolder
from fslora.runner import Untrained, run_cell
from fslora.simulate import Simulations


class Bench:
    """Runs cells, and keeps what the next one of the same seed needs too."""

    def __init__(self) -> None:
        self._seed: int | None = None
        self._workshop = Workshop()
        self._untrained: Untrained | None = None
        self.simulations = Simulations()
        """Whose worker processes (``engine.workers``) serve one cell after the other."""

    def workshop(self, seed: int) -> Workshop:
        """Returns the workshop of a seed; data and tokens of another seed are let go."""
        if seed != self._seed:
            self._seed, self._workshop, self._untrained = seed, Workshop(), None
        return self._workshop

    def attempt(self, experiment: Experiment, folder: RunFolder, watcher: Watcher) -> str | None:
        """Runs one cell to its end; returns what went wrong, or None.

        Whatever goes wrong in a cell is the cell's: out of memory or a fault in one method must not cost the others.
        """
        workshop = self.workshop(experiment.run.seed)
        try:
            _make_room(folder)
            self._untrained = run_cell(experiment, folder, workshop, watcher, self._untrained, self.simulations)
            return None
        except FsloraError as error:
            told = str(error)
        except Exception as error:
            told = f"{type(error).__name__}: {plain(error, 200)}; see {folder.path}/traceback.txt"
            with suppress(FsloraError):
                folder.write_text("traceback.txt", traceback.format_exc())
        self._seed = None  # the base may be left in any state
        return told


def _make_room(folder: RunFolder) -> None:
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        (folder.path / FAILED).unlink(missing_ok=True)
    except OSError as error:
        raise ArtifactError(f"{folder.path} cannot be written: {error}") from None


def main() -> None:
    """Answers requests until there are no more."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    requests: SimpleQueue[str] = SimpleQueue()
    Thread(target=_listen, args=(requests,), daemon=True).start()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
        bench = Bench()
        while True:
            request = json.loads(requests.get())
            experiment = build(tomllib.loads(request["experiment"]), source=request["folder"])
            error = bench.attempt(experiment, RunFolder(Path(request["folder"])), Silent())
            answers.write(json.dumps({"error": error}) + "\n")
            answers.flush()


def _listen(requests: SimpleQueue[str]) -> None:
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)
