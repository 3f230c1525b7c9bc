"""Who holds which training examples: index lists over one set of examples, never copies of it.

Fleets have up to a hundred thousand clients, so nothing here is an object per client: a partition says of every example
whose it is, and the clients' lists are views of one array.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from fslora.config import PartitionConfig
from fslora.data.types import Examples, Index
from fslora.errors import DataError
from fslora.rng import Rng

Notes = dict[str, int | float | str]


@dataclass(frozen=True, eq=False)
class Shares(Sequence[Index]):
    """One list of positions per client, all in one array; a client's list is a view, made when it is asked for."""

    flat: Index
    """[n], one client's positions after the other's."""
    bounds: Index
    """[clients + 1], increasing from 0: where each client's positions begin, and last their number."""

    @classmethod
    def of(cls, flat: Index, sizes: Index) -> Shares:
        """Returns lists of these sizes, cut from ``flat`` in order."""
        return cls(flat, np.concatenate([[0], np.cumsum(sizes)]))

    def __len__(self) -> int:
        """Returns the number of clients."""
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, client: int) -> Index: ...
    @overload
    def __getitem__(self, client: slice) -> Sequence[Index]: ...
    def __getitem__(self, client: int | slice) -> Index | Sequence[Index]:
        """Returns a client's positions."""
        if isinstance(client, slice):
            return [self[i] for i in range(*client.indices(len(self)))]
        place = range(len(self))[client]
        return self.flat[self.bounds[place] : self.bounds[place + 1]]

    @property
    def sizes(self) -> Index:
        """How many positions each client has, [clients]."""
        return np.diff(self.bounds)

    @property
    def owners(self) -> Index:
        """The client of every entry of ``flat``, [n]."""
        return np.repeat(np.arange(len(self)), self.sizes)

    def counts(self, labels: Index, classes: int) -> Index:
        """Returns how many examples of each class every client has, [clients classes]."""
        cells = self.owners * classes + labels[self.flat]
        return np.bincount(cells, minlength=len(self) * classes).reshape(len(self), classes)


@dataclass(frozen=True, eq=False)
class Partition:
    """The examples of each client, by client id; every example is in exactly one list."""

    train: Shares
    """Sorted positions of the examples that the client trains on."""
    holdout: Shares
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
    owner = KINDS[config.kind](config, examples, clients, rng.child(config.kind), notes)
    train, held = held_apart(owner, config, clients, rng)
    notes |= {
        "smallest client": int(train.sizes.min()),
        "largest client": int(train.sizes.max()),
    }
    if len(np.unique(examples.labels)) > 1:
        drawn, starts = examples.labels[train.flat], train.bounds[:-1]
        least, most = np.minimum.reduceat(drawn, starts), np.maximum.reduceat(drawn, starts)
        notes["clients with one class"] = int((least == most).sum())
    if config.holdout > 0:
        notes["clients without a held-out example"] = int((held.sizes == 0).sum())
    return Partition(train, held, _digest(train, held), notes)


def held_apart(owner: Index, config: PartitionConfig, clients: int, rng: Rng) -> tuple[Shares, Shares]:
    """Returns what each client trains on and what it keeps for its own test.

    Args:
        owner: The client of every example, [n].
        config: How much is kept.
        clients: How many there are; some may have no example here.
        rng: The partition's stream.
    """
    whole = Shares.of(np.argsort(owner, kind="stable"), np.bincount(owner, minlength=clients))
    out = _held_out(whole, config, rng.child("holdout"))
    held_sizes = np.bincount(owner[out], minlength=clients)
    train = Shares.of(whole.flat[~out[whole.flat]], whole.sizes - held_sizes)
    return train, Shares.of(whole.flat[out[whole.flat]], held_sizes)


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


def _iid(config: PartitionConfig, examples: Examples, clients: int, rng: Rng, notes: Notes) -> Index:
    drawn = rng.numpy().permutation(len(examples))
    owner = np.empty(len(examples), dtype=np.int64)
    sizes = len(drawn) // clients + (np.arange(clients) < len(drawn) % clients)
    owner[drawn] = np.repeat(np.arange(clients), sizes)
    return owner


def _dirichlet(config: PartitionConfig, examples: Examples, clients: int, rng: Rng, notes: Notes) -> Index:
    """Label skew: each class is dealt out by proportions p ~ Dirichlet(alpha), drawn for that class.

    Source: the experiments of Yurochkin et al., arXiv 1905.12022. A client that is left with too few
    examples gets drawn ones from whoever holds most at that moment.
    """
    stream = rng.numpy()
    dealt, owners = [], []
    for label in np.unique(examples.labels):
        members = stream.permutation(np.flatnonzero(examples.labels == label))
        proportions = stream.dirichlet(np.full(clients, config.alpha))
        cuts = np.floor(np.cumsum(proportions)[:-1] * len(members)).astype(np.int64)
        bounds = np.concatenate([[0], np.minimum(cuts, len(members)), [len(members)]])
        dealt.append(members)
        owners.append(np.repeat(np.arange(clients), np.diff(bounds)))
    line, of_line = np.concatenate(dealt), np.concatenate(owners)
    hands = Shares.of(line[np.argsort(of_line, kind="stable")], np.bincount(of_line, minlength=clients))
    owner = np.empty(len(examples), dtype=np.int64)
    owner[line] = of_line
    notes["examples moved to reach min_examples"] = _topped_up(owner, hands, config.min_examples, stream)
    return owner


def _topped_up(owner: Index, hands: Shares, least: int, stream: np.random.Generator) -> int:
    """Gives examples of the largest clients to those with fewer than ``least``, in ``owner``; returns how many."""
    sizes, moved = hands.sizes, 0
    hand: dict[int, list[int]] = {}
    by_size = [(-int(sizes[client]), client) for client in np.flatnonzero(sizes > least).tolist()]
    heapq.heapify(by_size)
    for poor in np.flatnonzero(sizes < least).tolist():
        for _ in range(least - int(sizes[poor])):
            size, donor = by_size[0]
            if donor not in hand:
                hand[donor] = hands[donor].tolist()
            owner[hand[donor].pop(int(stream.integers(-size)))] = poor
            heapq.heapreplace(by_size, (size + 1, donor))
            moved += 1
    return moved


def _natural(config: PartitionConfig, examples: Examples, clients: int, rng: Rng, notes: Notes) -> Index:
    """Whole groups in drawn order, each to the client that holds least so far: nearly balanced sizes."""
    if examples.groups is None:
        raise DataError(
            "partition.kind is 'natural', but the examples have no groups: name the column that tells whose "
            "row it is in data.group, or choose partition.kind 'dirichlet' or 'iid'"
        )
    names = {name: place for place, name in enumerate(sorted(set(examples.groups)))}
    group = np.array([names[name] for name in examples.groups], dtype=np.int64)
    if len(names) < clients:
        raise DataError(
            f"partition.kind is 'natural', but there are {len(names)} groups for {clients} clients; lower "
            f"fleet.clients to at most {len(names)}, or choose partition.kind 'dirichlet' or 'iid'"
        )
    members = np.bincount(group).tolist()
    owner_of_group = np.empty(len(names), dtype=np.int64)
    lightest = [(0, client) for client in range(clients)]
    for place in rng.numpy().permutation(len(names)).tolist():
        size, client = lightest[0]
        owner_of_group[place] = client
        heapq.heapreplace(lightest, (size + members[place], client))
    smallest = min(lightest)[0]
    if smallest < config.min_examples:
        raise DataError(
            f"partition.kind is 'natural' and keeps groups whole, which leaves a client with {smallest} "
            f"examples of at least {config.min_examples}. Lower partition.min_examples, or fleet.clients "
            f"from {clients}"
        )
    notes["groups"] = len(names)
    return owner_of_group[group]


Kind = Callable[[PartitionConfig, Examples, int, Rng, Notes], Index]
"""Returns the client of every example, [n]."""
KINDS: Mapping[str, Kind] = {"iid": _iid, "dirichlet": _dirichlet, "natural": _natural}


def _held_out(whole: Shares, config: PartitionConfig, rng: Rng) -> NDArray[np.bool_]:
    """Returns which examples their clients keep for their own test, [n]; each client draws from its own stream."""
    spare = np.maximum(whole.sizes - config.min_examples, 0)
    counts = np.minimum((config.holdout * whole.sizes).astype(np.int64), spare)
    out = np.zeros(len(whole.flat), dtype=np.bool_)
    for client in np.flatnonzero(counts).tolist():
        out[rng.child(client).numpy().choice(whole[client], size=counts[client], replace=False)] = True
    return out


def _digest(train: Shares, held: Shares) -> str:
    """The hash of every list after its length, in 8 bytes each."""
    digest = hashlib.sha256()
    for shares in (train, held):
        digest.update(np.insert(shares.flat, shares.bounds[:-1], shares.sizes).astype("<i8").tobytes())
    return digest.hexdigest()
