"""From the configuration of the data to examples: one loader per task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from fslora.config import DataConfig
from fslora.data.chapters import load_chapters
from fslora.data.documents import load_text
from fslora.data.images import load_images
from fslora.data.instruct import load_instruct
from fslora.data.regression import load_regression
from fslora.data.table import load_table
from fslora.data.tags import load_tags
from fslora.data.types import Dataset, Examples
from fslora.data.word_order import load_word_order
from fslora.rng import Rng

__all__ = ["TASKS", "Dataset", "Examples", "limited", "load_dataset"]

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


def load_dataset(config: DataConfig, rng: Rng) -> Dataset:
    """Returns the task's examples, each side cut to the configured size; the same for the same seed.

    Raises:
        DataError: The source cannot be read, or cannot be used for the task.
    """
    whole = TASKS[config.task](config, rng.child(config.task))
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
