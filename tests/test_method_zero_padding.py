"""Zero padding: who lacks a part counts as a zero there; what that costs; which methods it coincides with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora.algebra.rows import leading, padded
from fslora.methods.fedit import FedIT
from fslora.methods.hetlora import HetLoRA
from fslora.methods.replication import Replication
from fslora.methods.zero_padding import ZeroPadding
from fslora.types import Client
from kit import (
    FLEET,
    RANK,
    TEMPLATE,
    World,
    assert_same_adapter,
    begun,
    ended,
    exchanges,
    fake_training,
    plan,
    play,
    played,
)

# Means of at most six float32 numbers below 4, in another order and by another formula (old + mean of differences).
ROUNDING = 3e-6
LAWS = settings(max_examples=25, deadline=None, derandomize=True, database=None)
AVERAGES = pytest.mark.parametrize("average", ["factor", "delta"])


def shares(members, weights, layer_rank: int = RANK) -> np.ndarray:
    """q_j: the share of the weight of those whose rank is above j."""
    held = np.array([[client.rank > j for j in range(layer_rank)] for client in members])
    return (np.asarray(weights)[:, None] * held).sum(0) / np.sum(weights)


@LAWS
@given(
    st.lists(st.tuples(st.integers(1, RANK), st.integers(1, 40)), min_size=1, max_size=5),
    st.sampled_from(["uniform", "examples"]),
)
def test_the_server_averages_padded_factors(clients, weighting):
    """A = Σ_i p_i pad(A_i), B = Σ_i p_i pad(B_i), Σ p_i = 1, in float64 from dense padded stacks; the head alike."""
    fleet = tuple(Client(number, *properties) for number, properties in enumerate(clients))
    method = ZeroPadding(weighting=weighting)
    world = World(played(ZeroPadding(), 2).state)
    passed = exchanges(method, world, plan(0, tuple(range(len(fleet))), fleet))
    after = ended(method, world, plan(0), passed).state.adapter
    weights = np.array([c.examples if weighting == "examples" else 1 for c in fleet], dtype=np.float64)
    weights /= weights.sum()
    held = shares(fleet, weights) > 0
    for name, pair in after.layers.items():
        for kind in ("A", "Bt"):
            stack = [getattr(padded(x.trained.adapter, RANK).layers[name], kind).double().numpy() for x in passed]
            expected = np.einsum("c,crd->rd", weights, np.stack(stack))
            np.testing.assert_allclose(getattr(pair, kind).numpy()[held], expected[held], atol=ROUNDING)
            old = getattr(world.state.adapter.layers[name], kind)
            assert torch.equal(getattr(pair, kind)[~torch.from_numpy(held)], old[~torch.from_numpy(held)])
    for name, tensor in after.dense.items():
        expected = sum(w * x.trained.adapter.dense[name].double() for w, x in zip(weights, passed, strict=True))
        torch.testing.assert_close(tensor.double(), expected, atol=ROUNDING, rtol=0)


def test_nobody_trains_and_each_part_shrinks_by_the_weight_of_its_holders():
    """Factors: a_j and b_j times q_j, hence b_j a_jᵀ times q_j²; the head stays; part 0, which all hold, too."""
    method, round = ZeroPadding(), plan(1)
    world = played(method, 2)
    after = play(method, world, round, fake_training(0.0)).state.adapter
    q = torch.from_numpy(shares(round.cohort, [client.examples for client in round.cohort])).float().unsqueeze(1)
    assert q[0] == 1
    assert 0 < q[-1] < 0.5
    for name, old in world.state.adapter.layers.items():
        new = after.layers[name]
        torch.testing.assert_close(new.A, q * old.A, atol=ROUNDING, rtol=0)
        for j in range(RANK):
            torch.testing.assert_close(
                torch.outer(new.Bt[j], new.A[j]), q[j] ** 2 * torch.outer(old.Bt[j], old.A[j]), atol=ROUNDING, rtol=0
            )
    assert all(torch.equal(after.dense[name], tensor) for name, tensor in world.state.adapter.dense.items())


def test_nobody_trains_and_averaged_changes_keep_every_bit():
    """average = "delta": the same adapter, bit for bit, where average = "factor" loses some of it."""
    method, lossy = ZeroPadding(average="delta"), ZeroPadding()
    world = played(method, 2)
    assert_same_adapter(play(method, world, plan(2), fake_training(0.0)).state.adapter, world.state.adapter)
    shrunk = play(lossy, world, plan(2), fake_training(0.0)).state.adapter
    assert not torch.equal(shrunk.layers["up"].A, world.state.adapter.layers["up"].A)


@AVERAGES
def test_factor_and_delta_differ_by_what_the_absent_hold(average):
    """old_j + Σ p_i Δ_ij minus Σ p_i pad(old_j + Δ_ij) is (1 - q_j) old_j; the same twice would be zero."""
    world, round = played(ZeroPadding(average=average), 2), plan(0)
    passed = exchanges(ZeroPadding(), world, round)
    factor = ended(ZeroPadding(average="factor"), world, round, passed).state.adapter
    delta = ended(ZeroPadding(average="delta"), world, round, passed).state.adapter
    q = torch.from_numpy(shares(round.cohort, [client.examples for client in round.cohort])).float().unsqueeze(1)
    for name, old in world.state.adapter.layers.items():
        difference = delta.layers[name].Bt - factor.layers[name].Bt
        torch.testing.assert_close(difference, (1 - q) * old.Bt, atol=ROUNDING, rtol=0)
        assert difference[-1].abs().max() > 1e-3


@AVERAGES
@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_equal_ranks_are_fedit(average, weighting):
    """k_i = r for all: the bits of FedIT after three rounds."""
    fleet = tuple(Client(client.id, RANK, client.examples) for client in FLEET)
    ours, theirs = ZeroPadding(average=average, weighting=weighting), FedIT(rank="server", weighting=weighting)
    left, right = begun(ours, fleet=fleet), begun(theirs, fleet=fleet)
    for number in range(3):
        left, right = play(ours, left, plan(number, fleet=fleet)), play(theirs, right, plan(number, fleet=fleet))
    assert_same_adapter(left.state.adapter, right.state.adapter)


@AVERAGES
@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_it_is_hetlora_without_its_own_ideas(average, weighting):
    """HetLoRA without norms, pruning and penalty: the same bits over three rounds, and other bits with norms."""
    ours = played(ZeroPadding(average=average, weighting=weighting), 3).state
    plain = HetLoRA(weighting=weighting, average=average, prune=False, penalty=0)
    assert_same_adapter(ours.adapter, played(plain, 3).state.adapter)
    normed = played(HetLoRA(average=average, prune=False, penalty=0), 3).state
    assert not torch.equal(ours.adapter.layers["up"].A, normed.adapter.layers["up"].A)


def test_it_is_replication_times_the_share_of_the_holders():
    """Zero padding of part j = q_j times the mean over its holders, for either factor."""
    world, round = played(ZeroPadding(), 2), plan(0)
    passed = exchanges(ZeroPadding(), world, round)
    zero = ended(ZeroPadding(), world, round, passed).state.adapter
    held = ended(Replication(), world, round, passed).state.adapter
    q = torch.from_numpy(shares(round.cohort, [client.examples for client in round.cohort])).float().unsqueeze(1)
    for name, pair in zero.layers.items():
        torch.testing.assert_close(pair.A, q * held.layers[name].A, atol=ROUNDING, rtol=0)
        torch.testing.assert_close(pair.Bt, q * held.layers[name].Bt, atol=ROUNDING, rtol=0)


@AVERAGES
def test_a_part_that_no_client_of_the_round_holds_is_kept(average):
    """Ranks 1 and 2 alone in a round: parts 2 to 7 keep their bits; zero in both factors, they would be lost."""
    method = ZeroPadding(average=average)
    world = played(method, 2)
    after = play(method, world, plan(0, (0, 1))).state.adapter
    for name, old in world.state.adapter.layers.items():
        assert torch.equal(after.layers[name].A[2:], old.A[2:])
        assert torch.equal(after.layers[name].Bt[2:], old.Bt[2:])
        assert not torch.equal(after.layers[name].A[:2], old.A[:2])


def test_only_the_clients_own_rows_travel():
    """Down and up k_i (d_in + d_out) · 4 bytes per layer and the head, at the server's scale; no index sets."""
    world = played(ZeroPadding(), 1)
    head = sum(tensor.numel() * 4 for tensor in TEMPLATE.dense.values())
    for exchange in exchanges(ZeroPadding(), world, plan(0)):
        rank = exchange.site.client.rank
        expected = sum(rank * (d_in + d_out) * 4 for d_in, d_out in TEMPLATE.layers.values()) + head
        assert exchange.broadcast.nbytes == exchange.update.nbytes == expected
        assert_same_adapter(exchange.start.adapter, leading(world.state.adapter, rank))
        assert {pair.scale for pair in exchange.start.adapter.layers.values()} == {TEMPLATE.scale(RANK)}
