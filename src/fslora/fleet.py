"""The fleet: what each client can afford, and who takes part in a round.

Of a hundred thousand registered clients a round meets a few: what is known of them lies in arrays, and a `Client` is
made when somebody asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, overload

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
Whole = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Fleet(Sequence[Client]):
    """The clients, by id."""

    ranks: Whole
    """[clients]: the largest rank that each can hold and train."""
    examples: Whole
    """[clients]: the number of training examples that each holds."""

    def __len__(self) -> int:
        """Returns the number of clients."""
        return len(self.ranks)

    @overload
    def __getitem__(self, client: int) -> Client: ...
    @overload
    def __getitem__(self, client: slice) -> Sequence[Client]: ...
    def __getitem__(self, client: int | slice) -> Client | Sequence[Client]:
        """Returns one client, or several as a tuple."""
        if isinstance(client, slice):
            return tuple(self[i] for i in range(*client.indices(len(self))))
        place = range(len(self))[client]
        return Client(place, int(self.ranks[place]), int(self.examples[place]))

    def __iter__(self) -> Iterator[Client]:
        """Yields the clients by id; faster than asking for one after the other."""
        return map(Client, range(len(self)), self.ranks.tolist(), self.examples.tolist())


def build_fleet(config: FleetConfig, rank: int, sizes: Sequence[int] | Whole, rng: Rng) -> Fleet:
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
        ranks = np.array(config.ranks)
    elif config.ratios is not None:
        dealt = np.array([max(1, round(ratio * rank)) for ratio in config.ratios])
        turns = rng.child("ratios").numpy().permutation(config.clients)
        ranks = dealt[turns % len(dealt)]
    else:
        low, high = config.min_rank, rank if config.max_rank is None else config.max_rank
        ranks = _drawn(config, low, high, rng.child("ranks").numpy())
    return Fleet(ranks, np.array(sizes, dtype=np.int64))


def sample_cohort(fleet: Sequence[Client], cohort: int | Literal["all"], rng: Rng) -> tuple[Client, ...]:
    """Returns this many different clients, by increasing id; each that has examples is as likely as any other."""
    if isinstance(fleet, Fleet) and not fleet.examples.all():
        able = [fleet[i] for i in np.flatnonzero(fleet.examples).tolist()]
        return sample_cohort(able, cohort if cohort == "all" else min(cohort, len(able)), rng)
    if cohort == "all":
        return tuple(fleet)
    chosen = rng.numpy().choice(len(fleet), size=cohort, replace=False)
    return tuple(fleet[i] for i in sorted(chosen.tolist()))


def with_spares(fleet: Fleet, cohort: Sequence[Client], spares: int, rng: Rng) -> tuple[Client, ...]:
    """Returns a cohort and this many clients more, or as many as there are, by increasing id.

    Each client that has examples is as likely as any other, and the cohort is the one without spares.
    """
    inside = np.array([client.id for client in cohort], dtype=np.int64)
    outside = np.setdiff1d(np.flatnonzero(fleet.examples), inside)
    more = rng.numpy().choice(outside, size=min(spares, len(outside)), replace=False)
    return tuple(fleet[i] for i in sorted([*inside.tolist(), *more.tolist()]))


def _drawn(config: FleetConfig, low: int, high: int, stream: np.random.Generator) -> Whole:
    assert config.distribution is not None
    places = DISTRIBUTIONS[config.distribution](stream, config.clients, high - low)
    return np.clip(np.rint(low + places), low, high).astype(np.int64)


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
