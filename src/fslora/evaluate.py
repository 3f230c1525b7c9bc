"""Loss and accuracy of an adapter on a base, batched and without gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from fslora.data.batches import Encoded
from fslora.models.base import Base
from fslora.types import Adapter

Scores = dict[str, float]

TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Predictions:
    """One loss and one verdict per example."""

    losses: np.ndarray
    """float64 [n], cross-entropy in nats."""
    correct: np.ndarray
    """bool [n]."""

    def scores(self, index: np.ndarray | slice = slice(None)) -> Scores:
        """Returns mean loss and accuracy over the examples of ``index``."""
        return {"accuracy": float(self.correct[index].mean()), "loss": float(self.losses[index].mean())}


@torch.no_grad()
def predict(base: Base, adapter: Adapter, data: Encoded) -> Predictions:
    """Returns the predictions of one adapter on every example of a split."""
    losses, correct = np.zeros(len(data)), np.zeros(len(data), dtype=bool)
    with base.using(adapter):
        for index in by_length(data.lengths):
            batch = data.batch(index)
            logits = base.logits(batch).float().cpu()
            losses[index] = functional.cross_entropy(logits, batch["labels"], reduction="none").numpy()
            correct[index] = (logits.argmax(1) == batch["labels"]).numpy()
    return Predictions(losses, correct)


def predict_dealt(base: Base, adapters: Sequence[Adapter], data: Encoded) -> Predictions:
    """Returns predictions of which every adapter makes its share: the examples are dealt to them in turns.

    With one model per client this estimates the mean over clients of each model's score on the whole split, at the
    cost of scoring one.
    """
    losses, correct = np.zeros(len(data)), np.zeros(len(data), dtype=bool)
    for position, adapter in enumerate(adapters):
        index = np.arange(position, len(data), len(adapters))
        if len(index):
            part = predict(base, adapter, data.take(index))
            losses[index], correct[index] = part.losses, part.correct
    return Predictions(losses, correct)


def by_length(lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Yields index arrays of texts of similar length, at most about TOKENS_PER_BATCH tokens each."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and int(lengths[order[stop]]) * (stop + 1 - start) <= TOKENS_PER_BATCH:
            stop += 1
        yield order[start:stop]
        start = stop
