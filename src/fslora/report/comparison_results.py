"""What the finished cells of a comparison say: means over seeds, paired differences, and who is dominated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, isfinite, sqrt
from statistics import fmean, median, stdev

from scipy.special import stdtrit

from fslora.metrics import Metric
from fslora.report.comparison import ComparisonRecord, Contestant
from fslora.report.merit import ACCURACY, goodness
from fslora.report.read import RunRecord, score

COSTS = (
    "bytes_down",
    "bytes_up",
    "client_memory_bytes",
    "flops",
    "simulated_seconds",
    "train_seconds",
    "server_seconds",
    "server_bytes",
    "peak_memory_bytes",
)
"""Fields of summary.json that say what a run cost."""


@dataclass(frozen=True)
class Spread:
    """One quantity over seeds."""

    by_seed: Mapping[int, float]

    @property
    def n(self) -> int:
        """Seeds that have a value."""
        return len(self.by_seed)

    @property
    def mean(self) -> float | None:
        """The mean over seeds."""
        return fmean(self.by_seed.values()) if self.by_seed else None

    @property
    def sd(self) -> float | None:
        """The sample standard deviation; None with fewer than two seeds."""
        return stdev(self.by_seed.values()) if self.n > 1 else None


@dataclass(frozen=True)
class Difference:
    """Differences to the reference, seed by seed, over the seeds in which both finished."""

    by_seed: Mapping[int, float]
    mean: float
    low: float | None
    """Ends of the 95 % t interval of the mean; None with one seed."""
    high: float | None

    @property
    def n(self) -> int:
        """Seeds in which both finished."""
        return len(self.by_seed)

    @property
    def sign(self) -> int:
        """1 or -1 where the interval excludes zero; 0 where it does not, or there is none."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


@dataclass(frozen=True)
class ClientScore:
    """One client's score on its own held-out examples, with one seed."""

    seed: int
    rank: int
    value: float


@dataclass(frozen=True)
class MethodResult:
    """One label of the comparison: what its finished seeds say."""

    label: str
    entry: Contestant
    reference: bool
    personal: bool
    """Its test score is the mean over the clients' own models."""
    runs: Mapping[int, RunRecord]
    """The finished results by seed."""
    seeds: int
    """How many results there are to be."""
    problems: tuple[str, ...]
    """Why results are missing, each reason once; waiting is no problem."""
    failed: int
    test: Spread
    difference: Difference | None
    """None for the reference, and without a seed in which both finished."""
    clients: tuple[ClientScore, ...]
    own: Spread
    """Mean over clients of the score on their own held-out examples."""
    worst: Spread
    """The same over the worst tenth of the clients, at least one."""
    rounds: Spread
    costs: Mapping[str, Spread]
    traffic: Spread
    """Bytes down and up."""
    metric: Metric
    """What ``test``, ``difference``, ``clients``, ``own`` and ``worst`` are values of."""

    @property
    def merit(self) -> float | None:
        """The mean on the test as a number that is the higher the better."""
        return None if self.test.mean is None else goodness(self.metric, self.test.mean)

    @property
    def waiting(self) -> int:
        """Results that are still to come."""
        return self.seeds - len(self.runs) - self.failed

    @property
    def title(self) -> str:
        """The label as tables and figures show it: † is a mean over personal models."""
        return f"{self.label} †" if self.personal else self.label


def results(comparison: ComparisonRecord) -> list[MethodResult]:
    """Returns one entry per label, in the experiment's order."""
    reference = _spread(_runs(comparison, comparison.reference), partial(final_score, metric=comparison.metric))
    return [_result(comparison, label, reference) for label in comparison.labels]


def ranked(entries: Sequence[MethodResult]) -> list[MethodResult]:
    """Returns the entries as people read them: by test score, the best first, and baselines in the end."""

    def place(entry: MethodResult) -> tuple[bool, float]:
        merit = entry.merit
        return entry.entry.baseline, float("inf") if merit is None else -merit

    return sorted(entries, key=place)


def level_of(entries: Sequence[MethodResult]) -> float:
    """Returns about what the methods score on the test; 0 where none has a score."""
    means = [entry.test.mean for entry in entries if entry.test.mean is not None]
    return median(means) if means else 0.0


def leaders(entries: Sequence[MethodResult], number: int = 1) -> list[MethodResult]:
    """Returns the methods with the best test scores, baselines left out.

    A method that finished fewer seeds than another is passed over: its mean is of other runs.
    """
    scored = [entry for entry in ranked(entries) if entry.test.n and not entry.entry.baseline]
    most = max((entry.test.n for entry in scored), default=0)
    return [entry for entry in scored if entry.test.n == most][:number]


def paired(ours: Spread, theirs: Spread) -> Difference | None:
    """Returns our values minus theirs over the common seeds, with the 95 % t interval of the mean."""
    by_seed = {seed: value - theirs.by_seed[seed] for seed, value in ours.by_seed.items() if seed in theirs.by_seed}
    if not by_seed:
        return None
    mean, n = fmean(by_seed.values()), len(by_seed)
    if n == 1:
        return Difference(by_seed, mean, None, None)
    reach = float(stdtrit(n - 1, 0.975)) * stdev(by_seed.values()) / sqrt(n)
    return Difference(by_seed, mean, mean - reach, mean + reach)


def worst_tenth(values: Sequence[float], metric: Metric = ACCURACY) -> float | None:
    """Returns the mean of the worst tenth, rounded up to whole clients; None of nobody."""
    worst = sorted(values, key=partial(goodness, metric))[: ceil(len(values) / 10)]
    return fmean(worst) if worst else None


def undominated(entries: Sequence[MethodResult]) -> list[MethodResult]:
    """Returns the methods that none beats in traffic and test score at once, by traffic; no baselines."""
    placed = [
        (entry.traffic.mean, -entry.merit, entry)
        for entry in entries
        if entry.traffic.mean is not None and entry.merit is not None and not entry.entry.baseline
    ]
    front: list[MethodResult] = []
    best = 0.0
    for _, lost, entry in sorted(placed, key=lambda place: place[:2]):
        if not front or lost < best:
            front, best = [*front, entry], lost
    return front


def own_scores(run: RunRecord, metric: Metric) -> list[tuple[int, float]]:
    """Returns (rank, score on its own held-out examples) of every client that has one."""
    entries = run.summary.clients if run.summary else ()
    scored = ((entry.rank, score(entry.after, metric.name)) for entry in entries)
    return [(rank, value) for rank, value in scored if value is not None]


def cost(key: str, run: RunRecord) -> float | None:
    """Returns one of ``COSTS``; traffic that the summary does not record is added up from the rounds."""
    value: float | None = getattr(run.summary, key)
    if value is None and key in ("bytes_down", "bytes_up") and run.rounds:
        value = sum(getattr(row, key) for row in run.rounds)
    return float(value) if value is not None and isfinite(value) else None


def traffic(run: RunRecord) -> float | None:
    """Returns the bytes that a run sent, both ways."""
    down, up = cost("bytes_down", run), cost("bytes_up", run)
    return None if down is None or up is None else down + up


def final_score(run: RunRecord, metric: Metric) -> float | None:
    """Returns the test score after training."""
    return score(run.summary.test.after, metric.name) if run.summary else None


def _result(comparison: ComparisonRecord, label: str, reference: Spread) -> MethodResult:
    runs, metric = _runs(comparison, label), comparison.metric
    test = _spread(runs, partial(final_score, metric=metric))
    failed, problems = _failures(comparison, label)
    clients = tuple(
        ClientScore(seed, rank, value) for seed, run in runs.items() for rank, value in own_scores(run, metric)
    )
    own = {seed: [client.value for client in clients if client.seed == seed] for seed in runs}
    return MethodResult(
        label=label,
        entry=comparison.methods[label],
        reference=label == comparison.reference,
        personal=any(run.summary is not None and run.summary.personal for run in runs.values()),
        runs=runs,
        seeds=len(comparison.seeds),
        problems=problems,
        failed=failed,
        test=test,
        difference=None if label == comparison.reference else paired(test, reference),
        clients=clients,
        own=Spread({seed: fmean(values) for seed, values in own.items() if values}),
        worst=Spread({seed: mean for seed, values in own.items() if (mean := worst_tenth(values, metric)) is not None}),
        rounds=_spread(runs, lambda run: float(run.rounds_done)),
        costs={key: _spread(runs, partial(cost, key)) for key in COSTS},
        traffic=_spread(runs, traffic),
        metric=metric,
    )


def _runs(comparison: ComparisonRecord, label: str) -> dict[int, RunRecord]:
    return {seed: cell.run for seed, cell in comparison.results(label).items() if cell.run is not None}


def _spread(runs: Mapping[int, RunRecord], value: Callable[[RunRecord], float | None]) -> Spread:
    found = {seed: value(run) for seed, run in runs.items()}
    return Spread({seed: number for seed, number in found.items() if number is not None})


def _failures(comparison: ComparisonRecord, label: str) -> tuple[int, tuple[str, ...]]:
    """How many of a label's results failed, and the reasons; where no point could be chosen, all of them did."""
    cells = comparison.results(label)
    failed = [cell for cell in cells.values() if cell.status == "failed"]
    reasons = [cell.error or "no reason is recorded" for cell in failed]
    points = comparison.methods[label].points
    hopeless = not cells and bool(points) and all(point.error for point in points)
    if hopeless:
        reasons = [f"no point of its grid could be trained: {point.error}" for point in points[:1]]
    return len(comparison.seeds) if hopeless else len(failed), tuple(dict.fromkeys(reasons))
