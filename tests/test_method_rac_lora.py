"""RAC-LoRA: a shared random factor makes the mean exact; orthonormal rows make a step a projected gradient step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora.algebra.sketch import draw_factor
from fslora.methods.baselog import missed
from fslora.methods.ffa_lora import FFALoRA
from fslora.methods.rac_lora import RACLoRA
from fslora.rng import Rng
from fslora.types import Adapter, Client, LoRA, Round, Start, Tensor, Trained
from kit import (
    RANK,
    TEMPLATE,
    WIDE,
    World,
    assert_same_adapter,
    assert_same_function,
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
from quadratic import Targets, descent, drawn_targets

# Sums of some dozens of float32 products of numbers near 1.
SUMS = 2e-5
LAWS = settings(max_examples=25, deadline=None, derandomize=True, database=None)
SIDES = ["A", "B"]
S = WIDE.scale(WIDE.rank)
ONE = (Client(0, RANK, 4),)


def drawn(start: Start) -> Mapping[str, Tensor]:
    """The random factor of each layer, rank-major."""
    return {n: pair.A if start.trains == "B" else pair.Bt for n, pair in start.adapter.layers.items()}


def projection(rows: Tensor) -> Tensor:
    """H = Aᵀ (A Aᵀ)⁺ A, float64."""
    A = rows.double()
    return A.T @ torch.linalg.pinv(A @ A.T) @ A


def projected(error: Tensor, rows: Tensor, side: str) -> Tensor:
    """E H_A when B is trained, H_B E when A is."""
    return error @ projection(rows) if side == "B" else projection(rows) @ error


def base_of(method: RACLoRA, world: World, template=WIDE) -> dict[str, Tensor]:
    """W - W0 by layer, float64 [o i]."""
    base = method.base(world.state)
    return deltas(base) if base else {n: torch.zeros(o, i).double() for n, (i, o) in template.layers.items()}


# --- the aggregation ---


@LAWS
@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 30)), min_size=1, max_size=6),
    st.sampled_from(SIDES),
    st.sampled_from(["examples", "uniform"]),
    st.sampled_from(["orthonormal", "gaussian"]),
    st.sampled_from([TEMPLATE, WIDE]),
)
def test_the_change_is_the_mean_product(clients, side, weighting, sketch, template):
    """s B̄ A_S = Σ_i p_i s B_i A_S[:k_i]: the nested sketch is exact at unequal ranks, absent rows being true zeros."""
    fleet = tuple(Client(number, *facts) for number, facts in enumerate(clients))
    method = RACLoRA(side=side, weighting=weighting, sketch=sketch)
    world = begun(method, template=template, fleet=fleet)
    round = plan(0, tuple(range(len(fleet))), fleet, template)
    passed = exchanges(method, world, round)
    counts = [client.examples if weighting == "examples" else 1 for client in fleet]
    layers = {name: [x.trained.adapter.layers[name] for x in passed] for name in template.layers}
    found = deltas(method.global_adapter(ended(method, world, round, passed).state))
    for name, expected in mean_product(layers, [count / sum(counts) for count in counts]).items():
        torch.testing.assert_close(found[name], expected, atol=SUMS, rtol=SUMS)


@pytest.mark.parametrize("side", SIDES)
def test_all_clients_train_against_leading_rows_of_one_factor(side):
    """A_S[:k_i] is the same for all in a round, another one in the next; the trained factor starts from zero."""
    method = RACLoRA(side=side)
    world, largest = played(method, 2), []
    for number in (2, 3):
        passed = exchanges(method, world, plan(number, (0, 2, 3, 4, 5)))
        full = drawn(passed[2].start)
        largest.append(full["down"])
        for x in passed:
            assert x.start.trains == side
            for name, rows in drawn(x.start).items():
                width = TEMPLATE.layers[name][0 if side == "B" else 1]
                assert rows.shape == (min(x.site.client.rank, width), width)
                assert torch.equal(rows, full[name][: len(rows)])
                assert not x.start.adapter.layers[name].delta.any()
                assert x.start.adapter.layers[name].scale == TEMPLATE.scale(RANK)
    assert not torch.equal(*largest)


def test_the_first_round_is_ffas():
    """Never redrawn, never merged, it is FFA-LoRA: the same frozen factor and deltas give the same B, bit for bit."""
    rac, ffa, round = RACLoRA(sketch="gaussian"), FFALoRA(), plan(0, template=WIDE)
    world = begun(rac, template=WIDE)
    passed = exchanges(rac, world, round)
    frozen = {n: LoRA(A, torch.zeros(RANK, WIDE.layers[n][1]), S) for n, A in drawn(passed[3].start).items()}
    state = begun(ffa, template=WIDE).state
    state = ffa.aggregate(
        replace(state, adapter=Adapter(frozen, state.adapter.dense)), iter([x.update for x in passed]), round
    )
    ours = ended(rac, world, round, passed).state
    assert_same_adapter(rac.global_adapter(ours), ffa.global_adapter(state))


# --- the random factor ---


@LAWS
@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 5))
def test_orthonormal_rows_project(rank, width, seed):
    """A Aᵀ = identity, so that H = Aᵀ A: H² = H = Hᵀ with trace min(r, d)."""
    A = draw_factor("orthonormal", rank, width, Rng(seed)).double()
    k = min(rank, width)
    assert A.shape == (k, width)
    # Float64 rows rounded to float32.
    torch.testing.assert_close(A @ A.T, torch.eye(k).double(), atol=1e-6, rtol=0)
    H = A.T @ A
    torch.testing.assert_close(H @ H, H, atol=1e-6, rtol=0)
    torch.testing.assert_close(H, projection(A), atol=1e-6, rtol=0)
    assert float(H.trace()) == pytest.approx(k, abs=1e-5)


@pytest.mark.parametrize("kind", ["orthonormal", "gaussian"])
@pytest.mark.parametrize("k", [2, 5])
def test_sketches_are_isotropic(kind, k):
    """E[H] = (k / d) · identity for the first k of 5 rows, d = 6: the smallest eigenvalue that the theory asks for."""
    draws, d = 3000, 6
    mean = sum(projection(draw_factor(kind, 5, d, Rng(seed))[:k]) for seed in range(draws)) / draws
    # Entries of H are bounded by 1, their variance by 1/4: six standard errors.
    torch.testing.assert_close(mean, torch.eye(d).double() * k / d, atol=6 * 0.5 / draws**0.5, rtol=0)


def test_the_first_rows_do_not_depend_on_the_others():
    """Nested: drawing r rows and keeping k is drawing k rows of that stream, up to rounding of the QR."""
    A = draw_factor("orthonormal", 8, 20, Rng(1))
    q, r = torch.linalg.qr(torch.randn(20, 8, generator=Rng(1).torch(), dtype=torch.float64)[:, :3])
    torch.testing.assert_close(A[:3], (q * r.diagonal().sign()).T.float(), atol=1e-6, rtol=0)


def test_gaussian_rows_have_expected_norm_one():
    """Entries of variance 1 / d: E‖row‖² = 1; they are not orthonormal, and no more than there are columns."""
    A = draw_factor("gaussian", 400, 800, Rng(0)).double()
    squares = A.square().sum(dim=1)
    # A mean of 400 · 800 squares: standard error √(2 / 320000) = 0.0025.
    assert float(squares.mean()) == pytest.approx(1.0, abs=0.015)
    assert squares.std() > 0.02
    assert draw_factor("gaussian", 8, 3, Rng(0)).shape == (3, 3)


# --- what a round does to W ---


@pytest.mark.parametrize("side", SIDES)
def test_a_round_merges_and_leaves_the_function(side):
    """W ← W + s B̄ A_S, then B = 0: what the next round trains on is what is served, and its pairs compute zero."""
    method = RACLoRA(side=side)
    world = played(method, 2)
    served = method.global_adapter(world.state)
    assert served.layers is method.base(world.state).layers
    for x in exchanges(method, world, plan(2)):
        assert not any(pair.delta.any() for pair in x.start.adapter.layers.values())
        assert x.start.adapter.dense is world.state.adapter.dense
    still = play(method, world, plan(2), fake_training(0.0))
    assert_same_function(method.global_adapter(still.state), served, SUMS)


@pytest.mark.parametrize("side", SIDES)
def test_one_sgd_step_is_a_projected_gradient_step(side):
    """Orthonormal rows, one step from zero, one client: W ← W - lr s² G H_A (side A: H_B G), round after round.

    On a quadratic, L = 1 and γ = lr s² ≤ 1, so f falls by at least (γ / 2) ‖G H‖².
    """
    method, targets, lr = RACLoRA(side=side), drawn_targets(ONE, WIDE), 0.2
    gamma = lr * S * S
    assert gamma <= 1
    world = begun(method, template=WIDE, fleet=ONE)
    for number in range(3):
        before = base_of(method, world)
        round = plan(number, (0,), ONE, WIDE)
        training = descent(targets, lr, base={name: tensor.float() for name, tensor in before.items()})
        (x,) = passed = exchanges(method, world, round, training)
        world = ended(method, world, round, passed)
        for name, after in base_of(method, world).items():
            gradient = before[name] - targets[0][name].double()
            step = projected(gradient, drawn(x.start)[name], side)
            torch.testing.assert_close(after, before[name] - gamma * step, atol=SUMS, rtol=0)
            fall = 0.5 * (gradient.square().sum() - (after - targets[0][name].double()).square().sum())
            assert fall >= gamma / 2 * step.square().sum() * (1 - 1e-5)


def test_gaussian_rows_are_another_step():
    """Negative: with plain Gaussian rows a step is W - lr s² G AᵀA, not W - lr s² G H."""
    method, targets, lr = RACLoRA(sketch="gaussian"), drawn_targets(ONE, WIDE), 0.2
    world, round = begun(method, template=WIDE, fleet=ONE), plan(0, (0,), ONE, WIDE)
    (x,) = passed = exchanges(method, world, round, descent(targets, lr))
    for name, after in base_of(method, ended(method, world, round, passed)).items():
        gradient, A = -targets[0][name].double(), drawn(x.start)[name].double()
        torch.testing.assert_close(after, -lr * S * S * gradient @ A.T @ A, atol=SUMS, rtol=0)
        assert (after + lr * S * S * gradient @ projection(A)).abs().max() > 0.05


@pytest.mark.parametrize(("side", "layer"), [("B", "down"), ("A", "up")])
def test_a_full_sketch_is_full_fine_tuning(side, layer):
    """r ≥ the drawn side's width (4): H = identity, and a step is W - lr s² G."""
    method, targets, lr = RACLoRA(side=side), drawn_targets(ONE), 0.05
    world, round = begun(method, fleet=ONE), plan(0, (0,), ONE)
    after = base_of(method, play(method, world, round, descent(targets, lr)), TEMPLATE)[layer]
    torch.testing.assert_close(after, lr * TEMPLATE.scale(RANK) ** 2 * targets[0][layer].double(), atol=SUMS, rtol=SUMS)


def solving(targets: Targets, base: Mapping[str, Tensor]):
    """A local training to the end: the trained factor that is best for ½ ‖W + s B A - M‖², rows orthonormal."""

    def train(start: Start, client: Client, round: Round) -> Trained:
        del round
        layers = {}
        for name, pair in start.adapter.layers.items():
            error = targets[client.id][name] - base[name].float()
            if start.trains == "B":
                layers[name] = replace(pair, Bt=(pair.A @ error.T) / pair.scale)
            else:
                layers[name] = replace(pair, A=(pair.Bt @ error) / pair.scale)
        return Trained(client.id, Adapter(layers, start.adapter.dense), (1.0,))

    return train


@pytest.mark.parametrize("side", SIDES)
def test_exact_solves_project_the_error_away(side):
    """f = ½ ‖W - M‖², best B each round: W - M becomes (W - M)(I - H); it never rises, and falls towards zero."""
    method, targets = RACLoRA(side=side), drawn_targets(ONE, WIDE)
    world = begun(method, template=WIDE, fleet=ONE)
    norms = []
    for number in range(12):
        before = base_of(method, world)
        round = plan(number, (0,), ONE, WIDE)
        (x,) = passed = exchanges(method, world, round, solving(targets, before))
        world = ended(method, world, round, passed)
        for name, after in base_of(method, world).items():
            error = before[name] - targets[0][name].double()
            left = error - projected(error, drawn(x.start)[name], side)
            torch.testing.assert_close(after - targets[0][name].double(), left, atol=4 * SUMS, rtol=0)
        norms.append(sum(float((base_of(method, world)[n] - targets[0][n]).square().sum()) for n in WIDE.layers))
    assert all(later < earlier for earlier, later in pairwise(norms))
    # Each solve keeps (1 - r / d) of the error on average, with d = 24 or 40 and r = 8.
    assert norms[-1] < norms[0] * 0.25


def test_a_factor_that_is_never_redrawn_confines_w():
    """Negative: with one and the same seed for all rounds, W - W0 stays in row(A_S); redrawn, its rank grows."""
    method, targets = RACLoRA(), drawn_targets(ONE, WIDE)

    def rank_after(numbers: tuple[int, ...]) -> int:
        world = begun(method, template=WIDE, fleet=ONE)
        for number in numbers:
            round = plan(number, (0,), ONE, WIDE)
            world = play(method, world, round, descent(targets, 0.1))
        return int(torch.linalg.matrix_rank(base_of(method, world)["up"], atol=1e-4))

    assert rank_after((0, 0)) == RANK
    assert rank_after((0, 1)) == 2 * RANK


# --- messages ---


@pytest.mark.parametrize("side", SIDES)
def test_bytes_are_one_factor_and_a_seed(side):
    """Up k_i d · 4 per layer; down r d · 4 of the last change and its seed, the next seed, the head; d on that side."""
    method = RACLoRA(side=side)
    width = 4 * sum(shape[1 if side == "B" else 0] for shape in WIDE.layers.values())
    head = 4 * sum(tensor.numel() for tensor in WIDE.dense.values())
    world = begun(method, template=WIDE)
    for number in range(3):
        round = plan(number, tuple(range(6)), template=WIDE)
        passed = exchanges(method, world, round)
        for x in passed:
            assert x.update.nbytes == x.site.client.rank * width + head
            assert x.broadcast.nbytes == head + 8 + (RANK * width + 8 if number else 0)
        world = ended(method, world, round, passed)


@pytest.mark.parametrize("side", SIDES)
def test_a_change_is_completed_from_its_own_seed(side):
    """(seed, B̄) is all that a client needs: whatever the number of the round, and however many failed before it."""
    method = RACLoRA(side=side)
    world = begun(method, template=WIDE)
    for number in (3, 11):
        world = play(method, world, plan(number, tuple(range(6)), template=WIDE))
    updates = missed(world.state, 99)
    assert [update.version for update in updates] == [1, 2]
    assert {
        len(getattr(pair, "A" if side == "B" else "Bt")) for u in updates for pair in u.adapter.layers.values()
    } == {0}
    total = sum_of([deltas(method.base_update(update, WIDE)) for update in updates])
    for name, expected in base_of(method, world).items():
        torch.testing.assert_close(total[name], expected, atol=SUMS, rtol=SUMS)


def sum_of(changes: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(change[name] for change in changes) for name in changes[0]}


def test_a_sum_of_changes_is_complete():
    """After an absence too long for the log the sum travels; nothing is drawn for it."""
    method = RACLoRA()
    world = played(method, 9)
    (update,) = missed(world.state, 99)
    assert update.whole
    assert not update.adapter.dense
    assert_same_adapter(method.base_update(update, TEMPLATE), method.base(world.state))
