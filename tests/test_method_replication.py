"""Replication padding is the mean of every part over its holders; and how strong clients are found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora.algebra.rows import padded
from fslora.methods.fedit import FedIT
from fslora.methods.replication import Replication
from fslora.methods.zero_padding import ZeroPadding
from fslora.types import Client, Trained
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


def replicated(passed, name: str, kind: str, weights: np.ndarray) -> np.ndarray:
    """The paper's procedure on dense stacks, missing rows NaN: fill with the holders' mean, then average all."""
    stack = np.full((len(passed), RANK, getattr(passed[0].trained.adapter.layers[name], kind).shape[1]), np.nan)
    for c, exchange in enumerate(passed):
        own = getattr(exchange.trained.adapter.layers[name], kind).double().numpy()
        stack[c, : len(own)] = own
    for j in range(RANK):
        missing = np.isnan(stack[:, j, 0])
        if not missing.all():
            holders = weights * ~missing
            stack[missing, j] = (holders[~missing, None] * stack[~missing, j]).sum(0) / holders.sum()
    return np.einsum("c,crd->rd", weights, stack)


@LAWS
@given(
    st.lists(st.tuples(st.integers(1, RANK), st.integers(1, 40)), min_size=1, max_size=5),
    st.sampled_from(["uniform", "examples"]),
)
def test_replicate_then_average_is_the_mean_over_holders(clients, weighting):
    """Filling what a client lacks with the holders' weighted mean, then averaging with the same weights (steps 4 to 6).

    A row that nobody has stays NaN in the procedure; the server keeps its old bits there and is finite elsewhere.
    """
    fleet = tuple(Client(number, *properties) for number, properties in enumerate(clients))
    method = Replication(weighting=weighting)
    world = World(played(Replication(), 2).state)
    passed = exchanges(method, world, plan(0, tuple(range(len(fleet))), fleet))
    after = ended(method, world, plan(0), passed).state.adapter
    weights = np.array([c.examples if weighting == "examples" else 1 for c in fleet], dtype=np.float64)
    weights /= weights.sum()
    largest = max(client.rank for client in fleet)
    for name, pair in after.layers.items():
        for kind in ("A", "Bt"):
            ours = getattr(pair, kind)
            expected = replicated(passed, name, kind, weights)
            np.testing.assert_allclose(ours[:largest].numpy(), expected[:largest], atol=ROUNDING)
            assert np.isnan(expected[largest:]).all()
            assert torch.equal(ours[largest:], getattr(world.state.adapter.layers[name], kind)[largest:])


def test_the_only_holders_rows_are_taken_over():
    """Two clients of ranks 2 and 4: rows 2 and 3 of the result are the second one's, whatever the weights."""
    world = played(Replication(), 2)
    passed = exchanges(Replication(), world, plan(0, (1, 2)))
    assert [x.site.client.rank for x in passed] == [2, 4]
    after = ended(Replication(), world, plan(0), passed).state.adapter
    for name, pair in passed[1].trained.adapter.layers.items():
        # old + (new - old) against new.
        torch.testing.assert_close(after.layers[name].A[2:4], pair.A[2:4], atol=1e-6, rtol=0)
        torch.testing.assert_close(after.layers[name].Bt[2:4], pair.Bt[2:4], atol=1e-6, rtol=0)
        assert (after.layers[name].A[:2] - pair.A[:2]).abs().max() > 0.01


def test_nobody_trains_and_nothing_moves():
    """A fixed point bit for bit, whoever takes part."""
    world = played(Replication(), 2)
    for number in range(3):
        still = play(Replication(), world, plan(number), fake_training(0.0))
        assert_same_adapter(still.state.adapter, world.state.adapter)


def test_weak_clients_do_not_dilute_a_part():
    """Part 7 has one holder: the same result beside one weak client as beside four; zero padding goes by 1 / K."""
    fleet = (Client(0, RANK, 5), *(Client(number, 1, 5) for number in range(1, 5)))
    results = {}
    for kind in (Replication, ZeroPadding):
        method = kind(weighting="uniform")
        world = World(played(Replication(), 2).state)
        results[kind] = [
            play(method, world, plan(0, members, fleet)).state.adapter.layers["up"].A[7]
            for members in ((0, 1), (0, 1, 2, 3, 4))
        ]
    assert torch.equal(*results[Replication])
    few, many = results[ZeroPadding]
    torch.testing.assert_close(many * 5, few * 2, atol=ROUNDING, rtol=0)


def test_a_plain_sum_and_public_counts_suffice():
    """Σ p_i pad(A_i) divided by the public vector q_j gives the same: secure aggregation of equal shapes."""
    world, round = played(Replication(), 2), plan(0)
    passed = exchanges(Replication(), world, round)
    after = ended(Replication(), world, round, passed).state.adapter
    weights = np.array([client.examples for client in round.cohort]) / sum(client.examples for client in round.cohort)
    q = sum(w * (np.arange(RANK) < client.rank) for w, client in zip(weights, round.cohort, strict=True))
    for name, pair in after.layers.items():
        plain = sum(
            w * padded(x.trained.adapter, RANK).layers[name].Bt.double().numpy()
            for w, x in zip(weights, passed, strict=True)
        )
        np.testing.assert_allclose(pair.Bt.numpy(), plain / q[:, None], atol=ROUNDING)


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_equal_ranks_are_fedit(weighting):
    """No padding: FedIT's mean of factors, over three rounds."""
    fleet = tuple(Client(client.id, RANK, client.examples) for client in FLEET)
    ours, theirs = Replication(weighting=weighting), FedIT(rank="server", weighting=weighting)
    left, right = begun(ours, fleet=fleet), begun(theirs, fleet=fleet)
    for number in range(3):
        left, right = play(ours, left, plan(number, fleet=fleet)), play(theirs, right, plan(number, fleet=fleet))
    assert_same_adapter(left.state.adapter, right.state.adapter)


def test_the_mean_depends_on_how_a_product_is_factored():
    """Negative: (B M, M⁻¹ A) of one client is the same function of that client, and yet another average."""
    world, round = played(Replication(), 2), plan(0, (3, 4))

    def turned(start, client, r):
        trained = fake_training()(start, client, r)
        if client.id == 4:
            return trained
        M = torch.diag(torch.linspace(0.5, 2, RANK))
        tensors = trained.adapter.tensors()
        values = {f"{n}:A": torch.linalg.inv(M) @ tensors[f"{n}:A"] for n in start.adapter.layers}
        values |= {f"{n}:Bt": M.T @ tensors[f"{n}:Bt"] for n in start.adapter.layers}
        return Trained(client.id, trained.adapter.with_tensors({**tensors, **values}), trained.losses)

    (own, _), (same, _) = (
        exchanges(Replication(), world, round, fake_training()),
        exchanges(Replication(), world, round, turned),
    )
    torch.testing.assert_close(
        own.trained.adapter.layers["up"].delta, same.trained.adapter.layers["up"].delta, atol=1e-5, rtol=0
    )
    plain = play(Replication(), world, round).state.adapter.layers["up"].delta
    other = play(Replication(), world, round, turned).state.adapter.layers["up"].delta
    assert (plain - other).abs().max() > 0.01


def test_only_the_clients_own_rows_travel():
    """Down and up k_i (d_in + d_out) · 4 bytes per layer and the head; up 4 more where clients are judged."""
    head = sum(tensor.numel() * 4 for tensor in TEMPLATE.dense.values())
    for method, rank_of, score in (
        (Replication(), lambda client: client.rank, 0),
        (Replication(best=0.1, low=3), lambda client: min(client.rank, 3), 4),
    ):
        for exchange in exchanges(method, begun(method), plan(0)):
            parts = rank_of(exchange.site.client)
            expected = sum(parts * (d_in + d_out) * 4 for d_in, d_out in TEMPLATE.layers.values()) + head
            assert exchange.broadcast.nbytes == expected
            assert exchange.update.nbytes == expected + score


# --- who is strong ---


def losing(losses: dict[int, float]):
    """A training whose loss falls to no good: mean ``losses[id]`` over two steps."""

    def train(start, client, round):
        trained = fake_training()(start, client, round)
        return Trained(client.id, trained.adapter, (losses[client.id] + 1, losses[client.id] - 1))

    return train


def ranks_sent(method, world, members=tuple(range(6)), fleet=FLEET) -> list[int]:
    return [x.start.adapter.layers["up"].rank for x in exchanges(method, world, plan(9, members, fleet))]


BIG = tuple(Client(number, RANK, 5 + number) for number in range(6))


def test_the_best_of_the_first_round_get_their_own_rank():
    """All train r_L in round 0; the best third, by loss, goes on at r_H, the others at r_L, for good."""
    method = Replication(best=1 / 3, low=2)
    world = begun(method, fleet=BIG)
    assert ranks_sent(method, world, fleet=BIG) == [2] * 6
    world = play(method, world, plan(0, tuple(range(6)), BIG), losing({0: 5, 1: 2, 2: 4, 3: 6, 4: 3, 5: 7}))
    assert ranks_sent(method, world, fleet=BIG) == [2, RANK, 2, 2, RANK, 2]
    world = play(method, world, plan(1, tuple(range(6)), BIG), losing({0: 0, 1: 9, 2: 9, 3: 9, 4: 9, 5: 0}))
    assert ranks_sent(method, world, fleet=BIG) == [2, RANK, 2, 2, RANK, 2]


def test_latecomers_are_judged_among_themselves():
    """New clients of a later round compete with each other alone; winners add up to the share of all judged so far."""
    method = Replication(best=0.5, low=2)
    world = play(method, begun(method, fleet=BIG), plan(0, (0, 1), BIG), losing({0: 5, 1: 4}))
    assert ranks_sent(method, world, fleet=BIG) == [2, RANK, 2, 2, 2, 2]
    world = play(method, world, plan(1, (0, 2, 3), BIG), losing({0: 0, 2: 3, 3: 1}))
    assert ranks_sent(method, world, fleet=BIG) == [2, RANK, 2, RANK, 2, 2]
    world = play(method, world, plan(2, (4,), BIG), losing({4: 0}))
    # Half of 5 is 2.5, rounded to even: there are two winners already.
    assert ranks_sent(method, world, fleet=BIG) == [2, RANK, 2, RANK, 2, 2]
    world = play(method, world, plan(3, (5,), BIG), losing({5: 9}))
    assert ranks_sent(method, world, fleet=BIG) == [2, RANK, 2, RANK, 2, RANK]


def test_nobody_gets_more_than_it_can_afford():
    """A winner trains what it can afford, a weak client that much even where r_L is more."""
    method = Replication(best=1.0, low=3)
    world = begun(method)
    assert ranks_sent(method, world) == [min(client.rank, 3) for client in FLEET]
    world = play(method, world, plan(0))
    assert ranks_sent(method, world) == [client.rank for client in FLEET]
    assert ranks_sent(Replication(), begun(Replication())) == [client.rank for client in FLEET]
