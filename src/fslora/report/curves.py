"""Figures over rounds: scores, loss, and which parts of the adapter were trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fslora.metrics import Metric
from fslora.report.merit import LOSS, loss_unit, metric_of, value_text
from fslora.report.read import Baseline, RoundRow, RunRecord, score
from fslora.report.style import INK, label, legend_above, line, round_axis, run_styles, score_axis, styled
from fslora.report.text import byte_unit

_Points = tuple[list[float], list[float]]


@styled
def score_figure(records: Sequence[RunRecord]) -> Figure | None:
    """Returns the validation score by round and by cumulative bytes; None before the first evaluation.

    All runs are drawn by the metric of the first.
    """
    metric = metric_of(records)

    def value(row: RoundRow) -> float | None:
        return score(row.validation, metric.name)

    curves = [_curve(record, value) for record in records]
    if not any(values for _, values in curves):
        return None
    figure = Figure(figsize=(10, 4.1))
    left, right = figure.subplots(1, 2, sharey=True)
    handles: list[Line2D] = []
    traffic = [_curve(record, value, _bytes_at) for record in records]
    size, unit = byte_unit(max((x for xs, _ in traffic for x in xs), default=0.0))
    for look, curve, (bytes_sent, values) in zip(run_styles(records), curves, traffic, strict=True):
        if curve[1]:
            handles.append(line(left, look, curve, f"{look.label}, newest {value_text(metric, curve[1][-1])}"))
            line(right, look, ([x / size for x in bytes_sent], values))
    handles += _reference((left, right), records, metric)
    left.set(title="by round", ylabel=f"validation {label(metric.label)}")
    right.set(title="by traffic", xlabel=f"bytes down and up, all clients so far ({unit})")
    _byte_scale(right, [xs for xs, _ in traffic])
    round_axis(left)
    score_axis(left, "y", metric, [value for _, values in curves for value in values])
    legend_above(figure, handles)
    return figure


@styled
def loss_figure(records: Sequence[RunRecord]) -> Figure | None:
    """Returns local and, where there is any, validation loss by round; None before the first round."""
    local = [_curve(record, lambda row: row.loss) for record in records]
    checked = [_curve(record, lambda row: score(row.validation, "loss")) for record in records]
    if not any(values for _, values in local):
        return None
    unit = loss_unit(metric_of(records))
    with_validation = any(values for _, values in checked)
    figure = Figure(figsize=(10, 3.8))
    panels = list(figure.subplots(1, 2 if with_validation else 1, squeeze=False)[0])
    handles: list[Line2D] = []
    for look, (rounds, values), evaluated in zip(run_styles(records), local, checked, strict=True):
        panels[0].plot(rounds, values, color=look.colour, alpha=0.3, linewidth=0.8, linestyle=look.line)
        handles.append(line(panels[0], look, (rounds, _smooth(values)), look.label, marked=len(values) < 3))
        if with_validation:
            line(panels[1], look, evaluated)
    panels[0].set(title="local training", ylabel=f"mean loss of the cohort{unit}")
    if with_validation:
        handles += _reference((panels[1],), records, LOSS)
        panels[1].set(title="validation", ylabel=f"mean loss{unit}")
    for axes in panels:
        round_axis(axes)
    legend_above(figure, handles)
    return figure


@styled
def coverage_figure(records: Sequence[RunRecord]) -> Figure | None:
    """Returns holders by rank index, and the share of parts nobody held; None where no run has coverage.

    Folders that do not record ``unheld`` give a lower bound of that share; it is left out where it is zero.
    """
    covered = [[row for row in record.rounds if row.coverage and row.layers] for record in records]
    if not any(covered):
        return None
    shares = [[_unheld_share(row) for row in rows] for rows in covered]
    exact = all(row.unheld is not None for rows in covered for row in rows)
    both = exact or any(map(any, shares))
    figure = Figure(figsize=(10, 3.8))
    panels = list(figure.subplots(1, 2 if both else 1, squeeze=False)[0])
    handles: list[Line2D] = []
    most = max(max(_mean_holders(rows)) for rows in covered if rows) or 1.0
    for look, rows, unheld in zip(run_styles(records), covered, shares, strict=True):
        if rows:
            holders = _mean_holders(rows)
            edges = [index - 0.5 for index in range(len(holders) + 1)]
            # A run of small rank is drawn over the longer line of another that its own may coincide with.
            on_top = 2 + 1 / len(holders)
            panels[0].stairs(holders, edges, color=look.colour, linewidth=2, baseline=None, zorder=on_top)
            handles.append(Line2D([], [], color=look.colour, linewidth=2, label=look.label))
            if both:
                line(panels[1], look, ([float(row.round) for row in rows], unheld))
    panels[0].set(title="holders of each part", xlabel="rank index at the server", ylabel="clients, mean per round")
    panels[0].set_ylim(0, 1.1 * most)
    panels[0].margins(x=0.01)
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    if both:
        panels[1].set(title="parts that nobody held", ylabel="share of parts" if exact else "share of parts, at least")
        top = max(max(unheld, default=0.0) for unheld in shares)
        panels[1].set_ylim(-0.02 * max(top, 0.1), max(1.1 * top, 0.1))
        panels[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        round_axis(panels[1])
    legend_above(figure, handles)
    return figure


def _curve(
    record: RunRecord,
    value: Callable[[RoundRow], float | None],
    place: Callable[[RoundRow], float] = lambda row: float(row.round),
) -> _Points:
    """The rounds that have a finite value."""
    found = [(place(row), value(row)) for row in record.rounds]
    kept = [(x, y) for x, y in found if y is not None and isfinite(y)]
    return [x for x, _ in kept], [y for _, y in kept]


def _bytes_at(row: RoundRow) -> float:
    return float(row.bytes_total)


def _reference(panels: Sequence[Axes], records: Sequence[RunRecord], metric: Metric) -> list[Line2D]:
    """Draws the frozen base's validation score as a dashed line; returns its legend entry."""
    baseline: Baseline | None = next((record.baseline for record in records if record.baseline), None)
    value = score(baseline.validation, metric.name) if baseline else None
    if baseline is None or value is None:
        return []
    drawn = [axes.axhline(value, color=INK, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1.5) for axes in panels]
    drawn[0].set_label(f"{label(baseline.name, 40)}, {value_text(metric, value)}")
    return drawn[:1]


def _byte_scale(axes: Axes, runs: Sequence[Sequence[float]]) -> None:
    """A logarithmic axis where one run's traffic would squash another's against the edge."""
    ends = [max(xs) for xs in runs if xs and max(xs) > 0]
    if ends and max(ends) > 30 * min(ends):
        axes.set_xscale("log")


def _smooth(values: Sequence[float], reach: int = 2) -> list[float]:
    """The centred running mean over five rounds; short runs as they are."""
    if len(values) < 10:
        return list(values)
    return [fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def _mean_holders(rows: Sequence[RoundRow]) -> list[float]:
    """Mean over rounds of the holders of each index per layer; rounds of another server rank are left out."""
    rank = len(rows[-1].coverage or ())
    same = [[held / row.layers for held in row.coverage] for row in rows if row.coverage and len(row.coverage) == rank]
    return [fmean(column) for column in zip(*same, strict=True)]


def _unheld_share(row: RoundRow) -> float:
    """Share of (layer, index) parts without a holder; without ``unheld``, the least that the sums allow."""
    coverage = row.coverage or ()
    unheld = sum(max(0.0, row.layers - held) for held in coverage) if row.unheld is None else float(row.unheld)
    return unheld / (row.layers * len(coverage)) if coverage else 0.0
