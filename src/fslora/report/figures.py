"""All figures of a run, with a sentence or two on how to read each."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.figure import Figure

from fslora.metrics import Metric
from fslora.report.clients import bytes_figure, client_scores_figure
from fslora.report.curves import coverage_figure, loss_figure, score_figure
from fslora.report.merit import ACCURACY, better, strata
from fslora.report.partition import has_partition, partition_figure
from fslora.report.read import DataRecord, RunRecord

__all__ = [
    "Drawn",
    "bytes_figure",
    "client_scores_figure",
    "coverage_figure",
    "draw_all",
    "loss_figure",
    "partition_figure",
    "score_figure",
]

NAMES = ("accuracy", "score", "loss", "bytes", "coverage", "clients", "partition")
"""File names of all figures, in the order of the page; a metric other than accuracy is ``score``."""


@dataclass(frozen=True)
class Drawn:
    """A figure with what a page says of it."""

    name: str
    title: str
    reading: str
    """One or two sentences: how to read it."""
    figure: Figure


def draw_all(record: RunRecord) -> list[Drawn]:
    """Returns every figure that the run and its variants have data for, in the order of the page."""
    runs, metric = record.runs, record.metric
    main = "accuracy" if metric.name == ACCURACY.name else "score"
    coverage = coverage_figure(runs)
    still = _READ_UNHELD if coverage and len(coverage.axes) > 1 else ""
    partition = partition_figure(record.data) if has_partition(record.data) else None
    drawn = (
        (main, f"Validation {metric.label}", _score(metric), score_figure(runs)),
        ("loss", "Loss", _READ_LOSS, loss_figure(runs)),
        ("bytes", "What each client carries", _READ_BYTES, bytes_figure(record)),
        ("coverage", "Which parts of the adapter are trained", _READ_COVERAGE + still, coverage),
        ("clients", "Clients on their own data", _READ_CLIENTS, client_scores_figure(runs)),
        ("partition", "Who holds which examples", _partition(record.data), partition),
    )
    return [Drawn(name, title, reading, figure) for name, title, reading, figure in drawn if figure is not None]


def _score(metric: Metric) -> str:
    return (
        f"{better(metric, 'Higher', 'Lower')} is better. Left, what a round brings; right, the same evaluations "
        f"against everything that travelled, so that a run further left reaches its {metric.label} with less traffic."
    )


def _partition(data: DataRecord | None) -> str:
    if data is None or not data.partition.several:
        return "Clients from weak to strong, each with the number of its examples."
    return (
        f"Clients from weak to strong, each with its examples by {strata(data.metric)[0]}; the more the clients "
        "differ, the less one client's update speaks for the others."
    )


_READ_LOSS = (
    "Lower is better. Left, the mean local loss of each round's cohort; from ten rounds on, the strong line is its "
    "running mean over five rounds and the pale one the rounds themselves, which jump because cohorts differ."
)
_READ_BYTES = (
    "The main run's clients from weak to strong: what each downloaded (solid) and sent back (hatched). "
    "Within one rank, taller bars belong to clients that were drawn for more rounds."
)
_READ_COVERAGE = (
    "The server's adapter has one part per rank index and layer. Shown is how many clients hold a part in a "
    "round; a level line means that all parts are trained equally often."
)
_READ_UNHELD = " Right, the parts that no client held, which stood still in that round."
_READ_CLIENTS = (
    "Each client's own held-out examples in the main run, from hollow (before) to filled (after). "
    "These tests are small, so look at the means by rank (right) before single clients."
)
