"""From the configuration of the data to examples: one loader per task."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import numpy as np

from fslora.config import DataConfig, Experiment
from fslora.data.chapters import load_chapters
from fslora.data.documents import load_text
from fslora.data.images import load_images
from fslora.data.instruct import load_instruct
from fslora.data.partition import Partition
from fslora.data.private import at_server, at_site
from fslora.data.regression import load_regression
from fslora.data.table import load_table
from fslora.data.tags import load_tags
from fslora.data.types import Dataset, Examples, Kind
from fslora.data.word_order import load_word_order
from fslora.rng import Rng

__all__ = ["KINDS", "TASKS", "Dataset", "Examples", "load_at_server", "load_at_site", "load_dataset"]

TASKS: Mapping[str, Callable[[DataConfig, Rng], Dataset]] = {
    "word-order": load_word_order,
    "chapters": load_chapters,
    "table": load_table,
    "text": load_text,
    "instruct": load_instruct,
    "regression": load_regression,
    "tags": load_tags,
    "images": load_images,
}

KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(TASKS, "classes"),
    "regression": "value",
    "tags": "tags",
    "images": "images",
    "text": "causal",
    "instruct": "causal",
}
"""Task → what is learnt, for when the data are not read."""


def load_dataset(config: DataConfig, rng: Rng) -> Dataset:
    """Returns the task's examples, each side cut to the configured size; the same for the same seed.

    Raises:
        DataError: The source cannot be read, or cannot be used for the task.
    """
    return _limited(TASKS[config.task](config, rng.child(config.task)), config, rng)


def load_at_server(experiment: Experiment, rng: Rng) -> tuple[Dataset, Partition]:
    """Returns what the server has of data that are at sites: its splits, cut to the configured size.

    Raises:
        DataError: A split cannot be read, or cannot be used for the task.
    """
    config = experiment.data
    dataset, parts = at_server(experiment, _empty(config), TASKS[config.task], rng.child(config.task))
    return _limited(dataset, config, rng), parts


def load_at_site(experiment: Experiment, members: Collection[int], rng: Rng, drawn: Rng) -> tuple[Dataset, Partition]:
    """Returns what a site has: its clients' examples, of which no limit leaves out any.

    Raises:
        DataError: Its source cannot be read, cannot be used for the task, or does not divide into its clients.
    """
    config = experiment.data
    return at_site(experiment, members, _empty(config), TASKS[config.task], rng.child(config.task), drawn)


def _empty(config: DataConfig) -> Dataset:
    """The task without examples."""
    kind = KINDS[config.task]
    columns = {"value": ("value",), "tags": ("words", "tags"), "causal": ("target", "choices", "answer", "options")}
    none = Examples((), np.zeros(0, dtype=np.int64), columns=dict.fromkeys(columns.get(kind, ()), ()))
    return Dataset(config.task, config.labels or (), none, none, none, {}, kind)


def _limited(whole: Dataset, config: DataConfig, rng: Rng) -> Dataset:
    limits = {"train": config.max_train, "validation": config.max_validation, "test": config.max_test}
    sides: dict[str, Examples] = {name: getattr(whole, name) for name in limits}
    kept = {name: limited(sides[name], limit, rng.child("limit", name)) for name, limit in limits.items()}
    counts = {f"{name} examples": len(side) for name, side in kept.items()}
    for name, side in kept.items():
        if len(side) < len(sides[name]):
            counts[f"{name} examples left out by data.max_{name}"] = len(sides[name]) - len(side)
    return replace(
        whole,
        train=kept["train"],
        validation=kept["validation"],
        test=kept["test"],
        statistics={**whole.statistics, **counts},
    )


def limited(examples: Examples, limit: int, rng: Rng) -> Examples:
    """Returns ``limit`` of the examples, drawn evenly, in their order; all of them when the limit is 0."""
    if limit == 0 or len(examples) <= limit:
        return examples
    return examples.take(np.sort(rng.numpy().choice(len(examples), size=limit, replace=False)))
