"""Writes a comparison's report: a self-contained page, its figures, and its numbers in four formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fslora.report.comparison import ComparisonRecord, read_comparison
from fslora.report.comparison_figures import NAMES, draw_comparison
from fslora.report.comparison_files import csv_text, json_text, latex_table, markdown_page
from fslora.report.comparison_headline import comparison_headline, tally
from fslora.report.comparison_results import MethodResult, results
from fslora.report.comparison_tables import (
    PRICE,
    caption,
    failures_table,
    grid_table,
    outcome,
    results_table,
    settings_table,
)
from fslora.report.headline import Headline
from fslora.report.page import (
    code,
    document,
    drawn_table,
    head,
    picture,
    put,
    put_figures,
    remark,
    section,
    settings,
    titled_table,
)


def write_comparison(path: str | Path) -> Path:
    """Returns the path of the report.html that it wrote, with figures/ and results.{csv,json,md,tex} beside it.

    Raises:
        ArtifactError: The folder is no comparison folder, is damaged, or cannot be written.
    """
    comparison = read_comparison(path)
    entries = results(comparison)
    drawn = draw_comparison(comparison, entries)
    files = put_figures(comparison.path / "figures", drawn, NAMES)
    for name, text in (
        ("results.csv", csv_text(entries)),
        ("results.json", json_text(comparison, entries)),
        ("results.md", markdown_page(comparison, entries)),
        ("results.tex", latex_table(comparison, entries)),
    ):
        put(comparison.path / name, text.encode())
    page = comparison.path / "report.html"
    pictures = {entry.name: picture(entry, files[entry.name]) for entry in drawn}
    put(page, _html(comparison, entries, comparison_headline(comparison, entries), pictures).encode())
    return page


def _html(
    comparison: ComparisonRecord, entries: Sequence[MethodResult], top: Headline, pictures: Mapping[str, str]
) -> str:
    """The page. Everything that comes from the folder passes through `escape`."""

    def shown(*names: str) -> list[str]:
        return [pictures[name] for name in names if name in pictures]

    body = [
        *head(comparison.name, top, finished=not any(entry.waiting for entry in entries)),
        *section("Results", [*_results_part(comparison, entries), *shown("difference")]),
        *section("Training", shown("rounds", "traffic")),
        *section("Cost", [*_costs_part(comparison, entries), *shown("pareto")]),
        *section("Clients", shown("by-rank", "fairness")),
        *section("The global update", shown("spectra", "effective-rank")),
        *section("Choice of hyper-parameters", _grid_part(comparison)),
        *section("Failed cells", _failures_part(comparison)),
        *section("Settings", _settings_part(comparison)),
    ]
    return document(comparison.name, body, comparison.environment, "the comparison folder")


def _results_part(comparison: ComparisonRecord, entries: Sequence[MethodResult]) -> Iterator[str]:
    yield drawn_table(results_table(comparison, entries).only(*outcome(comparison.metric)))
    yield remark(" ".join(caption(comparison, entries)))
    told = tally(comparison, entries)
    if told:
        yield remark(told)


def _costs_part(comparison: ComparisonRecord, entries: Sequence[MethodResult]) -> Iterator[str]:
    table = results_table(comparison, entries).only(*PRICE)
    if len(table.columns) > 1:
        yield drawn_table(table)
        yield remark(
            "Means over the finished seeds. Down, up and compute: all clients together, whole run. Client memory: the "
            "most that any client needs for weights, gradients, optimizer and what it keeps, without activations and "
            "the base. Simulated time: on the fleet's own devices and links; training and server time: on the machine "
            "that ran the simulation."
        )


def _grid_part(comparison: ComparisonRecord) -> Iterator[str]:
    table = grid_table(comparison)
    if table.rows:
        yield remark(
            f"Every point was trained with seed {comparison.seeds[0]}; the one with the best validation result was "
            "kept for all seeds. The test split had no part in it."
        )
        yield titled_table(table)


def _failures_part(comparison: ComparisonRecord) -> Iterator[str]:
    table = failures_table(comparison)
    if table.rows:
        yield drawn_table(table)


def _settings_part(comparison: ComparisonRecord) -> Iterator[str]:
    yield titled_table(settings_table(comparison), folded=False)
    yield "<p>The same comparison again, from a copy of its experiment.toml:</p>"
    yield code("fslora compare experiment.toml --out NEW")
    yield from settings(comparison.config_text, comparison.environment)
