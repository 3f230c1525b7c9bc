"""Fed-PLoRA: every client starts from the global model; modules are averaged over those who trained them.

That training beside a frozen pair is training under a gradient mask is shown in ``test_engines_extensions.py``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora.algebra.adapters import rescaled
from fslora.algebra.rows import take
from fslora.methods.fed_plora import FedPLoRA
from fslora.methods.fedit import FedIT
from fslora.methods.fslora import FSLoRA
from fslora.types import Adapter, Broadcast, Client, LoRA
from kit import (
    FLEET,
    RANK,
    TEMPLATE,
    World,
    assert_same_adapter,
    begun,
    deltas,
    ended,
    exchanges,
    fake_training,
    mean_product,
    plan,
    play,
    played,
)

# Means of at most six float32 numbers below 4, by another formula (old + mean of differences).
ROUNDING = 3e-6
# Products of eight parts with numbers near 2, times the scale 2, in float64 from float32 factors.
PRODUCTS = 2e-5
LAWS = settings(max_examples=25, deadline=None, derandomize=True, database=None)
HEAD = sum(tensor.numel() * 4 for tensor in TEMPLATE.dense.values())


def whole(start) -> dict[str, torch.Tensor]:
    """What a client computes with: its trained and its frozen pair together."""
    trained = deltas(start.adapter)
    frozen = deltas(Adapter(start.frozen))
    return {name: delta + frozen.get(name, 0) for name, delta in trained.items()}


def assert_close(left, right, tolerance: float = PRODUCTS) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("shared_rows", [False, True])
def test_every_client_starts_at_the_global_model(shared_rows):
    """W_i + s B_K A_K = W0 + s B A for every K, whatever k_i; at scale alpha / k_i it would not be."""
    method = FedPLoRA(shared_rows=shared_rows)
    world = played(method, 2)
    served = deltas(method.global_adapter(world.state))
    for exchange in exchanges(method, world, plan(0)):
        start, rank = exchange.start, exchange.site.client.rank
        assert_close(whole(start), served)
        assert {pair.rank for pair in start.adapter.layers.values()} == {rank}
        assert {pair.rank for pair in start.frozen.values()} == ({RANK - rank} if rank < RANK else set())
        if rank < RANK:
            trained = deltas(rescaled(start.adapter, RANK / rank))
            wrong = {name: trained[name] + deltas(Adapter(start.frozen))[name] for name in TEMPLATE.layers}
            assert (wrong["up"] - served["up"]).abs().max() > 0.01


@LAWS
@given(st.integers(0, 99), st.sampled_from(["uniform", "examples"]), st.booleans())
def test_modules_are_averaged_over_those_who_trained_them(number, weighting, shared_rows):
    """b_j = mean of b_ij over Q_j, a_j likewise, from dense stacks with NaN where j ∉ K_i; Q_j empty: the old bits."""
    method = FedPLoRA(weighting=weighting, shared_rows=shared_rows)
    world, round = World(played(FedPLoRA(), 2).state), plan(number, (0, 1, 2, 5))
    passed = exchanges(method, world, round)
    after = ended(method, world, round, passed).state.adapter
    weights = np.array([client.examples if weighting == "examples" else 1.0 for client in round.cohort])
    for name, pair in after.layers.items():
        for kind in ("A", "Bt"):
            ours, old = getattr(pair, kind), getattr(world.state.adapter.layers[name], kind)
            stack = np.full((len(passed), *ours.shape), np.nan)
            for c, exchange in enumerate(passed):
                stack[c, exchange.broadcast.rows[name]] = getattr(exchange.trained.adapter.layers[name], kind)
            for j in range(RANK):
                holders = ~np.isnan(stack[:, j, 0])
                if holders.any():
                    expected = np.average(stack[holders, j], axis=0, weights=weights[holders])
                    np.testing.assert_allclose(ours[j].numpy(), expected, atol=ROUNDING)
                else:
                    assert torch.equal(ours[j], old[j])
    for name, tensor in after.dense.items():
        stack = np.stack([x.trained.adapter.dense[name].double().numpy() for x in passed])
        np.testing.assert_allclose(tensor.numpy(), np.average(stack, axis=0, weights=weights), atol=ROUNDING)


def test_nobody_trains_and_nothing_moves():
    """A fixed point bit for bit, whoever takes part and whatever they hold."""
    world = played(FedPLoRA(), 2)
    for number in range(3):
        still = play(FedPLoRA(), world, plan(number), fake_training(0.0))
        assert_same_adapter(still.state.adapter, world.state.adapter)


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_full_ranks_are_fedit(weighting):
    """k_i = R: the bits of FedIT over three rounds; nothing is frozen."""
    fleet = tuple(Client(client.id, RANK, client.examples) for client in FLEET)
    ours, theirs = FedPLoRA(weighting=weighting), FedIT(rank="server", weighting=weighting)
    left, right = begun(ours, fleet=fleet), begun(theirs, fleet=fleet)
    for number in range(3):
        assert not any(x.start.frozen for x in exchanges(ours, left, plan(number, fleet=fleet)))
        left, right = play(ours, left, plan(number, fleet=fleet)), play(theirs, right, plan(number, fleet=fleet))
    assert_same_adapter(left.state.adapter, right.state.adapter)


def by_part(pair: LoRA, j: int) -> LoRA:
    return LoRA(pair.A[j : j + 1], pair.Bt[j : j + 1], pair.scale)


def test_it_misses_the_mean_product_by_one_covariance_per_module():
    """Σ_j mean_{Q_j} b_ij a_ijᵀ - B A = Σ_j mean_{Q_j} (b_ij - b̄_j)(a_ij - ā_j)ᵀ; here not zero."""
    world, round = played(FedPLoRA(), 2), plan(0)
    passed = exchanges(FedPLoRA(), world, round)
    after = ended(FedPLoRA(), world, round, passed).state.adapter
    for name, mean in after.layers.items():
        residual = covariance = torch.zeros(mean.Bt.shape[1], mean.A.shape[1], dtype=torch.float64)
        for j in range(RANK):
            own = [
                by_part(x.trained.adapter.layers[name], x.broadcast.rows[name].tolist().index(j))
                for x in passed
                if j in x.broadcast.rows[name].tolist()
            ]
            assert own, "in this round every module has a holder"
            middle = by_part(mean, j)
            apart = [LoRA(part.A - middle.A, part.Bt - middle.Bt, part.scale) for part in own]
            weights = [1 / len(own)] * len(own)
            ours = mean_product({name: [middle]}, [1.0])[name]
            residual = residual + mean_product({name: own}, weights)[name] - ours
            covariance = covariance + mean_product({name: apart}, weights)[name]
        torch.testing.assert_close(residual, covariance, atol=PRODUCTS, rtol=0)
        assert covariance.abs().max() > 0.01


def test_disjoint_sets_are_averaged_exactly():
    """|Q_j| ≤ 1 for all j: the new product is the old one plus the sum of the clients' own changes of theirs."""
    method, round = FedPLoRA(), plan(0, (1, 2))
    world = played(method, 2)
    halves = {1: [0, 5], 2: [1, 3, 4, 7]}
    passed = []
    for client in round.cohort:
        rows = {name: torch.tensor(halves[client.id], dtype=torch.int32) for name in TEMPLATE.layers}
        site, broadcast = world.site(client), Broadcast(world.state.adapter, rows)
        start = method.start(broadcast, site)
        trained = fake_training()(start, client, round)
        passed.append((start, trained, method.client_update(broadcast, start, trained, site)))
    after = method.aggregate(world.state, iter([update for *_, update in passed]), round).adapter
    expected = deltas(world.state.adapter)
    for start, trained, _ in passed:
        before, moved = deltas(start.adapter), deltas(trained.adapter)
        expected = {name: expected[name] + moved[name] - before[name] for name in TEMPLATE.layers}
    assert_close(deltas(Adapter(after.layers)), expected)


def test_the_modules_are_a_fresh_uniform_choice():
    """K_i: k_i of R, increasing, per layer or shared, anew each round; Q_j is empty with chance Π (1 - k_i / R)."""
    state = begun(FedPLoRA()).state
    counts, empty, rounds = np.zeros(RANK), 0, 400
    for number in range(rounds):
        round = plan(number, (0, 1, 2, 5))
        sets = [FedPLoRA().broadcast(state, client, round).rows["up"].tolist() for client in round.cohort]
        assert [len(s) for s in sets] == [1, 2, 4, 3]
        assert all(s == sorted(set(s)) for s in sets)
        counts += np.bincount(sets[2], minlength=RANK)
        empty += sum(j not in {k for s in sets for k in s} for j in range(RANK))
    chance = np.prod([1 - k / RANK for k in (1, 2, 4, 3)])
    # Five standard deviations of 400 draws of chance 1/2, and of 3200 (negatively correlated) draws of chance 0.205.
    assert np.abs(counts - rounds / 2).max() < 5 * (rounds / 4) ** 0.5
    assert abs(empty / (rounds * RANK) - chance) < 5 * (chance * (1 - chance) / (rounds * RANK)) ** 0.5
    (one,) = (FedPLoRA(shared_rows=True).broadcast(state, FLEET[2], plan(0)).rows,)
    (each,) = (FedPLoRA().broadcast(state, FLEET[2], plan(0)).rows,)
    assert len({tuple(index.tolist()) for index in one.values()}) == 1
    assert len({tuple(index.tolist()) for index in each.values()}) > 1


@pytest.mark.parametrize("shared_rows", [False, True])
def test_it_trains_the_same_parts_as_fslora(shared_rows):
    """One seed draws one set for both, so that comparisons are paired; FSLoRA's scale is r / k times this one's."""
    ours, theirs = FedPLoRA(shared_rows=shared_rows), FSLoRA(shared_rows=shared_rows)
    world = begun(ours)
    for left, right in zip(exchanges(ours, world, plan(1)), exchanges(theirs, world, plan(1)), strict=True):
        for name, index in left.broadcast.rows.items():
            assert torch.equal(index, right.broadcast.rows[name])
        factor = RANK / left.site.client.rank
        assert_same_adapter(rescaled(left.start.adapter, factor), right.start.adapter)


def test_all_modules_go_down_and_the_trained_ones_up():
    """Down R (d_in + d_out) · 4 bytes per layer, up k_i times that over R; indices of 4 bytes both ways; the head."""
    world = played(FedPLoRA(), 1)
    for exchange in exchanges(FedPLoRA(), world, plan(0)):
        rank = exchange.site.client.rank
        widths = [d_in + d_out for d_in, d_out in TEMPLATE.layers.values()]
        index = 4 * rank * len(widths)
        assert exchange.broadcast.nbytes == sum(RANK * width * 4 for width in widths) + index + HEAD
        assert exchange.update.nbytes == sum(rank * width * 4 for width in widths) + index + HEAD
        held = take(world.state.adapter, exchange.broadcast.rows)
        assert_same_adapter(exchange.start.adapter, held)
