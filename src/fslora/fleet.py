"""The fleet: what each client can afford, and who takes part in a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fslora.config import FleetConfig
from fslora.rng import Rng
from fslora.types import Client

HEAVY_TAIL_MEDIAN = 5 / 31
"""heavy-tail-low: where the median lies in the range of ranks; rank 6 of [1, 32]."""
HEAVY_TAIL_SIGMA = 0.97
"""heavy-tail-low: standard deviation of the logarithm; on [1, 32] the mean of the final ranks is 8.5."""

Floats = NDArray[np.float64]


def build_fleet(config: FleetConfig, rank: int, sizes: Sequence[int], rng: Rng) -> tuple[Client, ...]:
    """Returns the clients, by id.

    Ratios are given to equal shares of the clients, in drawn order, as rank ``max(1, round(ratio * rank))``.

    Args:
        config: One of ranks, ratios and distribution is given.
        rank: The server's rank.
        sizes: The number of training examples of each client.
        rng: The fleet's stream.
    """
    if len(sizes) != config.clients:
        raise ValueError(f"{len(sizes)} sizes for {config.clients} clients")
    if config.ranks is not None:
        ranks: Sequence[int] = config.ranks
    elif config.ratios is not None:
        dealt = [max(1, round(ratio * rank)) for ratio in config.ratios]
        turns = rng.child("ratios").numpy().permutation(config.clients)
        ranks = [dealt[turn % len(dealt)] for turn in turns]
    else:
        low, high = config.min_rank, rank if config.max_rank is None else config.max_rank
        ranks = _drawn(config, low, high, rng.child("ranks").numpy())
    return tuple(Client(i, int(k), int(size)) for i, (k, size) in enumerate(zip(ranks, sizes, strict=True)))


def sample_cohort(fleet: Sequence[Client], cohort: int | Literal["all"], rng: Rng) -> tuple[Client, ...]:
    """Returns this many different clients, by increasing id; each is as likely as any other."""
    if cohort == "all":
        return tuple(fleet)
    chosen = rng.numpy().choice(len(fleet), size=cohort, replace=False)
    return tuple(fleet[i] for i in sorted(chosen.tolist()))


def _drawn(config: FleetConfig, low: int, high: int, stream: np.random.Generator) -> list[int]:
    assert config.distribution is not None
    places = DISTRIBUTIONS[config.distribution](stream, config.clients, high - low)
    return [int(rank) for rank in np.clip(np.rint(low + places), low, high)]


def _uniform(stream: np.random.Generator, count: int, span: int) -> Floats:
    return stream.integers(0, span, size=count, endpoint=True).astype(np.float64)


def _normal(stream: np.random.Generator, count: int, span: int) -> Floats:
    """Three standard deviations reach the ends; on [1, 32] this is Normal(16.5, 5.17)."""
    return stream.normal(span / 2, span / 6, size=count)


def _heavy_tail_low(stream: np.random.Generator, count: int, span: int) -> Floats:
    """Log-normal: most clients are weak, a few are strong."""
    return span * HEAVY_TAIL_MEDIAN * np.exp(HEAVY_TAIL_SIGMA * stream.standard_normal(count))


DISTRIBUTIONS: Mapping[str, Callable[[np.random.Generator, int, int], Floats]] = {
    "uniform": _uniform,
    "normal": _normal,
    "heavy-tail-low": _heavy_tail_low,
}
"""Name → draws (stream, count, span) → places above the lowest rank, before rounding and clipping."""
