"""Figures of merit as people read them: unit, direction, and how values and differences are written.

The report asks here about a metric, and nowhere by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Protocol

from fslora.metrics import METRICS, Metric
from fslora.report.text import NONE, margin95, percent, plain, points

ACCURACY, LOSS = METRICS["accuracy"], METRICS["loss"]
_COUNTED = frozenset({"accuracy", "exact_match"})
_OF_CLASSES = frozenset({"accuracy", "f1", "macro_f1", "matthews"})
_NOT_OF_NATS = frozenset({"pearson", "spearman", "loss"})
"""Metrics beside which the loss is, or may be, a squared error."""
_SHORT = {
    "accuracy": "acc.",
    "matthews": "Matthews corr.",
    "pearson": "Pearson corr.",
    "spearman": "Spearman corr.",
    "loss": "val. loss",
}
LEAST = 0.005
"""The least difference that matters to a reader, where values are about 1."""
_WIDE = 5.0
"""Ratio of the highest to the lowest value from which on an axis is logarithmic."""


class Judged(Protocol):
    """A run or a comparison's entry."""

    @property
    def metric(self) -> Metric:
        """What it is judged by."""


def metric_of(judged: Sequence[Judged]) -> Metric:
    """Returns what is shown of several: the metric of the first."""
    return judged[0].metric if judged else ACCURACY


def goodness(metric: Metric, value: float) -> float:
    """Returns a number that is the higher the better."""
    return value if metric.higher_is_better else -value


def value_text(metric: Metric, value: float | None) -> str:
    """Returns a value with its unit, such as ``82.1 %`` or ``24.53``."""
    return percent(value) if metric.percent else number_text(metric, value)


def number_text(metric: Metric, value: float | None, *beside: float | None) -> str:
    """Returns a value without its unit; ``beside`` are values with which it shares the number of decimals."""
    if value is None or not isfinite(value):
        return NONE
    return f"{100 * value:.1f}" if metric.percent else f"{value:.{_decimals(value, *beside)}f}"


def change_text(metric: Metric, difference: float | None, *beside: float | None) -> str:
    """Returns a difference of two values, with its sign; in points where values are in per cent."""
    if metric.percent or difference is None or not isfinite(difference):
        return points(difference)
    shown = f"{difference:+.{_decimals(difference, *beside)}f}".replace("-", "−")
    return shown if shown.strip("+−0.") else shown[1:]


def tick_text(metric: Metric, difference: float) -> str:
    """Returns a difference at an axis's tick: the fewest digits."""
    return points(difference) if metric.percent else f"{difference:+g}".replace("-", "−") if difference else "0"


def changed_text(metric: Metric, difference: float | None, *beside: float | None) -> str:
    """Returns a difference with its sign and unit, such as ``+2.5 points``."""
    return f"{change_text(metric, difference, *beside)}{' points' if metric.percent else ''}"


def distance_text(metric: Metric, difference: float, *beside: float | None) -> str:
    """Returns the size of a difference with its unit, such as ``2.5 points``."""
    return changed_text(metric, abs(difference), *beside).removeprefix("+")


def spread_text(metric: Metric, mean: float | None, sd: float | None) -> str:
    """Returns mean and standard deviation without unit, such as ``82.1 ± 0.4``."""
    deviation = "" if sd is None else f" ± {number_text(metric, sd, mean)}"
    return f"{number_text(metric, mean)}{deviation}"


def capital(text: str) -> str:
    """Returns text that begins a sentence or a title; the rest of it stays as it is."""
    return text[:1].upper() + text[1:]


def short(metric: Metric) -> str:
    """Returns the label where there is little room."""
    return _SHORT.get(metric.name, metric.label)


def in_title(metric: Metric) -> str:
    """Returns what the title of a column of numbers adds for their unit."""
    return ",\N{NO-BREAK SPACE}%" if metric.percent else ""


def change_title(metric: Metric) -> str:
    """Returns what the title of a column of differences adds for their unit."""
    return ", points" if metric.percent else ""


def gain_title(metric: Metric) -> str:
    """Returns the title of a column of differences between after and before."""
    return f"{'gain' if metric.higher_is_better else 'change'}{change_title(metric)}"


def best_word(metric: Metric) -> str:
    """Returns what the best value is among all."""
    return "highest" if metric.higher_is_better else "lowest"


def worst_word(metric: Metric) -> str:
    """Returns what the worst value is among all."""
    return "lowest" if metric.higher_is_better else "highest"


def better(metric: Metric, up: str = "above", down: str = "below") -> str:
    """Returns the word for the direction in which values are better."""
    return up if metric.higher_is_better else down


def worse(metric: Metric, up: str = "above", down: str = "below") -> str:
    """Returns the word for the direction in which values are worse."""
    return down if metric.higher_is_better else up


def direction(metric: Metric) -> str:
    """Returns what must be said beside numbers of which lower ones are better; nothing of the others."""
    return "" if metric.higher_is_better else f"{capital(metric.label)}: lower is better."


def unusual(metric: Metric) -> str:
    """Returns what scores are, where nothing beside them says so and they are not accuracies."""
    if metric.name == ACCURACY.name:
        return ""
    return f"Scores: {metric.label}{'' if metric.higher_is_better else ', lower is better'}."


def is_counted(metric: Metric) -> bool:
    """Returns whether values are shares of the examples that are right, and so have a binomial sampling error."""
    return metric.name in _COUNTED


def sampling_error(metric: Metric, value: float | None, examples: int | None) -> float | None:
    """Returns half the width of the 95 % interval of a share of so many examples; None where it is no such share."""
    return margin95(value, examples) if is_counted(metric) else None


def outcome_text(metric: Metric, value: float | None) -> str:
    """Returns a result in a few words, such as ``82.1 % right`` or ``perplexity 24.53``."""
    if is_counted(metric):
        return f"{value_text(metric, value)} right"
    return f"{metric.label} {value_text(metric, value)}"


def least(metric: Metric, level: float) -> float:
    """Returns the least range that an axis shows, where values are about ``level``."""
    return LEAST if metric.percent else LEAST * (abs(level) or 1.0)


def wide(metric: Metric, values: Sequence[float]) -> bool:
    """Returns whether values need a logarithmic axis: no shares, positive, and of several orders of magnitude."""
    return not metric.percent and bool(values) and min(values) > 0 and max(values) > _WIDE * min(values)


def strata(metric: Metric) -> tuple[str, str]:
    """Returns what a partition counts, one and many: classes, or else groups such as tasks or fifths of a range."""
    return ("class", "classes") if metric.name in _OF_CLASSES else ("group", "groups")


def loss_unit(metric: Metric) -> str:
    """Returns the unit of the loss in brackets, where it is certain."""
    return "" if metric.name in _NOT_OF_NATS else " (nats)"


def read_label(metric: Metric) -> Metric:
    """Returns the metric with a label of one printable line, however its file was written."""
    return Metric(metric.name, plain(metric.label, 40), metric.higher_is_better, metric.percent)


def _decimals(*values: float | None) -> int:
    """So many that the largest has four digits or so."""
    largest = max((abs(value) for value in values if value is not None and isfinite(value)), default=0.0)
    return next((digits for limit, digits in ((10.0, 3), (100.0, 2), (1000.0, 1)) if largest < limit), 0)
