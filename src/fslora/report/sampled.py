"""A run of a large fleet cut down to clients that figures and tables can show one by one."""

from __future__ import annotations

from dataclasses import replace

from fslora.report.read import DataRecord, RunRecord
from fslora.report.style import by_rank
from fslora.report.text import count

MOST = 1000
"""Clients up to which all are shown: a figure is 1,000 pixels wide, and a page has to open."""


def sampled(record: RunRecord) -> RunRecord:
    """Returns the run with at most ``MOST`` clients in it: of those that took part, evenly by rank.

    Cohorts are drawn at random, so those that took part stand for the fleet. Rounds keep all that they say.
    """
    if len(record.fleet) <= MOST or record.data is None:
        return record
    seen = {client for run in record.runs for row in run.rounds for client in row.clients}
    order = [i for i in by_rank(record.fleet) if record.fleet[i].id in seen] or by_rank(record.fleet)
    chosen = sorted(order[i * len(order) // MOST] for i in range(MOST)) if len(order) > MOST else sorted(order)
    ids = {record.fleet[i].id for i in chosen}
    variants = tuple(_only(run, chosen, ids) for run in record.variants)
    return replace(_only(record, chosen, ids), variants=variants)


def remark_on(record: RunRecord, shown: RunRecord) -> str | None:
    """Returns what a reader of ``shown`` has to know; None where it holds every client."""
    if len(shown.fleet) == len(record.fleet):
        return None
    return (
        f"Figures and tables of single clients show {count(len(shown.fleet))} of {count(len(record.fleet))} "
        "clients, of those that took part, evenly by rank. All other numbers are of all clients."
    )


def _only(run: RunRecord, chosen: list[int], ids: set[int]) -> RunRecord:
    summary = run.summary
    if summary:
        summary = replace(summary, clients=tuple(entry for entry in summary.clients if entry.id in ids))
    return replace(run, data=run.data and _held(run.data, chosen), summary=summary)


def _held(data: DataRecord, chosen: list[int]) -> DataRecord:
    counts, holdout = data.partition.label_counts, data.partition.holdout
    partition = replace(
        data.partition,
        label_counts=tuple(counts[i] for i in chosen) if counts else (),
        holdout=tuple(holdout[i] for i in chosen) if holdout else (),
    )
    return replace(data, partition=partition, fleet=tuple(data.fleet[i] for i in chosen if i < len(data.fleet)))
