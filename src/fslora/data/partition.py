"""Who holds which training examples: index lists over one set of examples, never copies of it."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fslora.config import PartitionConfig
from fslora.data.types import Examples, Index
from fslora.errors import DataError
from fslora.rng import Rng

Notes = dict[str, int | float | str]


@dataclass(frozen=True, eq=False)
class Partition:
    """The examples of each client, by client id; every example is in exactly one list."""

    train: tuple[Index, ...]
    """Sorted positions of the examples that the client trains on."""
    holdout: tuple[Index, ...]
    """Sorted positions of the examples that the client keeps for its own test; may be empty."""
    digest: str
    """SHA-256, in hex, of all index lists: equal for equal partitions."""
    notes: Mapping[str, int | float | str]
    """What a user should know of it, in words."""


def partition(config: PartitionConfig, examples: Examples, clients: int, rng: Rng) -> Partition:
    """Returns the partition of all examples over the clients.

    A client's held-out share is ``config.holdout`` of what it holds, rounded down, but never so much that
    fewer than ``config.min_examples`` are left to train on: a small client has a smaller share, or none.

    Raises:
        DataError: There are too few examples or groups for this many clients.
    """
    needed = clients * config.min_examples
    if len(examples) < needed:
        raise DataError(
            f"there are {len(examples)} training examples, but {clients} clients of at least "
            f"{config.min_examples} (partition.min_examples) need {needed}. Lower fleet.clients or "
            "partition.min_examples, or give more data (see also data.max_train)"
        )
    notes: Notes = {"kind": config.kind}
    parts = [np.sort(part) for part in KINDS[config.kind](config, examples, clients, rng.child(config.kind), notes)]
    held = [_held_out(part, config, rng.child("holdout", client)) for client, part in enumerate(parts)]
    train = tuple(np.setdiff1d(part, out) for part, out in zip(parts, held, strict=True))
    sizes = [len(part) for part in train]
    notes |= {
        "smallest client": min(sizes),
        "largest client": max(sizes),
    }
    if len(np.unique(examples.labels)) > 1:
        notes["clients with one class"] = sum(len(set(examples.labels[part].tolist())) == 1 for part in train)
    if config.holdout > 0:
        notes["clients without a held-out example"] = sum(len(out) == 0 for out in held)
    return Partition(train, tuple(held), _digest(train, held), notes)


def stratified_shares(labels: Index, shares: Sequence[float], rng: Rng) -> list[Index]:
    """Returns one sorted index list per share, and last the list of the rest; classes in proportion.

    The examples are lined up by class, in drawn order within a class, and taken at even distances: each class
    gives its share to within about one example. The first example of every class goes to the rest, which
    therefore knows every class.
    """
    stream = rng.numpy()
    drawn = stream.permutation(len(labels))
    line = drawn[np.argsort(labels[drawn], kind="stable")]
    first_of_class = np.ones(len(line), dtype=bool)
    first_of_class[1:] = labels[line[1:]] != labels[line[:-1]]
    rest, line = line[first_of_class], line[~first_of_class]
    taken: list[Index] = []
    for share in shares:
        wanted = min(len(line), round(share * len(labels)))
        places = ((np.arange(wanted) + stream.random()) * len(line) / max(1, wanted)).astype(np.int64)
        taken.append(np.sort(line[places]))
        line = np.delete(line, places)
    return [*taken, np.sort(np.concatenate([rest, line]))]


def _iid(config: PartitionConfig, examples: Examples, clients: int, rng: Rng, notes: Notes) -> list[Index]:
    return np.array_split(rng.numpy().permutation(len(examples)), clients)


def _dirichlet(config: PartitionConfig, examples: Examples, clients: int, rng: Rng, notes: Notes) -> list[Index]:
    """Label skew: each class is dealt out by proportions p ~ Dirichlet(alpha), drawn for that class.

    Source: the experiments of Yurochkin et al., arXiv 1905.12022. A client that is left with too few
    examples gets drawn ones from whoever holds most at that moment.
    """
    stream = rng.numpy()
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in np.unique(examples.labels):
        members = stream.permutation(np.flatnonzero(examples.labels == label))
        proportions = stream.dirichlet(np.full(clients, config.alpha))
        cuts = np.floor(np.cumsum(proportions)[:-1] * len(members)).astype(np.int64)
        for part, dealt in zip(parts, np.split(members, cuts), strict=True):
            part.extend(dealt.tolist())
    moved = 0
    for part in parts:
        while len(part) < config.min_examples:
            donor = max(parts, key=len)
            part.append(donor.pop(int(stream.integers(len(donor)))))
            moved += 1
    notes["examples moved to reach min_examples"] = moved
    return [np.array(part, dtype=np.int64) for part in parts]


def _natural(config: PartitionConfig, examples: Examples, clients: int, rng: Rng, notes: Notes) -> list[Index]:
    """Whole groups in drawn order, each to the client that holds least so far: nearly balanced sizes."""
    if examples.groups is None:
        raise DataError(
            "partition.kind is 'natural', but the examples have no groups: name the column that tells whose "
            "row it is in data.group, or choose partition.kind 'dirichlet' or 'iid'"
        )
    members: dict[str, list[int]] = {}
    for position, group in enumerate(examples.groups):
        members.setdefault(group, []).append(position)
    if len(members) < clients:
        raise DataError(
            f"partition.kind is 'natural', but there are {len(members)} groups for {clients} clients; lower "
            f"fleet.clients to at most {len(members)}, or choose partition.kind 'dirichlet' or 'iid'"
        )
    names = sorted(members)
    parts: list[list[int]] = [[] for _ in range(clients)]
    lightest = [(0, client) for client in range(clients)]
    for name in (names[i] for i in rng.numpy().permutation(len(names))):
        _, client = heapq.heappop(lightest)
        parts[client].extend(members[name])
        heapq.heappush(lightest, (len(parts[client]), client))
    smallest = min(len(part) for part in parts)
    if smallest < config.min_examples:
        raise DataError(
            f"partition.kind is 'natural' and keeps groups whole, which leaves a client with {smallest} "
            f"examples of at least {config.min_examples}. Lower partition.min_examples, or fleet.clients "
            f"from {clients}"
        )
    notes["groups"] = len(members)
    return [np.array(part, dtype=np.int64) for part in parts]


Kind = Callable[[PartitionConfig, Examples, int, Rng, Notes], list[Index]]
KINDS: Mapping[str, Kind] = {"iid": _iid, "dirichlet": _dirichlet, "natural": _natural}


def _held_out(part: Index, config: PartitionConfig, rng: Rng) -> Index:
    count = min(int(config.holdout * len(part)), len(part) - config.min_examples)
    return np.sort(rng.numpy().choice(part, size=count, replace=False))


def _digest(train: Sequence[Index], held: Sequence[Index]) -> str:
    digest = hashlib.sha256()
    for index in [*train, *held]:
        digest.update(len(index).to_bytes(8, "little"))
        digest.update(index.astype("<i8").tobytes())
    return digest.hexdigest()
