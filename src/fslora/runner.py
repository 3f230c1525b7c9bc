"""A whole experiment: baseline, the main run, its variants, adapters, page. Stopping it loses nothing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch

import fslora
from fslora.baseline import frozen_baseline
from fslora.config import Experiment, load, to_toml
from fslora.errors import FsloraError
from fslora.evaluate import Scored, by_label, client_scores, scored, untrained
from fslora.export import export_peft, import_peft
from fslora.memory import forget_peak_memory
from fslora.prepare import Federation, Workshop
from fslora.processes import threads_each
from fslora.rounds import Rounds, Watcher
from fslora.runfolder import RunFolder
from fslora.simulate import Simulation, Simulations, cohort_size, worker_devices
from fslora.types import Adapter, ServerState


class Stage(Protocol):
    """Where a command shows what it is doing."""

    def note(self, text: str) -> None:
        """A line for the user."""

    def rounds(self, name: str, done: int, total: int, metric: str | None) -> AbstractContextManager[Watcher]:
        """Opens the progress of one run's rounds; ``metric`` is what it is judged by."""


Make = Callable[[Federation, RunFolder, Watcher], Rounds]
"""Makes the rounds of a run: a simulation's, or those of a server with clients elsewhere."""


def start(experiment: Experiment, path: Path, stage: Stage) -> RunFolder:
    """Returns the folder of a new run after carrying it out; ``resume`` does the same for one that exists.

    Raises:
        FsloraError: Anything that makes the run impossible; data, ranks and folder are checked before the model
            is loaded, and the model before anything is trained.
    """
    workshop, devices = Workshop(), worker_devices(experiment)
    workshop.sites(experiment)
    folder = RunFolder.create(path)
    folder.write_text("experiment.toml", to_toml(experiment))
    workers = {"workers": len(devices), "worker_threads": threads_each(len(devices))} if devices else {}
    folder.write_json("environment.json", {**environment(), **workers})
    carry_out(experiment, folder, workshop, stage)
    return folder


def resume(path: Path, stage: Stage) -> RunFolder:
    """Returns the folder of a run after carrying out what was not yet done in it."""
    folder = RunFolder.open(path)
    experiment = load(path / "experiment.toml")
    carry_out(experiment, folder, Workshop(), stage)
    return folder


def carry_out(experiment: Experiment, folder: RunFolder, workshop: Workshop, stage: Stage) -> None:
    """Does whatever of the experiment is not yet in its folder; the page is written at the end, however that comes."""
    with Simulations() as make:
        _carry_out(experiment, folder, workshop, stage, make)


def _carry_out(experiment: Experiment, folder: RunFolder, workshop: Workshop, stage: Stage, make: Make) -> None:
    federation = workshop.federation(experiment)
    folder.write_json("data.json", federation.describe())
    _explain(federation, stage)
    at_server = experiment.run.eval_on == "server"  # a baseline on other examples would be none
    if at_server and federation.sites.dataset.kind == "classes" and folder.read_json("baseline.json") is None:
        stage.note("Fitting the baseline: a linear head on the frozen base ...")
        splits = (federation.train, federation.validation, federation.test)
        folder.write_json("baseline.json", frozen_baseline(federation.base, *splits, federation.rng.child("baseline")))
    try:
        before = None
        if not folder.finished:
            before = run_one(federation, folder, experiment.method.name, None, stage, make)
        for name in experiment.variants:
            varied = experiment.variant(name)
            inside = folder.variant(name)
            if inside.finished:
                continue
            other = workshop.federation(varied)
            inside.write_text("experiment.toml", to_toml(varied))
            if other.sites is not federation.sites:
                inside.write_json("data.json", other.describe())
            before = run_one(other, inside, name, before, stage, make)
    except BaseException:
        with suppress(FsloraError):  # the page must not hide what stopped the run
            write_report(folder)
        raise
    write_report(folder)


def write_report(folder: RunFolder) -> Path:
    """Writes the page, figures and tables of a run folder."""
    from fslora.report import write_page

    return write_page(folder.path)


@dataclass(frozen=True)
class Untrained:
    """What a federation scores before any training: its base with the fresh head."""

    federation: Federation
    scored: Scored

    @classmethod
    def of(cls, rounds: Rounds, known: Untrained | None = None) -> Untrained:
        """Returns the scores before training; ``known`` where it is of the same base, data and way to evaluate."""
        federation = rounds.federation
        if known and _alike(known.federation, federation):
            return known
        return cls(federation, scored(federation, [untrained(federation)], rounds.held_out(None)))


def _alike(one: Federation, other: Federation) -> bool:
    """Whether two federations' bases score the same before training."""
    same = (one.base, one.sites) == (other.base, other.sites)
    return same and one.experiment.run.eval_on == other.experiment.run.eval_on


def run_cell(
    experiment: Experiment,
    folder: RunFolder,
    workshop: Workshop,
    watcher: Watcher,
    known: Untrained | None = None,
    make: Make = Simulation,
) -> Untrained:
    """Carries out one run of a comparison: rounds from the folder's checkpoint on, adapter, summary; no page.

    Returns the scores before training, for the next cell that has the same base and data (``known``).

    Raises:
        FsloraError: Anything that makes this run impossible or fail.
    """
    forget_peak_memory()
    federation = workshop.federation(experiment)
    folder.write_text("experiment.toml", to_toml(experiment))
    folder.write_json("data.json", federation.describe())
    simulation = make(federation, folder, watcher)
    before = Untrained.of(simulation, known)
    _finish(simulation, simulation.run(), before)
    folder.drop_checkpoints()
    return before


def run_one(
    federation: Federation,
    folder: RunFolder,
    name: str,
    known: Untrained | None,
    stage: Stage,
    make: Make = Simulation,
) -> Untrained:
    """Runs one method to its end and writes its adapter and summary; returns the scores before training."""
    metric = federation.sites.metric.name
    with stage.rounds(name, folder.rounds_done, federation.experiment.run.rounds, metric) as watcher:
        rounds = make(federation, folder, watcher)
        try:
            state = rounds.run()
        except KeyboardInterrupt:
            _leave_usable(rounds)
            raise
    before = Untrained.of(rounds, known)
    _finish(rounds, state, before)
    return before


def _finish(rounds: Rounds, state: ServerState, before: Untrained) -> None:
    """Writes the adapter and the summary of a run that has come to its end."""
    adapters, folder = rounds.served(state), rounds.folder
    write_adapters(rounds.federation, adapters, folder.path / "adapter", len(folder.metrics()) - 1)
    after = scored(rounds.federation, adapters, rounds.held_out(state))
    folder.write_json("summary.json", _summary(rounds, adapters, before.scored, after))


def _leave_usable(rounds: Rounds) -> None:
    """After an interruption: the adapter of the newest checkpoint, so that the folder is of use as it is."""
    folder = rounds.folder
    newest = folder.load_checkpoint()
    if newest is not None:
        done, state, rounds.memories = newest
        write_adapters(rounds.federation, rounds.served(state), folder.path / "adapter", done)


def write_adapters(federation: Federation, adapters: Sequence[Adapter], to: Path, rounds: int) -> None:
    """Writes the one adapter that all share as a PEFT folder with a card, or a folder of one per client.

    Nothing, where there is none here: personal models stay at the sites.
    """
    if not adapters:
        return
    if len(adapters) == 1:
        write_adapter(federation, adapters[0], to, rounds)
        return
    partial = to.with_name(f".partial-{to.name}")
    shutil.rmtree(partial, ignore_errors=True)
    for client, adapter in zip(federation.sites.fleet, adapters, strict=True):
        write_adapter(federation, adapter, partial / client_folder(client.id), rounds)
    shutil.rmtree(to, ignore_errors=True)
    partial.rename(to)


def client_folder(client: int) -> str:
    """Returns the name of one client's folder below ``adapter/``."""
    return f"client-{client:04d}"


def read_adapters(path: Path) -> list[Adapter]:
    """Returns what ``write_adapters`` wrote: one adapter, or one per client.

    Raises:
        ArtifactError: A folder is missing or is no PEFT adapter.
    """
    personal = sorted(path.glob("client-*"))
    return [import_peft(folder) for folder in personal] if personal else [import_peft(path)]


def write_adapter(federation: Federation, adapter: Adapter, to: Path, rounds: int) -> None:
    """Writes an adapter of a federation as a PEFT folder with a card."""
    base = federation.base
    card, task = adapter_card(federation, rounds), base.objective.peft_task
    export_peft(adapter, base.head, base.name, to, card, base.fan_in_fan_out, task)


def adapter_card(federation: Federation, rounds: int) -> str:
    """Returns the README of an exported adapter: what it is and how to load it. No training text is quoted."""
    experiment, sites = federation.experiment, federation.sites
    return f"""
# LoRA adapter trained with fslora {fslora.__version__}

Method {experiment.method.name} ({experiment.method.paper}), {rounds} rounds, {len(sites.fleet)} clients with
ranks {sorted({client.rank for client in sites.fleet})}, server rank {experiment.adapter.rank}, seed
{experiment.run.seed}. Data: {sites.dataset.name}, {len(federation.train)} training examples over all clients.

```python
{federation.base.objective.card(federation.base.name, experiment.model.max_length)}
```
"""


def _summary(rounds: Rounds, adapters: Sequence[Adapter], before: Scored, after: Scored) -> dict[str, Any]:
    federation, folder = rounds.federation, rounds.folder
    rows = [row for row in folder.metrics() if row["round"] > 0]
    return {
        "method": federation.experiment.method.name,
        "personal": federation.experiment.method.personal,
        "rounds": len(rows),
        "finished": rounds.spent(rows[-1]) >= 1 or len(rows) == federation.experiment.run.rounds,
        "metric": federation.sites.metric.name,
        "test": {"before": before.test, "after": after.test},
        "by_label": by_label(before, after),
        "clients": client_scores(federation, before, after),
        "bytes_down": sum(row["bytes_down"] for row in rows),
        "bytes_up": sum(row["bytes_up"] for row in rows),
        "flops": rows[-1]["flops_total"],
        "simulated_seconds": rows[-1]["time_total"],
        "train_seconds": sum(row["seconds"] for row in rows),
        "server_seconds": sum(row["server_seconds"] for row in rows),
        "server_bytes": max(row["server_bytes"] for row in rows),
        "client_memory_bytes": max(max(row["client_memory"].values()) for row in rows),
        "peak_memory_bytes": rounds.peak_memory(),
        "adapter_rank": adapters[0].rank if adapters else None,
        "adapter_parameters": sum(t.numel() for t in adapters[0].tensors().values()) if adapters else None,
        "base_parameters": federation.base.parameters,
    }


def _explain(federation: Federation, stage: Stage) -> None:
    sites, base = federation.sites, federation.base
    ranks = sorted({client.rank for client in sites.fleet})
    stage.note(
        f"{sites.dataset.name}: {len(federation.train)} training examples at {len(sites.fleet)} clients "
        f"(ranks {', '.join(map(str, ranks))}), {len(federation.validation)} for validation, "
        f"{len(federation.test)} for the test"
    )
    for name, value in sites.dataset.statistics.items():
        stage.note(f"  {name}: {value}")
    if federation.truncated:
        limit = federation.experiment.model.max_length
        stage.note(f"  texts cut at {limit} tokens (model.max_length): {federation.truncated}")
    if federation.shortened:
        stage.note(f"  responses longer than model.max_length, cut at their end: {federation.shortened}")
    stage.note(
        f"{base.name}: {base.parameters / 1e6:.1f} M frozen parameters on {base.device}, "
        f"{len(base.targets)} adapted layers"
    )
    note = workers_note(federation.experiment)
    if note:
        stage.note(note)


def workers_note(experiment: Experiment) -> str:
    """Returns what becomes of ``engine.workers``; nothing where there is nothing to say."""
    engine, devices = experiment.engine, worker_devices(experiment)
    asked = engine.workers if isinstance(engine.workers, int) else len(engine.workers)
    if asked <= max(1, len(devices)):
        return f"worker processes: {len(devices)}, threads of each: {threads_each(len(devices))}" if devices else ""
    cohort = cohort_size(experiment)
    smaller = max(1, cohort // asked)
    remedy = f"; lower engine.chunk to {smaller} to occupy more" if smaller < engine.together else ""
    return (
        f"engine.workers asks for {asked} processes, but a round of {cohort} clients, {engine.together} at a time, "
        f"occupies {max(1, len(devices))}{remedy}"
    )


def environment() -> Mapping[str, Any]:
    """Returns what a result depends on beside the experiment: versions, processor, threads, code."""
    from importlib.metadata import version

    packages = ("torch", "transformers", "peft", "datasets", "numpy", "safetensors")
    return {
        "fslora": fslora.__version__,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "platform": platform.platform(),
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git": _git_state(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git_state() -> str | None:
    """Commit of the checkout this code runs from, with '-dirty' when it was changed; None outside one."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        result = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except OSError:
        return None
    return result.stdout.strip() or None
