"""Tables and figures of docs/reproduction.md from the finished comparisons of configs/reproduction-*.toml.

    python benchmarks/reproduction.py [--runs runs] [--out docs/figures]

Reads results.json of every comparison folder RUNS/reproduction-SET (and RUNS/reproduction-ablations where it is),
prints the Markdown tables, and writes OUT/reproduction.png and OUT/reproduction-ablations.png. Intervals are 95 % t
intervals over seeds, of a mean or of a mean of paired differences.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.figure import Figure
from scipy.special import stdtrit

from fslora.report.style import CATEGORIES, INK, MUTED, styled

SETS = {"sst2": "SST-2", "trec6": "TREC", "ag-news": "AG News", "cola": "CoLA"}
METHODS = ("fslora", "fslora-paper", "hetlora", "flexlora", "flora", "fedit-low", "fedit-full")
BASELINES = ("centralized", "local")
OURS = "fslora"
AVERAGE = "mean of sets"
SWEEPS = {
    "sketch ratio k / r, all clients": {"ratio-1-8": "1/8", "ratio-1-4": "1/4", "ratio-1-2": "1/2", "ratio-1": "1"},
    "server rank r, clients at k = 4": {"rank-4": "4", "rank-8": "8", "rank-16": "16", "rank-32": "32"},
    "clients N": {"clients-10": "10", "clients-20": "20", "clients-50": "50"},
    "local steps H": {"steps-1": "1", "steps-2": "2", "steps-6": "6"},
}

Seeds = Mapping[int, float]


def accuracies(folder: Path) -> dict[str, Seeds]:
    """Label → seed → test accuracy in per cent, of one comparison."""
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return {
        row["label"]: {int(seed): 100 * value for seed, value in row["test_accuracy"]["by_seed"].items()}
        for row in rows
        if row["test_accuracy"] and row["test_accuracy"]["by_seed"]
    }


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % t interval of the mean; None with one value."""
    return float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / sqrt(len(values)) if len(values) > 1 else None


def paired(ours: Seeds, other: Seeds) -> list[float]:
    """Differences over the seeds that both have."""
    return [ours[seed] - other[seed] for seed in sorted(ours.keys() & other.keys())]


def with_average(results: Mapping[str, Mapping[str, Seeds]]) -> dict[str, Mapping[str, Seeds]]:
    """The sets, and the mean over them seed by seed for every label that all of them have."""
    tables = list(results.values())
    labels = [label for label in tables[0] if all(label in table for table in tables)]
    mean = {}
    for label in labels:
        seeds = set.intersection(*(set(table[label]) for table in tables))
        mean[label] = {seed: fmean(table[label][seed] for table in tables) for seed in sorted(seeds)}
    return {**results, AVERAGE: mean}


def minus(text: str) -> str:
    """The same with a real minus sign."""
    return text.replace("-", "−")


def accuracy_table(results: Mapping[str, Mapping[str, Seeds]]) -> str:
    """Mean ± standard deviation over seeds."""
    lines = ["| method | " + " | ".join(SETS.get(name, name) for name in results) + " |"]
    lines.append("| --- |" + " ---: |" * len(results))
    for label in (*METHODS, *BASELINES):
        cells = []
        for table in results.values():
            values = list(table.get(label, {}).values())
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{fmean(values):.1f}{spread}" if values else "–")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference_table(results: Mapping[str, Mapping[str, Seeds]]) -> str:
    """FSLoRA less each of the others, points, with intervals."""
    lines = [f"| {OURS} less | " + " | ".join(SETS.get(name, name) for name in results) + " |"]
    lines.append("| --- |" + " ---: |" * len(results))
    for label in METHODS:
        if label != OURS:
            cells = [difference(table.get(OURS, {}), table.get(label, {})) for table in results.values()]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference(ours: Seeds, other: Seeds) -> str:
    """``+1.2 [−0.3, +2.7]``; bold where the interval excludes zero."""
    values = paired(ours, other)
    if not values:
        return "–"
    mean, half = fmean(values), half_width(values)
    if half is None:
        return minus(f"{mean:+.1f}")
    text = minus(rf"{mean:+.1f} \[{mean - half:+.1f}, {mean + half:+.1f}\]")
    return f"**{text}**" if abs(mean) > half else text


def sweep_table(table: Mapping[str, Seeds]) -> str:
    """One line per setting of an ablation."""
    lines = ["| ablation | setting | test accuracy, % | seeds |", "| --- | --- | ---: | ---: |"]
    for title, settings in SWEEPS.items():
        for label, name in settings.items():
            values = list(table.get(label, {}).values())
            if values:
                spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
                lines.append(f"| {title} | {name} | {fmean(values):.1f}{spread} | {len(values)} |")
    return "\n".join(lines)


@styled
def draw_methods(results: Mapping[str, Mapping[str, Seeds]], path: Path) -> None:
    """One panel per set: seeds as points, means with 95 % intervals."""
    figure = Figure(figsize=(10.5, 3.6))
    panels = figure.subplots(1, len(results), sharey=True)
    labels = [label for label in (*METHODS, *BASELINES) if any(label in table for table in results.values())]
    for axes, (name, table) in zip(panels, results.items(), strict=True):
        for place, label in enumerate(labels):
            values = list(table.get(label, {}).values())
            if values:
                colour = MUTED if label in BASELINES else CATEGORIES[0] if label.startswith(OURS) else CATEGORIES[5]
                mark(axes, values, place, colour, horizontal=True)
        axes.set_title(SETS.get(name, name))
        axes.set_xlabel("test accuracy, %")
        axes.set_yticks(range(len(labels)), labels, color=INK)
        axes.grid(axis="y", visible=False)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=110)


@styled
def draw_sweeps(table: Mapping[str, Seeds], path: Path) -> None:
    """One panel per ablation that has results."""
    there = {title: {k: v for k, v in labels.items() if k in table} for title, labels in SWEEPS.items()}
    there = {title: labels for title, labels in there.items() if len(labels) > 1}
    figure = Figure(figsize=(2.7 * len(there), 2.9))
    panels = figure.subplots(1, len(there), sharey=True, squeeze=False)[0]
    for axes, (title, labels) in zip(panels, there.items(), strict=True):
        for place, label in enumerate(labels):
            mark(axes, list(table[label].values()), place, CATEGORIES[0], horizontal=False)
        axes.plot(range(len(labels)), [fmean(table[label].values()) for label in labels], color=CATEGORIES[0], lw=1)
        axes.set_xticks(range(len(labels)), labels.values())
        axes.set_xlim(-0.5, len(labels) - 0.5)
        axes.set_title(title, fontsize=8.5)
        axes.grid(axis="x", visible=False)
    panels[0].set_ylabel("test accuracy, %")
    figure.savefig(path, dpi=110)


def mark(axes, values: Sequence[float], place: int, colour: str, horizontal: bool) -> None:
    """The seeds as light points, and their mean with its interval, cut to what a share can be."""
    mean, half = fmean(values), half_width(values) or 0.0
    ends = [[min(half, mean)], [min(half, 100 - mean)]]
    at = [place] * len(values)
    style = {"color": colour, "alpha": 0.45, "s": 14, "linewidths": 0, "zorder": 2}
    line = {"fmt": "o", "color": colour, "ms": 5, "capsize": 2.5, "lw": 1.3, "zorder": 3}
    if horizontal:
        axes.scatter(values, at, **style)
        axes.errorbar(mean, place, xerr=ends, **line)
    else:
        axes.scatter(at, values, **style)
        axes.errorbar(place, mean, yerr=ends, **line)


def main() -> None:
    """Prints the tables and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    arguments = parser.parse_args()
    folders = {name: arguments.runs / f"reproduction-{name}" for name in SETS}
    results = {name: accuracies(path) for name, path in folders.items() if (path / "results.json").is_file()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    if results:
        results = with_average(results)
        print(accuracy_table(results), difference_table(results), sep="\n\n")
        draw_methods(results, arguments.out / "reproduction.png")
    ablations = arguments.runs / "reproduction-ablations"
    if (ablations / "results.json").is_file():
        table = accuracies(ablations)
        print("\n" + sweep_table(table))
        draw_sweeps(table, arguments.out / "reproduction-ablations.png")


if __name__ == "__main__":
    main()
