"""What the frozen base gives without any fine-tuning: a linear classifier on its mean-pooled features."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from fslora.data.batches import Encoded
from fslora.metrics import Scores, class_scores
from fslora.models.base import NOT_INPUTS, Base
from fslora.rng import Rng

NAME = "frozen base + linear head"
MOST_TRAINING_EXAMPLES = 3000
STRENGTHS = (0.003, 0.03, 0.3)


def frozen_baseline(base: Base, train: Encoded, validation: Encoded, test: Encoded, rng: Rng) -> dict[str, Any]:
    """Returns the scores of a logistic regression on frozen features, pooled over all clients' data.

    Features are standardised; the strength of regularisation is the one that does best on validation. At most
    MOST_TRAINING_EXAMPLES training examples are used.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    chosen = rng.numpy().permutation(len(train))[:MOST_TRAINING_EXAMPLES]
    labels = train.labels[chosen]
    if len(np.unique(labels)) < 2:
        return {"name": NAME, "validation": None, "test": None}
    features = pooled_features(base, train, chosen)
    held_out = pooled_features(base, validation, np.arange(len(validation)))
    best: tuple[float, Any] = (-1.0, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for strength in STRENGTHS:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300))
            model.fit(features, labels)
            accuracy = float(model.score(held_out, validation.labels))
            best = max(best, (accuracy, model), key=lambda pair: pair[0])
    model = best[1]
    tested = pooled_features(base, test, np.arange(len(test)))
    return {
        "name": NAME,
        "training_examples": len(chosen),
        "validation": _scores(model, held_out, validation.labels),
        "test": _scores(model, tested, test.labels),
    }


@torch.no_grad()
def pooled_features(base: Base, data: Encoded, index: np.ndarray) -> np.ndarray:
    """Returns the mean over tokens of the frozen backbone's last hidden states, float32 [len(index), d]."""
    backbone = base.model.base_model
    result: np.ndarray | None = None
    for part, texts in data.take(index).evaluated():
        batch = {name: tensor.to(base.device) for name, tensor in texts.items() if name not in NOT_INPUTS}
        hidden = backbone(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        pooled = ((hidden * mask).sum(1) / mask.sum(1)).float().cpu().numpy()
        if result is None:
            result = np.zeros((len(index), pooled.shape[1]), dtype=np.float32)
        result[part] = pooled
    assert result is not None
    return result


def _scores(model: Any, features: np.ndarray, labels: np.ndarray) -> Scores:
    """The scores of classes, and the loss where every label was seen in training."""
    scores = class_scores(model.predict(features), labels, len(model.classes_))
    if set(np.unique(labels)) <= set(model.classes_):
        probabilities = model.predict_proba(features)
        column = np.searchsorted(model.classes_, labels)
        chosen = probabilities[np.arange(len(labels)), column]
        scores["loss"] = float(-np.log(np.clip(chosen, 1e-12, None)).mean())
    return scores
