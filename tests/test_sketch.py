"""The sketch: its index sets, its mean and variance, and that a sketched layer is a plain rank-k LoRA."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, pairwise
from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora.algebra.adapters import rescaled
from fslora.algebra.rows import holders, take
from fslora.algebra.sketch import draw_rows
from fslora.methods.fslora import FSLoRA
from fslora.rng import Rng
from fslora.types import Adapter, Client, LoRA, Round, ServerState, Template

KINDS = ("independent", "balanced", "nested")
# Float64 sums over at most 70 subsets of products of a few numbers near 1.
EXACT = 1e-12
# Ratio of two first AdamW steps whose denominators |g| + eps differ by eps = 1e-12 against |g| > 1e-4.
ADAM = 1e-6
LAWS = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def cohorts(draw):
    """(server rank, the cohort's ranks, its ids): any number of clients, any ranks up to the server's."""
    rank = draw(st.integers(1, 24))
    ranks = draw(st.lists(st.integers(1, rank), min_size=1, max_size=8))
    ids = sorted(draw(st.sets(st.integers(0, 99), min_size=len(ranks), max_size=len(ranks))))
    return rank, ranks, ids


def drawn(kind, rank, ranks, ids, rng) -> list[torch.Tensor]:
    return [draw_rows(kind, rank, ranks, position, ids, rng) for position in range(len(ranks))]


# --- index sets ---


@LAWS
@given(cohorts(), st.sampled_from(KINDS), st.integers(0, 10**6))
def test_index_sets_are_increasing_k_subsets(cohort, kind, seed):
    """|I_i| = k_i, strictly increasing within 0..r-1, int32; the same address gives the same set again."""
    rank, ranks, ids = cohort
    rng = Rng(seed).child("round", 0)
    sets = drawn(kind, rank, ranks, ids, rng)
    for k, index in zip(ranks, sets, strict=True):
        assert index.dtype == torch.int32
        assert index.shape == (k,)
        assert index[0] >= 0
        assert index[-1] < rank
        assert (index[1:] > index[:-1]).all()
    again = drawn(kind, rank, ranks, ids, Rng(seed).child("round").child(0))
    assert all(torch.equal(a, b) for a, b in zip(sets, again, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_other_addresses_give_other_sets(kind):
    """Rounds, seeds and layers redraw: of 40 addresses at C(32, 16) subsets no two agree."""
    addresses = [Rng(seed).child(round, layer) for seed in range(2) for round in range(10) for layer in ("q", "v")]
    sets = {tuple(draw_rows(kind, 32, [16], 0, [0], address).tolist()) for address in addresses}
    assert len(sets) == len(addresses)


def test_addresses_are_stable():
    """The addressed stream is fixed: these numbers, once published, must not change under anybody's feet."""
    assert Rng(0).child("sketch", 1, "a").integer() == 2393166316723857632
    assert Rng(0).child(1).integer() != Rng(0).child("1").integer()
    published = {
        "independent": [[2, 3, 6], [0, 2, 3, 4, 6, 7]],
        "balanced": [[2, 5, 7], [0, 1, 3, 4, 6, 7]],
        "nested": [[2, 5, 7], [1, 2, 3, 4, 5, 7]],
    }
    for kind, sets in published.items():
        assert [index.tolist() for index in drawn(kind, 8, [3, 6], [5, 6], Rng(0))] == sets


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_each_clients_own_set_is_uniform(kind, position):
    """Marginally P(I) = 1 / C(r, k) for every k-subset, whatever the kind and whatever the others hold."""
    rank, ranks, ids, draws = 5, [2, 3, 4], [3, 8, 9], 1500
    counts = Counter(
        tuple(draw_rows(kind, rank, ranks, position, ids, Rng(2).child(number)).tolist()) for number in range(draws)
    )
    subsets = list(combinations(range(rank), ranks[position]))
    assert set(counts) <= set(subsets)
    expected = draws / len(subsets)
    statistic = sum((counts[subset] - expected) ** 2 / expected for subset in subsets)
    freedom = len(subsets) - 1
    # Pearson's chi-square has mean f and variance 2 f; the seeds are fixed, so this never flickers.
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


@LAWS
@given(cohorts(), st.integers(0, 10**6))
def test_balanced_covers_the_parts_evenly(cohort, seed):
    """Balanced: any two of the r parts have numbers of holders that differ by at most one; in all Σ k_i."""
    rank, ranks, ids = cohort
    sets = drawn("balanced", rank, ranks, ids, Rng(seed))
    held = sum(holders({"layer": index}, rank)[0] for index in sets)
    assert held.max() - held.min() <= 1
    assert held.sum() == sum(ranks)


@LAWS
@given(cohorts(), st.integers(0, 10**6))
def test_nested_sets_lie_in_each_other(cohort, seed):
    """Nested: k_i <= k_j implies I_i ⊆ I_j; clients of one rank hold the same parts."""
    rank, ranks, ids = cohort
    sets = [set(index.tolist()) for index in drawn("nested", rank, ranks, ids, Rng(seed))]
    ordered = sorted(sets, key=len)
    assert all(small <= large for small, large in pairwise(ordered))


@LAWS
@given(cohorts(), st.integers(0, 10**6), st.data())
def test_independent_sets_do_not_know_the_cohort(cohort, seed, data):
    """Independent: I_i depends on the client's id and rank alone, so both sides can regenerate it."""
    rank, ranks, ids = cohort
    position = data.draw(st.integers(0, len(ids) - 1))
    alone = draw_rows("independent", rank, [ranks[position]], 0, [ids[position]], Rng(seed))
    assert torch.equal(alone, draw_rows("independent", rank, ranks, position, ids, Rng(seed)))


def test_independent_clients_overlap_as_chance_has_it():
    """Independent: E|I_1 ∩ I_2| = k_1 k_2 / r (hypergeometric); balanced: 0 while Σ k <= r; nested: min k."""
    rank, ranks, draws = 16, [4, 8], 1000

    def overlaps(kind):
        sizes = []
        for number in range(draws):
            first, second = drawn(kind, rank, ranks, [1, 2], Rng(5).child(number))
            sizes.append(len(set(first.tolist()) & set(second.tolist())))
        return sizes

    # Hypergeometric variance k1 (k2/r) (1 - k2/r) (r - k1)/(r - 1) = 0.8; four standard errors of the mean.
    assert sum(overlaps("independent")) / draws == pytest.approx(2.0, abs=4 * (0.8 / draws) ** 0.5)
    assert set(overlaps("balanced")) == {0}
    assert set(overlaps("nested")) == {4}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [0, -1, 9])
def test_impossible_ranks_are_refused_by_name(kind, k):
    """A client's rank outside 1..r is a ValueError that names the client and both ranks."""
    with pytest.raises(ValueError, match=rf"client 7 has rank {k}; .* 8 parts"):
        draw_rows(kind, 8, [2, k], 1, [3, 7], Rng(0))


# --- expectation, variance and the plain rank-k layer ---


def sketched(pair: LoRA, index: tuple[int, ...]) -> LoRA:
    """What the server sends for one layer: the rows of I at scale · r / k."""
    rows = {"l": torch.tensor(index, dtype=torch.int32)}
    return rescaled(take(Adapter({"l": pair}), rows), pair.rank / len(index)).layers["l"]


def random_pair(rank: int, d_in: int, d_out: int, scale: float) -> LoRA:
    stream = Rng(rank).child(d_in, d_out).torch()
    return LoRA(
        torch.randn(rank, d_in, generator=stream, dtype=torch.float64),
        torch.randn(rank, d_out, generator=stream, dtype=torch.float64),
        scale,
    )


RANKS = [(r, k) for r in (1, 2, 5, 6) for k in range(1, r + 1)]


@pytest.mark.parametrize(("r", "k"), RANKS)
def test_the_sketch_is_the_identity_on_average(r, k):
    """(1 / C(r,k)) Σ S = I and (1 / C(r,k)) Σ S Sᵀ = (r/k) I, with S as the code makes it from B = A = I."""
    identity = LoRA(torch.eye(r, dtype=torch.float64), torch.eye(r, dtype=torch.float64), 1.0)
    sketches = [sketched(identity, index).delta for index in combinations(range(r), k)]
    assert len(sketches) == comb(r, k)
    torch.testing.assert_close(sum(sketches) / len(sketches), torch.eye(r).double(), atol=EXACT, rtol=0)
    squares = sum(S @ S.T for S in sketches) / len(sketches)
    torch.testing.assert_close(squares, r / k * torch.eye(r).double(), atol=EXACT, rtol=0)


@pytest.mark.parametrize(("r", "k"), RANKS)
def test_sketched_layers_average_to_the_global_layer(r, k):
    """E[scale · B S A] = scale · B A over all C(r, k) subsets."""
    pair = random_pair(r, 4, 3, 0.7)
    parts = [sketched(pair, index).delta for index in combinations(range(r), k)]
    torch.testing.assert_close(sum(parts) / len(parts), pair.delta, atol=EXACT, rtol=0)


@pytest.mark.parametrize(("r", "k"), [(r, k) for r, k in RANKS if r > 1])
def test_variance_of_the_sketched_product(r, k):
    """E‖B S A - B A‖² = (r-k) / (k (r-1)) · (r Σ_j ‖b_j‖² ‖a_j‖² - ‖B A‖²), over all subsets."""
    pair = random_pair(r, 4, 3, 1.0)
    errors = [(sketched(pair, index).delta - pair.delta).square().sum() for index in combinations(range(r), k)]
    parts = (pair.Bt.square().sum(1) * pair.A.square().sum(1)).sum()
    expected = (r - k) / (k * (r - 1)) * (r * parts - pair.delta.square().sum())
    assert (sum(errors) / len(errors)).item() == pytest.approx(expected.item(), rel=1e-10, abs=EXACT)


def loss_of(weight: torch.Tensor) -> torch.Tensor:
    """A smooth, non-linear loss of a layer's weight [3 4]."""
    stream = Rng(9).torch()
    x = torch.randn(6, 4, generator=stream, dtype=torch.float64)
    y = torch.randn(6, 3, generator=stream, dtype=torch.float64)
    return (torch.tanh(x @ weight.T) - y).square().mean()


W0 = torch.randn(3, 4, generator=Rng(10).torch(), dtype=torch.float64)
ALPHA = 3.0


@pytest.mark.parametrize(("r", "k"), RANKS)
def test_a_sketched_layer_is_a_plain_rank_k_lora(r, k):
    """W0 + (alpha/r) B S A = W0 + (alpha/k) B_I A_I; gradients are equal inside I and exactly 0 outside."""
    pair = random_pair(r, 4, 3, ALPHA / r)
    for index in list(combinations(range(r), k))[::3]:
        S = torch.zeros(r, r, dtype=torch.float64)
        S[index, index] = r / k
        A, Bt = pair.A.clone().requires_grad_(), pair.Bt.clone().requires_grad_()
        masked = W0 + ALPHA / r * Bt.T @ S @ A
        part = sketched(pair, index)
        assert part.scale == pytest.approx(ALPHA / k, rel=1e-15)
        A_I, Bt_I = part.A.clone().requires_grad_(), part.Bt.clone().requires_grad_()
        plain = W0 + LoRA(A_I, Bt_I, part.scale).delta
        torch.testing.assert_close(masked, plain, atol=EXACT, rtol=0)
        full = torch.autograd.grad(loss_of(masked), [A, Bt])
        small = torch.autograd.grad(loss_of(plain), [A_I, Bt_I])
        outside = [j for j in range(r) if j not in index]
        for wide, narrow in zip(full, small, strict=True):
            torch.testing.assert_close(wide[list(index)], narrow, atol=EXACT, rtol=0)
            assert not wide[outside].any()
            assert narrow.any()


def trained_both_ways(optimizer, steps: int, r: int = 6, index: tuple[int, ...] = (1, 4)):
    """(rank-k layer, the masked full pair read back, the start's rows), each as (A_I, Bt_I).

    The masked way trains B S in the place of B, with its gradient times S², and divides by r/k at the end.
    """
    k, rows = len(index), list(index)
    pair = random_pair(r, 4, 3, ALPHA / r)
    part = sketched(pair, index)
    A_I, Bt_I = part.A.clone().requires_grad_(), part.Bt.clone().requires_grad_()
    stepper = optimizer([A_I, Bt_I])
    for _ in range(steps):
        stepper.zero_grad()
        loss_of(W0 + LoRA(A_I, Bt_I, part.scale).delta).backward()
        stepper.step()

    diagonal = torch.zeros(r, 1, dtype=torch.float64)
    diagonal[rows] = r / k
    A, SBt = pair.A.clone().requires_grad_(), (diagonal * pair.Bt).requires_grad_()
    stepper = optimizer([A, SBt])
    for _ in range(steps):
        stepper.zero_grad()
        loss_of(W0 + ALPHA / r * SBt.T @ A).backward()
        SBt.grad.mul_(diagonal.square())
        stepper.step()
    masked = (A.detach()[rows], SBt.detach()[rows] / (r / k))
    outside = [j for j in range(r) if j not in index]
    assert torch.equal(A.detach()[outside], pair.A[outside])
    assert not SBt.detach()[outside].any()
    return (A_I.detach(), Bt_I.detach()), masked, (part.A, part.Bt)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_masked_sgd_is_rank_k_sgd(momentum):
    """SGD: masking the pair with grad(B S) times S² and dividing by r/k is training the rank-k layer."""
    plain, masked, start = trained_both_ways(lambda p: torch.optim.SGD(p, lr=0.05, momentum=momentum), steps=5)
    for left, right, before in zip(plain, masked, start, strict=True):
        torch.testing.assert_close(left, right, atol=EXACT, rtol=0)
        assert (left - before).abs().max() > 1e-3, "nothing was trained"


def test_masked_adam_is_not_rank_k_adam():
    """AdamW: S² is normalised away, so B's step, read back from the masked pair, is k/r of the rank-k layer's."""
    r, index = 6, (1, 4)
    plain, masked, start = trained_both_ways(
        lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-12, weight_decay=0.0), 1, r, index
    )
    torch.testing.assert_close(plain[0], masked[0], atol=ADAM, rtol=0)
    ratio = (masked[1] - start[1]) / (plain[1] - start[1])
    torch.testing.assert_close(ratio, torch.full_like(ratio, len(index) / r), atol=ADAM, rtol=ADAM)


# --- the method's broadcast uses it ---


def broadcast_of(method: FSLoRA, rslora: bool = False, k: int = 4, round_number: int = 0):
    template = Template({"q": (6, 5), "v": (6, 7), "o": (5, 6)}, {"head": torch.ones(2)}, 16, 8.0, rslora)
    state = method.init(template, (), Rng(0))
    stream = Rng(1).torch()
    layers = {
        name: LoRA(pair.A, torch.randn(pair.Bt.shape, generator=stream), pair.scale)
        for name, pair in state.adapter.layers.items()
    }
    state = ServerState(Adapter(layers, state.adapter.dense))
    cohort = (Client(0, 2, 10), Client(3, k, 10), Client(5, 16, 10))
    plan = Round(round_number, cohort, Rng(0).child("round", round_number), template)
    return state, method.broadcast(state, cohort[1], plan)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared_rows", [False, True])
def test_a_broadcast_is_the_rows_of_one_index_set_for_a_and_b(kind, shared_rows):
    """The client gets A[I] and Bt[I] of one I per layer (one for all if shared), and the head whole."""
    state, broadcast = broadcast_of(FSLoRA(sketch=kind, shared_rows=shared_rows))
    for name, pair in broadcast.adapter.layers.items():
        index = broadcast.rows[name].long()
        assert torch.equal(pair.A, state.adapter.layers[name].A[index])
        assert torch.equal(pair.Bt, state.adapter.layers[name].Bt[index])
    assert torch.equal(broadcast.adapter.dense["head"], torch.ones(2))
    sets = {tuple(index.tolist()) for index in broadcast.rows.values()}
    assert len(sets) == (1 if shared_rows else 3)


@pytest.mark.parametrize("k", [1, 4, 16])
def test_the_clients_scale(k):
    """alpha/k under PEFT's convention; alpha sqrt(r)/k, not alpha/sqrt(k), under the rank-stabilised one."""
    for rslora, expected in ((False, 8.0 / k), (True, 8.0 * 16**0.5 / k)):
        _, broadcast = broadcast_of(FSLoRA(), rslora, k)
        assert all(pair.scale == expected for pair in broadcast.adapter.layers.values())


def test_every_round_redraws():
    """I is frozen within a round and drawn anew in the next."""
    (_, first), (_, again), (_, second) = (broadcast_of(FSLoRA(), round_number=n) for n in (0, 0, 1))
    for name, index in first.rows.items():
        assert torch.equal(index, again.rows[name])
        assert not torch.equal(index, second.rows[name])
