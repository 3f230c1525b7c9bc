"""What of a plan is done. All of it is read from the cells' folders, so that a stopped comparison just goes on.

comparison.json repeats it for the report, and is written again after every cell.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from fslora.compare.plan import Cell, Contestant, Key, Plan, dotted
from fslora.errors import FsloraError
from fslora.metrics import Metric
from fslora.report.merit import ACCURACY, goodness
from fslora.report.read import parse_metric, score
from fslora.runfolder import RunFolder

FORMAT = 1
FAILED = "failed.json"
"""In a cell's folder: why it failed."""


@dataclass(frozen=True)
class Outcome:
    """How a cell ended."""

    error: str | None = None
    """Why it failed; None when it is finished."""
    validation: dict[str, float] | None = None
    """Its last scores on the validation split."""
    metric: Metric = ACCURACY
    """What they are compared by."""

    @classmethod
    def of(cls, folder: RunFolder) -> Outcome:
        """Returns the outcome of a run that finished."""
        metric = parse_metric(folder.read_json("data.json"), folder.path / "data.json")
        return cls(validation=_last_validation(folder), metric=metric)

    @property
    def merit(self) -> tuple[float, float]:
        """The higher the better: by the metric, then by the loss; lowest for a failure, or where nothing is known."""
        value, loss = score(self.validation, self.metric.name), score(self.validation, "loss")
        return -inf if value is None else goodness(self.metric, value), -inf if loss is None else -loss


@dataclass
class Ledger:
    """The state of a comparison."""

    plan: Plan
    path: Path
    outcomes: dict[Key, Outcome] = field(default_factory=dict)
    """The cells that ended."""
    again: set[Key] = field(default_factory=set)
    """Those that failed when the comparison ran before; until they are tried again, their failure counts."""

    @classmethod
    def of(cls, plan: Plan, path: Path) -> Ledger:
        """Returns the ledger of a comparison folder: what ended in it."""
        ledger = cls(plan, path)
        for cell in plan.cells:
            folder = ledger.run_folder(cell)
            if folder.finished:
                ledger.outcomes[cell.key] = Outcome.of(folder)
            elif failed := folder.read_json(FAILED):
                ledger.outcomes[cell.key] = Outcome(failed["error"])
                ledger.again.add(cell.key)
        return ledger

    def run_folder(self, cell: Cell) -> RunFolder:
        """Returns a cell's run folder, which need not be there yet."""
        return RunFolder(self.path / cell.folder)

    def settle(self, cell: Cell, error: str | None) -> None:
        """Notes that a cell ended, and writes it down."""
        folder = self.run_folder(cell)
        self.again.discard(cell.key)
        self.outcomes[cell.key] = Outcome(error) if error else Outcome.of(folder)
        if error:
            with suppress(FsloraError):  # the folder itself may be what failed; comparison.json has the error too
                folder.write_json(FAILED, {"error": error})
        self.write()

    def choice(self, contestant: Contestant) -> int | None:
        """Returns the point that a contestant is compared at; None while that is open, or when every point failed.

        The points are compared by their final scores on the validation split with the first seed: best by the
        experiment's metric, then lowest loss, then first in the grid. The test split has no say.
        """
        if len(contestant.points) == 1:
            return 0
        ended = self._first_seed(contestant)
        if None in ended or self._hopeless(contestant):
            return None
        return max(range(len(ended)), key=lambda point: (ended[point] or Outcome()).merit)

    def needed(self) -> list[Cell]:
        """Returns the cells known to be needed, in order: every point with the first seed, the chosen with the rest."""
        chosen = {contestant.label: self.choice(contestant) for contestant in self.plan.contestants}
        first = self.plan.seeds[0]
        return [cell for cell in self.plan.cells if cell.seed == first or cell.point == chosen[cell.label]]

    def waiting(self, running: Collection[Key] = ()) -> list[Cell]:
        """Returns the cells that can run now, in order."""
        done = self.outcomes.keys() - self.again | set(running)
        return [cell for cell in self.needed() if cell.key not in done]

    @property
    def done(self) -> int:
        """How many of the needed cells have ended."""
        return len(self.needed()) - len(self.waiting())

    @property
    def total(self) -> int:
        """How many cells there will be in all, also where the choice of a point is still open."""
        undecided = [c for c in self.plan.contestants if self.choice(c) is None and not self._hopeless(c)]
        return len(self.needed()) + len(undecided) * (len(self.plan.seeds) - 1)

    def failures(self) -> list[tuple[Cell, str]]:
        """Returns what is missing from the comparison, and why.

        A point of a grid that failed is an answer like any other, unless all points of its contestant did.
        """
        chosen = {contestant.label: self.choice(contestant) for contestant in self.plan.contestants}
        outcomes = [(cell, self.outcomes.get(cell.key)) for cell in self.needed()]
        return [
            (cell, outcome.error)
            for cell, outcome in outcomes
            if outcome and outcome.error and chosen[cell.label] in (None, cell.point)
        ]

    def write(self) -> None:
        """Replaces comparison.json."""
        RunFolder(self.path).write_json("comparison.json", self.describe())

    def describe(self) -> dict[str, Any]:
        """Returns what comparison.json holds."""
        kind, amount = self.plan.budget
        return {
            "format": FORMAT,
            "name": self.path.resolve().name,
            "reference": self.plan.experiment.compare.reference,
            "seeds": list(self.plan.seeds),
            "budget": {"kind": kind, "amount": amount},
            "labels": [contestant.label for contestant in self.plan.contestants],
            "methods": {contestant.label: self._describe(contestant) for contestant in self.plan.contestants},
            "cells": [self._describe_cell(cell) for cell in self.needed()],
        }

    def _describe(self, contestant: Contestant) -> dict[str, Any]:
        method = next(cell.experiment.method for cell in self.plan.cells if cell.label == contestant.label)
        choice = self.choice(contestant)
        ended = [outcome or Outcome() for outcome in self._first_seed(contestant)]
        return {
            "method": method.name,
            "paper": method.paper,
            "baseline": contestant.baseline,
            "changes": dotted(contestant.changes),
            "chosen": None if choice is None else dict(contestant.points[choice]),
            "points": [
                {"point": dict(point), "validation": outcome.validation, "error": outcome.error}
                for point, outcome in zip(contestant.points, ended, strict=True)
            ],
        }

    def _describe_cell(self, cell: Cell) -> dict[str, Any]:
        outcome = self.outcomes.get(cell.key)
        return {
            "label": cell.label,
            "point": cell.point,
            "seed": cell.seed,
            "folder": cell.folder,
            "status": "waiting" if outcome is None else "failed" if outcome.error else "finished",
            "error": outcome and outcome.error,
            "chosen": cell.point == self.choice(self.plan.contestant(cell.label)),
        }

    def _first_seed(self, contestant: Contestant) -> list[Outcome | None]:
        """How each point ended with the first seed; None where it has not."""
        points = range(len(contestant.points))
        return [self.outcomes.get((contestant.label, point, self.plan.seeds[0])) for point in points]

    def _hopeless(self, contestant: Contestant) -> bool:
        """Whether every point failed."""
        return all(outcome and outcome.error for outcome in self._first_seed(contestant))


def _last_validation(folder: RunFolder) -> dict[str, float] | None:
    scores = [row["validation"] for row in folder.metrics() if row.get("validation")]
    return scores[-1] if scores else None
