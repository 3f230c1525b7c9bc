"""What commands show while they work. Progress and notes go to standard error, results to standard output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fslora.report.text import byte_text, percent
from fslora.simulate import Watcher

FACTS = ("loss", "accuracy", "sent", "dropped")
"""In the order in which the bar shows them; together they fit a terminal of 80 columns."""


class Silent:
    """Shows nothing."""

    def round_started(self, number: int, clients: int) -> None:
        """Nothing."""

    def client_done(self, loss: float) -> None:
        """Nothing."""

    def round_done(self, row: Mapping[str, Any]) -> None:
        """Nothing."""


class RoundBar:
    """A progress bar over rounds, with the round's clients, loss, bytes and the last validation accuracy."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
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
        """Shows the round's mean loss, bytes so far and, where it was evaluated, accuracy."""
        if "loss" in row:
            self._facts["loss"] = f"loss {row['loss']:.3f}"
        if row.get("validation"):
            self._facts["accuracy"] = f"acc {percent(row['validation']['accuracy'])}"
        self._facts["sent"] = byte_text(row["bytes_total"])
        if row.get("dropped"):
            self._facts["dropped"] = f"{len(row['dropped'])} dropped"
        self._progress.update(self._task, completed=row["round"])
        self._show()

    def _show(self) -> None:
        facts = "  ".join(self._facts[name] for name in FACTS if name in self._facts)
        clients = f"  {self._done}/{self._of} clients" if self._of else ""
        self._progress.update(self._task, facts=facts + clients)


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
    def rounds(self, name: str, done: int, total: int) -> Iterator[Watcher]:
        """Shows a progress bar for one run's rounds, unless quiet."""
        if self._quiet:
            yield Silent()
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[facts]}", markup=False),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(f"{name:<11}", total=total, completed=done, facts="")
            yield RoundBar(progress, task)
