"""All figures of a comparison, with a sentence or two on how to read each."""

from __future__ import annotations

from collections.abc import Sequence

from fslora.metrics import Metric
from fslora.report.comparison import ComparisonRecord
from fslora.report.comparison_curves import rank_figure, rounds_figure, traffic_figure
from fslora.report.comparison_looks import STRONG, crowded, method_looks
from fslora.report.comparison_maps import pareto_figure, spectra_figure
from fslora.report.comparison_results import MethodResult
from fslora.report.comparison_rows import by_rank_figure, difference_figure, fairness_figure
from fslora.report.figures import Drawn
from fslora.report.merit import better, capital
from fslora.report.text import plain

NAMES = ("difference", "rounds", "traffic", "pareto", "by-rank", "fairness", "spectra", "effective-rank")
"""File names of all figures, in the order of the page."""


def draw_comparison(comparison: ComparisonRecord, entries: Sequence[MethodResult]) -> list[Drawn]:
    """Returns every figure that the comparison has data for, in the order of the page."""
    looks = method_looks(entries)
    reference = plain(comparison.reference)
    several = len(comparison.seeds) > 1
    pale = crowded(looks)
    metric = comparison.metric
    name = capital(metric.label)
    drawn = (
        (
            "difference",
            "Difference to the reference",
            _difference(metric, reference, several),
            difference_figure(entries, looks),
        ),
        ("rounds", f"{name} by round", _curves(metric, several, pale), rounds_figure(entries, looks)),
        ("traffic", f"{name} by traffic", _curves(metric, several, pale, traffic=True), traffic_figure(entries, looks)),
        ("pareto", f"What {metric.label} costs", _pareto(metric, several), pareto_figure(entries, looks)),
        ("by-rank", "Weak and strong clients", _BY_RANK, by_rank_figure(entries, looks)),
        ("fairness", "Who is left behind", _fairness(metric), fairness_figure(entries, looks)),
        ("spectra", "What the global update is made of", _spectra(reference), spectra_figure(entries, looks)),
        ("effective-rank", "Effective rank by round", _RANK + _pale(metric, pale), rank_figure(entries, looks)),
    )
    return [Drawn(name, title, reading, figure) for name, title, reading, figure in drawn if figure is not None]


def _difference(metric: Metric, reference: str, several: bool) -> str:
    how = (
        "The bar is the 95 % t interval of the mean over seeds, the small dots are the seeds; a pale bar includes "
        "zero, so that these runs do not tell the method from the reference."
        if several
        else "With one seed there is no interval, and small differences mean nothing."
    )
    side = better(metric, "Right", "Left")
    return f"{side} of the line is better than {reference}. {how} An arrow points to a value beyond the panel."


def _curves(metric: Metric, several: bool, pale: bool, *, traffic: bool = False) -> str:
    end = (
        f"Further left is the same {metric.label} for less traffic; what sends next to nothing is left out. "
        if traffic
        else ""
    )
    band = "Mean over seeds; bands reach from the lowest to the highest seed. " if several else ""
    side = "" if metric.higher_is_better else "Lower is better. "
    return f"{side}{end}{band}An arrow is beside a value beyond the panel.{_pale(metric, pale)}"


def _pale(metric: Metric, pale: bool) -> str:
    if not pale:
        return ""
    return f" Strong: the reference, the {STRONG} best by test {metric.label}, and baselines; thin: all others."


def _pareto(metric: Metric, several: bool) -> str:
    bars = " Bars are one standard deviation over seeds." if several else ""
    return (
        f"{better(metric, 'Up', 'Down')} and left is better. The stepped line joins the methods that no other beats in "
        f"both, which are in bold with the reference; baselines (grey) take no part in it.{bars} Hollow: mean over "
        "personal models. An arrow points to a value beyond the panel."
    )


def _spectra(reference: str) -> str:
    return (
        "Each panel is one method at its last evaluation: how the energy of its global update spreads over "
        f"singular values, mean over layers and seeds; in grey, {reference}. A line that falls off early is an update "
        "of low rank, however high the adapter's rank is. Shares below 0.001 % are not drawn."
    )


def _fairness(metric: Metric) -> str:
    return (
        "Every client of every seed on its own held-out examples. The bar marks the mean over the worst tenth of the "
        f"clients: of two methods with the same mean, the one whose bar is further {better(metric, 'right', 'left')} "
        "leaves fewer behind."
    )


_BY_RANK = (
    "A dot is the mean over the clients of one rank, on the examples that they held out themselves. The longer the "
    "row, the more a client's rank decides what it gets."
)
_RANK = (
    "How many singular values the global update effectively has, mean over layers and seeds; a falling curve is a "
    "collapse to few directions."
)
