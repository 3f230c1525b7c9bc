"""A comparison's numbers for other programs and for papers: CSV, JSON, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fslora.report.comparison import Cell, ComparisonRecord
from fslora.report.comparison_results import (
    COSTS,
    MethodResult,
    Spread,
    cost,
    final_accuracy,
    own_accuracies,
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
from fslora.report.read import RunRecord
from fslora.report.style import score
from fslora.report.tables import Row
from fslora.report.text import NONE, byte_text, duration, markdown_text, operations, plain

FORMAT = 1
_PARTS: dict[str, tuple[str, ...]] = {
    "test_accuracy": ("mean", "sd", "n"),
    "difference": ("mean", "low", "high", "n"),
    "own_accuracy": ("mean", "sd", "n"),
    "worst_tenth": ("mean", "sd", "n"),
    "seeds": ("finished", "failed", "waiting", "all"),
}
"""What a value of several numbers becomes in CSV: one column each, such as ``difference_low``."""


def csv_text(entries: Sequence[MethodResult]) -> str:
    """Returns one line per label in the experiment's order, every number in full precision."""
    rows = [_flat(result_row(entry)) for entry in entries]
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
        results_table(comparison, entries).only(*_MARKDOWN).markdown().rstrip(),
    ]
    missing = problems(entries)
    parts += ["\n".join(f"- {markdown_text(sentence)}" for sentence in missing)] if missing else []
    return "\n\n".join(parts) + "\n"


def latex_table(comparison: ComparisonRecord, entries: Sequence[MethodResult]) -> str:
    """Returns a table environment for a paper that loads ``booktabs``; the highest accuracies are bold."""
    shown = ranked(entries)
    columns = [column for column in _LATEX if any(column.of(entry).n for entry in shown)]
    titles = [latex_text(column.title) for column in columns]
    if any(entry.difference for entry in shown):
        titles.insert(1, r"$\Delta$ (points)")
    sentences = [
        *caption(comparison, entries),
        "Bold: the highest accuracy of the column, baselines aside.",
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
    best = [column.best(shown) for column in columns]
    for position, entry in enumerate(shown):
        if position and entry.entry.baseline and not shown[position - 1].entry.baseline:
            yield r"\midrule"
        cells = [column.cell(entry, text) for column, text in zip(columns, best, strict=True)]
        if differences:
            row = result_row(entry)["difference"]
            cells.insert(1, latex_text(NONE if row is None else difference_text(row)))
        name = f"{plain(entry.title, 60)} (reference)" if entry.reference else plain(entry.title, 60)
        yield " & ".join([latex_text(name), *cells]) + r" \\"


def _slug(name: str) -> str:
    """The name as a LaTeX label may hold it."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() or "comparison"


def latex_text(text: str) -> str:
    """Returns text that LaTeX sets as it is."""
    return "".join(_LATEX_CHARACTERS.get(char, char) for char in text)


def _flat(row: Row) -> Row:
    flat: Row = {}
    for key, value in row.items():
        if key in _PARTS:
            flat |= {f"{key}_{part}": (value or {}).get(part) for part in _PARTS[key]}
        else:
            flat[key] = json.dumps(value) if isinstance(value, Mapping) else value
    return flat


def _cell_row(comparison: ComparisonRecord, cell: Cell) -> Row:
    points = comparison.methods[cell.label].points
    point = points[cell.point] if cell.point < len(points) else None
    validation = point.validation if point else None
    return {
        "label": cell.label,
        "point": dict(point.point) if point else None,
        "seed": cell.seed,
        "folder": cell.folder,
        "status": cell.status,
        "error": cell.error,
        "chosen": cell.chosen,
        "validation_accuracy": score(validation, "accuracy"),
        "result": _run_row(cell.run) if cell.run else None,
    }


def _run_row(run: RunRecord) -> Row:
    own = own_accuracies(run)
    return {
        "test_accuracy": final_accuracy(run),
        "own_accuracy": [{"rank": rank, "accuracy": accuracy} for rank, accuracy in own],
        "worst_tenth": worst_tenth([accuracy for _, accuracy in own]),
        "rounds": run.rounds_done,
        **{key: cost(key, run) for key in COSTS},
    }


_MARKDOWN = (
    *("label", "test_accuracy", "difference", "own_accuracy", "worst_tenth", "bytes_down", "bytes_up"),
    *("client_memory_bytes", "flops", "simulated_seconds", "chosen", "seeds"),
)


@dataclass(frozen=True)
class _Quantity:
    """One column of the LaTeX table."""

    title: str
    of: Callable[[MethodResult], Spread]
    show: Callable[[float], str]
    bold: bool = False
    """Whether the highest is bold. Low costs are not: what learns nothing may cost least."""
    spread: bool = False
    """Whether ± is shown."""

    def cell(self, entry: MethodResult, best: str | None) -> str:
        """Returns the cell, in bold where it reads like the best one."""
        spread = self.of(entry)
        if spread.mean is None:
            return latex_text(NONE)
        shown = latex_text(self.show(spread.mean))
        bold = self.show(spread.mean) == best and not entry.entry.baseline
        deviation = "" if not self.spread or spread.sd is None else latex_text(f" ± {self.show(spread.sd)}")
        return (rf"\textbf{{{shown}}}" if bold else shown) + deviation

    def best(self, entries: Sequence[MethodResult]) -> str | None:
        """Returns how the highest mean reads, baselines aside, where it is to be bold."""
        means = [mean for entry in entries if not entry.entry.baseline and (mean := self.of(entry).mean) is not None]
        return self.show(max(means)) if self.bold and means else None


def _share(value: float) -> str:
    return f"{100 * value:.1f}"


_LATEX = (
    _Quantity("Test acc. (%)", lambda entry: entry.test, _share, bold=True, spread=True),
    _Quantity("Own (%)", lambda entry: entry.own, _share, bold=True),
    _Quantity("Worst 10% (%)", lambda entry: entry.worst, _share, bold=True),
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
