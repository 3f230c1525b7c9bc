"""The tables of a comparison: results and costs per method, the grid, and the cells that failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fslora.metrics import Metric
from fslora.report import merit
from fslora.report.comparison import ComparisonRecord, read_comparison
from fslora.report.comparison_results import COSTS, Difference, MethodResult, Spread, level_of, ranked, results
from fslora.report.read import score
from fslora.report.tables import Column, Row, Table, fact_text
from fslora.report.text import byte_text, counted, duration, operations, plain

PRICE = ("label", *COSTS)
"""Columns that say what it cost."""


def outcome(metric: Metric) -> tuple[str, ...]:
    """Returns the columns of the table that say how it ended."""
    scores = (f"test_{metric.name}", "difference", f"own_{metric.name}", "worst_tenth")
    return ("label", *scores, "rounds", "chosen", "seeds")


def comparison_table(path: str | Path) -> Table:
    """Returns one row per label of a comparison folder: the best first, baselines as a group of their own.

    Raises:
        ArtifactError: The path is no comparison folder, or comparison.json is damaged.
    """
    comparison = read_comparison(path)
    return results_table(comparison, results(comparison))


def results_table(comparison: ComparisonRecord, entries: Sequence[MethodResult]) -> Table:
    """Returns the table of a comparison that was read; ``entries`` are its results."""
    shown = ranked(entries)
    titles = {entry.label: f"{entry.title} (reference)" if entry.reference else entry.title for entry in shown}
    first = next((position for position, entry in enumerate(shown) if entry.entry.baseline), None)
    named = Column("label", "method", lambda label: plain(titles[label], 60), number=False)
    return Table(
        title=f"{plain(comparison.name)}: {size_text(entries)}, {counted(len(comparison.seeds), 'seed')}",
        columns=(named, *_scores(comparison, level_of(entries)), *_COLUMNS),
        rows=tuple(result_row(entry) for entry in shown),
        groups={first: "baselines"} if first else {},
        note=" ".join([*caption(comparison, entries), *problems(entries)]),
    ).compact()


def result_row(entry: MethodResult) -> Row:
    """Returns what is known of one label, in full precision."""
    return {
        "label": entry.label,
        "method": entry.entry.method,
        "paper": entry.entry.paper,
        "baseline": entry.entry.baseline,
        "reference": entry.reference,
        "personal": entry.personal,
        f"test_{entry.metric.name}": _spread(entry.test),
        "difference": _difference(entry.difference),
        f"own_{entry.metric.name}": _spread(entry.own),
        "worst_tenth": _spread(entry.worst),
        **{key: spread.mean for key, spread in entry.costs.items()},
        "rounds": entry.rounds.mean,
        "chosen": dict(entry.entry.chosen or {}) or None,
        "seeds": {
            "finished": len(entry.runs),
            "failed": entry.failed,
            "waiting": entry.waiting,
            "all": entry.seeds,
        },
        "failure": "; ".join(entry.problems) or None,
    }


def size_text(entries: Sequence[MethodResult]) -> str:
    """Returns how many methods and baselines there are."""
    baselines = sum(entry.entry.baseline for entry in entries)
    methods = counted(len(entries) - baselines, "method")
    return f"{methods} and {counted(baselines, 'baseline')}" if baselines else methods


def caption(comparison: ComparisonRecord, entries: Sequence[MethodResult]) -> list[str]:
    """Returns what must be said beside the numbers: seeds, budget, reference, and what ± and † are."""
    reference, metric = plain(comparison.reference), comparison.metric
    sentences = [f"Budget of every method: {comparison.budget.text()}."]
    if comparison.budget.kind == "bytes" and any(entry.entry.baseline for entry in entries):
        sentences.append("It does not bind baselines, which send nothing or would send other things.")
    if len(comparison.seeds) > 1:
        sentences += [
            f"Test {metric.label}: mean ± standard deviation over {len(comparison.seeds)} seeds.",
            f"Difference: to {reference} with the same seed, mean and 95 % t interval over the seeds in which both "
            "finished.",
        ]
    else:
        sentences += [f"One seed: no spread and no interval. Difference: to {reference} with the same seed."]
    if not metric.higher_is_better:
        sentences.append(merit.direction(metric))
    if any(entry.own.n for entry in entries):
        sentences.append(
            f"Own examples: {metric.label} of clients on what they held out themselves, mean over clients; worst "
            f"tenth: mean over the {merit.worst_word(metric)} tenth of them."
        )
    if any(entry.personal for entry in entries):
        sentences.append(f"† serves one model per client: its test {metric.label} is the mean over these models.")
    return sentences


def problems(entries: Sequence[MethodResult]) -> list[str]:
    """Returns one sentence per label whose results failed or are still to come."""
    sentences: list[str] = []
    for entry in entries:
        if entry.failed:
            reasons = plain("; ".join(entry.problems), 200)
            sentences.append(
                f"{plain(entry.label)}: {entry.failed} of {counted(entry.seeds, 'seed')} failed: {reasons}."
            )
        unscored = len(entry.runs) - entry.test.n
        if unscored:
            sentences.append(
                f"{plain(entry.label)}: {unscored} of {counted(entry.seeds, 'seed')} finished without a finite test "
                f"{entry.metric.label}."
            )
    waiting = [f"{plain(entry.label)} ({entry.waiting})" for entry in entries if entry.waiting]
    return [*sentences, f"Seeds still to come: {', '.join(waiting)}."] if waiting else sentences


def settings_table(comparison: ComparisonRecord) -> Table:
    """Returns what each label is: the registry's name, the paper, what is changed and what was chosen."""
    rows = tuple(
        {
            "label": label,
            "method": entry.method,
            "paper": entry.paper or None,
            "changes": dict(entry.changes) or None,
            "chosen": dict(entry.chosen or {}) or None,
        }
        for label, entry in ((label, comparison.methods[label]) for label in comparison.labels)
    )
    columns = (
        Column("label", "label", lambda text: plain(text, 60), number=False),
        Column("method", "method", number=False),
        Column("paper", "paper", number=False),
        Column("changes", "changes", assignments, number=False),
        Column("chosen", "chosen on validation", assignments, number=False),
    )
    return Table("What each label stands for", columns, rows).compact()


def grid_table(comparison: ComparisonRecord) -> Table:
    """Returns one row per point that was tried, the chosen one marked; none where nothing was to be chosen."""
    metric = comparison.metric
    rows: list[Row] = []
    for label in comparison.labels:
        entry = comparison.methods[label]
        for point in entry.points if len(entry.points) > 1 else ():
            # Before the choice is made there is none, and no point is like it.
            chosen = entry.chosen is not None and point.point == entry.chosen
            rows.append(
                {
                    "label": label,
                    "point": dict(point.point),
                    **{name: score(point.validation, name) for name in (metric.name, "loss")},
                    "chosen": chosen,
                    "error": point.error,
                }
            )
    shown = {metric.name: Column(metric.name, f"validation {metric.label}", partial(merit.value_text, metric))}
    shown["loss"] = Column("loss", "validation loss", lambda loss: f"{loss:.4f}")
    columns = (
        Column("label", "method", lambda text: plain(text, 60), number=False),
        Column("point", "point", assignments, number=False),
        *shown.values(),
        Column("chosen", "", lambda chosen: "chosen" if chosen else "", number=False),
        Column("error", "failed", lambda text: plain(text, 300), number=False),
    )
    return Table("Points of the grids", columns, tuple(rows)).compact()


def failures_table(comparison: ComparisonRecord) -> Table:
    """Returns one row per cell that failed."""
    rows = tuple(
        {
            "label": cell.label,
            "seed": cell.seed,
            "use": "result" if cell.chosen else "choosing the point",
            "folder": cell.folder,
            "reason": cell.error or "no reason is recorded",
        }
        for cell in comparison.cells
        if cell.status == "failed"
    )
    columns = (
        Column("label", "method", lambda text: plain(text, 60), number=False),
        Column("seed", "seed"),
        Column("use", "was for", number=False),
        Column("reason", "reason", lambda text: plain(text, 500), number=False),
        Column("folder", "folder", lambda text: plain(text, 120), number=False),
    )
    return Table("Cells that failed", columns, rows)


def assignments(values: Mapping[str, Any]) -> str:
    """Returns settings as ``lr = 0.001``; a key keeps its section where its last part alone is ambiguous."""
    last = [key.rsplit(".", 1)[-1] for key in values]
    names = [key if last.count(short) > 1 else short for key, short in zip(values, last, strict=True)]
    pairs = zip(names, values.values(), strict=True)
    unbroken = (f"{plain(name)} = {fact_text(value)}".replace(" ", "\N{NO-BREAK SPACE}") for name, value in pairs)
    return ", ".join(unbroken) or "as configured"


def _scores(comparison: ComparisonRecord, level: float) -> tuple[Column, ...]:
    """The columns of scores, which are about ``level``; the reference is named in the title of differences to it."""
    metric, reference = comparison.metric, plain(comparison.reference, 24)
    unit, between = merit.in_title(metric), merit.change_title(metric)
    return (
        Column(f"test_{metric.name}", f"test {metric.label}{unit}", partial(spread_text, metric)),
        Column("difference", f"difference to {reference}{between}", partial(difference_text, metric, level)),
        Column(f"own_{metric.name}", f"own examples{unit}", partial(mean_text, metric), minor=3),
        Column("worst_tenth", f"worst tenth{unit}", partial(mean_text, metric), minor=2),
    )


def _spread(spread: Spread) -> Row | None:
    if not spread.n:
        return None
    by_seed = {str(seed): value for seed, value in spread.by_seed.items()}
    return {"mean": spread.mean, "sd": spread.sd, "n": spread.n, "by_seed": by_seed}


def _difference(difference: Difference | None) -> Row | None:
    if difference is None:
        return None
    by_seed = {str(seed): value for seed, value in difference.by_seed.items()}
    ends = {"low": difference.low, "high": difference.high}
    return {"mean": difference.mean, **ends, "n": difference.n, "by_seed": by_seed}


def spread_text(metric: Metric, spread: Row) -> str:
    """Returns mean and standard deviation without the unit."""
    return merit.spread_text(metric, spread["mean"], spread["sd"])


def difference_text(metric: Metric, level: float, difference: Row) -> str:
    """Returns a mean difference and its interval, in points where scores are in per cent, and else like ``level``."""
    parts = [difference[part] for part in ("mean", "low", "high")]
    mean, low, high = (merit.change_text(metric, part, level, *parts) for part in parts)
    return mean if difference["low"] is None else f"{mean} [{low}, {high}]"


def mean_text(metric: Metric, spread: Row) -> str:
    """Returns the mean without the unit."""
    return merit.number_text(metric, spread["mean"])


def _seeds_text(seeds: Row) -> str:
    return f"{seeds['finished']}/{seeds['all']}"


_COLUMNS = (
    Column("bytes_down", "down", byte_text, minor=4),
    Column("bytes_up", "up", byte_text, minor=4),
    Column("client_memory_bytes", "client memory", byte_text, minor=6),
    Column("flops", "client compute", operations, minor=7),
    Column("simulated_seconds", "simulated time", duration, minor=5),
    Column("train_seconds", "training", duration, minor=8),
    Column("server_seconds", "server time", duration, minor=9),
    Column("server_bytes", "server state", byte_text, minor=10),
    Column("peak_memory_bytes", "peak memory", byte_text, minor=11),
    Column("rounds", "rounds", lambda number: f"{number:.0f}", minor=12),
    Column("chosen", "chosen", assignments, number=False, minor=13),
    Column("seeds", "seeds", _seeds_text, minor=1),
    Column("failure", "failed because", lambda text: plain(text, 300), number=False, minor=14),
)
