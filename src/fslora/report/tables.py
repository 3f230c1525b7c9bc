"""The report's tables: plain rows first, then the same rows for the terminal, Markdown or a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite
from statistics import fmean, median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from fslora.metrics import Metric
from fslora.report.merit import (
    capital,
    change_text,
    direction,
    gain_title,
    metric_of,
    sampling_error,
    strata,
    unusual,
    value_text,
)
from fslora.report.read import Baseline, DataRecord, RunRecord, Scores, score
from fslora.report.text import NONE, byte_text, count, decimal, duration, markdown_text, percent, plain, span

Row = dict[str, Any]
"""Column key → a JSON value, never formatted; None where there is no value."""


@dataclass(frozen=True)
class Column:
    """How one key of the rows is shown."""

    key: str
    title: str
    show: Callable[[Any], str] = plain
    number: bool = True
    """Whether the column is aligned to the right."""
    minor: int = 0
    """How soon a narrow terminal leaves it out: the highest first, 0 never."""


@dataclass(frozen=True)
class Table:
    """Rows and how to show them."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    groups: Mapping[int, str] = field(default_factory=dict)
    """Position of a row → what the rows from there on are called; empty where all rows are alike."""
    note: str = ""
    """What to know before reading it, where that is printed below the table."""

    def cells(self) -> list[list[str]]:
        """Returns the formatted rows."""
        return [[_cell(column, row) for column in self.columns] for row in self.rows]

    def compact(self) -> Table:
        """Returns the table without the columns that no row has a value for."""
        used = tuple(column for column in self.columns if any(row.get(column.key) is not None for row in self.rows))
        return replace(self, columns=used)

    def only(self, *keys: str) -> Table:
        """Returns the table with these columns, as far as it has them."""
        return replace(self, columns=tuple(column for column in self.columns if column.key in keys))

    def dicts(self) -> list[Row]:
        """Returns the rows for JSON."""
        return [dict(row) for row in self.rows]

    def rich(self) -> RenderableType:
        """Returns what a rich console prints: minor columns are left out until the rest fits its width."""
        return self

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draws the table for one console; no cell is read as markup."""
        columns = self._fitting(options.max_width)
        title = Text(self.title, style="bold")
        titled = any(column.title for column in columns)
        table = RichTable(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, show_header=titled)
        table.caption, table.caption_justify = Text(self.note) if self.note else None, "left"
        for column in columns:
            # A fixed width breaks the title of a number before it breaks the number; text takes what is left.
            if column.number:
                table.add_column(Text(column.title), justify="right", width=self._width(column))
            else:
                table.add_column(Text(column.title), min_width=self._width(column))
        for position, row in enumerate(self.rows):
            if position in self.groups:
                table.add_section()
                table.add_row(Text(self.groups[position], style="italic"))
            table.add_row(*(Text(_cell(column, row)) for column in columns))
        yield table

    def _fitting(self, width: int) -> tuple[Column, ...]:
        columns = self.columns
        while sum(self._width(column) + 3 for column in columns) > width:
            least = max(columns, key=lambda column: column.minor)
            if not least.minor:
                break
            columns = tuple(column for column in columns if column is not least)
        return columns

    def _width(self, column: Column) -> int:
        """Characters that the terminal needs: titles of numbers break at spaces, long text anywhere."""
        widest = max((len(_cell(column, row)) for row in self.rows), default=0)
        words = column.title.split(" ") or [""]
        return max(widest if column.number else min(widest, 16), *map(len, words))

    def markdown(self) -> str:
        """Returns the table as Markdown (GitHub's), without its title."""
        lines = ["| " + " | ".join(markdown_text(column.title) for column in self.columns) + " |"]
        lines.append("| " + " | ".join("---:" if column.number else "---" for column in self.columns) + " |")
        for position, cells in enumerate(self.cells()):
            if position in self.groups:
                lines.append(f"| *{markdown_text(self.groups[position])}* |" + " |" * (len(self.columns) - 1))
            lines.append("| " + " | ".join(markdown_text(cell) for cell in cells) + " |")
        return "\n".join(lines) + "\n"


def closing_table(records: Sequence[RunRecord]) -> Table:
    """Returns one row per run, and one per frozen-base reference, which is there once per data set.

    All are shown by the metric of the first.
    """
    metric = metric_of(records)
    references: list[tuple[Baseline, int | None]] = []
    for record in records:
        reference = (record.baseline, _test_examples(record)) if record.baseline else None
        if reference and (reference[0].validation or reference[0].test) and reference not in references:
            references.append(reference)
    rows = [_run_row(record, metric) for record in records]
    rows += [_baseline_row(baseline, examples, metric) for baseline, examples in references]
    pending = any(row["test_after"] is None for row in rows)
    columns = [column for column in _closing(metric) if pending or column.key != "validation"]
    return Table("Runs", tuple(columns), tuple(rows), note=unusual(metric)).compact()


def by_label_table(records: Sequence[RunRecord]) -> Table:
    """Returns the test scores by label (a task, a stratum), and their mean; no rows where there are fewer than two.

    Before training as the first run has it, and after it of every run.
    """
    metric = metric_of(records)
    tests = {f"after_{place}": record.summary.by_label for place, record in enumerate(records) if record.summary}
    before = next(iter(tests.values()), {})
    scores = {"before": {label: test.before for label, test in before.items()}}
    scores |= {key: {label: test.after for label, test in by_label.items()} for key, by_label in tests.items()}
    several = len(tests) > 1
    titles = {f"after_{place}": f"after, {run.label}" if several else "after" for place, run in enumerate(records)}
    columns = (
        Column("label", "", lambda text: plain(text, 40), number=False),
        Column("before", "before", partial(value_text, metric)),
        *(Column(key, titles[key], partial(value_text, metric)) for key in tests),
    )
    rows = tuple(label_rows(metric, scores))
    return Table(f"Test {metric.label} by label", columns, rows, note=direction(metric)).compact()


def label_rows(metric: Metric, scores: Mapping[str, Mapping[str, Scores]]) -> list[Row]:
    """Returns one row per label with a value of each column, and their means where every label has one.

    Args:
        metric: What is shown.
        scores: Column → label → scores; the same labels in all columns, as far as they are known.
    """
    labels = list(dict.fromkeys(label for column in scores.values() for label in column))
    if len(labels) < 2:
        return []
    known = {key: [score(column.get(label), metric.name) for label in labels] for key, column in scores.items()}
    finite = {key: [value for value in values if value is not None] for key, values in known.items()}
    means = {key: fmean(values) if len(values) == len(labels) else None for key, values in finite.items()}
    rows: list[Row] = [{"label": label, **{key: known[key][i] for key in known}} for i, label in enumerate(labels)]
    return [*rows, {"label": f"mean over {len(labels)}", **means}]


def fleet_table(data: DataRecord, top: int = 3) -> Table:
    """Returns one row per client: rank, examples, and its most frequent classes where there are several.

    Args:
        data: The data record.
        top: Classes to name per client.
    """
    _, plural = strata(data.metric)
    partition = data.partition
    rows: list[Row] = []
    for position, client in enumerate(data.fleet):
        counts = partition.label_counts[position] if partition.several else ()
        rows.append(
            {
                "client": client.id,
                "rank": client.rank,
                "examples": client.examples,
                "holdout": partition.holdout[position] if partition.holdout else None,
                "classes": sum(number > 0 for number in counts) if counts else None,
                "top": _top_classes(data, counts, top) if counts else None,
            }
        )
    columns = (
        Column("client", "client"),
        Column("rank", "rank"),
        Column("examples", "training examples", count),
        Column("holdout", "own test", count),
        Column("classes", f"{plural} held", count),
        Column("top", f"most frequent {plural}", _top_text, number=False),
    )
    return Table("What each client holds", columns, tuple(rows)).compact()


def class_table(data: DataRecord) -> Table:
    """Returns one row per class: examples, clients that hold it, and the share of the largest holder.

    There are no rows where there is one class: nothing is then told apart.
    """
    one, plural = strata(data.metric)
    counts = data.partition.label_counts
    classes = max((len(row) for row in counts), default=0)
    rows: list[Row] = []
    everything = sum(map(sum, counts))
    for label in range(classes if classes > 1 else 0):
        held = [row[label] if label < len(row) else 0 for row in counts]
        rows.append(
            {
                "class": label_name(data, label),
                "examples": sum(held),
                "share": sum(held) / everything if everything else None,
                "clients": sum(number > 0 for number in held),
                "largest": max(held) / sum(held) if sum(held) else None,
            }
        )
    columns = (
        Column("class", one, number=False),
        Column("examples", "examples at clients", count),
        Column("share", "share", percent),
        Column("clients", "clients that hold it", count),
        Column("largest", "largest holder has", percent),
    )
    return Table(capital(plural), columns, tuple(rows)).compact()


def statistics_table(data: DataRecord) -> Table:
    """Returns what is known of the data and its partition, one fact a row."""
    several = len(data.label_names) if len(data.label_names) > 1 else None
    facts: list[tuple[str, object]] = [("data set", data.name), (strata(data.metric)[1], several)]
    facts += [(f"{split} examples", number) for split, number in data.examples.items()]
    facts += [("texts cut at the longest length", data.truncated)]
    facts += list(flat(data.statistics))
    facts += [("partition kind", data.partition.kind), ("partition digest", data.partition.digest or None)]
    facts += [(f"partition {key}", value) for key, value in flat(data.partition.notes)]
    known: dict[str, object] = {}
    for name, value in facts:
        if value is not None:
            known.setdefault(name, value)
    rows = tuple({"fact": name, "value": value} for name, value in known.items())
    return Table("Data", (Column("fact", "", number=False), Column("value", "", fact_text, number=False)), rows)


def clients_table(record: RunRecord) -> Table:
    """Returns one row per client: rounds taken part in, bytes, last loss, and score on its own test."""
    name = record.metric.name
    scores = {entry.id: entry for entry in record.summary.clients} if record.summary else {}
    rows: list[Row] = []
    for client in record.fleet:
        before = score(scores[client.id].before, name) if client.id in scores else None
        after = score(scores[client.id].after, name) if client.id in scores else None
        losses = [row.client_loss[client.id] for row in record.rounds if client.id in row.client_loss]
        rows.append(
            {
                "client": client.id,
                "rank": client.rank,
                "examples": client.examples,
                "rounds": sum(client.id in row.clients for row in record.rounds),
                "bytes_down": sum(row.client_bytes_down.get(client.id, 0) for row in record.rounds),
                "bytes_up": sum(row.client_bytes_up.get(client.id, 0) for row in record.rounds),
                "loss": _finite(losses[-1]) if losses else None,
                "before": before,
                "after": after,
                "gain": after - before if after is not None and before is not None else None,
            }
        )
    level = median([row["after"] for row in rows if row["after"] is not None] or [0.0])
    return Table("What each client did", _clients(record.metric, level), tuple(rows)).compact()


def dropped_table(records: Sequence[RunRecord]) -> Table:
    """Returns one row per update that the server refused."""
    rows = tuple(
        {"run": record.label, "round": row.round, "client": client, "reason": reason}
        for record in records
        for row in record.rounds
        for client, reason in sorted(row.dropped.items())
    )
    columns = (
        Column("run", "run", number=False),
        Column("round", "round"),
        Column("client", "client"),
        Column("reason", "reason", lambda text: plain(text, 200), number=False),
    )
    return Table("Refused updates", columns, rows)


def label_name(data: DataRecord, label: int) -> str:
    """Returns the class's name, or its number where it has none."""
    return data.label_names[label] if label < len(data.label_names) else f"{strata(data.metric)[0]} {label}"


def trained_ranks(record: RunRecord) -> list[int]:
    """Returns the ranks that clients trained, one entry per client where that is known.

    The rows say it where they record it. Otherwise: when every rank index was held by the whole cohort, the
    rank is the number of indices; a ``method.rank`` of the experiment binds all clients; else the fleet's.
    """
    recorded = {client: rank for row in record.rounds for client, rank in row.client_ranks.items()}
    if recorded:
        return list(recorded.values())
    covered = [row for row in record.rounds if row.coverage and row.layers and row.clients and not row.dropped]
    if covered and all(set(row.coverage or ()) == {len(row.clients) * row.layers} for row in covered):
        return sorted({len(row.coverage or ()) for row in covered})
    fleet = [client.rank for client in record.fleet]
    rank = record.setting("method", "rank")
    if rank == "server":
        rank = record.setting("adapter", "rank")
    elif rank == "smallest":
        rank = min(fleet, default=None)
    return [rank] if isinstance(rank, int) else fleet


def last_validation(record: RunRecord, metric: Metric) -> float | None:
    """Returns the newest validation score."""
    values = [score(row.validation, metric.name) for row in record.rounds]
    return next((value for value in reversed(values) if value is not None), None)


def fact_text(value: object) -> str:
    """Returns a fact of unknown kind as a reader would write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return plain(", ".join(fact_text(entry) for entry in value), 200)
    return plain(value, 200)


def flat(values: Mapping[str, Any], prefix: str = "", *, dots: bool = False) -> Iterator[tuple[str, object]]:
    """Yields the leaves of nested tables under their path: ``a.b`` with dots, ``a: b`` without."""
    for key, value in values.items():
        name = f"{prefix}{key}" if dots else f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}." if dots else f"{name}: ", dots=dots)
        else:
            yield name, value


def _run_row(record: RunRecord, metric: Metric) -> Row:
    summary, rounds = record.summary, record.rounds
    examples = _test_examples(record)
    after = score(summary.test.after, metric.name) if summary else None
    down, up = (summary.bytes_down, summary.bytes_up) if summary else (None, None)
    seconds = summary.train_seconds if summary else None
    return {
        "run": record.label,
        "method": record.method,
        "ranks": span(trained_ranks(record)) if record.fleet or rounds else None,
        "rounds": _rounds_text(record),
        "validation": last_validation(record, metric),
        "test_before": score(summary.test.before, metric.name) if summary else None,
        "test_after": after,
        "margin": sampling_error(metric, after, examples),
        "bytes_down": sum(row.bytes_down for row in rounds) if down is None else down,
        "bytes_up": sum(row.bytes_up for row in rounds) if up is None else up,
        "train_seconds": sum(row.seconds for row in rounds) if seconds is None else seconds,
        "adapter_parameters": summary.adapter_parameters if summary else None,
    }


def _baseline_row(baseline: Baseline, examples: int | None, metric: Metric) -> Row:
    row: Row = dict.fromkeys(column.key for column in _closing(metric))
    test = score(baseline.test, metric.name)
    values = {"test_after": test, "margin": sampling_error(metric, test, examples)}
    return row | values | {"run": baseline.name, "validation": score(baseline.validation, metric.name)}


def _rounds_text(record: RunRecord) -> str:
    done, planned = record.rounds_done, record.rounds_planned
    return str(done) if planned is None or record.finished or done == planned else f"{done} of {planned}"


def _test_examples(record: RunRecord) -> int | None:
    return record.data.examples.get("test") if record.data else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None


def _top_classes(data: DataRecord, counts: Sequence[int], top: int) -> list[Row]:
    order = sorted((label for label, number in enumerate(counts) if number), key=lambda label: -counts[label])
    total = sum(counts)
    return [{"class": label_name(data, label), "share": counts[label] / total} for label in order[:top]]


def _top_text(classes: list[Row]) -> str:
    return ", ".join(f"{plain(entry['class'], 30)} {percent(entry['share'], 0)}" for entry in classes)


def _cell(column: Column, row: Row) -> str:
    value = row.get(column.key)
    return NONE if value is None else column.show(value)


def _closing(metric: Metric) -> tuple[Column, ...]:
    show = partial(value_text, metric)
    return (
        Column("run", "run", number=False),
        Column("method", "method", number=False, minor=5),
        Column("ranks", "client ranks"),
        Column("rounds", "rounds", minor=4),
        Column("validation", "validation, newest", show),
        Column("test_before", "test before", show, minor=1),
        Column("test_after", "test after", show),
        Column("margin", "±\N{NO-BREAK SPACE}95\N{NO-BREAK SPACE}%", lambda share: f"{100 * share:.1f}", minor=3),
        Column("bytes_down", "down", byte_text),
        Column("bytes_up", "up", byte_text),
        Column("train_seconds", "training", duration, minor=2),
        Column("adapter_parameters", "adapter parameters", count, minor=6),
    )


def _clients(metric: Metric, level: float) -> tuple[Column, ...]:
    show = partial(value_text, metric)
    return (
        Column("client", "client"),
        Column("rank", "rank"),
        Column("examples", "training examples", count),
        Column("rounds", "rounds", count),
        Column("bytes_down", "down", byte_text),
        Column("bytes_up", "up", byte_text),
        Column("loss", "last local loss", decimal),
        Column("before", "own test before", show),
        Column("after", "own test after", show),
        Column("gain", gain_title(metric), lambda change: change_text(metric, change, level)),
    )
