"""What commands show while they work. Progress and notes go to standard error, results to standard output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from fslora.metrics import METRICS
from fslora.report.merit import short, value_text
from fslora.report.text import byte_text
from fslora.rounds import Watcher

FACTS = ("loss", "score", "sent", "dropped")
"""In the order in which the bar shows them; together they fit a terminal of 80 columns."""


class Silent:
    """Shows nothing: a watcher of rounds, and a board of cells."""

    def round_started(self, number: int, clients: int) -> None:
        """Nothing."""

    def client_done(self, loss: float) -> None:
        """Nothing."""

    def round_done(self, row: Mapping[str, Any]) -> None:
        """Nothing."""

    def started(self, name: str, done: int, rounds: int | None, metric: str | None) -> Watcher:
        """Nothing."""
        del name, done, rounds, metric
        return self

    def ended(self, name: str, text: str, total: int) -> None:
        """Nothing."""


class RoundBar:
    """A progress bar over rounds, with the round's clients, loss, bytes and the last validation score.

    Args:
        progress: What it is drawn in.
        task: The bar.
        metric: What the experiment says that it is judged by; None: what its task is.
    """

    def __init__(self, progress: Progress, task: TaskID, metric: str | None = None) -> None:
        self._metric = metric
        self._progress = progress
        self._task = task
        self._clients = ""
        self._number = self._of = self._done = 0
        self._facts: dict[str, str] = {}

    def round_started(self, number: int, clients: int) -> None:
        """Shows how many clients train."""
        self._number, self._of, self._done = number, clients, 0
        self._show()

    def client_done(self, loss: float) -> None:
        """Moves the bar by one client's share of the round."""
        self._done += 1
        self._facts.setdefault("loss", f"loss {loss:.3f}")
        self._progress.update(self._task, completed=self._number - 1 + self._done / self._of)
        self._show()

    def round_done(self, row: Mapping[str, Any]) -> None:
        """Shows the round's mean loss, bytes so far and, where it was evaluated, score."""
        if "loss" in row:
            self._facts["loss"] = f"loss {row['loss']:.3f}"
        if row.get("validation"):
            self._facts |= score_fact(row["validation"], self._metric)
        self._facts["sent"] = byte_text(row["bytes_total"])
        if row.get("dropped"):
            self._facts["dropped"] = f"{len(row['dropped'])} dropped"
        self._progress.update(self._task, completed=row["round"])
        self._show()

    def _show(self) -> None:
        facts = "  ".join(self._facts[name] for name in FACTS if name in self._facts)
        clients = f"  {self._done}/{self._of} clients" if self._of else ""
        self._progress.update(self._task, facts=facts + clients)


class StepBar:
    """A progress bar over training steps, with the step's loss."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def __call__(self, number: int, loss: float) -> None:
        """Moves the bar to step ``number``."""
        self._progress.update(self._task, completed=number, facts=f"steps  loss {loss:.3f}")


def score_fact(scores: Mapping[str, float | None], metric: str | None) -> dict[str, str]:
    """Returns the score to show, as a fact: by a metric, or by the first of ``METRICS`` that there is.

    Their order is that of what tasks are judged by as they stand.
    """
    name = next((name for name in (metric, *METRICS) if name in METRICS and name in scores), None)
    if name is None:
        return {}
    shown = METRICS[name]
    return {"score": f"{short(shown).removesuffix('.')} {value_text(shown, scores[name])}"}


class CellBars:
    """One bar over the cells of a comparison, and one below it for each cell that runs."""

    def __init__(self, progress: Progress, done: int, total: int) -> None:
        self._progress = progress
        self._all = progress.add_task(f"{'cells':<11}", total=total, completed=done, facts="")
        self._running: dict[str, TaskID] = {}

    def started(self, name: str, done: int, rounds: int | None, metric: str | None) -> Watcher:
        """Opens a bar over the cell's rounds."""
        task = self._progress.add_task(name, total=rounds, completed=done, facts="")
        self._running[name] = task
        return RoundBar(self._progress, task, metric)

    def ended(self, name: str, text: str, total: int) -> None:
        """Replaces the cell's bar by a line."""
        self._progress.remove_task(self._running.pop(name))
        self._progress.console.print(text, markup=False, soft_wrap=True)
        self._progress.update(self._all, advance=1, total=total)


class Count(ProgressColumn):
    """How many of how many; without the latter where that is open."""

    def render(self, task: Task) -> Text:
        """Returns the column of one bar."""
        return Text(f"{task.completed:.0f}" + ("" if task.total is None else f"/{task.total:.0f}"))


class Terminal:
    """The stage of a command that may talk."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True, highlight=False)

    def note(self, text: str) -> None:
        """Prints one line to standard error, unless quiet."""
        if not self._quiet:
            self._console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def rounds(self, name: str, done: int, total: int, metric: str | None = None) -> Iterator[Watcher]:
        """Shows a progress bar for one run's rounds, unless quiet."""
        if self._quiet:
            yield Silent()
            return
        with self._progress() as progress:
            task = progress.add_task(f"{name:<11}", total=total, completed=done, facts="")
            yield RoundBar(progress, task, metric)

    @contextmanager
    def cells(self, done: int, total: int) -> Iterator[Silent | CellBars]:
        """Shows a progress bar for the cells of a comparison, and one for each that runs, unless quiet."""
        if self._quiet:
            yield Silent()
            return
        with self._progress() as progress:
            yield CellBars(progress, done, total)

    @contextmanager
    def steps(self, name: str, total: int | None) -> Iterator[Callable[[int, float], None]]:
        """Shows a progress bar over training steps, unless quiet; ``total`` is None where time decides."""
        if self._quiet:
            yield lambda number, loss: None
            return
        with self._progress() as progress:
            task = progress.add_task(f"{name:<11}", total=total, facts="reading text")
            yield StepBar(progress, task)

    def _progress(self) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            Count(),
            TextColumn("{task.fields[facts]}", markup=False),
            TimeElapsedColumn(),
        )
        return Progress(*columns, console=self._console)
