"""A deployed run from its first round to its page, on the server's machine; what becomes of it is in its folder.

deployment.json     run, state (running, done or failed), the error, and notes, for those who follow from outside
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from fslora import runner
from fslora.config import Experiment
from fslora.console import Silent
from fslora.deploy.letters import Hello
from fslora.deploy.roster import Roster
from fslora.deploy.server import Deployed, Transport
from fslora.deploy.settings import RunSettings
from fslora.errors import ConfigError, FsloraError, TrainingError
from fslora.prepare import SERVER, Federation, Workshop
from fslora.rounds import Watcher
from fslora.runfolder import RunFolder

STATUS = "deployment.json"


class Waiting(Transport, Protocol):
    """A transport whose sites come when they come."""

    def wait(self, clients: int, seconds: float) -> int:
        """Waits until so many clients are there, at most so long; returns how many are."""


Connect = Callable[[Callable[[Hello], None], Callable[[str], None]], Waiting]
"""Makes the transport of a check of sites and a place for notes."""


class Status:
    """The file that says what becomes of a run; it is also where this process shows what it is doing."""

    def __init__(self, folder: RunFolder, run: str) -> None:
        self._folder = folder
        self._value: dict[str, Any] = {"run": run, "state": "running", "error": "", "notes": []}
        self._write()

    def note(self, text: str) -> None:
        """Adds a line."""
        self._value["notes"].append(text)
        self._write()

    def ended(self, state: str, error: str = "") -> None:
        """Says how it ended."""
        self._value.update(state=state, error=error)
        self._write()

    @contextmanager
    def rounds(self, name: str, done: int, total: int, metric: str | None) -> Iterator[Watcher]:
        """Rounds are followed by metrics.jsonl."""
        del name, done, total, metric
        yield Silent()

    def _write(self) -> None:
        self._folder.write_json(STATUS, self._value)


def check(experiment: Experiment) -> None:
    """Raises ConfigError where an experiment cannot be carried out at sites."""
    if experiment.fleet.pooled:
        raise ConfigError("fleet.pooled is true: data in one place need no sites; use `fslora run`")
    if experiment.method.personal and experiment.run.eval_on == "server":
        raise ConfigError(
            f"method.name is {experiment.method.name!r}, which ends with a model of its own at every client, and "
            "run.eval_on is 'server', where these models never come; set run.eval_on to 'clients'"
        )


def serve(settings: RunSettings, connect: Connect) -> None:
    """Carries out what is not yet done of a run; how it ends is in its folder.

    Raises:
        FsloraError: What stopped it; it is in the folder too.
    """
    experiment = settings.parsed()
    folder = RunFolder.open(Path(settings.folder))
    status = Status(folder, settings.run)
    try:
        check(experiment)
        before = folder.read_json("data.json") if folder.rounds_done else None
        roster = Roster(Workshop().federation(experiment, SERVER), settings.digest, before)

        def rounds(federation: Federation, folder: RunFolder, watcher: Watcher) -> Deployed:
            transport = connect(roster.check, status.note)
            _gathered(transport, federation, settings)
            roster.admit(transport.sites())
            roster.begun = True
            folder.write_json("data.json", roster.federation.describe())
            patience = settings.patience
            return Deployed(roster.federation, folder, watcher, transport, settings.run, patience, status.note, roster)

        try:
            if not folder.finished:
                runner.run_one(roster.federation, folder, experiment.method.name, None, status, rounds)
        finally:
            with suppress(FsloraError):  # the page must not hide what stopped the run
                runner.write_report(folder)
    except BaseException as error:
        status.ended("failed", str(error) if isinstance(error, FsloraError) else repr(error))
        raise
    status.ended("done")


def _gathered(transport: Waiting, federation: Federation, settings: RunSettings) -> None:
    """Waits for the sites; goes on without some, if a quorum of the clients is there."""
    clients, patience = len(federation.trainers), settings.patience
    there = transport.wait(clients, patience.wait)
    if there < max(1, patience.quorum * clients):
        raise TrainingError(
            f"{there} of {clients} clients were there within {patience.wait:g} s, and the quorum is "
            f"{patience.quorum:g}; start their SuperNodes, or wait longer with --wait"
        )
