"""From an experiment to everything a run needs: data, partition, fleet, base, tokens. Cheap checks come first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fslora.config import Experiment
from fslora.data import Dataset, load_at_server, load_at_site, load_dataset
from fslora.data.batches import Encoded
from fslora.data.partition import Partition, Shares, partition
from fslora.errors import ConfigError
from fslora.fleet import Fleet, build_fleet
from fslora.metrics import Metric
from fslora.models.base import Base
from fslora.models.load import load_base
from fslora.objectives import Objective, metric_of, objective_of
from fslora.rng import Rng
from fslora.types import Template


@dataclass(frozen=True)
class Sites:
    """The federation without a model: who holds what, and what each can afford."""

    dataset: Dataset
    kind: str
    """How the data were partitioned."""
    partition: Partition
    fleet: Fleet
    objective: Objective
    metric: Metric
    """What runs are judged by."""

    def describe(self, truncated: int | None = None, shortened: int | None = None) -> dict[str, Any]:
        """Returns what data.json holds: statistics, partition and fleet, never a text."""
        labels = self.dataset.train.labels
        classes = max(len(self.dataset.label_names), int(labels.max(initial=0)) + 1)
        splits = {"train": self.dataset.train, "validation": self.dataset.validation, "test": self.dataset.test}
        return {
            "name": self.dataset.name,
            "label_names": list(self.dataset.label_names),
            "statistics": dict(self.dataset.statistics),
            "examples": {name: len(split) for name, split in splits.items()},
            "metric": self.metric.as_dict(),
            "truncated": truncated,
            "shortened": shortened,
            "partition": {
                "kind": self.kind,
                "digest": self.partition.digest,
                "notes": dict(self.partition.notes),
                "label_counts": self.partition.train.counts(labels, classes).tolist(),
                "holdout": self.partition.holdout.sizes.tolist(),
            },
            "fleet": [{"id": c.id, "rank": c.rank, "examples": c.examples} for c in self.fleet],
        }


@dataclass(frozen=True)
class Federation:
    """All that the round loop works on."""

    experiment: Experiment
    sites: Sites
    base: Base
    train: Encoded
    validation: Encoded
    test: Encoded

    @property
    def trainers(self) -> Fleet:
        """Who trains: the fleet, or one client with everybody's data (``fleet.pooled``)."""
        if not self.experiment.fleet.pooled:
            return self.sites.fleet
        return Fleet(np.array([self.experiment.adapter.rank]), self.sites.fleet.examples.sum(keepdims=True))

    @property
    def shares(self) -> Shares:
        """The training examples of each trainer, as indices into ``train``."""
        shares = self.sites.partition.train
        return Shares.of(shares.flat, np.array([len(shares.flat)])) if self.experiment.fleet.pooled else shares

    @property
    def batch_size(self) -> int:
        """Examples per local step: of one client, or of as many as a cohort has where their data are pooled."""
        fleet, size = self.experiment.fleet, self.experiment.local.batch_size
        return size * (fleet.clients if fleet.cohort == "all" else fleet.cohort) if fleet.pooled else size

    @property
    def rng(self) -> Rng:
        """The run's root stream."""
        return Rng(self.experiment.run.seed)

    @property
    def template(self) -> Template:
        """What the method is told of the model."""
        return self.base.template(self.experiment.adapter)

    def describe(self) -> dict[str, Any]:
        """Returns what data.json holds."""
        described = self.sites.describe(self.truncated, self.shortened)
        if self.experiment.run.eval_on == "clients":
            held = int(self.sites.partition.holdout.sizes.sum())
            described["examples"] |= {"validation": held, "test": held}
        return {**described, "eval_on": self.experiment.run.eval_on}

    @property
    def truncated(self) -> int:
        """Texts of all splits that were longer than model.max_length and were cut."""
        return self.train.truncated + self.validation.truncated + self.test.truncated

    @property
    def shortened(self) -> int:
        """Responses of all splits that were longer than model.max_length and lost their end."""
        return self.train.shortened + self.validation.shortened + self.test.shortened


Here = frozenset[int] | None
"""Whose data are in this process, where they are at sites: these clients', or (empty) the server's; None: at none."""
SERVER: frozenset[int] = frozenset()


def prepare_sites(experiment: Experiment, here: Here = None) -> Sites:
    """Returns data, partition and fleet; nothing of the model is touched.

    Raises:
        ConfigError: The data are at sites, and this process is none of a deployed run.
        DataError: The data or their partition cannot be used.
    """
    rng = Rng(experiment.run.seed)
    dataset, parts = _data(experiment, here, rng)
    fleet = build_fleet(experiment.fleet, experiment.adapter.rank, parts.train.sizes, rng.child("fleet"))
    objective = objective_of(dataset, experiment.data)
    metric = metric_of(objective, experiment.data)
    return Sites(dataset, experiment.partition.kind, parts, fleet, objective, metric)


def _data(experiment: Experiment, here: Here, rng: Rng) -> tuple[Dataset, Partition]:
    of_data, of_partition = rng.child("data"), rng.child("partition")
    if experiment.partition.kind != "sites":
        dataset = load_dataset(experiment.data, of_data)
        return dataset, partition(experiment.partition, dataset.train, experiment.fleet.clients, of_partition)
    if here is None:
        raise ConfigError(
            "partition.kind is 'sites': the clients' data are not here. Carry it out with `fslora deploy run`, or "
            "choose partition.kind 'natural', 'dirichlet' or 'iid' to simulate"
        )
    return load_at_site(experiment, here, of_data, of_partition) if here else load_at_server(experiment, of_data)


def _seen(experiment: Experiment, here: Here) -> list[int] | None:
    """What of ``here`` makes a difference."""
    return sorted(here) if here is not None and experiment.partition.kind == "sites" else None


class Workshop:
    """Prepares federations, and keeps base and tokens for the next one that needs the same (variants do)."""

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}

    def sites(self, experiment: Experiment, here: Here = None) -> Sites:
        """Returns the sites of an experiment, as this process sees them (`Here`)."""
        sections = (
            experiment.run.seed,
            experiment.run.eval_on,
            experiment.data,
            experiment.partition,
            experiment.fleet,
        )
        key = f"sites {sections!r} {experiment.adapter.rank} {_seen(experiment, here)!r}"
        if key not in self._kept:
            self._kept[key] = prepare_sites(experiment, here)
        sites = self._kept[key]
        assert isinstance(sites, Sites)
        return sites

    def federation(self, experiment: Experiment, here: Here = None) -> Federation:
        """Returns an experiment's federation, ready for its first round.

        Raises:
            DataError: The data or its partition cannot be used.
            ModelError: The base cannot be loaded or adapted.
        """
        sites = self.sites(experiment, here)
        model, seed, objective = experiment.model, experiment.run.seed, sites.objective
        base_key = f"base {model!r} {experiment.adapter.targets!r} {objective!r} {seed}"
        if base_key not in self._kept:
            # Only the newest base is kept here; an older one goes when its last federation does.
            self._kept = {key: value for key, value in self._kept.items() if not key.startswith("base ")}
            self._kept[base_key] = load_base(model, experiment.adapter, objective, Rng(seed))
        base = self._kept[base_key]
        tokens_key = f"tokens {model!r} {experiment.data!r} {seed} {_seen(experiment, here)!r}"
        if tokens_key not in self._kept:
            splits = (sites.dataset.train, sites.dataset.validation, sites.dataset.test)
            self._kept[tokens_key] = [objective.encode(split, base.tokenizer, model) for split in splits]
        return Federation(experiment, sites, base, *self._kept[tokens_key])
