"""LoRA-FAIR: the fitted correction of B against dense oracles, and what the method reduces to."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora.algebra.adapters import add, all_finite
from fslora.algebra.lowrank import stacked
from fslora.algebra.rows import leading
from fslora.methods.fedit import FedIT
from fslora.methods.lora_fair import LoRAFAIR, cosine_correction, cosine_slope, squared_correction
from fslora.types import Client, LoRA, ServerState, Start, Trained
from kit import (
    FLEET,
    RANK,
    TEMPLATE,
    WIDE,
    World,
    assert_same_adapter,
    assert_same_function,
    begun,
    deltas,
    exchanges,
    fake_training,
    plan,
    play,
    played,
)

LAWS = settings(max_examples=25, deadline=None, derandomize=True, database=None)
# Float64 throughout; the smallest eigenvalue of a drawn A Aᵀ may be 1e-4 of the largest.
EXACT = 1e-8
# Products of sums of a few float32 numbers below 4.
ROUNDED = 5e-6
# Second differences of a smooth function at a step of 1e-5, in float64.
DIFFERENCES = 1e-6
EQUAL = tuple(Client(number, RANK, examples) for number, examples in enumerate((5, 1, 20, 3)))

sizes = {
    "seed": st.integers(0, 10_000),
    "clients": st.integers(1, 5),
    "k": st.integers(1, 4),
    "shape": st.tuples(st.integers(6, 9), st.integers(4, 9)),
}
"""Ā is wider than high: a square one may be drawn nearly singular (1 of 1400), and with λ = 0 nothing is exact then."""


def uploads(seed: int, clients: int, k: int, shape: tuple[int, int]) -> tuple[LoRA, list[LoRA], list[float]]:
    """Ā and B̄, every A_i and B_i, and unequal weights; float64, a scale that must not matter."""
    draw = torch.Generator().manual_seed(seed)
    normal = {"generator": draw, "dtype": torch.float64}
    d_in, d_out = shape
    factors = [LoRA(torch.randn(k, d_in, **normal), torch.randn(k, d_out, **normal), 2.0) for _ in range(clients)]
    raw = torch.rand(clients, **normal) + 0.1
    shares = (raw / raw.sum()).tolist()
    return averaged(factors, shares), factors, shares


def averaged(factors: list[LoRA], shares: list[float]) -> LoRA:
    A = sum(share * pair.A for share, pair in zip(shares, factors, strict=True))
    Bt = sum(share * pair.Bt for share, pair in zip(shares, factors, strict=True))
    return LoRA(A, Bt, factors[0].scale)


def target(factors: list[LoRA], shares: list[float]) -> torch.Tensor:
    """ΔW = Σ p_i B_i A_i, dense and unscaled."""
    return sum(share * pair.Bt.T @ pair.A for share, pair in zip(shares, factors, strict=True))


def distance(dW: torch.Tensor, X: torch.Tensor, by_column: bool) -> torch.Tensor:
    if by_column:
        return (1 - torch.cosine_similarity(dW, X, dim=0)).mean()
    return 1 - torch.cosine_similarity(dW.flatten(), X.flatten(), dim=0)


# --- the closed form ---


@given(**sizes, penalty=st.sampled_from([0.0, 0.01, 1.0, 30.0]))
@LAWS
def test_the_closed_form_is_the_dense_minimum(seed, clients, k, shape, penalty):
    """Tests 1, 2: ΔB = E Āᵀ (Ā Āᵀ + λ I)⁻¹ with E = ΔW - B̄ Ā formed densely, and the gradient is zero there."""
    mean, factors, shares = uploads(seed, clients, k, shape)
    dW, B = target(factors, shares), mean.Bt.T
    dB = squared_correction(mean, factors, shares, penalty).T
    E = dW - B @ mean.A
    dense = E @ mean.A.T @ torch.linalg.inv(mean.A @ mean.A.T + penalty * torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(dB, dense, atol=EXACT, rtol=EXACT)
    gradient = ((B + dB) @ mean.A - dW) @ mean.A.T + penalty * dB
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=EXACT, rtol=0)


@given(**sizes, equal=st.sampled_from(["A", "B", "one client"]))
@LAWS
def test_nothing_lost_nothing_corrected(seed, clients, k, shape, equal):
    """Test 1: E = Σ p_i (B_i - B̄)(A_i - Ā) is zero with equal A_i, equal B_i or one client, and so is every ΔB."""
    _, factors, shares = uploads(seed, clients, k, shape)
    if equal == "one client":
        factors, shares = factors[:1], [1.0]
    elif equal == "A":
        factors = [LoRA(factors[0].A, pair.Bt, pair.scale) for pair in factors]
    else:
        factors = [LoRA(pair.A, factors[0].Bt, pair.scale) for pair in factors]
    mean = averaged(factors, shares)
    zero = torch.zeros_like(mean.Bt)
    torch.testing.assert_close(squared_correction(mean, factors, shares, 0.0), zero, atol=EXACT, rtol=0)
    for by_column in (False, True):
        moved = cosine_correction(mean, factors, shares, 0.0, 20, by_column)
        torch.testing.assert_close(moved, zero, atol=EXACT, rtol=0)


@given(**sizes)
@LAWS
def test_what_remains_lies_outside_the_row_space(seed, clients, k, shape):
    """Test 3: with λ = 0 the remaining error is E (I - P), P the projection on the row space of Ā."""
    mean, factors, shares = uploads(seed, clients, k, shape)
    dW = target(factors, shares)
    served = (mean.Bt + squared_correction(mean, factors, shares, 0.0)).T @ mean.A
    P = torch.linalg.pinv(mean.A) @ mean.A
    E = dW - mean.Bt.T @ mean.A
    torch.testing.assert_close(dW - served, E - E @ P, atol=EXACT, rtol=EXACT)


def test_exact_where_the_rows_of_the_mean_span_everything():
    """Test 3: with r = d_in and Ā invertible, λ = 0 serves the mean product."""
    mean, factors, shares = uploads(0, 4, 4, (4, 7))
    served = (mean.Bt + squared_correction(mean, factors, shares, 0.0)).T @ mean.A
    torch.testing.assert_close(served, target(factors, shares), atol=EXACT, rtol=EXACT)


@given(**sizes)
@LAWS
def test_a_larger_penalty_corrects_less(seed, clients, k, shape):
    """Test 4: as λ grows, ‖ΔW - B'Ā‖ never falls and ‖ΔB‖ never rises; λ → ∞ is FedIT, and no λ is further off."""
    mean, factors, shares = uploads(seed, clients, k, shape)
    dW = target(factors, shares)
    errors, sizes_ = [], []
    for penalty in (0.0, 1e-3, 1e-2, 0.1, 1.0, 10.0, 1e9):
        dBt = squared_correction(mean, factors, shares, penalty)
        errors.append(float((dW - (mean.Bt + dBt).T @ mean.A).norm()))
        sizes_.append(float(dBt.norm()))
    assert all(left <= right + EXACT for left, right in pairwise(errors))
    assert all(left >= right - EXACT for left, right in pairwise(sizes_))
    fedit = float((dW - mean.Bt.T @ mean.A).norm())
    assert errors[-1] <= fedit + EXACT
    assert errors[-1] == pytest.approx(fedit, abs=1e-6)


@given(**sizes)
@LAWS
def test_the_largest_reachable_cosine(seed, clients, k, shape):
    """Test 5: with λ = 0 the closed form reaches the flattened cosine ‖ΔW P‖ / ‖ΔW‖, and no gradient step beats it."""
    mean, factors, shares = uploads(seed, clients, k, shape)
    dW = target(factors, shares)
    best = (dW @ torch.linalg.pinv(mean.A) @ mean.A).norm() / dW.norm()
    served = (mean.Bt + squared_correction(mean, factors, shares, 0.0)).T @ mean.A
    assert float(1 - distance(dW, served, False)) == pytest.approx(float(best), abs=EXACT)
    steps = (mean.Bt + cosine_correction(mean, factors, shares, 0.0, 50, False)).T @ mean.A
    assert float(1 - distance(dW, steps, False)) <= float(best) + EXACT


@given(**sizes, penalty=st.sampled_from([0.0, 0.01, 1.0]))
@LAWS
def test_a_common_rotation_turns_the_correction(seed, clients, k, shape, penalty):
    """Test 6: (B_i M, Mᵀ A_i) with one orthogonal M: ΔB becomes ΔB M for any λ.

    (B_i M, M⁻¹ A_i) with a general M leaves B'Ā for λ = 0.
    """
    mean, factors, shares = uploads(seed, clients, k, shape)
    before = squared_correction(mean, factors, shares, penalty)
    draw = torch.Generator().manual_seed(seed + 1)
    M = torch.linalg.qr(torch.randn(k, k, generator=draw, dtype=torch.float64)).Q
    turned = [LoRA(M.T @ pair.A, M.T @ pair.Bt, pair.scale) for pair in factors]
    after = squared_correction(averaged(turned, shares), turned, shares, penalty)
    torch.testing.assert_close(after, M.T @ before, atol=EXACT, rtol=EXACT)
    if penalty == 0:
        size = torch.linspace(0.5, 2, k, dtype=torch.float64)[:, None]
        sheared = [LoRA(M.T @ pair.A / size, size * (M.T @ pair.Bt), pair.scale) for pair in factors]
        mean_, served = averaged(sheared, shares), (mean.Bt + before).T @ mean.A
        product = (mean_.Bt + squared_correction(mean_, sheared, shares, 0.0)).T @ mean_.A
        torch.testing.assert_close(product, served, atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize("penalty", [0.0, 0.01, 1.0])
def test_different_rotations_change_the_result(penalty):
    """Test 6, negative: (-B_1, -A_1) for one client alone leaves ΔW, but Ā is another and so is B'Ā."""
    mean, factors, shares = uploads(7, 3, 2, (6, 5))
    flipped = [LoRA(-factors[0].A, -factors[0].Bt, 2.0), *factors[1:]]
    torch.testing.assert_close(target(flipped, shares), target(factors, shares))
    mean_ = averaged(flipped, shares)
    here = (mean.Bt + squared_correction(mean, factors, shares, penalty)).T @ mean.A
    there = (mean_.Bt + squared_correction(mean_, flipped, shares, penalty)).T @ mean_.A
    assert (there - here).norm() > 0.1 * here.norm()


def test_a_mean_of_smaller_rank_is_fitted_by_the_pseudo_inverse():
    """λ = 0, r = 6 > d_in = 4, and a doubled row: finite, and exact because Ā still spans all columns."""
    mean, factors, shares = uploads(1, 3, 6, (4, 5))
    factors = [replace(pair, A=torch.cat([pair.A[:5], pair.A[:1]])) for pair in factors]
    mean = averaged(factors, shares)
    dBt = squared_correction(mean, factors, shares, 0.0)
    served = (mean.Bt + dBt).T @ mean.A
    torch.testing.assert_close(served, target(factors, shares), atol=EXACT, rtol=EXACT)
    assert dBt.norm() < 10 * mean.Bt.norm()


# --- the cosines ---

both_cosines = pytest.mark.parametrize("by_column", [False, True], ids=["flattened", "by column"])


@both_cosines
@given(**sizes)
@LAWS
def test_the_gradient_is_that_of_the_cosine(by_column, seed, clients, k, shape):
    """Test 7: the factored gradient equals central differences of the dense 1 - cos; along B itself it is zero."""
    mean, factors, shares = uploads(seed, clients, k, shape)
    dW = target(factors, shares)
    gradient, _ = cosine_slope(stacked(factors, shares), mean.A, mean.Bt, by_column)
    draw = torch.Generator().manual_seed(seed + 1)
    for _ in range(3):
        way = torch.randn(mean.Bt.shape, generator=draw, dtype=torch.float64)
        h = 1e-5
        there, back = (distance(dW, (mean.Bt + s * h * way).T @ mean.A, by_column) for s in (1, -1))
        slope = (there - back) / (2 * h)
        assert float((gradient * way).sum()) == pytest.approx(float(slope), abs=DIFFERENCES)
    assert float((gradient * mean.Bt).sum()) == pytest.approx(0, abs=EXACT)


@both_cosines
@given(**sizes)
@LAWS
def test_the_curvature_is_that_across_the_directions(by_column, seed, clients, k, shape):
    """Where X = T, D's second difference along a change across X_j is the quadratic form of the returned curvature."""
    mean, _, _ = uploads(seed, clients, k, shape)
    dW = mean.Bt.T @ mean.A
    _, curvature = cosine_slope(mean, mean.A, mean.Bt, by_column)
    way = torch.randn(mean.Bt.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    h, W = 1e-4, way.T @ mean.A
    there, back = (distance(dW, dW + s * h * W, by_column) for s in (1, -1))
    shape_ = 0 if by_column else (0, 1)
    along = (W * dW).sum(shape_).square() / dW.square().sum(shape_) ** 2
    along = along.mean() if by_column else along
    expected = (way * (curvature @ way)).sum() - along
    assert float((there + back) / h**2) == pytest.approx(float(expected), rel=1e-3, abs=1e-4)


@both_cosines
@given(**sizes, penalty=st.sampled_from([0.0, 0.01]))
@LAWS
def test_no_step_rises(by_column, seed, clients, k, shape, penalty):
    """The objective falls with every step, unrelated clients included; no step size is chosen for it.

    Clients that drifted apart by a fifth: after 20 steps the gradient is less than a twentieth of what it was, or by
    column, where some columns may be small, a fifth (in 1500 draws 0.0083 and 0.078 at most).
    """
    mean, factors, shares = uploads(seed, clients, k, shape)

    def path(mean, factors, steps) -> tuple[list[float], list[float]]:
        dW, stack, values, slopes = target(factors, shares), stacked(factors, shares), [], []
        for number in range(steps + 1):
            dBt = cosine_correction(mean, factors, shares, penalty, number, by_column)
            slope, _ = cosine_slope(stack, mean.A, mean.Bt + dBt, by_column)
            value = distance(dW, (mean.Bt + dBt).T @ mean.A, by_column) + penalty * dBt.square().sum()
            values.append(float(value))
            slopes.append(float((slope + 2 * penalty * dBt).norm()))
        return values, slopes

    values, _ = path(mean, factors, 10)
    assert all(left + EXACT >= right for left, right in pairwise(values))
    common = factors[0]
    near = [LoRA(common.A + 0.2 * pair.A, common.Bt + 0.2 * pair.Bt, 2.0) for pair in factors]
    _, slopes = path(averaged(near, shares), near, 20)
    assert slopes[-1] <= (0.2 if by_column else 0.05) * slopes[0] + EXACT


@both_cosines
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
def test_no_mean_is_too_small_for_the_steps(by_column, size):
    """λ = 0: multiplying every B_i by c multiplies ΔB by c (c = 1e-6 is a first round); a fixed step size would not."""
    mean, factors, shares = uploads(4, 3, 2, (6, 5))
    small = [replace(pair, Bt=size * pair.Bt) for pair in factors]
    here = cosine_correction(mean, factors, shares, 0.0, 20, by_column)
    there = cosine_correction(averaged(small, shares), small, shares, 0.0, 20, by_column)
    assert here.norm() > 1e-2 * mean.Bt.norm()
    torch.testing.assert_close(there, size * here, rtol=1e-6, atol=0)


@both_cosines
def test_zero_products_and_columns_are_left_alone(by_column):
    """Where T or B̄ Ā is zero the cosine is undefined: ΔB = 0; a column of zeros counts for nothing."""
    mean, factors, shares = uploads(5, 3, 2, (6, 5))
    still = [replace(pair, Bt=torch.zeros_like(pair.Bt)) for pair in factors]
    assert not cosine_correction(averaged(still, shares), still, shares, 0.01, 5, by_column).any()
    opposite = [factors[0], replace(factors[0], Bt=-factors[0].Bt, A=2 * factors[0].A)]
    assert not cosine_correction(averaged(opposite, [0.5, 0.5]), opposite, [0.5, 0.5], 0.01, 5, by_column).any()
    without = [replace(pair, A=torch.cat([pair.A, torch.zeros(2, 1)], dim=1)) for pair in factors]
    torch.testing.assert_close(
        cosine_correction(averaged(without, shares), without, shares, 0.01, 20, by_column),
        cosine_correction(mean, factors, shares, 0.01, 20, by_column),
    )


# --- the method ---


def only(factor: str):
    """The kit's training, of one factor and the head alone."""
    noise = fake_training()

    def train(start: Start, client: Client, round) -> Trained:
        trained = noise(start, client, round)
        values = trained.adapter.tensors()
        kept = {
            n: t if not n.endswith({"A": ":Bt", "B": ":A"}[factor]) else start.adapter.tensors()[n]
            for n, t in values.items()
        }
        return replace(trained, adapter=start.adapter.with_tensors(kept))

    return train


@pytest.mark.parametrize("distance", ["squared", "flattened-cosine", "column-cosine"])
@pytest.mark.parametrize("case", ["one client", "A", "B"])
def test_reduces_to_fedit(distance, case):
    """Equal ranks and one client, or one factor trained: E = 0, so the round ends as FedIT's."""
    fair, fedit = LoRAFAIR(distance=distance, penalty=0.0), FedIT(rank="server")
    world = World(play(fair, begun(fair, fleet=EQUAL), plan(0, (0, 1, 2), EQUAL)).state)
    train = fake_training() if case == "one client" else only(case)
    round = plan(1, (2,) if case == "one client" else (0, 1, 3), EQUAL)
    ours, theirs = play(fair, world, round, train), play(fedit, world, round, train)
    assert not torch.equal(ours.state.adapter.layers["up"].A, world.state.adapter.layers["up"].A) or case == "B"
    assert_same_function(ours.state.adapter, theirs.state.adapter, ROUNDED)


def test_the_distance_is_chosen_by_name():
    """``distance``, ``penalty`` and ``steps`` reach the correction that they name; the three differ."""
    world, round = (
        World(play(LoRAFAIR(), begun(LoRAFAIR(), fleet=EQUAL), plan(0, (0, 1, 2), EQUAL)).state),
        plan(1, (0, 1, 3), EQUAL),
    )
    passed = exchanges(LoRAFAIR(), world, round)
    factors = [x.trained.adapter.layers["up"] for x in passed]
    examples = [x.site.client.examples for x in passed]
    shares = [count / sum(examples) for count in examples]
    mean, found = averaged(factors, shares), []
    for distance, expected in {
        "squared": squared_correction(mean, factors, shares, 0.02),
        "flattened-cosine": cosine_correction(mean, factors, shares, 0.02, 3, False),
        "column-cosine": cosine_correction(mean, factors, shares, 0.02, 3, True),
    }.items():
        method = LoRAFAIR(distance=distance, penalty=0.02, steps=3)
        Bt = method.aggregate(world.state, iter([x.update for x in passed]), round).adapter.layers["up"].Bt
        torch.testing.assert_close(Bt, mean.Bt + expected.float(), atol=ROUNDED, rtol=0)
        found.append(Bt)
    assert min(float((found[i] - found[j]).abs().max()) for i, j in ((0, 1), (0, 2), (1, 2))) > 20 * ROUNDED


def test_an_infinite_penalty_is_fedit_and_the_default_is_not():
    """Test 4 at the method: λ = 1e12 ends as FedIT, factor by factor; the default does not."""
    rounds = plan(0, (0, 1, 2, 3), EQUAL)
    start = fake_training()
    world = play(FedIT(rank="server"), begun(LoRAFAIR(), fleet=EQUAL), rounds, start)
    fedit = play(FedIT(rank="server"), world, plan(1, (0, 1, 2, 3), EQUAL)).state.adapter
    stiff = play(LoRAFAIR(penalty=1e12), world, plan(1, (0, 1, 2, 3), EQUAL)).state.adapter
    default = play(LoRAFAIR(), world, plan(1, (0, 1, 2, 3), EQUAL)).state.adapter
    for name, tensor in fedit.tensors().items():
        torch.testing.assert_close(stiff.tensors()[name], tensor, atol=ROUNDED, rtol=0)
    assert (default.layers["up"].Bt - fedit.layers["up"].Bt).abs().max() > 1e-3
    assert_same_adapter(replace_pairs(default, fedit), fedit)


def replace_pairs(adapter, other):
    """``adapter`` with the B of ``other``: what LoRA-FAIR leaves as FedIT has it."""
    layers = {name: replace(pair, Bt=other.layers[name].Bt) for name, pair in adapter.layers.items()}
    return replace(adapter, layers=layers)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_unequal_ranks_are_filled_up_with_zeros(weighting):
    """Ā, B̄ and ΔW over [A_i; 0], [B_i 0], one p and one scale; ΔB by the dense formula; the head's mean."""
    method = LoRAFAIR(penalty=0.3, weighting=weighting)
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
            assert x.start.adapter.layers[name].scale == TEMPLATE.scale(RANK)
            trained = x.trained.adapter.layers[name]
            A[i, : trained.rank], Bt[i, : trained.rank] = trained.A, trained.Bt
        mean_A, mean_B = torch.tensordot(p, A, 1), torch.tensordot(p, Bt, 1).T
        E = torch.einsum("m,mko,mki->oi", p, Bt, A) - mean_B @ mean_A
        gram = mean_A @ mean_A.T + 0.3 * torch.eye(RANK, dtype=torch.float64)
        corrected = mean_B + E @ mean_A.T @ torch.linalg.inv(gram)
        assert pair.scale == TEMPLATE.scale(RANK)
        torch.testing.assert_close(pair.A.double(), mean_A, atol=ROUNDED, rtol=ROUNDED)
        torch.testing.assert_close(pair.Bt.double().T, corrected, atol=ROUNDED, rtol=ROUNDED)
    for name, tensor in after.dense.items():
        mean = sum(w * x.trained.adapter.dense[name] for w, x in zip(p.tolist(), passed, strict=True))
        torch.testing.assert_close(tensor, mean, atol=ROUNDED, rtol=0)


def test_clients_go_on_from_the_corrected_pair():
    """Down: the first k_i parts of Ā and B̄ + ΔB; bytes are k_i (d_in + d_out) per layer and the head, both ways."""
    method = LoRAFAIR()
    world = played(method, 2)
    head = sum(tensor.nbytes for tensor in TEMPLATE.dense.values())
    for x in exchanges(method, world, plan(0)):
        assert_same_adapter(x.start.adapter, leading(world.state.adapter, x.site.client.rank))
        expected = head + 4 * x.site.client.rank * sum(d_in + d_out for d_in, d_out in TEMPLATE.layers.values())
        assert x.broadcast.nbytes == x.update.nbytes == expected


def test_a_part_that_nobody_holds_is_kept():
    """A cohort of ranks 1, 2 and 4: parts 4 to 7 stay bit for bit, and take no part in the fit of the others."""
    method = LoRAFAIR()
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


@pytest.mark.parametrize("distance", ["squared", "flattened-cosine", "column-cosine"])
def test_equal_ranks_and_no_training_change_nothing(distance):
    """Nobody trains, all hold everything: E = 0 and the mean is what it was, bit for bit."""
    method = LoRAFAIR(distance=distance)
    world = play(method, begun(method, fleet=EQUAL), plan(0, (0, 1, 2, 3), EQUAL))
    still = play(method, world, plan(1, (0, 1, 2, 3), EQUAL), fake_training(0.0))
    assert_same_adapter(still.state.adapter, world.state.adapter)


def test_zero_padding_shrinks_by_the_share_of_the_holders():
    """Nobody trains, unequal ranks, λ = 0: part j is multiplied by q_j = Σ p_i over its holders, not by FedIT's q_j².

    ΔW = Σ_j q_j b_j a_jᵀ and Ā has rows q_j a_j, all independent: B̄ + ΔB is the old B.
    """
    method = LoRAFAIR(penalty=0.0, weighting="uniform")
    rounds = (plan(0, template=WIDE), plan(1, (0, 1, 2, 3, 4, 5), template=WIDE))
    world = play(method, begun(method, template=WIDE), rounds[0])
    after = play(method, world, rounds[1], fake_training(0.0)).state.adapter
    q = torch.tensor([sum(client.rank > j for client in FLEET) / len(FLEET) for j in range(RANK)])
    assert q.min() < 0.4
    for name, pair in after.layers.items():
        old = world.state.adapter.layers[name]
        # A fit of 8 rows whose lengths differ by a factor of q's range, through float32 factors.
        torch.testing.assert_close(pair.Bt, old.Bt, atol=2e-5, rtol=0)
        torch.testing.assert_close(pair.A, q[:, None] * old.A, atol=ROUNDED, rtol=0)


def test_a_layer_narrower_than_the_rank_stays_finite():
    """r = 8 on layers of width 3 and 4 with λ = 0: Ā Āᵀ is singular every round, and the mean product is served."""
    method = LoRAFAIR(penalty=0.0)
    world, round = begun(method, fleet=EQUAL), plan(0, (0, 1, 2, 3), EQUAL)
    passed = exchanges(method, world, round)
    after = method.aggregate(world.state, iter([x.update for x in passed]), round).adapter
    assert all_finite(after)
    examples = [x.site.client.examples for x in passed]
    for name in ("down", "out"):
        mean = sum(n / sum(examples) * deltas(x.trained.adapter)[name] for n, x in zip(examples, passed, strict=True))
        torch.testing.assert_close(deltas(after)[name], mean, atol=1e-4, rtol=1e-4)


def test_updates_are_changes():
    """What comes up is trained minus received; the server adds it to the parts that it sent."""
    method = LoRAFAIR()
    world = played(method, 1)
    for x in exchanges(method, world, plan(1)):
        rebuilt = add(leading(world.state.adapter, x.site.client.rank), x.update.adapter)
        for name, tensor in rebuilt.tensors().items():
            torch.testing.assert_close(tensor, x.trained.adapter.tensors()[name], atol=1e-6, rtol=0)
