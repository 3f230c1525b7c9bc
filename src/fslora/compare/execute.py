"""Carries a comparison out, cell by cell, here or in worker processes. Stopping it loses nothing."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fslora.compare.crew import Crew
from fslora.compare.ledger import Ledger
from fslora.compare.plan import Cell, Key, Plan, make_plan
from fslora.compare.worker import Bench
from fslora.config import Experiment, load, to_toml
from fslora.errors import ConfigError, FsloraError
from fslora.processes import threads_each
from fslora.report.merit import outcome_text
from fslora.report.read import score
from fslora.rounds import Watcher
from fslora.runfolder import RunFolder
from fslora.runner import environment
from fslora.simulate import worker_devices

PATIENCE = 0.5
"""Seconds between two looks at how far the workers are."""


class Board(Protocol):
    """Where the cells of a comparison are shown."""

    def started(self, name: str, done: int, rounds: int | None, metric: str | None) -> Watcher:
        """A cell runs, with so many rounds behind it; None rounds where another budget ends it.

        ``metric`` is the one that its experiment names; None where that is left to the task.
        """

    def ended(self, name: str, text: str, total: int) -> None:
        """A cell has ended, as ``text`` says; ``total`` cells are needed as far as is known."""


class Stage(Protocol):
    """Where ``fslora compare`` shows what it is doing."""

    def note(self, text: str) -> None:
        """A line for the user."""

    def cells(self, done: int, total: int) -> AbstractContextManager[Board]:
        """Opens the progress of a comparison's cells."""


def is_comparison(path: Path) -> bool:
    """Returns whether a folder is a comparison's, and not a run's."""
    return (path / "comparison.json").is_file()


def start(experiment: Experiment, path: Path, jobs: int, stage: Stage) -> Ledger:
    """Returns the ledger of a new comparison after carrying it out; ``resume`` does the same for one that exists.

    Raises:
        FsloraError: Anything that makes the comparison impossible. What goes wrong in a cell is in the ledger.
    """
    plan, bench = make_plan(experiment), Bench()
    _check_processes(plan, jobs)
    first = [cell.experiment for cell in plan.cells if cell.seed == plan.seeds[0]]
    workshop = bench.workshop(plan.seeds[0])
    for one in first:
        workshop.sites(one)
    folder = RunFolder.create(path)
    if jobs == 1:
        for one in first:  # now, rather than when its turn comes; all that share a base load it once
            workshop.federation(one)
    ledger = Ledger(plan, path)
    stage.note(f"{', '.join(plan.experiment.compare.methods)}: {ledger.total} runs, in {path}")
    ledger.write()
    threads = {"threads": threads_each(jobs)} if jobs > 1 else {}
    folder.write_json("environment.json", {**environment(), "jobs": jobs, **threads})
    folder.write_text("experiment.toml", to_toml(plan.experiment))
    carry_out(ledger, jobs, bench, stage)
    return ledger


def resume(path: Path, jobs: int, stage: Stage) -> Ledger:
    """Returns the ledger of a comparison after running what is not finished in it; what failed is tried again."""
    RunFolder.open(path)
    plan = make_plan(load(path / "experiment.toml"))
    _check_processes(plan, jobs)
    ledger = Ledger.of(plan, path)
    carry_out(ledger, jobs, Bench(), stage)
    return ledger


def carry_out(ledger: Ledger, jobs: int, bench: Bench, stage: Stage) -> None:
    """Runs whatever is needed and not finished; the page is written at the end, however that comes."""
    try:
        if ledger.waiting():
            with stage.cells(ledger.done, ledger.total) as board:
                if jobs == 1:
                    _one_by_one(ledger, bench, board)
                else:
                    _side_by_side(ledger, jobs, board)
    except BaseException:
        with suppress(FsloraError):  # the page must not hide what stopped the comparison
            write_report(ledger.path)
        raise
    finally:
        bench.simulations.close()
    write_report(ledger.path)


def _check_processes(plan: Plan, jobs: int) -> None:
    """Refuses runs side by side of which each would start workers of its own."""
    for cell in plan.cells if jobs > 1 else ():
        workers = len(worker_devices(cell.experiment))
        if workers:
            raise ConfigError(
                f"--jobs is {jobs}, and engine.workers would start {workers} more processes for each of those runs; "
                "set engine.workers to 1, or --jobs to 1"
            )


def write_report(path: Path) -> Path:
    """Writes the page, figures and result files of a comparison folder."""
    from fslora.report import write_comparison

    return write_comparison(path)


def _show(ledger: Ledger, cell: Cell, board: Board) -> Watcher:
    run, done = cell.experiment.run, ledger.run_folder(cell).rounds_done
    metric = cell.experiment.data.metric
    return board.started(_name(ledger, cell), done, None if run.budget else run.rounds, metric)


def _settle(ledger: Ledger, cell: Cell, error: str | None, board: Board) -> None:
    ledger.settle(cell, error)
    name, outcome = _name(ledger, cell), ledger.outcomes[cell.key]
    reached = outcome_text(outcome.metric, score(outcome.validation, outcome.metric.name))
    how = f"failed: {error}" if error else f"{reached} on validation"
    board.ended(name, f"{name}: {how}", ledger.total)


def _name(ledger: Ledger, cell: Cell) -> str:
    point = ledger.plan.contestant(cell.label).points[cell.point]
    return " ".join([cell.label, *(f"{key}={value}" for key, value in point.items()), f"seed {cell.seed}"])


def _one_by_one(ledger: Ledger, bench: Bench, board: Board) -> None:
    while waiting := ledger.waiting():
        cell = waiting[0]
        watcher = _show(ledger, cell, board)
        _settle(ledger, cell, bench.attempt(cell.experiment, ledger.run_folder(cell), watcher), board)


def _side_by_side(ledger: Ledger, jobs: int, board: Board) -> None:
    crew, running = Crew(jobs), dict[Key, Follower]()
    try:
        while True:
            for cell in ledger.waiting(running)[: crew.free]:
                folder = ledger.run_folder(cell).path
                running[cell.key] = Follower(folder / "metrics.jsonl", _show(ledger, cell, board))
                crew.run(cell, folder)
            if not running:
                return
            for cell, error in crew.ended(PATIENCE):
                del running[cell.key]
                _settle(ledger, cell, error, board)
            for follower in running.values():
                follower.look()
    finally:
        crew.stop()


@dataclass
class Follower:
    """Tells a watcher of the rounds that another process writes down."""

    metrics: Path
    watcher: Watcher
    position: int = 0

    def look(self) -> None:
        """Tells of the newest round, if there is a new one."""
        if not self.metrics.is_file():
            return
        with self.metrics.open("rb") as file:
            file.seek(self.position)
            whole, _, _ = file.read().rpartition(b"\n")
        self.position += len(whole)
        with suppress(ValueError):  # a resumed run has rewound the file
            self.watcher.round_done(json.loads(whole.rpartition(b"\n")[2]))
