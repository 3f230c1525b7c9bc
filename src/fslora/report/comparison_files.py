"""A comparison's numbers for other programs and for papers: CSV, JSON, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from fslora.metrics import Metric
from fslora.report.comparison import Cell, ComparisonRecord
from fslora.report.comparison_results import (
    COSTS,
    MethodResult,
    Spread,
    cost,
    final_score,
    level_of,
    own_scores,
    ranked,
    worst_tenth,
)
from fslora.report.comparison_tables import (
    caption,
    difference_text,
    problems,
    result_row,
    results_table,
)
from fslora.report.merit import best_word, goodness, metric_of, number_text, short, spread_text
from fslora.report.read import RunRecord, score
from fslora.report.tables import Row
from fslora.report.text import NONE, byte_text, duration, markdown_text, operations, plain

FORMAT = 1


def csv_text(entries: Sequence[MethodResult]) -> str:
    """Returns one line per label in the experiment's order, every number in full precision."""
    parts = _parts(metric_of(entries))
    rows = [_flat(result_row(entry), parts) for entry in entries]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else ["label"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def json_text(comparison: ComparisonRecord, entries: Sequence[MethodResult]) -> str:
    """Returns the same rows with their values by seed, and every cell."""
    content = {
        "format": FORMAT,
        "name": comparison.name,
        "reference": comparison.reference,
        "seeds": list(comparison.seeds),
        "budget": {"kind": comparison.budget.kind, "amount": comparison.budget.amount},
        "rows": [result_row(entry) for entry in entries],
        "cells": [_cell_row(comparison, cell) for cell in comparison.cells],
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def markdown_page(comparison: ComparisonRecord, entries: Sequence[MethodResult]) -> str:
    """Returns a compact table to paste into a document, with what must be said beside it."""
    parts = [
        f"**{markdown_text(plain(comparison.name))}.** {markdown_text(' '.join(caption(comparison, entries)))}",
        results_table(comparison, entries).only(*_markdown(comparison.metric)).markdown().rstrip(),
    ]
    missing = problems(entries)
    parts += ["\n".join(f"- {markdown_text(sentence)}" for sentence in missing)] if missing else []
    return "\n\n".join(parts) + "\n"


def latex_table(comparison: ComparisonRecord, entries: Sequence[MethodResult]) -> str:
    """Returns a table environment for a paper that loads ``booktabs``; the best scores are bold."""
    shown, metric = ranked(entries), comparison.metric
    columns = [column for column in _latex(metric) if any(column.of(entry).n for entry in shown)]
    titles = [latex_text(column.title) for column in columns]
    if any(entry.difference for entry in shown):
        titles.insert(1, r"$\Delta$ (points)" if metric.percent else r"$\Delta$")
    sentences = [
        *caption(comparison, entries),
        f"Bold: the {best_word(metric)} {metric.label} of the column, baselines aside.",
        *problems(entries),
    ]
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table*}[t]",
        r"\centering",
        rf"\caption{{{latex_text(plain(comparison.name))}. {latex_text(' '.join(sentences))}}}",
        rf"\label{{tab:{_slug(comparison.name)}}}",
        rf"\begin{{tabular}}{{l{'r' * len(titles)}}}",
        r"\toprule",
        rf"{' & '.join(['Method', *titles])} \\",
        r"\midrule",
        *_latex_rows(shown, columns, differences=len(titles) > len(columns)),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def _latex_rows(shown: Sequence[MethodResult], columns: Sequence[_Quantity], *, differences: bool) -> Iterator[str]:
    best, level = [column.best(shown) for column in columns], level_of(shown)
    for position, entry in enumerate(shown):
        if position and entry.entry.baseline and not shown[position - 1].entry.baseline:
            yield r"\midrule"
        cells = [column.cell(entry, text) for column, text in zip(columns, best, strict=True)]
        if differences:
            row = result_row(entry)["difference"]
            cells.insert(1, latex_text(NONE if row is None else difference_text(entry.metric, level, row)))
        name = f"{plain(entry.title, 60)} (reference)" if entry.reference else plain(entry.title, 60)
        yield " & ".join([latex_text(name), *cells]) + r" \\"


def _slug(name: str) -> str:
    """The name as a LaTeX label may hold it."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() or "comparison"


def latex_text(text: str) -> str:
    """Returns text that LaTeX sets as it is."""
    return "".join(_LATEX_CHARACTERS.get(char, char) for char in text)


def _parts(metric: Metric) -> dict[str, tuple[str, ...]]:
    """What a value of several numbers becomes in CSV: one column each, such as ``difference_low``."""
    return {
        f"test_{metric.name}": ("mean", "sd", "n"),
        "difference": ("mean", "low", "high", "n"),
        f"own_{metric.name}": ("mean", "sd", "n"),
        "worst_tenth": ("mean", "sd", "n"),
        "seeds": ("finished", "failed", "waiting", "all"),
    }


def _flat(row: Row, parts: Mapping[str, tuple[str, ...]]) -> Row:
    flat: Row = {}
    for key, value in row.items():
        if key in parts:
            flat |= {f"{key}_{part}": (value or {}).get(part) for part in parts[key]}
        else:
            flat[key] = json.dumps(value) if isinstance(value, Mapping) else value
    return flat


def _cell_row(comparison: ComparisonRecord, cell: Cell) -> Row:
    points = comparison.methods[cell.label].points
    point = points[cell.point] if cell.point < len(points) else None
    validation, name = point.validation if point else None, comparison.metric.name
    return {
        "label": cell.label,
        "point": dict(point.point) if point else None,
        "seed": cell.seed,
        "folder": cell.folder,
        "status": cell.status,
        "error": cell.error,
        "chosen": cell.chosen,
        f"validation_{name}": score(validation, name),
        "result": _run_row(cell.run, comparison.metric) if cell.run else None,
    }


def _run_row(run: RunRecord, metric: Metric) -> Row:
    own, name = own_scores(run, metric), metric.name
    return {
        f"test_{name}": final_score(run, metric),
        f"own_{name}": [{"rank": rank, name: value} for rank, value in own],
        "worst_tenth": worst_tenth([value for _, value in own], metric),
        "rounds": run.rounds_done,
        **{key: cost(key, run) for key in COSTS},
    }


def _markdown(metric: Metric) -> tuple[str, ...]:
    scores = ("label", f"test_{metric.name}", "difference", f"own_{metric.name}", "worst_tenth")
    return (*scores, "bytes_down", "bytes_up", "client_memory_bytes", "flops", "simulated_seconds", "chosen", "seeds")


@dataclass(frozen=True)
class _Quantity:
    """One column of the LaTeX table."""

    title: str
    of: Callable[[MethodResult], Spread]
    show: Callable[[float], str]
    metric: Metric | None = None
    """What is shown, of scores: the best is bold. Low costs are not: what learns nothing may cost least."""
    spread: bool = False
    """Whether ± is shown."""

    def cell(self, entry: MethodResult, best: str | None) -> str:
        """Returns the cell, in bold where it reads like the best one."""
        spread = self.of(entry)
        if spread.mean is None:
            return latex_text(NONE)
        shown = self.show(spread.mean)
        bold = shown == best and not entry.entry.baseline
        whole = spread_text(self.metric, spread.mean, spread.sd) if self.spread and self.metric else shown
        deviation = latex_text(whole.removeprefix(shown))
        return (rf"\textbf{{{latex_text(shown)}}}" if bold else latex_text(shown)) + deviation

    def best(self, entries: Sequence[MethodResult]) -> str | None:
        """Returns how the best mean reads, baselines aside, where it is to be bold."""
        means = [mean for entry in entries if not entry.entry.baseline and (mean := self.of(entry).mean) is not None]
        return self.show(max(means, key=partial(goodness, self.metric))) if self.metric and means else None


def _latex(metric: Metric) -> tuple[_Quantity, ...]:
    unit, show = " (%)" if metric.percent else "", partial(number_text, metric)
    return (
        _Quantity(f"Test {short(metric)}{unit}", lambda entry: entry.test, show, metric, spread=True),
        _Quantity(f"Own{unit}", lambda entry: entry.own, show, metric),
        _Quantity(f"Worst 10%{unit}", lambda entry: entry.worst, show, metric),
        *_COSTS,
    )


_COSTS = (
    _Quantity("Sent", lambda entry: entry.traffic, byte_text),
    _Quantity("Client memory", lambda entry: entry.costs["client_memory_bytes"], byte_text),
    _Quantity("Compute", lambda entry: entry.costs["flops"], operations),
    _Quantity("Sim. time", lambda entry: entry.costs["simulated_seconds"], duration),
)
_LATEX_CHARACTERS = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "−": "$-$",
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "–": "--",
    "…": r"\ldots{}",
}
