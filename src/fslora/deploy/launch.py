"""Starting a run and following it: on an existing SuperLink, or with a whole federation on this machine."""

from __future__ import annotations

import math
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from subprocess import SubprocessError

from fslora import config, runner
from fslora.config import Experiment
from fslora.deploy.bundle import flwr, require_flower, run_status, submit
from fslora.deploy.lab import CONNECTION, Lab
from fslora.deploy.patience import Patience
from fslora.deploy.serve import STATUS, check
from fslora.deploy.settings import OWN_DATA, RunSettings, SiteSettings
from fslora.errors import ConfigError, FsloraError, TrainingError
from fslora.prepare import SERVER, prepare_sites
from fslora.runfolder import RunFolder
from fslora.runner import Stage

LOOK = 0.5
"""Seconds between looks at the run folder."""
ASK = 10.0
"""Seconds between questions whether all goes on: Flower's server process may have ended without a word."""
BEGIN = 60.0
"""Seconds after which a run that nobody has begun is spoken of."""
NOT_BEGUN = (
    "Flower has not begun this run yet. If no other run keeps it busy, see the SuperLink's own output: its helper "
    "flower-superexec has to reach it by a name or address that is in the server's certificate"
)


def prepare(experiment: Experiment, path: Path) -> RunFolder:
    """Returns a new run folder of an experiment, without its variants: one run is deployed at a time."""
    alone = experiment.model_copy(update={"variants": {}})
    check(alone)
    prepare_sites(alone, SERVER)
    folder = RunFolder.create(path)
    folder.write_text("experiment.toml", config.to_toml(alone))
    folder.write_json("environment.json", runner.environment())
    return folder


def settings_of(folder: RunFolder, patience: Patience) -> RunSettings:
    """Returns what a run is told; one that is resumed keeps its name, and with it what sites have kept."""
    before = folder.read_json(STATUS) or {}
    name = str(before.get("run") or f"run-{uuid.uuid4().hex[:12]}")
    return RunSettings(
        run=name,
        experiment=(folder.path / "experiment.toml").read_text(encoding="utf-8"),
        folder=str(folder.path.resolve()),
        patience=patience,
    )


def local(folder: RunFolder, count: int, secure: bool, patience: Patience, stage: Stage) -> None:
    """Carries out a run with a SuperLink and SuperNodes on this machine, and ends them however it ends."""
    require_flower()
    settings = settings_of(folder, patience)
    experiment = settings.parsed()
    stage.note(f"Starting a SuperLink and {count} SuperNodes{' with TLS and keys' if secure else ''} ...")
    with Lab(local_sites(experiment, folder, count), folder.path / "logs", secure) as lab:
        _run(folder, settings, CONNECTION, lab.home, stage, lab.check)


def remote(folder: RunFolder, connection: str, patience: Patience, stage: Stage) -> None:
    """Carries out a run on a SuperLink that is there, by the name of its connection in Flower's config.toml."""
    require_flower()
    _run(folder, settings_of(folder, patience), connection, None, stage, lambda: None)


def local_sites(experiment: Experiment, folder: RunFolder, count: int) -> dict[str, SiteSettings]:
    """Returns what each site is told: clients dealt in turn, and a folder of its own below the run's."""
    clients = experiment.fleet.clients
    if experiment.partition.kind == "sites":
        raise ConfigError(
            "partition.kind is 'sites': every site has data of its own, and `fslora deploy local` cannot say which; "
            "use `fslora deploy client-config --data PATH` and `fslora deploy run`"
        )
    if not 1 <= count <= clients:
        raise ConfigError(f"--sites is {count}; there are {clients} clients, so give 1 to {clients}")
    return {
        f"site-{number}": SiteSettings(
            site=f"site-{number}",
            clients=",".join(map(str, range(number - 1, clients, count))),
            storage=str((folder.path / "sites" / f"site-{number}").resolve()),
            data=OWN_DATA,
        )
        for number in range(1, count + 1)
    }


def _run(
    folder: RunFolder,
    settings: RunSettings,
    connection: str,
    home: Path | None,
    stage: Stage,
    alive: Callable[[], None],
) -> None:
    # What an earlier attempt said must not be taken for this one's; the name of the run stays.
    folder.write_json(STATUS, {"run": settings.run, "state": "submitted", "error": "", "notes": []})
    with tempfile.TemporaryDirectory(prefix="fslora-bundle-") as scratch:
        number = submit(settings, connection, Path(scratch), home)
    stage.note(f"Flower's run {number}; logs and results in {folder.path}")
    try:
        _follow(folder, settings, stage, lambda: _check(folder, number, connection, home, alive))
    except KeyboardInterrupt:
        # Or it would go on, and write where its continuation will.
        with suppress(FsloraError, OSError, SubprocessError):
            flwr(["stop", number, connection], home, timeout=30)
        raise


def _follow(folder: RunFolder, settings: RunSettings, stage: Stage, check: Callable[[], None]) -> None:
    """Shows what happens in a run folder until the run has come to its end; asks now and then whether it goes on."""
    experiment = settings.parsed()
    with stage.rounds(experiment.method.name, folder.rounds_done, experiment.run.rounds, None) as watcher:
        seen, told, asked, late = folder.rounds_done, 0, time.monotonic(), time.monotonic() + BEGIN
        while True:
            status = folder.read_json(STATUS) or {}
            for note in status.get("notes", [])[told:]:
                stage.note(note)
                told += 1
            for row in folder.metrics():
                if row["round"] > seen:
                    watcher.round_done(row)
                    seen = row["round"]
            if status.get("state") == "done":
                return
            if status.get("state") == "failed":
                raise TrainingError(f"the run has failed: {status['error']}")
            if status.get("state") == "submitted" and time.monotonic() > late:
                stage.note(NOT_BEGUN)
                late = math.inf
            if time.monotonic() - asked > ASK:
                check()
                asked = time.monotonic()
            time.sleep(LOOK)


def _check(folder: RunFolder, number: str, connection: str, home: Path | None, alive: Callable[[], None]) -> None:
    """Raises TrainingError where a run has ended without a word in its folder."""
    alive()
    try:
        said = run_status(number, connection, home)
    except (FsloraError, SubprocessError):
        return  # the SuperLink may be busy, or away for a moment
    if said.startswith("finished") and (folder.read_json(STATUS) or {}).get("state") not in ("done", "failed"):
        raise TrainingError(
            f"Flower says that run {number} is {said}, but it has not come to its end in {folder.path}; see `flwr log "
            f"{number} {connection}`, or the SuperLink's own output. Go on with --resume {folder.path}"
        )
