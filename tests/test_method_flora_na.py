"""FLoRA-NA: the Gram arithmetic against dense oracles, alternating least squares, and what the method reduces to."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora.algebra.rows import leading
from fslora.methods.fedit import FedIT
from fslora.methods.flora_na import FLoRANA, gram_blocks, mixed, mixing_weights, quadratic, step
from fslora.types import Client, LoRA, ServerState, Tensor
from kit import (
    COHORTS,
    FLEET,
    RANK,
    TEMPLATE,
    World,
    assert_same_adapter,
    begun,
    exchanges,
    fake_training,
    plan,
    play,
    played,
)

LAWS = settings(max_examples=25, deadline=None, derandomize=True, database=None)
# Float64 sums of some hundred products of numbers near 1, and solutions of small systems cut at 1e-10.
EXACT = 1e-9
# Sums of a few float32 numbers below 4.
ROUNDED = 2e-6
EQUAL = tuple(Client(number, RANK, examples) for number, examples in enumerate((5, 1, 20, 3)))

sizes = {
    "seed": st.integers(0, 10_000),
    "clients": st.integers(1, 5),
    "k": st.integers(1, 4),
    "shape": st.tuples(st.integers(3, 9), st.integers(3, 9)),
}


def uploads(seed: int, clients: int, k: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Every client's A [m k i] and B [m k o], and unequal p [m]; float64."""
    draw = torch.Generator().manual_seed(seed)
    A, Bt = (torch.randn(clients, k, d, generator=draw, dtype=torch.float64) for d in shape)
    p = torch.rand(clients, generator=draw, dtype=torch.float64) + 0.1
    return A, Bt, p / p.sum()


def product(A: Tensor, Bt: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Σ u_i B_i · Σ v_i A_i, dense."""
    return torch.tensordot(u, Bt, 1).T @ torch.tensordot(v, A, 1)


def target(A: Tensor, Bt: Tensor, p: Tensor) -> Tensor:
    return torch.einsum("m,mko,mki->oi", p, Bt, A)


def error(A: Tensor, Bt: Tensor, p: Tensor, u: Tensor, v: Tensor) -> float:
    return float((product(A, Bt, u, v) - target(A, Bt, p)).square().sum())


def pairs(A: Tensor, Bt: Tensor) -> list[LoRA]:
    return [LoRA(a, b, 2.0) for a, b in zip(A, Bt, strict=True)]


# --- the objective ---


@given(**sizes)
@LAWS
def test_the_gram_form_is_the_dense_error(seed, clients, k, shape):
    """Test 1: ‖T‖² - 2 uᵀ y + uᵀ X u is ‖Σ u_i B_i Σ v_i A_i - T‖² for any u and v, seen from either factor."""
    A, Bt, p = uploads(seed, clients, k, shape)
    u, v = torch.randn(2, clients, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    energy = float(target(A, Bt, p).square().sum())
    for mine, other, left, right in ((u, v, Bt, A), (v, u, A, Bt)):
        X, y = quadratic(other, gram_blocks(left), gram_blocks(right), p)
        gram_form = energy - 2 * float(mine @ y) + float(mine @ X @ mine)
        assert gram_form == pytest.approx(error(A, Bt, p, u, v), rel=EXACT, abs=EXACT * energy)


@given(**sizes)
@LAWS
def test_equal_weights_are_fedit(seed, clients, k, shape):
    """Test 2: F(p, p) = ‖Σ p_i (B_i - B̄)(A_i - Ā)‖², the error of FedIT; no sweep leaves FedIT's pair."""
    A, Bt, p = uploads(seed, clients, k, shape)
    mean_A, mean_Bt = torch.tensordot(p, A, 1), torch.tensordot(p, Bt, 1)
    covariance = torch.einsum("m,mko,mki->oi", p, Bt - mean_Bt, A - mean_A)
    assert error(A, Bt, p, p, p) == pytest.approx(float(covariance.square().sum()), rel=EXACT, abs=EXACT)
    pair = mixed(pairs(A, Bt), p.tolist(), sweeps=0)
    torch.testing.assert_close(pair.A, mean_A, atol=EXACT, rtol=0)
    torch.testing.assert_close(pair.Bt, mean_Bt, atol=EXACT, rtol=0)


@given(**sizes)
@LAWS
def test_every_sweep_lowers_the_error(seed, clients, k, shape):
    """Tests 3, 4: the error never rises from sweep to sweep, and lies between the best rank-k error and FedIT's."""
    A, Bt, p = uploads(seed, clients, k, shape)
    errors = [error(A, Bt, p, *mixing_weights(A, Bt, p, sweeps)) for sweeps in (0, 1, 2, 3, 10, 50)]
    energy = float(target(A, Bt, p).square().sum())
    assert errors[0] == pytest.approx(error(A, Bt, p, p, p))
    assert all(right <= left + EXACT * energy for left, right in pairwise(errors))
    tail = torch.linalg.svdvals(target(A, Bt, p))[k:].square().sum()
    assert errors[-1] >= float(tail) - EXACT * energy


def test_sweeps_gain_something():
    """Three clients far apart: the fit lowers FedIT's error by more than a tenth, and differs from the best pair's."""
    A, Bt, p = uploads(0, 3, 2, (7, 5))
    fedit, fitted = error(A, Bt, p, p, p), error(A, Bt, p, *mixing_weights(A, Bt, p, 50))
    tail = float(torch.linalg.svdvals(target(A, Bt, p))[2:].square().sum())
    assert tail < 0.9 * fitted < 0.9 * 0.9 * fedit


@given(**sizes)
@LAWS
def test_after_a_step_the_residual_is_orthogonal(seed, clients, k, shape):
    """Test 7: ⟨T̂, T - T̂⟩ = 0 after a step of either factor, so ‖T‖² - F, which the step returns, is ‖T̂‖²."""
    A, Bt, p = uploads(seed, clients, k, shape)
    T, G, H = target(A, Bt, p), gram_blocks(Bt), gram_blocks(A)
    v = torch.randn(clients, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    u, below_u = step(p, v, G, H, p)
    v_, below_v = step(v, u, H, G, p)
    size = float(T.square().sum())
    for result, below in ((product(A, Bt, u, v), below_u), (product(A, Bt, u, v_), below_v)):
        assert float((result * (T - result)).sum()) == pytest.approx(0, abs=EXACT * size)
        assert float(below) == pytest.approx(float(result.square().sum()), rel=1e-6, abs=EXACT * size)


@given(**sizes, equal=st.sampled_from(["A", "B", "all"]))
@LAWS
def test_where_fedit_is_exact_so_is_this(seed, clients, k, shape, equal):
    """Test 5: equal A_i, equal B_i, or clients that coincide (X is singular): exact, and the pair is FedIT's."""
    A, Bt, p = uploads(seed, clients, k, shape)
    A = A[:1].expand_as(A) if equal in ("A", "all") else A
    Bt = Bt[:1].expand_as(Bt) if equal in ("B", "all") else Bt
    pair = mixed(pairs(A, Bt), p.tolist(), 50)
    torch.testing.assert_close(pair.Bt.T @ pair.A, target(A, Bt, p), atol=EXACT, rtol=EXACT)
    torch.testing.assert_close(pair.A, torch.tensordot(p, A, 1), atol=1e-7, rtol=0)
    torch.testing.assert_close(pair.Bt, torch.tensordot(p, Bt, 1), atol=1e-7, rtol=0)


@given(**sizes)
@LAWS
def test_scale_and_sign_are_fixed(seed, clients, k, shape):
    """Test 6: (c u, v / c) is the same product for any c; the pair that is served has FedIT's ‖B‖ / ‖A‖."""
    A, Bt, p = uploads(seed, clients, k, shape)
    u, v = mixing_weights(A, Bt, p, 50)
    pair = mixed(pairs(A, Bt), p.tolist(), 50)
    torch.testing.assert_close(pair.Bt.T @ pair.A, product(A, Bt, -3 * u, v / -3), atol=EXACT, rtol=EXACT)
    ratio = torch.tensordot(p, Bt, 1).norm() / torch.tensordot(p, A, 1).norm()
    assert float(pair.Bt.norm() / pair.A.norm()) == pytest.approx(float(ratio), rel=1e-9)
    # The factor's sign is that of Σ v_i A_i with Σ v_i > 0.
    way = torch.tensordot(v / v.sum(), A, 1)
    assert float((pair.A * way).sum()) > 0


def test_a_fit_that_ends_with_negative_weights_is_turned():
    """Draws for which the alternation ends with Σ v_i < 0: both factors change their sign, the product does not."""
    draw = torch.Generator().manual_seed(143)
    turned = 0
    for _ in range(200):
        A, Bt = torch.randn(4, 1, 6, generator=draw).double(), torch.randn(4, 1, 5, generator=draw).double()
        p = torch.full((4,), 0.25, dtype=torch.float64)
        u, v = mixing_weights(A, Bt, p, 50)
        if v.sum() < 0:
            turned += 1
            pair = mixed(pairs(A, Bt), p.tolist(), 50)
            torch.testing.assert_close(pair.Bt.T @ pair.A, product(A, Bt, u, v), atol=EXACT, rtol=EXACT)
            assert float((pair.A * torch.tensordot(v, A, 1)).sum()) < 0
    assert turned, "no draw shows what this test is about"


def test_orthogonal_clients_leave_one():
    """Test 8: k = 1, orthonormal b_i and a_i: F(p, p) = (Σp²)² - 2Σp³ + Σp²; the minimum Σp² - max p² keeps one client.

    Two equal clients: both are 1/4, and the weights stay where they were.
    """
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    A, Bt = torch.eye(3, 5, dtype=torch.float64)[:, None], torch.eye(3, 4, dtype=torch.float64)[:, None]
    squares = p.square().sum()
    assert error(A, Bt, p, p, p) == pytest.approx(float(squares**2 - 2 * p.pow(3).sum() + squares))
    u, v = mixing_weights(A, Bt, p, 50)
    assert error(A, Bt, p, u, v) == pytest.approx(float(squares - 0.25), abs=1e-7)
    half = torch.full((2,), 0.5, dtype=torch.float64)
    u, v = mixing_weights(A[:2], Bt[:2], half, 50)
    assert error(A[:2], Bt[:2], half, half, half) == pytest.approx(0.25)
    assert error(A[:2], Bt[:2], half, u, v) == pytest.approx(0.25)
    assert [*u.tolist(), *v.tolist()] == pytest.approx([0.5] * 4)


@given(**sizes)
@LAWS
def test_the_order_of_clients_does_not_matter(seed, clients, k, shape):
    """Test 9: a permutation of the clients permutes u and v and leaves the pair."""
    A, Bt, p = uploads(seed, clients, k, shape)
    order = torch.randperm(clients, generator=torch.Generator().manual_seed(seed))
    u, v = mixing_weights(A, Bt, p, 5)
    u_, v_ = mixing_weights(A[order], Bt[order], p[order], 5)
    torch.testing.assert_close(u_, u[order], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(v_, v[order], atol=1e-6, rtol=1e-6)


def test_before_any_training_nothing_moves():
    """All B_i zero: T = 0 and every X is zero; the pair is (Ā, 0), not an arbitrary v. B̄ = 0 alone stays finite."""
    A, Bt, p = uploads(0, 3, 2, (6, 5))
    pair = mixed(pairs(A, torch.zeros_like(Bt)), p.tolist(), 50)
    torch.testing.assert_close(pair.A, torch.tensordot(p, A, 1))
    assert not pair.Bt.any()
    opposite = torch.cat([Bt[:1], -Bt[:1]])
    pair = mixed(pairs(A[:2], opposite), [0.5, 0.5], 50)
    assert torch.isfinite(pair.A).all()
    assert torch.isfinite(pair.Bt).all()
    half = torch.full((2,), 0.5, dtype=torch.float64)
    assert error(A[:2], opposite, half, *mixing_weights(A[:2], opposite, half, 50)) < error(
        A[:2], opposite, half, half, half
    )


# --- the method ---


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_unequal_ranks_are_filled_up_with_zeros(weighting):
    """Layer by layer, the pair is mixed from [A_i; 0] and [B_i 0] at one scale, with one p; the head is the p-mean."""
    method = FLoRANA(weighting=weighting)
    world, round = played(method, 2), plan(0)
    passed = exchanges(method, world, round)
    after = method.aggregate(world.state, iter([x.update for x in passed]), round).adapter
    raw = torch.tensor([float(x.site.client.examples) if weighting == "examples" else 1.0 for x in passed])
    p = (raw / raw.sum()).double()
    for name, pair in after.layers.items():
        d_in, d_out = TEMPLATE.layers[name]
        A = torch.zeros(len(passed), RANK, d_in, dtype=torch.float64)
        Bt = torch.zeros(len(passed), RANK, d_out, dtype=torch.float64)
        for i, x in enumerate(passed):
            trained = x.trained.adapter.layers[name]
            assert trained.scale == pair.scale == TEMPLATE.scale(RANK)
            A[i, : trained.rank], Bt[i, : trained.rank] = trained.A, trained.Bt
        dense = torch.stack(
            [x.trained.adapter.layers[name].Bt.double().T @ x.trained.adapter.layers[name].A.double() for x in passed]
        )
        torch.testing.assert_close(target(A, Bt, p), torch.tensordot(p, dense, 1))  # padding leaves the target
        fitted = mixed(pairs(A, Bt), p.tolist(), 50)
        torch.testing.assert_close(pair.A.double(), fitted.A, atol=2e-5, rtol=0)
        torch.testing.assert_close(pair.Bt.double(), fitted.Bt, atol=2e-5, rtol=0)
        before = float((target(A, Bt, p) - product(A, Bt, p, p)).norm())
        assert float((target(A, Bt, p) - pair.Bt.double().T @ pair.A.double()).norm()) < before
    for name, tensor in after.dense.items():
        mean = sum(w * x.trained.adapter.dense[name] for w, x in zip(p.tolist(), passed, strict=True))
        torch.testing.assert_close(tensor, mean, atol=ROUNDED, rtol=0)


def test_clients_count_equally_by_default():
    """The paper's target is the plain mean over clients: numbers of examples do not matter unless asked for."""
    world, round = played(FLoRANA(), 1), plan(0)
    updates = [x.update for x in exchanges(FLoRANA(), world, round)]
    counted = [replace(update, examples=1 + 7 * update.client) for update in updates]
    for method, same in ((FLoRANA(), True), (FLoRANA(weighting="examples"), False)):
        here, there = (method.aggregate(world.state, iter(u), round).adapter.layers["up"].A for u in (updates, counted))
        assert torch.equal(here, there) == same


def test_traffic_is_fedits():
    """Equal ranks: the bytes of FedIT both ways, u and v included, because they stay at the server."""
    method, fedit, round = FLoRANA(), FedIT(rank="server"), plan(1, (0, 1, 2), EQUAL)
    world = play(method, begun(method, fleet=EQUAL), plan(0, (0, 1, 2, 3), EQUAL))
    ours, theirs = exchanges(method, world, round), exchanges(fedit, World(ServerState(world.state.adapter)), round)
    assert [(x.broadcast.nbytes, x.update.nbytes) for x in ours] == [
        (x.broadcast.nbytes, x.update.nbytes) for x in theirs
    ]
    head = sum(tensor.nbytes for tensor in TEMPLATE.dense.values())
    assert ours[0].update.nbytes == head + 4 * RANK * sum(d_in + d_out for d_in, d_out in TEMPLATE.layers.values())
    for x in exchanges(method, world, plan(0)):
        assert_same_adapter(x.broadcast.adapter, leading(world.state.adapter, x.site.client.rank))


def test_one_client_and_no_sweeps_are_fedit():
    """A round of one client ends with what it trained; with 0 sweeps the round is FedIT's."""
    fedit = FedIT(rank="server")
    world = World(play(fedit, begun(fedit, fleet=EQUAL), plan(0, (0, 1, 2, 3), EQUAL)).state)
    for method, members in ((FLoRANA(), (2,)), (FLoRANA(sweeps=0, weighting="examples"), (0, 1, 2, 3))):
        round = plan(1, members, EQUAL)
        ours, theirs = (play(m, world, round).state.adapter.tensors() for m in (method, fedit))
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, atol=ROUNDED, rtol=0)


def test_equal_ranks_and_no_training_change_nothing():
    """Nobody trains, all hold everything: all clients coincide and the state stays, bit for bit."""
    method = FLoRANA(weighting="examples")
    world = play(method, begun(method, fleet=EQUAL), plan(0, (0, 1, 2, 3), EQUAL))
    still = play(method, world, plan(1, (0, 1, 2, 3), EQUAL), fake_training(0.0))
    assert_same_adapter(still.state.adapter, world.state.adapter)


def test_a_part_that_nobody_holds_is_kept():
    """A cohort of ranks 1, 2 and 4: parts 4 to 7 stay bit for bit, and take no part in the fit of the others."""
    method = FLoRANA()
    world, round = played(method, 2), plan(2, (0, 1, 2))
    after = play(method, world, round).state.adapter
    for name, pair in after.layers.items():
        old = world.state.adapter.layers[name]
        assert torch.equal(pair.A[4:], old.A[4:])
        assert torch.equal(pair.Bt[4:], old.Bt[4:])
        assert old.Bt[4:].any()
        assert not torch.equal(pair.Bt[:4], old.Bt[:4])
    alone = play(method, World(ServerState(leading(world.state.adapter, 4))), round).state.adapter
    assert_same_adapter(leading(after, 4), alone)


def test_layers_have_weights_of_their_own():
    """The objective is a sum over layers: another layer's uploads do not move this one's pair."""
    method = FLoRANA()
    world, round = played(method, 1), plan(0)
    updates = [x.update for x in exchanges(method, world, round)]
    changed = [
        replace(u, adapter=replace(u.adapter, layers={**u.adapter.layers, "up": _twice(u.adapter.layers["up"])}))
        for u in updates
    ]
    here, there = (method.aggregate(world.state, iter(us), round).adapter.layers for us in (updates, changed))
    assert torch.equal(here["down"].Bt, there["down"].Bt)
    assert not torch.equal(here["up"].Bt, there["up"].Bt)


def _twice(pair: LoRA) -> LoRA:
    return LoRA(pair.A, 2 * pair.Bt, pair.scale)


def test_the_fleet_here_is_unequal():
    """The tests above would not see zero padding on a fleet of one rank."""
    assert len({FLEET[i].rank for i in COHORTS[0]}) > 2
