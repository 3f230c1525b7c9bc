"""What a comparison runs: contestants × grid points × seeds. Every cell's experiment is built before anything runs.

The design is paired. Data, partition, fleet, cohorts, batches and first adapter are drawn from the seed alone, so two
cells of one seed differ by what their contestants change and by nothing else.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from fslora.config import CompareConfig, Experiment, RunConfig, build, merged
from fslora.errors import ConfigError
from fslora.methods import registered

BASELINES: dict[str, dict[str, Any]] = {
    "local": {"method": {"name": "local"}},
    "centralized": {"fleet": {"pooled": True}, "method": {"name": "fedit", "rank": "server"}},
}
"""Part of every comparison: each client alone, and all data in one place. Label → keys to change."""

FIXED = ("run", "model", "data", "partition", "compare", "variants")
"""Sections that no contestant and no grid may change: what a comparison holds fixed, or what has no place in a cell."""

ROUNDS_CEILING = 10_000
"""Rounds of a run that ends with another budget, so that its rounds do not end it first."""

Point = Mapping[str, Any]
"""Dotted key → value: one combination of a grid."""

Key = tuple[str, int, int]
"""Label, point, seed."""


@dataclass(frozen=True)
class Contestant:
    """One row of the comparison."""

    label: str
    baseline: bool
    changes: Mapping[str, Any]
    """Keys to change in the experiment, as tables."""
    points: tuple[Point, ...]
    """What is tried; a single empty point where there is no grid."""


@dataclass(frozen=True)
class Cell:
    """One run: a contestant at one point of its grid with one seed."""

    label: str
    point: int
    seed: int
    experiment: Experiment

    @property
    def key(self) -> Key:
        """What tells it from the other cells."""
        return self.label, self.point, self.seed

    @property
    def folder(self) -> str:
        """Its run folder, inside the comparison's."""
        return f"cells/{self.label}/point-{self.point}/seed-{self.seed}"


@dataclass(frozen=True)
class Plan:
    """A whole comparison."""

    experiment: Experiment
    """The resolved experiment: [compare] names what is compared, and there are no variants."""
    contestants: tuple[Contestant, ...]
    """In order; the baselines come last."""
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    """Every cell that may be needed, by seed first: runs of one seed share data, and each seed done compares all."""

    def contestant(self, label: str) -> Contestant:
        """Returns the contestant of this label."""
        return next(contestant for contestant in self.contestants if contestant.label == label)

    @property
    def budget(self) -> tuple[str, float]:
        """What every run may use: kind (one of rounds, bytes, flops, seconds) and amount."""
        run = self.experiment.run
        key, amount = run.budget or ("rounds", run.rounds)
        return key.removeprefix("max_"), amount


def make_plan(experiment: Experiment) -> Plan:
    """Returns the plan of an experiment's [compare] section.

    Raises:
        ConfigError: A label is unknown, or a contestant or a point of its grid is no valid experiment.
    """
    compare = experiment.compare
    labels = _labels(compare)
    seeds = tuple(range(experiment.run.seed, experiment.run.seed + compare.seeds))
    contestants = tuple(_contestant(label, compare) for label in labels)
    effective = compare.model_copy(update={"methods": labels, "reference": _reference(compare, labels)})
    return Plan(
        experiment.model_copy(update={"variants": {}, "compare": effective}),
        contestants,
        seeds,
        tuple(
            Cell(contestant.label, point, seed, _cell_experiment(experiment, contestant, point, seed))
            for seed in seeds
            for contestant in contestants
            for point in range(len(contestant.points))
        ),
    )


def dotted(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested tables as one flat one: ``{"method": {"rank": 4}}`` as ``{"method.rank": 4}``."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _labels(compare: CompareConfig) -> tuple[str, ...]:
    """The contestants in order: those asked for, then the baselines."""
    for label in compare.entries:
        if label in BASELINES or label == "all" or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", label):
            raise ConfigError(
                f"compare.entries has {label!r}, which is no name for an entry; use letters, digits, '.', '_' and '-', "
                f"and none of all, {', '.join(BASELINES)}"
            )
    known = tuple(dict.fromkeys([*registered(), *compare.entries, *BASELINES]))
    asked = [label for label in compare.methods if label != "all"]
    for label in asked:
        _known(label, known, "compare.methods")
    for label in compare.grids:
        _known(label, known, "compare.grids")
    everything = "all" in compare.methods or not compare.methods
    chosen = dict.fromkeys(known if everything else asked)
    return (*(label for label in chosen if label not in BASELINES), *BASELINES)


def _known(label: str, known: tuple[str, ...], where: str) -> None:
    if label not in known:
        near = difflib.get_close_matches(label, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"{where} names {label!r}; {hint}Known are {', '.join(known)}; another is made by [compare.entries.{label}]"
        )


def _reference(compare: CompareConfig, labels: tuple[str, ...]) -> str:
    if compare.reference in labels:
        return compare.reference
    if "reference" not in compare.model_fields_set:
        return labels[0]
    raise ConfigError(
        f"compare.reference is {compare.reference!r}, which is not compared; add it to compare.methods, or name one of "
        f"{', '.join(labels)}"
    )


def _contestant(label: str, compare: CompareConfig) -> Contestant:
    changes = {**BASELINES, **compare.entries}.get(label, {"method": {"name": label}})
    _check_sections(changes, f"compare.entries.{label}")
    where, grid = ("compare.grid", compare.grid)
    if label in compare.grids:
        where, grid = f"compare.grids.{label}", compare.grids[label]
    for key, values in grid.items():
        _check_sections({key.partition(".")[0]: None}, f"{where}: {key}")
        if not values:
            raise ConfigError(f"{where}: {key} has no values; give at least one, or leave the key out")
    points = tuple(dict(zip(grid, values, strict=True)) for values in product(*grid.values()))
    return Contestant(label, label in BASELINES, changes, points)


def _check_sections(changes: Mapping[str, Any], where: str) -> None:
    for section in changes:
        if section in FIXED:
            raise ConfigError(
                f"{where} changes [{section}], which is the same for all that are compared; change it for the whole "
                "comparison, e.g. with --set"
            )


def _cell_experiment(experiment: Experiment, contestant: Contestant, point: int, seed: int) -> Experiment:
    fields = experiment.model_dump(exclude={"variants", "compare"})
    fields = merged(fields, {"run": {"seed": seed, **_length(experiment.run, contestant.baseline)}})
    fields = merged(fields, contestant.changes)
    name = f"contestant {contestant.label!r}"
    plain = build(fields, source=name)  # first, so that what is wrong here is not blamed on the grid
    chosen = contestant.points[point]
    if not chosen:
        return plain
    for key, value in chosen.items():
        fields = merged(fields, _nested(key, value))
    try:
        return build(fields, source=f"{name} with {', '.join(f'{key}={value!r}' for key, value in chosen.items())}")
    except ConfigError as error:
        common = contestant.label not in experiment.compare.grids
        if common and any(key.startswith("method.") for key in chosen):
            raise ConfigError(
                f"{error} A key that not every method has belongs in a grid of its own: "
                f"[compare.grids.LABEL], and for this one an empty [compare.grids.{contestant.label}]"
            ) from None
        raise


def _length(run: RunConfig, baseline: bool) -> dict[str, Any]:
    """The keys of [run] by which a cell ends with the comparison's budget.

    A budget of bytes would never end a baseline: one sends nothing, and what is counted for data in one place is not
    what sending them would be. They run ``run.rounds`` then.
    """
    if run.budget is None:
        return {}
    if baseline and run.max_bytes is not None:
        return {"max_bytes": None}
    return {"rounds": max(run.rounds, ROUNDS_CEILING)}


def _nested(key: str, value: Any) -> dict[str, Any]:
    """``{"local": {"lr": value}}`` of ``local.lr``."""
    head, _, rest = key.partition(".")
    return {head: _nested(rest, value) if rest else value}
