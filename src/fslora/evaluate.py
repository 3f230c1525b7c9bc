"""Predictions of adapters on a base, batched and without gradient."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fslora.data.batches import Encoded
from fslora.models.base import Base
from fslora.objectives import Predictions, joined
from fslora.types import Adapter


@torch.no_grad()
def predict(base: Base, adapter: Adapter, data: Encoded) -> Predictions:
    """Returns the predictions of one adapter on every example of a split."""
    with base.using(adapter):
        return base.objective.predict(base, data)


def predict_dealt(base: Base, adapters: Sequence[Adapter], data: Encoded) -> Predictions:
    """Returns predictions of which every adapter makes its share: the examples are dealt to them in turns.

    With one model per client this estimates the mean over clients of each model's score on the whole split, at the
    cost of scoring one.
    """
    if len(adapters) == 1:
        return predict(base, adapters[0], data)
    speakers = range(min(len(adapters), len(data)))  # of many clients only the first ones have a share
    shares = [np.arange(position, len(data), len(adapters)) for position in speakers]
    dealt = joined([predict(base, adapters[i], data.take(index)) for i, index in enumerate(shares)])
    order = np.argsort(np.concatenate(shares))
    return Predictions({name: column[order] for name, column in dealt.columns.items()}, dealt.score)
