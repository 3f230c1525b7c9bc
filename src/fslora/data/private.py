"""Data that are at sites alone (``partition.kind = "sites"``): what the server reads, and what a site does.

The server has the splits that it scores on, or nothing. A site has its clients' examples and no others; what a client
holds out is drawn as a simulation draws it. The classes are those of the experiment, so that all count them alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np

from fslora.config import DataConfig, Experiment
from fslora.data.partition import Partition, Shares, held_apart
from fslora.data.types import Dataset, Examples, Index
from fslora.errors import DataError
from fslora.rng import Rng

Load = Callable[[DataConfig, Rng], Dataset]
"""A task's loader."""


def at_server(experiment: Experiment, empty: Dataset, load: Load, rng: Rng) -> tuple[Dataset, Partition]:
    """Returns the server's splits, and a partition in which nobody's examples are known yet.

    Args:
        experiment: Its [data] names the splits, where any are scored.
        empty: The task's data set without examples.
        load: Its loader.
        rng: The data's stream.

    Raises:
        DataError: A split cannot be read.
    """
    dataset, data, clients = empty, experiment.data, experiment.fleet.clients
    if experiment.run.eval_on == "server":
        assert data.validation is not None
        assert data.test is not None
        validation, test = (_whole(data, side, load, rng) for side in (data.validation, data.test))
        dataset = replace(test, train=empty.train, validation=validation.train, test=test.train, statistics={})
    nobody = np.zeros(clients, dtype=np.int64)
    return dataset, counted(experiment, nobody, nobody)


def counted(experiment: Experiment, examples: Index, held_out: Index) -> Partition:
    """Returns the partition as the server knows it: numbers of held-out examples [clients], and no positions."""
    nothing = np.zeros(0, dtype=np.int64)
    notes: dict[str, int | float | str] = {
        "kind": "sites",
        "clients with examples": int((examples > 0).sum()),
        "examples": int(examples.sum()),
    }
    return Partition(
        Shares.of(nothing, np.zeros_like(held_out)), Shares.of(nothing, held_out), _agreement(experiment), notes
    )


def at_site(
    experiment: Experiment, members: Collection[int], empty: Dataset, load: Load, rng: Rng, drawn: Rng
) -> tuple[Dataset, Partition]:
    """Returns a site's examples, and whose they are.

    One client has all of them. Of several, each has one group: a file of a folder or pattern, or a folder of images,
    in the order of their names, by increasing client id.

    Args:
        experiment: Its [data] says what the columns are; its source is the site's own.
        members: The ids of the site's clients.
        empty: The task's data set without examples.
        load: Its loader.
        rng: The data's stream.
        drawn: The partition's stream.

    Raises:
        DataError: The source cannot be read, does not divide into that many clients, or one has too few or too many.
    """
    config, clients, source = experiment.partition, sorted(members), experiment.data.source
    whole = _whole(experiment.data, source, load, rng)
    owner = _owners(whole.train, clients, source)
    sizes = np.bincount(owner, minlength=experiment.fleet.clients)
    least = min(clients, key=lambda client: sizes[client])
    if sizes[least] < config.min_examples:
        raise DataError(
            f"client {least} has {sizes[least]} usable examples in {source}, and partition.min_examples is "
            f"{config.min_examples}; give it more, or leave the client out"
        )
    most = max(clients, key=lambda client: sizes[client])
    if sizes[most] > config.max_examples:
        raise DataError(
            f"client {most} has {sizes[most]} usable examples in {source}, and partition.max_examples is "
            f"{config.max_examples}; leave some out, or have the experiment's number raised"
        )
    train, held = held_apart(owner, config, experiment.fleet.clients, drawn)
    dataset = replace(whole, validation=empty.validation, test=empty.test)
    return dataset, Partition(train, held, _agreement(experiment), {"kind": config.kind})


def _whole(config: DataConfig, source: str, load: Load, rng: Rng) -> Dataset:
    """All of a source as ``train``: with splits of their own, nothing is cut from it for them."""
    changes = {"source": source, "validation": source, "test": source, "group": None}
    return load(config.model_copy(update=changes), rng)


def _owners(examples: Examples, clients: list[int], source: str) -> Index:
    """The client of every example, [n]."""
    if len(clients) == 1:
        return np.full(len(examples), clients[0], dtype=np.int64)
    names = sorted(set(examples.groups or ()))
    if len(names) != len(clients):
        raise DataError(
            f"the site's data are {source}, with {len(names) or 'no'} files to tell clients apart, and it has "
            f"{len(clients)} clients ({', '.join(map(str, clients))}); give a folder or pattern of one file per client "
            "(of images, a folder of one folder per client)"
        )
    place = dict(zip(names, clients, strict=True))
    return np.array([place[name] for name in examples.groups or ()], dtype=np.int64)


def _agreement(experiment: Experiment) -> str:
    """A digest of what server and sites must mean alike: the task, and its classes in their order."""
    return hashlib.sha256(repr((experiment.data.task, experiment.data.labels)).encode()).hexdigest()
