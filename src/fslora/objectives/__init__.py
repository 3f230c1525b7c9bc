"""What models are trained and judged by."""

from __future__ import annotations

from fslora.config import DataConfig
from fslora.data.types import Dataset
from fslora.errors import ConfigError
from fslora.metrics import METRICS, Metric
from fslora.objectives.base import Objective, Predictions, joined
from fslora.objectives.causal import Causal
from fslora.objectives.classes import Classes, Value
from fslora.objectives.images import Images
from fslora.objectives.tags import Tags

__all__ = [
    "Causal",
    "Classes",
    "Images",
    "Objective",
    "Predictions",
    "Tags",
    "Value",
    "joined",
    "metric_of",
    "objective_of",
]


def objective_of(dataset: Dataset, data: DataConfig) -> Objective:
    """Returns the objective of a data set's kind."""
    names = dataset.label_names
    match dataset.kind:
        case "classes":
            return Classes(names)
        case "value":
            return Value()
        case "tags":
            return Tags(names)
        case "images":
            return Images(names)
        case "causal":
            return Causal(data, names)


def metric_of(objective: Objective, data: DataConfig) -> Metric:
    """Returns what runs are judged by: ``data.metric``, or the objective's first.

    Raises:
        ConfigError: The objective has no such metric.
    """
    known = (*objective.metrics, "loss")
    if data.metric is None:
        return METRICS[known[0]]
    if data.metric not in known:
        raise ConfigError(f"data.metric is {data.metric!r}; for this task there are {', '.join(known)}")
    return METRICS[data.metric]
