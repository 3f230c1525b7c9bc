"""Figures of what a score costs, and of what the global update is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from fslora.report.comparison_looks import Look, Tag, beyond, byte_axis, focus, point_labels, sending
from fslora.report.comparison_results import MethodResult, level_of, ranked, undominated
from fslora.report.merit import least, metric_of, value_text
from fslora.report.read import RunRecord
from fslora.report.style import INK, MUTED, label, score_axis, styled

Looks = Mapping[str, Look]
_FAINT = 1e-5
"""The least share of energy that is drawn."""
_ACROSS = 5
"""Small panels in a row."""


@styled
def pareto_figure(entries: Sequence[MethodResult], looks: Looks) -> Figure | None:
    """Returns the test score by bytes sent, with the methods that none beats in both; None before the first result."""
    scored = [entry for entry in entries if entry.test.mean is not None]
    talkers = sending({entry.label: entry.traffic.mean for entry in scored})
    placed = [entry for entry in scored if entry.label in talkers]
    if not placed:
        return None
    figure = Figure(figsize=(10, 5.4))
    axes = figure.subplots()
    byte_axis(axes, [entry.traffic.mean or 0.0 for entry in placed])
    metric = metric_of(entries)
    limits = focus([_range(entry) for entry in scored], least(metric, level_of(scored)))
    axes.set_ylim(*limits)
    axes.margins(x=0.08)
    front = undominated(placed)
    tags = [_mark(axes, entry, looks[entry.label], limits, ahead=entry in front) for entry in placed]
    ends = [(entry.traffic.mean or 0.0, entry.test.mean or 0.0) for entry in front]
    if ends:
        axes.plot(*zip(*ends, strict=True), color=MUTED, linewidth=1.2, drawstyle="steps-post", zorder=1.8)
    tags += [_level(axes, entry, looks[entry.label], limits) for entry in scored if entry.label not in talkers]
    axes.set(xlabel="sent in the whole run, down and up, all clients", ylabel=f"test {label(metric.label)}")
    score_axis(axes, "y", metric)
    point_labels(figure, axes, tags)
    return figure


@styled
def spectra_figure(entries: Sequence[MethodResult], looks: Looks) -> Figure | None:
    """Returns one small panel per method: the energy of the last global update by singular value; None without any."""
    spectra = {entry.label: spectrum for entry in ranked(entries) if (spectrum := mean_spectrum(entry))}
    if not spectra:
        return None
    rows = ceil(len(spectra) / _ACROSS)
    figure = Figure(figsize=(10, 0.55 + 1.45 * rows))
    panels = figure.subplots(rows, _ACROSS, sharex=True, sharey=True, squeeze=False).ravel().tolist()
    reference = next((spectra[entry.label] for entry in entries if entry.reference and entry.label in spectra), None)
    known = {entry.label: entry for entry in entries}
    for axes, (name, spectrum) in zip(panels, spectra.items(), strict=False):
        _spectrum(axes, known[name], looks[name], spectrum, reference)
    used = len(spectra)
    for place, axes in enumerate(panels):
        axes.set_visible(place < used)
        # The last panel above an empty place has no panel below that would carry its numbers.
        axes.xaxis.set_tick_params(labelbottom=place + _ACROSS >= used)
    figure.supxlabel("singular value, the largest first", fontsize=9)
    figure.supylabel("share of energy", fontsize=9)
    return figure


def mean_spectrum(entry: MethodResult) -> list[float]:
    """Returns the last recorded spectrum, mean over seeds; empty where there is none."""
    spectra = [spectrum for run in entry.runs.values() if (spectrum := _last_spectrum(run))]
    return [fmean(column) for column in zip(*spectra, strict=False)]


def _last_spectrum(run: RunRecord) -> tuple[float, ...]:
    return next((row.spectrum for row in reversed(run.rounds) if row.spectrum), ())


def _range(entry: MethodResult) -> tuple[float, float, float]:
    """Mean test score, and one standard deviation below and above it."""
    mean, spread = entry.test.mean or 0.0, entry.test.sd or 0.0
    return mean, mean - spread, mean + spread


def _mark(axes: Axes, entry: MethodResult, look: Look, limits: tuple[float, float], *, ahead: bool) -> Tag:
    """Draws one method and returns its label; one that is beyond the panel stands at its edge with its number."""
    mean, x = entry.test.mean or 0.0, entry.traffic.mean or 0.0
    colour, emphasis = look.style.colour, replace(look, strong=ahead or entry.reference)
    outside = beyond(mean, limits)
    if outside:
        edge, arrow, marker = outside
        axes.plot([x], [edge], marker=marker, markersize=8, color=colour, clip_on=False, zorder=4)
        return Tag(x, edge, emphasis, f"{look.name}, {value_text(entry.metric, mean)} {arrow}")
    axes.errorbar([x], [mean], entry.test.sd, entry.traffic.sd, "none", ecolor=colour, elinewidth=1.0, alpha=0.7)
    axes.plot([x], [mean], marker=look.style.marker, markersize=6.5, color=colour, mfc=look.face, zorder=3)
    return Tag(x, mean, emphasis)


def _level(axes: Axes, entry: MethodResult, look: Look, limits: tuple[float, float]) -> Tag:
    """Draws a method that sends (next to) nothing, such as training on pooled data, as a level; returns its label."""
    level, name = entry.test.mean or 0.0, f"{look.name} (sends {'next to ' if entry.traffic.mean else ''}nothing)"
    outside = beyond(level, limits)
    if outside:
        name = f"{name}, {value_text(entry.metric, level)} {outside[1]}"
        level = outside[0]
    axes.axhline(level, color=look.style.colour, linestyle=look.style.line, linewidth=1.2, zorder=1.7)
    # Not on the line but above it, and below it at the upper edge.
    above = 0.02 * (limits[1] - limits[0]) * (-1 if level == limits[1] else 1)
    return Tag(axes.get_xlim()[1], level + above, look, name)


def _spectrum(
    axes: Axes, entry: MethodResult, look: Look, spectrum: Sequence[float], reference: Sequence[float] | None
) -> None:
    """Draws one method's spectrum over the reference's."""
    if reference is not None and not entry.reference:
        axes.plot(range(1, len(reference) + 1), reference, color="#aab4bf", linewidth=1.1, zorder=2)
    axes.plot(range(1, len(spectrum) + 1), spectrum, color=look.style.colour, linewidth=1.8, zorder=3)
    axes.set_yscale("log")
    axes.set_ylim(_FAINT, 1.5)
    axes.yaxis.set_major_locator(LogLocator(numticks=4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.tick_params(labelsize=7.5)
    axes.set_title(look.name, fontsize=8, color=INK, fontweight="bold" if entry.reference else "normal", pad=3)
    ranks = [rank for run in entry.runs.values() if (rank := _last_rank(run)) is not None]
    if ranks:
        note = f"effective rank {fmean(ranks):.1f}"
        axes.text(0.97, 0.93, note, transform=axes.transAxes, ha="right", va="top", fontsize=7, color=MUTED)


def _last_rank(run: RunRecord) -> float | None:
    return next((row.effective_rank for row in reversed(run.rounds) if row.effective_rank is not None), None)
