"""What all figures share: colours, fonts, client order, and saving. Never pyplot, never a lasting setting."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Literal, ParamSpec, TypeVar

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter, ScalarFormatter

from fslora.metrics import Metric
from fslora.report.merit import wide
from fslora.report.read import RunRecord
from fslora.report.text import plain
from fslora.types import Client

P = ParamSpec("P")
R = TypeVar("R")

INK, MUTED, GRID = "#1f2933", "#5f6b7a", "#e3e8ee"
MAIN = "#0072b2"
CATEGORIES = (MAIN, "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#8c8c8c")
"""Okabe and Ito's colours, which people with any usual colour vision can tell apart."""
_RUNS = (MAIN, "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_LINES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
_MARKERS = "osD^vP"

_STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 8.0,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "fslora",
    "hatch.linewidth": 0.6,
}
_WIDE_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Microsoft YaHei")
"""Fonts for what the first lacks; a character that none of them has is drawn as a box."""
_RANKS = LinearSegmentedColormap.from_list("ranks", ["#b9a5e3", "#8468c4", "#5b3f9e", "#2b1a5a"])


@dataclass(frozen=True)
class RunStyle:
    """How one run is drawn, in every figure."""

    label: str
    colour: str
    line: str | tuple[int, tuple[float, ...]]
    marker: str


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Returns ``draw`` under the report's settings, whatever the user's own matplotlib settings are."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with style.context(["default", {**_STYLE, "font.family": _families()}]):
            return draw(*args, **kwargs)

    return drawn


@styled
def save(figure: Figure, form: str) -> bytes:
    """Returns the figure as a file, ``svg``, ``png`` or ``pdf``; the same bytes each time."""
    buffer = io.BytesIO()
    stamp = {"svg": "Date", "pdf": "CreationDate"}.get(form, "Software")
    figure.draw_without_rendering()  # finds the layout, which saving would do twice
    figure.set_layout_engine("none")
    figure.savefig(buffer, format=form, dpi=200, metadata={stamp: None})
    return buffer.getvalue()


def run_styles(records: Sequence[RunRecord]) -> list[RunStyle]:
    """Returns one style per run, by position: the first is the main run."""
    return [
        RunStyle(
            label(record.label, 40),
            _RUNS[position % len(_RUNS)],
            _LINES[position // len(_RUNS) % len(_LINES)],
            _MARKERS[position % len(_MARKERS)],
        )
        for position, record in enumerate(records)
    ]


def rank_colours(fleet: Sequence[Client]) -> dict[int, str]:
    """Returns a colour per rank of the fleet, light for low and dark for high, in a hue that no run has."""
    ranks = sorted({client.rank for client in fleet})
    return dict(zip(ranks, rank_shades(len(ranks)), strict=True))


def rank_shades(number: int) -> list[str]:
    """Returns so many colours of the ranks' hue, from light for low to dark for high."""
    return [to_hex(_RANKS(place / (number - 1) if number > 1 else 0.6)) for place in range(number)]


def by_rank(fleet: Sequence[Client]) -> list[int]:
    """Returns positions in the fleet by increasing rank, then id: the order of clients in every figure."""
    return sorted(range(len(fleet)), key=lambda position: (fleet[position].rank, fleet[position].id))


def label(text: object, limit: int = 28) -> str:
    """Returns text that a figure can draw: one line, known glyphs, and no formula however many dollars."""
    known = _glyphs()
    line = "".join(char if ord(char) in known else "□" for char in plain(text, limit))
    line = line.replace("$", r"\$")
    return f" {line}" if line.startswith("_") else line


def rank_panel(axes: Axes, fleet: Sequence[Client], order: Sequence[int]) -> None:
    """Draws each client's rank as a bar in the rank's colour, to stand above a panel of the same clients."""
    colours = rank_colours(fleet)
    ranks = [fleet[position].rank for position in order]
    axes.bar(range(len(order)), ranks, width=bar_width(len(order)), color=[colours[rank] for rank in ranks])
    axes.set_ylim(0, max(ranks) * 1.1)
    axes.set_ylabel("rank")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    axes.tick_params(axis="x", length=0, labelbottom=False)
    axes.grid(visible=False, axis="x")


def round_axis(axes: Axes) -> None:
    """Labels an axis of rounds."""
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def client_axis(axes: Axes, fleet: Sequence[Client], order: Sequence[int]) -> None:
    """Labels the shared axis of clients: with ids while they are legible."""
    axes.set_xlim(-0.5, len(order) - 0.5)
    axes.grid(visible=False, axis="x")
    if len(order) <= 60:
        size, turned = (8, 0) if len(order) <= 32 else (6.5, 90)
        axes.set_xticks(range(len(order)), [str(fleet[position].id) for position in order])
        axes.tick_params(axis="x", labelsize=size, labelrotation=turned, length=0)
        axes.set_xlabel("client id, by increasing rank")
    else:
        axes.set_xticks([])
        axes.set_xlabel(f"{len(order)} clients, by increasing rank, then id")


def score_axis(
    axes: Axes, along: Literal["x", "y"], metric: Metric, values: Sequence[float] = (), *, decimals: int | None = 0
) -> None:
    """Writes the numbers of an axis of scores in the metric's unit.

    Args:
        axes: The panel.
        along: Which of its axes.
        metric: What is drawn.
        values: All that are drawn: the axis is logarithmic where they would otherwise crowd at one end.
        decimals: Of per cents; None for as many as the panel needs.
    """
    logarithmic = wide(metric, values)
    if logarithmic:
        axes.set(**{f"{along}scale": "log"})
    axis = axes.xaxis if along == "x" else axes.yaxis
    if metric.percent:
        axis.set_major_formatter(PercentFormatter(1.0, decimals=decimals, symbol=" %"))
    elif logarithmic:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_formatter(ScalarFormatter(useOffset=False))


def bar_width(bars: int) -> float:
    """Returns the width of one bar: touching where there are many."""
    return 0.8 if bars <= 80 else 1.0


def line(
    axes: Axes,
    look: RunStyle,
    curve: tuple[Sequence[float], Sequence[float]],
    name: str = "",
    *,
    marked: bool = True,
) -> Line2D:
    """Draws one run's curve in its style and returns it for the legend."""
    marker = look.marker if marked and len(curve[0]) <= 40 else ""
    line = axes.plot(*curve, color=look.colour, linestyle=look.line, marker=marker, markersize=4, linewidth=1.6)[0]
    line.set_label(name)
    return line


def legend_above(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Puts the legend above all panels, where it covers no data."""
    longest = max((len(str(handle.get_label())) for handle in handles), default=1)
    columns = max(1, min(len(handles), 110 // (longest + 6)))
    figure.legend(handles=list(handles), loc="outside upper left", ncols=columns)


@cache
def _families() -> list[str]:
    """The report's font, which matplotlib brings along, then what is installed of the wider ones."""
    installed = set(fontManager.get_font_names())
    return ["DejaVu Sans", *(name for name in _WIDE_FONTS if name in installed)]


@cache
def _glyphs() -> frozenset[int]:
    """The characters that the fonts can draw."""
    return frozenset(char for name in _families() for char in get_font(findfont(name)).get_charmap())
