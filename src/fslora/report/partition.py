"""The figure of the partition: who holds how many examples of which class, and at what rank."""

from __future__ import annotations

from typing import TypeGuard

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from fslora.errors import ArtifactError
from fslora.report.merit import strata
from fslora.report.read import DataRecord
from fslora.report.style import CATEGORIES, bar_width, by_rank, client_axis, label, rank_panel, styled
from fslora.report.tables import label_name

_COUNTS = LinearSegmentedColormap.from_list("counts", ["#d6e6f4", "#6aaed6", "#1764ab", "#08306b"])
Counts = np.ndarray[tuple[int, int], np.dtype[np.int64]]
"""[clients classes]."""
_HEAT_ROW, _HEAT_LEAST, _HEAT_MOST = 0.2, 2.5, 13.0
"""Inches: height of one class while there is room; least and most for all of them."""


def has_partition(data: DataRecord | None) -> TypeGuard[DataRecord]:
    """Returns whether it is known which client holds how many examples of which class."""
    return data is not None and bool(data.fleet) and any(map(any, data.partition.label_counts))


@styled
def partition_figure(data: DataRecord) -> Figure:
    """Returns clients by classes under the clients' ranks.

    One class is plain bars, up to eight are stacked ones. More are a map with one row per class, which stays legible
    for about 150 classes and 200 clients.

    Raises:
        ArtifactError: The record holds no fleet or no counts.
    """
    if not has_partition(data):
        raise ArtifactError(
            "there is no partition to draw: data.json names no clients or counts none of their examples; "
            "run the experiment again"
        )
    order = by_rank(data.fleet)
    counts = _counts(data)[order]
    stacked = counts.shape[1] <= len(CATEGORIES)
    classes = counts.shape[1]
    tall = 3.2 if stacked else float(np.clip(classes * _row_height(classes), _HEAT_LEAST, _HEAT_MOST))
    figure = Figure(figsize=(10, tall + 1.7))
    top, main = figure.subplots(2, 1, sharex=True, height_ratios=[0.9, tall])
    rank_panel(top, data.fleet, order)
    if stacked:
        _stack(figure, main, data, counts)
    else:
        _heat(figure, main, data, counts)
    client_axis(main, data.fleet, order)
    return figure


def _counts(data: DataRecord) -> Counts:
    """[clients classes]; rows of unequal length are filled with zeros."""
    rows = data.partition.label_counts
    counts = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for position, row in enumerate(rows):
        counts[position, : len(row)] = row
    return counts


def _stack(figure: Figure, axes: Axes, data: DataRecord, counts: Counts) -> None:
    base = np.zeros(len(counts), dtype=np.int64)
    few = len(counts) <= 80
    for held, colour in zip(counts.T, CATEGORIES, strict=False):
        axes.bar(
            range(len(counts)),
            held,
            bottom=base,
            width=bar_width(len(counts)),
            color=colour,
            edgecolor="white",
            linewidth=0.4 if few else 0.0,
        )
        base += held
    axes.set_ylabel("training examples")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if not data.partition.several:
        return
    names = [label(label_name(data, index), 32) for index in range(counts.shape[1])]
    handles = [Patch(facecolor=colour, label=name) for name, colour in zip(names, CATEGORIES, strict=False)]
    columns = max(1, min(len(names), 110 // (max(map(len, names)) + 6)))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)


def _heat(figure: Figure, axes: Axes, data: DataRecord, counts: Counts) -> None:
    clients, classes = counts.shape
    norm = PowerNorm(0.5, vmin=0, vmax=int(counts.max()))
    edges = (np.arange(clients + 1) - 0.5, np.arange(classes + 1) - 0.5)
    shown = np.ma.masked_equal(counts.T, 0)
    mesh = axes.pcolormesh(*edges, shown, cmap=_COUNTS, norm=norm, rasterized=True)
    if counts.size <= 2000:
        mesh.set(edgecolor="white", linewidth=0.5)
    axes.invert_yaxis()
    axes.grid(visible=False)
    every = max(1, round(classes / 150))
    named = range(0, classes, every)
    axes.set_yticks(list(named), [label(label_name(data, index), 32) for index in named])
    axes.tick_params(axis="y", length=0, labelsize=float(np.clip(_row_height(classes) * 58, 4.6, 8)))
    axes.set_ylabel(f"{classes} {strata(data.metric)[1]}")
    bar = figure.colorbar(mesh, ax=axes, shrink=min(1.0, 3.0 / (classes * _row_height(classes))), aspect=22)
    bar.set_label("training examples (none: blank)")
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(nbins=6, integer=True)
    bar.update_ticks()


def _row_height(classes: int) -> float:
    """Inches for one class: 0.2 up to 30 classes, then less, so that 150 still have a legible line each."""
    return _HEAT_ROW if classes <= 30 else max(0.085, _HEAT_ROW * (30 / classes) ** 0.53)
