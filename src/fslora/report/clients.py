"""Figures with one place per client: what it carries, and how it fares on its own data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import isfinite, nan
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fslora.metrics import Metric
from fslora.report.read import ClientScores, RunRecord, Scores, score
from fslora.report.style import (
    INK,
    MUTED,
    bar_width,
    by_rank,
    client_axis,
    label,
    legend_above,
    line,
    rank_colours,
    rank_panel,
    run_styles,
    score_axis,
    styled,
)
from fslora.report.text import byte_unit


@styled
def bytes_figure(record: RunRecord) -> Figure | None:
    """Returns rank and cumulative bytes of every client; None before the first round or without a fleet."""
    fleet = record.fleet
    down = [sum(row.client_bytes_down.get(client.id, 0) for row in record.rounds) for client in fleet]
    up = [sum(row.client_bytes_up.get(client.id, 0) for row in record.rounds) for client in fleet]
    if not any(down) and not any(up):
        return None
    order, colours = by_rank(fleet), rank_colours(fleet)
    size, unit = byte_unit(max(map(sum, zip(down, up, strict=True))))
    figure = Figure(figsize=(10, 4.6))
    top, main = figure.subplots(2, 1, sharex=True, height_ratios=[1, 3])
    rank_panel(top, fleet, order)
    bars = [colours[fleet[position].rank] for position in order]
    edge = {"edgecolor": "white", "linewidth": 0.4 if len(order) <= 80 else 0.0}
    sent = [down[position] / size for position in order]
    places, width = range(len(order)), bar_width(len(order))
    main.bar(places, sent, width=width, color=bars, **edge)
    back = [up[position] / size for position in order]
    main.bar(places, back, width=width, bottom=sent, color=bars, alpha=0.5, hatch="////", **edge)
    main.set_ylabel(f"bytes so far ({unit})")
    client_axis(main, fleet, order)
    handles = [
        Patch(facecolor=MUTED, label="down: server to client"),
        Patch(facecolor=MUTED, alpha=0.5, hatch="////", edgecolor="white", label="up: client to server"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2)
    return figure


@styled
def client_scores_figure(records: Sequence[RunRecord]) -> Figure | None:
    """Returns each client's score on its own test before and after, and means by rank for every run.

    Bars, order and metric follow the main run, which is the first record. None where it has no such scores.
    """
    record, metric = records[0], records[0].metric
    scores = _own_scores(record, metric)
    fleet = [client for client in record.fleet if client.id in scores]
    if not fleet:
        return None
    order, colours = by_rank(fleet), rank_colours(record.fleet)
    figure = Figure(figsize=(10, 4.6))
    grid = figure.add_gridspec(2, 2, width_ratios=[2.6, 1], height_ratios=[1, 3])
    main = figure.add_subplot(grid[1, 0])
    rank_panel(figure.add_subplot(grid[0, 0], sharex=main), fleet, order)
    ordered = [scores[fleet[position].id] for position in order]
    shades = [colours[fleet[position].rank] for position in order]
    before, after = ([_value(part, metric) for part in parts] for parts in _parts(ordered))
    places, dot = range(len(order)), 26 if len(order) <= 60 else 12
    main.vlines(places, before, after, colors=shades, linewidth=1.2, alpha=0.7)
    main.scatter(places, before, dot, "white", edgecolors=shades, linewidths=1.1, zorder=3, clip_on=False)
    main.scatter(places, after, dot, shades, zorder=4, clip_on=False)
    main.set_ylabel(f"{label(metric.label)} on own test")
    score_axis(main, "y", metric, [value for value in (*before, *after) if isfinite(value)])
    client_axis(main, fleet, order)
    handles = _rank_means(figure.add_subplot(grid[:, 1]), records)
    legend_above(figure, [*_before_after_marks(), *handles])
    return figure


def rank_groups(ranks: Sequence[int]) -> list[Sequence[int]]:
    """Returns the distinct ranks in groups: up to six stand alone, more in four groups of neighbours."""
    groups = len(ranks) if len(ranks) <= 6 else 4
    bounds = [round(position * len(ranks) / groups) for position in range(groups + 1)]
    return [ranks[start:stop] for start, stop in pairwise(bounds)]


def _rank_means(axes: Axes, records: Sequence[RunRecord]) -> list[Line2D]:
    """Draws every run's mean score by groups of the main run's ranks; returns the runs' legend entries."""
    metric = records[0].metric
    groups = rank_groups(sorted({client.rank for client in records[0].fleet}))
    places = [float(place) for place in range(len(groups))]
    members = [{client.id for client in records[0].fleet if client.rank in group} for group in groups]
    starts = _group_means(records[0], metric, members, "before")
    axes.plot(places, starts, "o", color=MUTED, markerfacecolor="white", linestyle=(0, (2, 2)), linewidth=1)
    handles: list[Line2D] = []
    drawn = list(starts)
    for look, record in zip(run_styles(records), records, strict=True):
        means = _group_means(record, metric, members, "after")
        drawn += means
        if any(isfinite(mean) for mean in means):
            handles.append(line(axes, look, (places, means), look.label))
    names = [str(group[0]) if len(group) == 1 else f"{group[0]}–{group[-1]}" for group in groups]
    axes.set_xticks(places, names)
    axes.set_xlim(-0.4, len(groups) - 0.6)
    axes.set(
        title="mean over clients, by rank",
        xlabel="client rank in the main run",
        ylabel=f"{label(metric.label)} on own test",
    )
    score_axis(axes, "y", metric, [value for value in drawn if isfinite(value)])
    return handles


def _group_means(record: RunRecord, metric: Metric, members: Sequence[set[int]], part: str) -> list[float]:
    scores = _own_scores(record, metric)
    means: list[float] = []
    for ids in members:
        parts = [getattr(entry, part) for entry in scores.values() if entry.id in ids]
        values = [value for value in (score(scored, metric.name) for scored in parts) if value is not None]
        means.append(fmean(values) if values else nan)
    return means


def _own_scores(record: RunRecord, metric: Metric) -> dict[int, ClientScores]:
    entries = record.summary.clients if record.summary else ()
    return {
        entry.id: entry
        for entry in entries
        if score(entry.before, metric.name) is not None or score(entry.after, metric.name) is not None
    }


def _parts(entries: Sequence[ClientScores]) -> tuple[list[Scores | None], list[Scores | None]]:
    return [entry.before for entry in entries], [entry.after for entry in entries]


def _value(scores: Scores | None, metric: Metric) -> float:
    value = score(scores, metric.name)
    return nan if value is None else value


def _before_after_marks() -> list[Line2D]:
    before = Line2D([], [], marker="o", linestyle="", color=INK, markerfacecolor="white", label="before training")
    return [before, Line2D([], [], marker="o", linestyle="", color=INK, label="after")]
