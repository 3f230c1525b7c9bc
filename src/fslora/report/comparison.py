"""Reads a comparison folder into one frozen value. Like a run, it can be read while it is being made.

comparison.json says which cells there are (a method at one point of its grid with one seed) and how they ended;
each cell is an ordinary run folder. A cell that ended but cannot be read counts as failed, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fslora.errors import ArtifactError
from fslora.metrics import Metric
from fslora.report.merit import ACCURACY
from fslora.report.read import RunRecord, Scores, parse_metric, read_json, read_run, read_text, validated
from fslora.report.text import byte_text, counted, duration, operations

FORMAT = 1


@dataclass(frozen=True)
class Budget:
    """What every method may spend."""

    kind: str = "rounds"
    """rounds, bytes, flops or seconds (simulated)."""
    amount: float = 0.0

    def text(self) -> str:
        """Returns the budget as a reader would write it."""
        if self.kind == "bytes":
            return f"{byte_text(self.amount)} sent"
        if self.kind == "flops":
            return f"{operations(self.amount)} at the clients"
        if self.kind == "seconds":
            return f"{duration(self.amount)} of simulated time"
        return counted(round(self.amount), "round") if self.kind == "rounds" else f"{self.amount:g} {self.kind}"


@dataclass(frozen=True)
class Point:
    """One combination of hyper-parameters that was tried, with the first seed."""

    point: Mapping[str, Any] = field(default_factory=dict)
    """Dotted key → value."""
    validation: Scores | None = None
    error: str | None = None


@dataclass(frozen=True)
class Contestant:
    """One row of the comparison: a method with what is changed for it."""

    method: str = ""
    """The registry's name."""
    paper: str = ""
    baseline: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)
    chosen: Mapping[str, Any] | None = None
    """The point of its grid that was best on the validation split; None before that is known."""
    points: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One run: a label at one point with one seed."""

    label: str
    seed: int
    folder: str
    point: int = 0
    status: Literal["finished", "failed", "waiting"] = "waiting"
    error: str | None = None
    chosen: bool = False
    """Whether it is a result; the others served to choose the point."""
    run: RunRecord | None = None
    """What its folder holds, for results that finished."""


@dataclass(frozen=True)
class ComparisonRecord:
    """One comparison folder."""

    name: str
    reference: str
    labels: tuple[str, ...]
    """The experiment's order, baselines last."""
    methods: Mapping[str, Contestant]
    seeds: tuple[int, ...] = ()
    budget: Budget = field(default_factory=Budget)
    metric: Metric = ACCURACY
    """What all methods are judged by: the first cell's that says it."""
    cells: tuple[Cell, ...] = ()
    format: int = FORMAT
    path: Path = Path()
    config_text: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)

    def results(self, label: str) -> dict[int, Cell]:
        """Returns a label's result cells by seed, in the order of the seeds."""
        found = {cell.seed: cell for cell in self.cells if cell.label == label and cell.chosen}
        return {seed: found[seed] for seed in self.seeds if seed in found}


def read_comparison(path: str | Path) -> ComparisonRecord:
    """Returns what a comparison folder holds.

    Raises:
        ArtifactError: The path is no comparison folder, or comparison.json is damaged or of another format.
    """
    folder = Path(path)
    source = folder / "comparison.json"
    fields = read_json(source)
    if fields is None:
        raise ArtifactError(
            f"{folder} is no comparison folder (it holds no comparison.json); give the one that `fslora compare` wrote"
        )
    if fields.get("format") != FORMAT:
        raise ArtifactError(f"{source} has format {fields.get('format')!r}; this fslora reads format {FORMAT}")
    record = validated(ComparisonRecord, fields, source)
    unknown = {*record.labels, *(cell.label for cell in record.cells)} - record.methods.keys()
    if unknown:
        raise ArtifactError(
            f"{source} is damaged: methods has no entry for {', '.join(sorted(unknown))}; run the comparison again"
        )
    cells = tuple(_with_run(cell, folder) for cell in record.cells)
    return replace(
        record,
        path=folder,
        metric=_metric(cells, folder),
        cells=cells,
        config_text=read_text(folder / "experiment.toml"),
        environment=read_json(folder / "environment.json") or {},
    )


def _metric(cells: Sequence[Cell], folder: Path) -> Metric:
    """The metric of the first finished result, else of the first cell that has begun."""
    found = (cell.run.metric for cell in cells if cell.run and cell.run.data)
    return next(found, None) or next(_begun(cells, folder), ACCURACY)


def _begun(cells: Sequence[Cell], folder: Path) -> Iterator[Metric]:
    for cell in cells:
        source = folder / cell.folder / "data.json"
        with suppress(ArtifactError):  # a damaged cell is told of where its own results are
            if fields := read_json(source):
                yield parse_metric(fields, source)


def _with_run(cell: Cell, folder: Path) -> Cell:
    if cell.status != "finished" or not cell.chosen:
        return cell
    try:
        run = read_run(folder / cell.folder)
    except ArtifactError as error:
        return replace(cell, status="failed", error=str(error))
    if run.summary is None:
        return replace(cell, status="failed", error=f"{run.path} has no summary.json; run the comparison again")
    return replace(cell, run=run)
