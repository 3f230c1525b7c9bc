"""What a reader wants first: what was trained, how it ended, and what to be wary of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Literal

from fslora.report.merit import better, changed_text, distance_text, sampling_error, value_text
from fslora.report.read import RunRecord, score
from fslora.report.tables import flat, last_validation, trained_ranks
from fslora.report.text import byte_text, count, counted, duration, percent, plain, span


@dataclass(frozen=True)
class Tile:
    """One number with its name and a remark."""

    name: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class Headline:
    """The top of a report."""

    what: str
    result: str
    tiles: tuple[Tile, ...]
    notes: tuple[str, ...]
    """What is unfinished or went wrong."""


def headline(record: RunRecord) -> Headline:
    """Returns the top of the report."""
    return Headline(_what(record), _result(record), tuple(_tiles(record)), tuple(_notes(record)))


def changes(record: RunRecord) -> dict[str, str]:
    """Returns, per variant, the keys that it changes in the main run's experiment."""
    declared = record.setting("variants")
    if not isinstance(declared, Mapping):
        return {}
    texts = {name: _keys(fields) for name, fields in declared.items() if isinstance(fields, Mapping)}
    return {str(name): text or "nothing" for name, text in texts.items()}


def _keys(fields: Mapping[str, object]) -> str:
    pairs = flat(fields, dots=True)
    return ", ".join(f"{key} = {json.dumps(value, ensure_ascii=False, default=str)}" for key, value in pairs)


def _what(record: RunRecord) -> str:
    rank, model = record.setting("adapter", "rank"), record.setting("model", "name")
    adapter = f"A LoRA adapter of rank {rank}" if isinstance(rank, int) else "A LoRA adapter"
    base = f" for {plain(model)}" if model else ""
    rounds = counted(record.rounds_done, "round")
    if record.rounds_planned and record.rounds_done < record.rounds_planned:
        rounds = f"{record.rounds_done} of {record.rounds_planned} rounds"
    fleet = ""
    if record.fleet:
        fleet = f" over {len(record.fleet)} clients of rank {span([client.rank for client in record.fleet])}"
    data = f" Data: {plain(record.data.name)}." if record.data else ""
    return f"{adapter}{base}, trained with {plain(record.method)}{fleet} for {rounds}.{data}"


def _result(record: RunRecord) -> str:
    metric = record.metric
    after = _test(record)
    if after is None:
        newest = last_validation(record, metric)
        tested = record.summary is not None and record.summary.test.after
        none = f"The test gave no finite {metric.label}" if tested else "No test yet"
        if newest is None:
            return f"{none}." if tested else "Nothing has been evaluated yet."
        reference = _reference(record, "validation")
        beside = "" if reference is None else f"; {_reference_name(record)} reaches {value_text(metric, reference)}"
        return f"{none}. The newest validation {metric.label} is {value_text(metric, newest)}{beside}."
    before = score(record.summary.test.before, metric.name) if record.summary else None
    sentence = f"Test {metric.label} went from {value_text(metric, before)} to {value_text(metric, after)}"
    if before is None:
        sentence = f"Test {metric.label} is {value_text(metric, after)}"
    reference = _reference(record, "test")
    if reference is None:
        return f"{sentence}."
    verdict = _verdict(record, after, reference)
    return f"{sentence}; {_reference_name(record)} reaches {value_text(metric, reference)}. {verdict}"


def _verdict(record: RunRecord, after: float, reference: float) -> str:
    """How the result stands to the reference; a difference within the sampling error is called none."""
    metric, difference = record.metric, after - reference
    examples = record.data.examples.get("test") if record.data else None
    margins = [sampling_error(metric, value, examples) for value in (after, reference)]
    error = sum(margin**2 for margin in margins if margin is not None) ** 0.5
    if abs(difference) <= error:
        sample = f"the sampling error of {count(examples)} test examples"
        return f"The difference, {changed_text(metric, difference, after)}, is within {sample}."
    side = "above" if difference > 0 else "below"
    aside = "" if metric.higher_is_better else f", which is {'better' if side == better(metric) else 'worse'}"
    return f"Federated fine-tuning is {distance_text(metric, difference, after)} {side} it{aside}."


def _test(record: RunRecord) -> float | None:
    """The score on the test after training."""
    return score(record.summary.test.after, record.metric.name) if record.summary else None


def _reference(record: RunRecord, split: Literal["validation", "test"]) -> float | None:
    """The score of the reference without federated training."""
    return score(getattr(record.baseline, split), record.metric.name) if record.baseline else None


def _reference_name(record: RunRecord) -> str:
    return f"the {plain(record.baseline.name)}" if record.baseline else "the reference"


def _tiles(record: RunRecord) -> list[Tile]:
    summary = record.summary
    tiles = [*_score_tiles(record)]
    down, up = sum(row.bytes_down for row in record.rounds), sum(row.bytes_up for row in record.rounds)
    seconds: float | None = sum(row.seconds for row in record.rounds)
    if summary:
        down, up = (summary.bytes_down or down), (summary.bytes_up or up)
        seconds = summary.train_seconds or seconds
    tiles.append(Tile("Traffic", byte_text(down + up), f"{byte_text(down)} down, {byte_text(up)} up"))
    ranks = span(trained_ranks(record))
    tiles.append(Tile("Clients", count(len(record.fleet)) if record.fleet else "–", f"training at rank {ranks}"))
    memory = summary.peak_memory_bytes if summary else None
    tiles.append(Tile("Training time", duration(seconds), f"peak memory {byte_text(memory)}" if memory else ""))
    if summary and summary.adapter_parameters:
        share = summary.adapter_parameters / summary.base_parameters if summary.base_parameters else None
        remark = f"{percent(share)} of the base's {count(summary.base_parameters)}" if share is not None else ""
        tiles.append(Tile("Trained parameters", count(summary.adapter_parameters), remark))
    return tiles


def _score_tiles(record: RunRecord) -> list[Tile]:
    metric, after = record.metric, _test(record)
    if after is None:
        current = last_validation(record, metric)
        tiles = [] if current is None else [Tile(f"Validation {metric.label}", value_text(metric, current), "newest")]
        reference = _reference(record, "validation")
    else:
        current = after
        margin = sampling_error(metric, after, record.data.examples.get("test") if record.data else None)
        error = "" if margin is None else f"± {100 * margin:.1f}, "
        before = score(record.summary.test.before, metric.name) if record.summary else None
        aside = "" if metric.higher_is_better else "; lower is better"
        remark = f"{error}before {value_text(metric, before)}{aside}"
        tiles = [Tile(f"Test {metric.label}", value_text(metric, after), remark)]
        reference = _reference(record, "test")
    if record.baseline and reference is not None:
        remark = "" if current is None else f"this run: {changed_text(metric, current - reference, current)}"
        tiles.append(Tile(plain(record.baseline.name, 40).capitalize(), value_text(metric, reference), remark))
    return tiles


def _notes(record: RunRecord) -> list[str]:
    notes: list[str] = []
    for run in record.runs:
        if not run.finished:
            name = "The run" if run is record else f"The variant {plain(run.name)}"
            planned = f" of {run.rounds_planned}" if run.rounds_planned else ""
            notes.append(f"{name} is not finished: {run.rounds_done}{planned} rounds are done.")
        diverged = [row.round for row in run.rounds if row.loss is not None and not isfinite(row.loss)]
        if diverged:
            first = f"{counted(len(diverged), 'round')}, first in round {diverged[0]}"
            notes.append(f"{plain(run.label)}: the local loss was not finite in {first}.")
        dropped = sum(len(row.dropped) for row in run.rounds)
        if dropped:
            notes.append(f"{plain(run.label)}: the server refused {counted(dropped, 'update')}; see the list below.")
    present = {variant.name for variant in record.variants}
    waiting = [plain(name) for name in changes(record) if name not in present]
    if waiting and record.main:
        notes.append(f"Variants that have not started: {', '.join(waiting)}.")
    return notes
