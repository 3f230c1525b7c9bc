"""How the methods of a comparison are drawn: one style each, a few of them strong, and labels that do not overlap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import cos, radians, sin
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fslora.report.comparison_results import MethodResult, leaders
from fslora.report.merit import LEAST
from fslora.report.style import INK, MAIN, MUTED, RunStyle, label
from fslora.report.text import byte_unit

STRONG = 3
"""How many of the best methods stand out where not all of them can."""
CROWD = 8
"""Methods up to which all of them stand out."""
_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_BASELINES = (INK, "#7b8794", "#4a5563", "#9aa5b1")
_LINES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
_MARKERS = "sD^vP<X>ph*"
_HALO = [withStroke(linewidth=2.2, foreground="white")]
_SIZE = 7.5
"""Points: the labels' type."""


@dataclass(frozen=True)
class Look:
    """How one method is drawn, in every figure."""

    style: RunStyle
    strong: bool
    hollow: bool
    """Markers of personal methods are hollow."""

    @property
    def name(self) -> str:
        """The label, as a figure can draw it."""
        return self.style.label

    @property
    def width(self) -> float:
        """Points: the line's width."""
        return 1.9 if self.strong else 0.9

    @property
    def opacity(self) -> float:
        """How much of the colour is seen."""
        return 1.0 if self.strong else 0.5

    @property
    def order(self) -> float:
        """What is drawn over what."""
        return 3.0 if self.strong else 2.0

    @property
    def face(self) -> str:
        """The marker's inside."""
        return "white" if self.hollow else self.style.colour


@dataclass(frozen=True)
class Tag:
    """A label for a point of a panel."""

    x: float
    y: float
    look: Look
    text: str = ""
    """Instead of the method's name."""

    @property
    def shown(self) -> str:
        """What is written."""
        return self.text or self.look.name


def method_looks(entries: Sequence[MethodResult]) -> dict[str, Look]:
    """Returns a style per label: colours first to the best, so that those in front are told apart by hue alone."""
    best = [entry for entry in leaders(entries, STRONG + 1) if not entry.reference][:STRONG]
    front = [entry.label for entry in best]
    methods = sorted(
        (entry for entry in entries if not entry.reference and not entry.entry.baseline),
        key=lambda entry: front.index(entry.label) if entry.label in front else len(front),
    )
    baselines = [entry for entry in entries if entry.entry.baseline and not entry.reference]
    styles = {entry.label: _style(entry, _COLOURS, place) for place, entry in enumerate(methods)}
    styles |= {entry.label: _style(entry, _BASELINES, place, dashed=1) for place, entry in enumerate(baselines)}
    styles |= {entry.label: RunStyle(_name(entry), MAIN, "-", "o") for entry in entries if entry.reference}
    few = len(entries) <= CROWD
    return {
        entry.label: Look(
            styles[entry.label],
            strong=few or entry.reference or entry.entry.baseline or entry.label in front,
            hollow=entry.personal,
        )
        for entry in entries
    }


def crowded(looks: dict[str, Look]) -> bool:
    """Returns whether some methods are drawn pale."""
    return not all(look.strong for look in looks.values())


def sending(amounts: Mapping[str, float | None]) -> set[str]:
    """Returns who sends more than next to nothing (a seed, say): a thousandth of what the most talkative sends."""
    most = max((amount for amount in amounts.values() if amount), default=0.0)
    return {label for label, amount in amounts.items() if amount and amount > most / 1000}


def byte_axis(axes: Axes, amounts: Sequence[float]) -> bool:
    """Makes the x axis one of bytes; returns whether it is logarithmic, as some send over ten times what others do.

    Args:
        axes: The panel.
        amounts: What each sends in the end, all positive.
    """
    logarithmic = max(amounts) > 10 * min(amounts)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(_bytes_text))
    return logarithmic


def end_labels(figure: Figure, axes: Axes, tags: Sequence[Tag]) -> None:
    """Writes the names right of a panel, in the order of the curves' ends, each tied to its end and none over another.

    Args:
        figure: The panel's figure, which is laid out as far as it is drawn.
        axes: The panel.
        tags: The ends of the curves.
    """
    figure.draw_without_rendering()
    height = axes.get_window_extent().height * 72 / figure.dpi
    ordered = sorted(tags, key=lambda tag: (tag.y, tag.shown))
    ends = [_in_axes(axes, tag) for tag in ordered]
    gap = min(1.32 * _SIZE / height, 1.0 / max(1, len(tags) - 1))
    for tag, (x, y), place in zip(ordered, ends, spaced([y for _, y in ends], gap), strict=True):
        look, colour = tag.look, tag.look.style.colour
        strokes = [
            Line2D([x, 1.015, 1.05], [y, y, place], color=colour, linewidth=0.5, alpha=0.6),
            Line2D([1.05, 1.09], [place] * 2, color=colour),
        ]
        strokes[1].set(linestyle=look.style.line, linewidth=look.width, alpha=look.opacity)
        if look.strong:
            strokes.append(Line2D([1.07], [place], marker=look.style.marker, markersize=4, color=colour, mfc=look.face))
        for stroke in strokes:
            stroke.set(transform=axes.transAxes, clip_on=False)
            axes.add_artist(stroke)
        axes.text(1.1, place, tag.shown, transform=axes.transAxes, va="center_baseline", **small(look))


def spaced(wanted: Sequence[float], gap: float) -> list[float]:
    """Returns places from 0 to 1, at least ``gap`` apart and as near to increasing wishes as that allows.

    Neighbours that want the same place are moved as one block around the mean of their wishes.
    """
    blocks: list[tuple[float, int]] = []
    for position, wish in enumerate(wanted):
        mean, size = wish - position * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, number = blocks.pop()
            mean, size = (before * number + mean * size) / (number + size), size + number
        blocks.append((mean, size))
    # The shifts rise from block to block, so that bounding them keeps the order and the gaps.
    room = max(0.0, 1.0 - gap * (len(wanted) - 1))
    shifts = [min(max(mean, 0.0), room) for mean, size in blocks for _ in range(size)]
    return [shift + position * gap for position, shift in enumerate(shifts)]


def point_labels(figure: Figure, axes: Axes, tags: Sequence[Tag]) -> None:
    """Writes a name beside every point, strong ones first, where it covers least of names and points."""
    figure.draw_without_rendering()
    scale = 72 / figure.dpi
    points = [tuple(axes.transData.transform((tag.x, tag.y)) * scale) for tag in tags]
    panel = _Box(*(float(edge) * scale for edge in axes.get_window_extent().extents))
    taken = [_Box(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    order = sorted(range(len(tags)), key=lambda place: (not tags[place].look.strong, points[place]))
    for place in order:
        tag, (x, y) = tags[place], points[place]
        width = _text_width(tag.shown, tag.look.strong)
        reach, box = min(
            ((reach, box) for reach, box in _places(x, y, width)),
            key=lambda found: found[0] + sum(map(found[1].overlap, taken)) * 2 + found[1].outside(panel) * 4,
        )
        taken.append(box)
        tie = {"arrowstyle": "-", "color": tag.look.style.colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            tag.shown,
            (tag.x, tag.y),
            xytext=(box.left - x, (box.bottom + box.top) / 2 - y),
            textcoords="offset points",
            va="center",
            arrowprops=tie if reach > _NEAR else None,
            path_effects=_HALO,
            zorder=5,
            **small(tag.look),
        ).set_in_layout(False)


def focus(ranges: Sequence[tuple[float, float | None, float | None]], least: float = LEAST) -> tuple[float, float]:
    """Returns the ends of an axis on which the bulk can be told apart: far outliers lie beyond them.

    Args:
        ranges: (middle, low, high) of everything that is to be drawn; low and high may be unknown.
        least: The least range that is shown.
    """
    middles = [middle for middle, _, _ in ranges]
    first, third = np.quantile(middles, [0.25, 0.75])
    fence = _FENCE * max(third - first, least)
    inside = [entry for entry in ranges if first - fence <= entry[0] <= third + fence]
    low = max(min(m if low is None else low for m, low, _ in inside), first - fence)
    high = min(max(m if high is None else high for m, _, high in inside), third + fence)
    spare = 0.07 * max(high - low, least)
    return float(low - spare), float(high + spare)


def beyond(value: float, limits: tuple[float, float]) -> tuple[float, str, str] | None:
    """Returns (edge, arrow, marker) of a value beyond an axis's limits, or None of one within them."""
    low, high = limits
    return (low, "↓", "v") if value < low else (high, "↑", "^") if value > high else None


def small(look: Look) -> dict[str, Any]:
    """Returns how a label is set, as text properties."""
    return {
        "fontsize": _SIZE,
        "color": INK if look.strong else MUTED,
        "fontweight": "bold" if look.strong else "normal",
    }


@dataclass(frozen=True)
class _Box:
    """A rectangle in points."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: _Box) -> float:
        """Returns the common area."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.top, other.top) - max(self.bottom, other.bottom)
        return wide * high if wide > 0 and high > 0 else 0.0

    def outside(self, panel: _Box) -> float:
        """Returns the area that lies outside of a panel."""
        return (self.right - self.left) * (self.top - self.bottom) - self.overlap(panel)


_FENCE = 3.0
"""Interquartile ranges beyond the quartiles from which on a value is a far outlier (Tukey's outer fences)."""
_NEAR = 9.0
"""Points: up to this distance a label needs no line to its point."""


def _places(x: float, y: float, width: float) -> Iterator[tuple[float, _Box]]:
    """Yields (distance, box) of a label around a point, the nearest first and right of it before left."""
    high = 1.2 * _SIZE
    for reach in (7.0, 12.0, 18.0, 26.0, 36.0, 48.0, 64.0):
        for angle in (0, 180, 25, -25, 155, -155, 55, -55, 125, -125, 90, -90):
            across, up = reach * cos(radians(angle)), reach * sin(radians(angle))
            left = x + across - (width if abs(angle) > 90 else width / 2 if abs(angle) == 90 else 0.0)
            yield reach, _Box(left, y + up - high / 2, left + width, y + up + high / 2)


def _bytes_text(amount: float, _: object) -> str:
    size, unit = byte_unit(amount)
    return f"{amount / size:g} {unit}"


@cache
def _text_width(text: str, bold: bool) -> float:
    """Points."""
    font = FontProperties(weight="bold" if bold else "normal")
    return float(TextPath((0, 0), text, size=_SIZE, prop=font).get_extents().width)


def _in_axes(axes: Axes, tag: Tag) -> tuple[float, float]:
    """A point of the data as shares of the panel's width and height."""
    x, y = axes.transAxes.inverted().transform(axes.transData.transform((tag.x, tag.y)))
    return float(x), float(y)


def _style(entry: MethodResult, colours: Sequence[str], place: int, dashed: int = 0) -> RunStyle:
    line = _LINES[(place // len(colours) + dashed) % len(_LINES)]
    return RunStyle(_name(entry), colours[place % len(colours)], line, _MARKERS[place % len(_MARKERS)])


def _name(entry: MethodResult) -> str:
    return label(entry.title, 26)
