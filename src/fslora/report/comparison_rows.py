"""Figures with one row per method: differences to the reference, and how clients of all kinds fare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from fslora.report.clients import rank_groups
from fslora.report.comparison_looks import Look, focus
from fslora.report.comparison_results import ClientScore, MethodResult, level_of, ranked
from fslora.report.comparison_tables import difference_text, result_row
from fslora.report.merit import goodness, least, metric_of, tick_text
from fslora.report.style import GRID, INK, MUTED, label, legend_above, rank_shades, score_axis, styled

Looks = Mapping[str, Look]
_ROW, _REST = 0.235, 1.15
"""Inches: height of one row, and of everything that is no row."""


@styled
def difference_figure(entries: Sequence[MethodResult], looks: Looks) -> Figure | None:
    """Returns every method's paired differences to the reference, with intervals; None without any."""
    metric = metric_of(entries)
    shown = sorted(
        (entry for entry in ranked(entries) if entry.difference),
        key=lambda entry: (
            entry.entry.baseline,
            -goodness(metric, entry.difference.mean) if entry.difference else 0.0,
        ),
    )
    if not shown:
        return None
    figure, axes, places = _rows(shown, looks)
    level = level_of(entries)
    tiny = least(metric, level)
    low, high = focus([(d.mean, d.low, d.high) for entry in shown if (d := entry.difference)], tiny)
    low, high = min(low, -tiny), max(high, tiny)
    for entry in shown:
        _difference_row(axes, entry, looks[entry.label], places[entry.label], (low, high))
    axes.axvline(0, color=INK, linewidth=1, zorder=1.5)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda change, _: tick_text(metric, change)))
    reference = next((looks[entry.label].name for entry in entries if entry.reference), "the reference")
    unit = " (points)" if metric.percent else ""
    axes.set_xlabel(f"test {label(metric.label)} minus that of {reference}, same seed{unit}")
    beside = axes.twinx()
    beside.grid(visible=False)
    beside.set_ylim(axes.get_ylim())
    texts = [difference_text(metric, level, result_row(entry)["difference"]) for entry in shown]
    beside.set_yticks(list(places.values()), texts, fontsize=8)
    beside.tick_params(length=0)
    return figure


@styled
def by_rank_figure(entries: Sequence[MethodResult], looks: Looks) -> Figure | None:
    """Returns the score on own examples by client rank, a row per method; None before the first result."""
    shown = _by_own(entries)
    if not shown:
        return None
    groups = rank_groups(sorted({client.rank for entry in shown for client in entry.clients}))
    figure, axes, places = _rows(shown, looks)
    shades = rank_shades(len(groups))
    drawn: list[float] = []
    for entry in shown:
        means = [_group_mean(entry.clients, group) for group in groups]
        known = [(mean, shade) for mean, shade in zip(means, shades, strict=True) if mean is not None]
        drawn += [mean for mean, _ in known]
        values, colours = [mean for mean, _ in known], [shade for _, shade in known]
        place = places[entry.label]
        axes.hlines(place, min(values), max(values), color="#c3ccd6", linewidth=1.4, zorder=2)
        axes.scatter(values, [place] * len(values), 34, colours, edgecolors="white", linewidths=0.6, zorder=3)
    metric = metric_of(shown)
    axes.set_xlabel(f"{label(metric.label)} on clients' own examples, mean over clients and seeds")
    score_axis(axes, "x", metric, drawn)
    names = [str(group[0]) if len(group) == 1 else f"{group[0]}–{group[-1]}" for group in groups]
    handles = [
        Line2D([], [], marker="o", linestyle="", markersize=6, color=shade, label=f"rank {name}")
        for name, shade in zip(names, shades, strict=True)
    ]
    legend_above(figure, handles)
    return figure


@styled
def fairness_figure(entries: Sequence[MethodResult], looks: Looks) -> Figure | None:
    """Returns the distribution over clients of the score on own examples; None before the first result."""
    shown = _by_own(entries)
    if not shown:
        return None
    figure, axes, places = _rows(shown, looks)
    for entry in shown:
        _fairness_row(axes, entry, looks[entry.label], places[entry.label])
    metric = metric_of(shown)
    axes.set_xlabel(f"{label(metric.label)} on a client's own examples")
    score_axis(axes, "x", metric, [client.value for entry in shown for client in entry.clients])
    figure.legend(handles=_fairness_marks(), loc="outside upper left", ncols=4)
    return figure


def _difference_row(axes: Axes, entry: MethodResult, look: Look, place: float, limits: tuple[float, float]) -> None:
    difference = entry.difference
    if difference is None:
        return
    low, high = limits
    colour, seeds = look.style.colour, list(difference.by_seed.values())
    clear = 1.0 if difference.sign else 0.45
    if difference.low is not None and difference.high is not None:
        axes.hlines(place, difference.low, difference.high, color=colour, linewidth=2.4, alpha=clear, zorder=2)
        axes.scatter(seeds, [place] * len(seeds), 9, MUTED, linewidths=0, alpha=0.8, zorder=3)
    if low <= difference.mean <= high:
        axes.scatter([difference.mean], [place], 38, colour, marker=look.style.marker, edgecolors="white", zorder=4)
    else:
        edge, arrow = (low, "<") if difference.mean < low else (high, ">")
        axes.scatter([edge], [place], 46, colour, marker=arrow, clip_on=False, zorder=4)


def _fairness_row(axes: Axes, entry: MethodResult, look: Look, place: float) -> None:
    values = np.array([client.value for client in entry.clients])
    # A shift that is the same each time, and even over neighbours in whatever order clients come.
    shifts = (np.arange(len(values)) * 0.618034 % 1.0 - 0.5) * 0.5
    size, colour = (10 if len(values) <= 150 else 4), look.style.colour
    axes.scatter(values, place + shifts, size, colour, linewidths=0, alpha=0.35, zorder=2)
    first, third = np.quantile(values, [0.25, 0.75])
    axes.barh(place, third - first, 0.62, left=first, facecolor="none", edgecolor=MUTED, linewidth=0.9, zorder=3)
    if entry.own.mean is not None:
        axes.scatter([entry.own.mean], [place], 30, colour, marker="o", edgecolors=INK, linewidths=0.9, zorder=5)
    if entry.worst.mean is not None:
        axes.scatter([entry.worst.mean], [place], 110, INK, marker="|", linewidths=2, zorder=4)


def _fairness_marks() -> list[Line2D | Patch]:
    return [
        Line2D([], [], marker="o", linestyle="", markersize=3.5, color=MUTED, alpha=0.6, label="a client, one seed"),
        Patch(facecolor="none", edgecolor=MUTED, label="the middle half"),
        Line2D([], [], marker="o", linestyle="", markersize=6, color=MUTED, markeredgecolor=INK, label="mean"),
        Line2D([], [], marker="|", linestyle="", markersize=10, markeredgewidth=2, color=INK, label="worst tenth"),
    ]


def _rows(shown: Sequence[MethodResult], looks: Looks) -> tuple[Figure, Axes, dict[str, float]]:
    """A panel with a row per method, from the top, baselines set apart; returns where each row is."""
    figure = Figure(figsize=(10, _REST + _ROW * (len(shown) + 1)))
    axes = figure.subplots()
    first = next((place for place, entry in enumerate(shown) if entry.entry.baseline), None)
    apart = 0.7 if first else 0.0
    places = {entry.label: place + apart * entry.entry.baseline for place, entry in enumerate(shown)}
    if first:
        axes.axhline(first - 0.5 + apart / 2, color="#9aa5b1", linewidth=0.8, linestyle=(0, (2, 2)))
    axes.set_ylim(max(places.values()) + 0.7, -0.7)
    ticks = axes.set_yticks(list(places.values()), [looks[entry.label].name for entry in shown], fontsize=8.5)
    for tick, entry in zip(ticks, shown, strict=True):
        tick.label1.set(color=INK, fontweight="bold" if entry.reference else "normal")
    axes.tick_params(axis="y", length=0, pad=8)
    axes.grid(visible=True, axis="y", color=GRID, linewidth=0.5)
    return figure, axes, places


def _by_own(entries: Sequence[MethodResult]) -> list[MethodResult]:
    """Those with scored clients, by the mean over clients, baselines in the end."""
    scored = [entry for entry in entries if entry.clients]
    return sorted(scored, key=lambda entry: (entry.entry.baseline, -goodness(entry.metric, entry.own.mean or 0.0)))


def _group_mean(clients: Sequence[ClientScore], ranks: Sequence[int]) -> float | None:
    """Mean over seeds of the mean over the clients of these ranks."""
    seeds = dict.fromkeys(client.seed for client in clients)
    held = [[c.value for c in clients if c.seed == seed and c.rank in ranks] for seed in seeds]
    means = [fmean(values) for values in held if values]
    return fmean(means) if means else None
