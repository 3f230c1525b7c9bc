"""Figures over rounds and traffic: mean over seeds, with the range of the seeds as a band."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from statistics import fmean, median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fslora.metrics import Metric
from fslora.report.comparison_looks import (
    Look,
    Tag,
    beyond,
    byte_axis,
    end_labels,
    focus,
    point_labels,
    sending,
)
from fslora.report.comparison_results import MethodResult, ranked
from fslora.report.merit import least, metric_of, value_text
from fslora.report.read import RoundRow, RunRecord, score
from fslora.report.style import label, round_axis, score_axis, styled

Measure = Callable[[RoundRow], float | None]
Looks = Mapping[str, Look]


@dataclass(frozen=True)
class Curve:
    """A quantity over seeds, at the places where every seed has it."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def mean_curve(runs: Sequence[RunRecord], value: Measure, place: Measure) -> Curve | None:
    """Returns a quantity's mean and range over runs; None where no round has it in all of them.

    The runs of a budget may end in different rounds: their last values are then one more point, at the mean place.
    """
    found = [_points(run, value, place) for run in runs]
    found = [points for points in found if points]
    if not found:
        return None
    common = sorted(set.intersection(*(set(points) for points in found)))
    columns = [[points[number] for points in found] for number in common]
    if any(max(points) != max(found[0]) for points in found):
        columns.append([points[max(points)] for points in found])
    return Curve(
        x=[fmean(x for x, _ in column) for column in columns],
        mean=[fmean(y for _, y in column) for column in columns],
        low=[min(y for _, y in column) for column in columns],
        high=[max(y for _, y in column) for column in columns],
    )


@styled
def rounds_figure(entries: Sequence[MethodResult], looks: Looks) -> Figure | None:
    """Returns the validation score by round, and its second half larger; None before the first result.

    Where a budget ends some runs early, there is no common second half, and one panel shows all.
    """
    metric = metric_of(entries)
    curves = _curves(entries, _validation(metric), _round)
    if not curves:
        return None
    if not _end_together(curves):
        figure, axes = _panel(5.0)
        _draw_ends(figure, axes, metric, curves, looks)
        round_axis(axes)
        return figure
    figure = Figure(figsize=(10, max(4.4, 1.1 + 0.15 * len(curves))))
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.3])
    for axes in (left, right):
        axes.margins(x=0.01)
        _draw(axes, curves, looks)
        round_axis(axes)
    left.set(title="whole", ylabel=f"validation {label(metric.label)}")
    right.set_title("the second half, larger")
    score_axis(left, "y", metric, [value for curve in curves.values() for value in curve.mean])
    last = max(curve.x[-1] for curve in curves.values())
    right.set_xlim(last / 2, last * 1.01)
    _look_at_ends(right, metric, curves)
    end_labels(figure, right, _tags(right, curves, looks, partial(value_text, metric)))
    return figure


@styled
def traffic_figure(entries: Sequence[MethodResult], looks: Looks) -> Figure | None:
    """Returns the validation score by bytes sent, of all that send more than next to nothing; None without any."""
    metric = metric_of(entries)
    curves = _curves(entries, _validation(metric), _sent)
    # What was measured before anything was sent has no place on a logarithmic axis.
    talkers = sending({name: curve.x[-1] for name, curve in curves.items()})
    curves = {name: _from_first_byte(curve) for name, curve in curves.items() if name in talkers}
    if not curves:
        return None
    figure, axes = _panel(5.0)
    axes.set_xlabel("sent so far, down and up, all clients")
    ends = [curve.x[-1] for curve in curves.values()]
    # Below what the thriftiest needs for half of its run nobody is compared.
    limits = (min(ends) / 2, max(ends) * 1.6) if byte_axis(axes, ends) else None
    _draw_ends(figure, axes, metric, curves, looks, limits)
    return figure


@styled
def rank_figure(entries: Sequence[MethodResult], looks: Looks) -> Figure | None:
    """Returns the effective rank of the global update by round; None where no run records it."""
    curves = _curves(entries, lambda row: row.effective_rank, _round)
    if not curves:
        return None
    figure, axes = _panel(max(4.2, 0.9 + 0.15 * len(curves)))
    _draw(axes, curves, looks)
    axes.set(ylabel="effective rank of the global update")
    axes.set_ylim(bottom=0)
    round_axis(axes)
    if _end_together(curves):
        end_labels(figure, axes, _tags(axes, curves, looks, "{:.1f}".format))
    else:
        _leave_room(axes)
        point_labels(figure, axes, _tags(axes, curves, looks, "{:.1f}".format))
    return figure


def _validation(metric: Metric) -> Measure:
    return lambda row: score(row.validation, metric.name)


def _round(row: RoundRow) -> float:
    return float(row.round)


def _sent(row: RoundRow) -> float:
    return float(row.bytes_total)


def _curves(entries: Sequence[MethodResult], value: Measure, place: Measure) -> dict[str, Curve]:
    """Label → curve, of those that have one, the best first."""
    found = {entry.label: mean_curve(list(entry.runs.values()), value, place) for entry in ranked(entries)}
    return {name: curve for name, curve in found.items() if curve is not None}


def _points(run: RunRecord, value: Measure, place: Measure) -> dict[int, tuple[float, float]]:
    found = {row.round: (place(row), value(row)) for row in run.rounds}
    return {number: (x, y) for number, (x, y) in found.items() if x is not None and y is not None and isfinite(x + y)}


def _end_together(curves: Mapping[str, Curve]) -> bool:
    """Whether all curves reach the second half."""
    ends = [curve.x[-1] for curve in curves.values()]
    return min(ends) > max(ends) / 2


def _panel(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(10, height))
    axes = figure.subplots()
    axes.margins(x=0.03)
    return figure, axes


def _draw_ends(
    figure: Figure,
    axes: Axes,
    metric: Metric,
    curves: Mapping[str, Curve],
    looks: Looks,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draws scores in one panel, with the names where the curves end; ``limits`` bound the x axis."""
    _draw(axes, curves, looks)
    axes.set_ylabel(f"validation {label(metric.label)}")
    _look_at_ends(axes, metric, curves)
    if limits:
        axes.set_xlim(*limits)
    else:
        _leave_room(axes)
    point_labels(figure, axes, _tags(axes, curves, looks, partial(value_text, metric)))


def _leave_room(axes: Axes) -> None:
    """Leaves room for names right of the last ends."""
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.1 * (high - low))


def _draw(axes: Axes, curves: Mapping[str, Curve], looks: Looks) -> None:
    for name, curve in curves.items():
        look = looks[name]
        marker = look.style.marker if look.strong and len(curve.x) <= 40 else ""
        axes.plot(
            curve.x,
            curve.mean,
            color=look.style.colour,
            linestyle=look.style.line,
            linewidth=look.width,
            alpha=look.opacity,
            marker=marker,
            markersize=4,
            markerfacecolor=look.face,
            zorder=look.order,
            label=look.name,
        )
        if look.strong and curve.low != curve.high:
            axes.fill_between(curve.x, curve.low, curve.high, color=look.style.colour, alpha=0.12, linewidth=0)


def _from_first_byte(curve: Curve) -> Curve:
    start = next(place for place, x in enumerate(curve.x) if x > 0)
    return Curve(curve.x[start:], curve.mean[start:], curve.low[start:], curve.high[start:])


def _look_at_ends(axes: Axes, metric: Metric, curves: Mapping[str, Curve]) -> None:
    """Bounds a panel of scores to where the curves are in their second half, far outliers aside."""
    halves = [(curve, len(curve.mean) // 2) for curve in curves.values()]
    ranges = [(curve.mean[-1], min(curve.mean[half:]), max(curve.mean[half:])) for curve, half in halves]
    axes.set_ylim(*focus(ranges, least(metric, median(end for end, _, _ in ranges))))
    score_axis(axes, "y", metric, decimals=None)


def _tags(axes: Axes, curves: Mapping[str, Curve], looks: Looks, show: Callable[[float], str]) -> list[Tag]:
    """Returns the names at the curves' ends; one that ends beyond the panel is marked at its edge, with the number."""
    tags: list[Tag] = []
    for name, curve in curves.items():
        end, look = curve.mean[-1], looks[name]
        outside = beyond(end, axes.get_ylim())
        if outside:
            edge, arrow, marker = outside
            axes.plot([curve.x[-1]], [edge], marker=marker, markersize=6, color=look.style.colour, clip_on=False)
            tags.append(Tag(curve.x[-1], edge, look, f"{look.name}, {show(end)} {arrow}"))
        else:
            tags.append(Tag(curve.x[-1], end, look))
    return tags
