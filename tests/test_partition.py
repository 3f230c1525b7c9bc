"""Who holds what: laws of every kind of partition, and what each refuses."""

from __future__ import annotations

import hashlib
from time import process_time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fslora.config import PartitionConfig
from fslora.data.partition import Partition, Shares, partition, stratified_shares
from fslora.data.types import Examples
from fslora.errors import DataError
from fslora.rng import Rng


def examples(count: int, classes: int = 4, groups: int = 30, seed: int = 0) -> Examples:
    """Returns examples of drawn classes; later groups are larger."""
    draw = np.random.default_rng(seed)
    weights = np.arange(1, groups + 1) / np.arange(1, groups + 1).sum()
    names = [f"g{g:02d}" for g in draw.choice(groups, size=count, p=weights)]
    texts = tuple(f"text {i}" for i in range(count))
    return Examples(texts, draw.integers(0, classes, size=count), groups=tuple(names))


def split(kind: str, data: Examples, clients: int, seed: int = 0, **fields) -> Partition:
    return partition(PartitionConfig(kind=kind, **fields), data, clients, Rng(seed))


@settings(deadline=None)
@given(
    st.sampled_from(["iid", "dirichlet", "natural"]),
    st.integers(1, 12),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.sampled_from([0.01, 0.5, 100.0]),
    st.integers(0, 99),
)
def test_every_example_is_held_once(kind, clients, min_examples, holdout, alpha, seed):
    data = examples(300, seed=seed)
    fields = {"min_examples": min_examples, "holdout": holdout, "alpha": alpha}
    result = split(kind, data, clients, seed, **fields)
    held = np.concatenate([*result.train, *result.holdout])
    assert sorted(held.tolist()) == list(range(300))
    assert len(result.train) == len(result.holdout) == clients
    for index in (*result.train, *result.holdout):
        assert index.dtype == np.int64
        assert (np.diff(index) > 0).all()
    for own, out in zip(result.train, result.holdout, strict=True):
        assert len(own) >= min_examples
        wanted = int(holdout * (len(own) + len(out)))
        assert len(out) == wanted or (len(out) < wanted and len(own) == min_examples)
    again = split(kind, data, clients, seed, **fields)
    assert again.digest == result.digest
    if clients > 1:
        assert split(kind, data, clients, seed + 1, **fields).digest != result.digest


def test_digest_tells_train_from_holdout_and_clients_apart():
    data = examples(60)
    digests = {split("iid", data, n, holdout=h).digest for n in (2, 3) for h in (0, 0.1, 0.2)}
    assert len(digests) == 6
    assert all(len(digest) == 64 for digest in digests)


def test_iid_sizes_differ_by_one():
    sizes = {len(index) for index in split("iid", examples(103), 10, holdout=0).train}
    assert sizes == {10, 11}


def test_small_alpha_is_skewed_and_large_alpha_is_not():
    data = examples(4000)

    def skew(alpha):
        parts = split("dirichlet", data, 10, alpha=alpha).train
        shares = [np.bincount(data.labels[part], minlength=4).max() / len(part) for part in parts]
        return float(np.mean(shares))

    assert skew(0.05) > 0.6
    assert skew(1000.0) < 0.3


def test_dirichlet_sizes_vary_and_top_ups_are_counted():
    result = split("dirichlet", examples(400), 20, alpha=0.05, min_examples=8, holdout=0)
    sizes = [len(part) for part in result.train]
    assert min(sizes) == 8
    assert max(sizes) > 24
    assert result.notes["examples moved to reach min_examples"] > 0
    assert result.notes["clients with one class"] > 0


def test_clients_with_one_class_are_counted():
    data = Examples(tuple("abcdef"), np.array([0, 0, 0, 1, 1, 0]), groups=("x", "x", "x", "y", "y", "z"))
    result = split("natural", data, 3, min_examples=1, holdout=0)
    assert result.notes["clients with one class"] == 3
    assert result.notes["groups"] == 3


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(0, 99))
def test_natural_keeps_groups_whole(clients, seed):
    data = examples(600, groups=30, seed=seed)
    assume(len(set(data.groups)) >= clients)
    result = split("natural", data, clients, seed, min_examples=1)
    owner = {}
    for client, (own, out) in enumerate(zip(result.train, result.holdout, strict=True)):
        for i in (*own.tolist(), *out.tolist()):
            assert owner.setdefault(data.groups[i], client) == client
    assert set(owner.values()) == set(range(clients))


def test_natural_is_balanced_yet_of_unequal_sizes():
    data = examples(2000, groups=100)
    sizes = [len(part) for part in split("natural", data, 10, holdout=0).train]
    largest_group = np.bincount([int(group[1:]) for group in data.groups]).max()
    assert max(sizes) - min(sizes) <= largest_group
    assert len(set(sizes)) > 3


def test_too_few_examples_is_an_error():
    message = r"39 training examples, but 5 clients of at least 8 .* need 40. Lower fleet.clients or"
    with pytest.raises(DataError, match=message):
        split("iid", examples(39), 5)


def test_natural_without_groups_is_an_error():
    with pytest.raises(DataError, match=r"the examples have no groups: .* in data.group, or choose partition.kind"):
        split("natural", Examples(("a",) * 50, np.zeros(50, dtype=np.int64)), 2)


def test_natural_with_fewer_groups_than_clients_is_an_error():
    data = examples(300, groups=4)
    with pytest.raises(DataError, match=r"4 groups for 5 clients; lower fleet.clients to at most 4, or choose"):
        split("natural", data, 5)


def test_natural_with_tiny_groups_is_an_error():
    data = Examples(("t",) * 40, np.arange(40) % 2, groups=("big",) * 37 + ("small",) * 3)
    with pytest.raises(DataError, match=r"a client with 3 examples of at least 8. Lower partition.min_examples"):
        split("natural", data, 2)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=200),
    st.lists(st.sampled_from([0.1, 0.15, 0.3]), max_size=2),
    st.integers(0, 99),
)
def test_stratified_shares_are_disjoint_proportional_and_leave_every_class(labels, shares, seed):
    labels = np.array(labels, dtype=np.int64)
    parts = stratified_shares(labels, shares, Rng(seed))
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert set(labels[parts[-1]].tolist()) == set(labels.tolist())
    counts = np.bincount(labels, minlength=6)
    free = len(labels) - len(set(labels.tolist()))
    for share, part in zip(shares, parts, strict=False):
        assert len(part) == min(round(share * len(labels)), free)
        free -= len(part)
        assert np.abs(np.bincount(labels[part], minlength=6) - share * counts).max() <= 3


# --- the same partition, dealt out client by client ---


def dealt_iid(config, data, clients, rng):
    return np.array_split(rng.numpy().permutation(len(data)), clients)


def dealt_dirichlet(config, data, clients, rng):
    stream = rng.numpy()
    parts = [[] for _ in range(clients)]
    for label in np.unique(data.labels):
        members = stream.permutation(np.flatnonzero(data.labels == label))
        proportions = stream.dirichlet(np.full(clients, config.alpha))
        cuts = np.floor(np.cumsum(proportions)[:-1] * len(members)).astype(np.int64)
        for part, dealt in zip(parts, np.split(members, cuts), strict=True):
            part.extend(dealt.tolist())
    for part in parts:
        while len(part) < config.min_examples:
            donor = max(parts, key=len)
            part.append(donor.pop(int(stream.integers(len(donor)))))
    return parts


def dealt_natural(config, data, clients, rng):
    names = sorted(set(data.groups))
    parts = [[] for _ in range(clients)]
    for place in rng.numpy().permutation(len(names)):
        smallest = min(parts, key=len)
        smallest.extend(np.flatnonzero(np.array(data.groups) == names[place]).tolist())
    return parts


DEALT = {"iid": dealt_iid, "dirichlet": dealt_dirichlet, "natural": dealt_natural}


@settings(deadline=None)
@given(
    st.sampled_from(list(DEALT)),
    st.integers(1, 25),
    st.integers(1, 8),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.sampled_from([0.01, 0.5, 100.0]),
    st.integers(0, 99),
)
def test_it_is_the_partition_that_dealing_to_one_client_after_the_other_gives(
    kind, clients, min_examples, holdout, alpha, seed
):
    """Bit for bit, digest and notes included: seeds keep the partitions that published comparisons were paired on."""
    data = examples(300, seed=seed)
    assume(kind != "natural" or len(set(data.groups)) >= clients)
    config = PartitionConfig(kind=kind, min_examples=min_examples, holdout=holdout, alpha=alpha)
    parts = [np.sort(part) for part in DEALT[kind](config, data, clients, Rng(seed).child(kind))]
    assume(min(map(len, parts)) >= min_examples)
    train, held, digest = [], [], hashlib.sha256()
    for client, part in enumerate(parts):
        count = min(int(holdout * len(part)), len(part) - min_examples)
        out = np.sort(Rng(seed).child("holdout", client).numpy().choice(part, size=count, replace=False))
        train.append(np.setdiff1d(part, out))
        held.append(out)
    for index in (*train, *held):
        digest.update(len(index).to_bytes(8, "little") + index.astype("<i8").tobytes())
    found = partition(config, data, clients, Rng(seed))
    assert [index.tolist() for index in found.train] == [index.tolist() for index in train]
    assert [index.tolist() for index in found.holdout] == [index.tolist() for index in held]
    assert found.digest == digest.hexdigest()
    sizes, classes = [len(index) for index in train], [len(set(data.labels[index].tolist())) for index in train]
    assert (found.notes["smallest client"], found.notes["largest client"]) == (min(sizes), max(sizes))
    assert found.notes["clients with one class"] == classes.count(1)
    assert found.notes.get("clients without a held-out example", None) == (
        sum(len(index) == 0 for index in held) if holdout else None
    )


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_shares_are_views_of_one_array(sizes):
    """As a sequence they are the cut list; their class counts are those of each part."""
    flat = np.random.default_rng(0).permutation(sum(sizes))
    shares, parts = Shares.of(flat, np.array(sizes)), np.split(flat, np.cumsum(sizes)[:-1])
    assert [part.tolist() for part in shares] == [part.tolist() for part in parts]
    assert all(np.shares_memory(shares[c], flat) for c, size in enumerate(sizes) if size)
    assert [part.tolist() for part in shares[1:3]] == [part.tolist() for part in parts[1:3]]
    assert shares[-1].tolist() == parts[-1].tolist()
    assert shares.sizes.tolist() == sizes
    with pytest.raises(IndexError):
        shares[len(sizes)]
    labels = np.arange(sum(sizes)) % 3
    assert shares.counts(labels, 3).tolist() == [np.bincount(labels[part], minlength=3).tolist() for part in parts]


def test_a_hundred_thousand_clients_take_seconds():
    """Of processor time, held-out draws of every client included; no list per client is kept."""
    draw = np.random.default_rng(0)
    count, clients = 1_200_000, 100_000
    data = Examples(("",) * count, draw.integers(0, 10, count))
    began = process_time()
    result = split("dirichlet", data, clients, alpha=0.5, min_examples=2, holdout=0.1)
    assert process_time() - began < 60
    assert len(result.train) == len(result.holdout) == clients
    assert result.train.sizes.min() >= 2
    assert np.array_equal(np.sort(np.concatenate([result.train.flat, result.holdout.flat])), np.arange(count))
