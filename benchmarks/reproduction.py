"""Tables and figures of docs/reproduction.md from the finished comparisons of configs/reproduction-*.toml.

    python benchmarks/reproduction.py [--runs runs] [--out docs/figures]

Reads results.json of the folders RUNS/reproduction-NAME that are there, prints the Markdown tables, and writes
OUT/reproduction.png and OUT/reproduction-ablations.png. Intervals are 95 % t intervals over seeds, of a mean or of a
mean of paired differences.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.special import stdtrit

from fslora.report.style import CATEGORIES, INK, MUTED, styled

SETS = {"sst2": "SST-2", "trec6": "TREC", "ag-news": "AG News", "cola": "CoLA"}
METHODS = ("fslora", "fslora-paper", "fslora-examples", "hetlora", "flexlora", "flora", "fedit-low", "fedit-full")
BASELINES = ("centralized", "local")
OURS = "fslora"
AVERAGE = "mean of sets"
SWEEPS = {
    "sketch ratio k / r of all clients": {"ratio-1-8": "1/8", "ratio-1-4": "1/4", "ratio-1-2": "1/2", "ratio-1": "1"},
    "server rank r, all clients k = 4": {"rank-4": "4", "rank-8": "8", "rank-16": "16", "ratio-1-8": "32"},
    "clients N, 10 per round": {"fslora": "10", "clients-20": "20", "clients-50": "50"},
    "local steps H": {"steps-1": "1", "fslora": "2", "steps-4": "4"},
}
"""Title → label → setting; differences are to the first setting."""

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
    """FSLoRA less each of the others, points, with intervals; and in how many pairs of runs it is ahead."""
    lines = [f"| {OURS} less | " + " | ".join(SETS.get(name, name) for name in results) + " | ahead, level, behind |"]
    lines.append("| --- |" + " ---: |" * (len(results) + 1))
    for label in METHODS:
        if label != OURS:
            pairs = {name: paired(table.get(OURS, {}), table.get(label, {})) for name, table in results.items()}
            signs = [(value > 0) - (value < 0) for name in pairs if name != AVERAGE for value in pairs[name]]
            cells = [difference(table.get(OURS, {}), table.get(label, {})) for table in results.values()]
            cells.append(", ".join(str(signs.count(sign)) for sign in (1, 0, -1)))
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference(ours: Seeds, other: Seeds) -> str:
    """``+1.2 [−0.3, +2.7]``; bold where the interval excludes zero."""
    values = paired(ours, other)
    if not values:
        return "–"
    mean, half = fmean(values), half_width(values)
    if not any(values):
        return "0.0"
    if half is None:
        return minus(f"{mean:+.1f}")
    text = minus(rf"{mean:+.1f} \[{mean - half:+.1f}, {mean + half:+.1f}\]")
    return f"**{text}**" if abs(mean) > half else text


def sweep_table(table: Mapping[str, Seeds]) -> str:
    """One line per setting of an ablation."""
    lines = ["| ablation | setting | test accuracy, % | difference to the first, points |"]
    lines.append("| --- | --- | ---: | ---: |")
    for title, settings in present(table).items():
        first = next(iter(settings))
        for label, name in settings.items():
            values = list(table[label].values())
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            change = "–" if label == first else difference(table[label], table[first])
            lines.append(f"| {title if label == first else ''} | {name} | {fmean(values):.1f}{spread} | {change} |")
    return "\n".join(lines)


def present(table: Mapping[str, Seeds]) -> dict[str, dict[str, str]]:
    """The sweeps of which at least two settings have results."""
    there = {title: {k: v for k, v in settings.items() if k in table} for title, settings in SWEEPS.items()}
    return {title: settings for title, settings in there.items() if len(settings) > 1}


def chosen_table(folders: Mapping[str, Path]) -> str:
    """The learning rates that the validation split chose."""
    rates: dict[str, dict[str, str]] = {}
    for name, folder in folders.items():
        for row in json.loads((folder / "results.json").read_text())["rows"]:
            rate = (row["chosen"] or {}).get("local.lr")
            rates.setdefault(row["label"], {})[name] = "–" if rate is None else f"{rate:g}"
    lines = ["| method | " + " | ".join(SETS.get(name, name) for name in folders) + " |"]
    lines.append("| --- |" + " ---: |" * len(folders))
    lines += [
        f"| {label} | " + " | ".join(rates[label].get(name, "–") for name in folders) + " |"
        for label in METHODS
        if label in rates
    ]
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
                mark(axes, values, place, colour)
        axes.set_title(SETS.get(name, name))
        axes.set_xlabel("test accuracy, %")
        axes.set_yticks(range(len(labels)), labels, color=INK)
        axes.grid(axis="y", visible=False)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=110)


@styled
def draw_sweeps(table: Mapping[str, Seeds], path: Path) -> None:
    """One panel per ablation: a thin line for each seed, and the means."""
    sweeps = present(table)
    figure = Figure(figsize=(8.0, 5.0))
    panels = figure.subplots(2, (len(sweeps) + 1) // 2, sharey=True, squeeze=False).flat
    for axes, (title, settings) in zip(panels, sweeps.items(), strict=False):
        for seed in sorted(set().union(*(table[label] for label in settings))):
            line = [table[label].get(seed) for label in settings]
            axes.plot(range(len(line)), line, color=CATEGORIES[0], alpha=0.4, lw=0.9, marker=".", ms=4)
        axes.plot(
            range(len(settings)), [fmean(table[label].values()) for label in settings], color=INK, marker="o", ms=4
        )
        axes.set_xticks(range(len(settings)), settings.values())
        axes.set_xlim(-0.4, len(settings) - 0.6)
        axes.set_title(title, fontsize=8.5)
        axes.grid(axis="x", visible=False)
    for place, axes in enumerate(panels):
        axes.set_visible(place < len(sweeps))
    figure.supylabel("test accuracy, %", fontsize=9, color=INK)
    figure.savefig(path, dpi=110)


def mark(axes: Axes, values: Sequence[float], place: int, colour: str) -> None:
    """The seeds as light points, and their mean with its interval, cut to what a share can be."""
    mean, half = fmean(values), half_width(values) or 0.0
    axes.scatter(
        values, [place] * len(values), color=colour, alpha=0.6, s=18, edgecolors="white", linewidths=0.5, zorder=4
    )
    ends = [[min(half, mean)], [min(half, 100 - mean)]]
    axes.errorbar(mean, place, xerr=ends, fmt="o", color=colour, ms=5, capsize=2.5, lw=1.3, zorder=3)


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
        print("\n" + chosen_table({name: folders[name] for name in results if name in folders}))
        draw_methods(results, arguments.out / "reproduction.png")
    ablations = arguments.runs / "reproduction-ablations"
    table = accuracies(ablations) if (ablations / "results.json").is_file() else {}
    if present(table):
        print("\n" + sweep_table(table))
        draw_sweeps(table, arguments.out / "reproduction-ablations.png")


if __name__ == "__main__":
    main()
