"""The figures of merit: what each is called, which way is better, and how it is computed from predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Scores = dict[str, float]


@dataclass(frozen=True)
class Metric:
    """One figure of merit."""

    name: str
    label: str
    """In running text."""
    higher_is_better: bool = True
    percent: bool = True
    """Whether people read it in per cent."""

    def as_dict(self) -> dict[str, Any]:
        """Returns it as data.json holds it."""
        return asdict(self)


_ALL = (
    Metric("accuracy", "accuracy"),
    Metric("f1", "F1"),
    Metric("macro_f1", "macro F1"),
    Metric("matthews", "Matthews correlation"),
    Metric("pearson", "Pearson correlation"),
    Metric("spearman", "Spearman correlation"),
    Metric("exact_match", "exact match"),
    Metric("perplexity", "perplexity", higher_is_better=False, percent=False),
    Metric("loss", "loss", higher_is_better=False, percent=False),
)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _ALL}
RANGES: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("accuracy", "f1", "macro_f1", "exact_match"), (0.0, 1.0)),
    **dict.fromkeys(("matthews", "pearson", "spearman"), (-1.0, 1.0)),
    "perplexity": (1.0, float("inf")),
    "loss": (0.0, float("inf")),
}
"""Metric → the least and the most that it can be."""


def class_scores(predicted: np.ndarray, labels: np.ndarray, classes: int) -> Scores:
    """Returns accuracy, macro F1 and Matthews correlation of predicted classes [n]; F1 of class 1 where there are two.

    Classes that neither occur nor are predicted do not count in the macro mean; a correlation with something constant
    is 0. The numbers are scikit-learn's, which takes a hundred times as long: a large fleet is scored client by client.
    """
    present, codes = np.unique(np.concatenate([labels, predicted]), return_inverse=True)
    true, said, size = codes[: len(labels)], codes[len(labels) :], len(present)
    hits = np.bincount(true[true == said], minlength=size).astype(np.float64)
    held, chosen = (np.bincount(column, minlength=size).astype(np.float64) for column in (true, said))
    f1 = 2 * hits / (held + chosen)
    number = float(len(labels))
    spread = (number**2 - chosen @ chosen) * (number**2 - held @ held)
    scores = {
        "accuracy": float((predicted == labels).mean()),
        "macro_f1": float(f1.mean()),
        "matthews": float((hits.sum() * number - held @ chosen) / np.sqrt(spread)) if spread else 0.0,
    }
    if classes == 2:
        scores["f1"] = float(f1[present == 1].sum())  # 0 where class 1 neither occurs nor is predicted
    return scores


def value_scores(predicted: np.ndarray, values: np.ndarray) -> Scores:
    """Returns the Pearson and Spearman correlations of predicted numbers [n]; 0 with something constant."""
    from scipy.stats import pearsonr, spearmanr

    if len(values) < 2 or np.ptp(values) == 0 or np.ptp(predicted) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(pearsonr(predicted, values).statistic),
        "spearman": float(spearmanr(predicted, values).statistic),
    }
