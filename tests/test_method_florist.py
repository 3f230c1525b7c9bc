"""FLoRIST: the energy threshold, the warm start that keeps its capacity, and merging."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora.algebra.lowrank import stacked, svd_by_gram, svd_by_qr
from fslora.methods.florist import FLoRIST, rank_of_energy
from fslora.types import Adapter, LoRA
from kit import (
    FLEET,
    TEMPLATE,
    WIDE,
    assert_same_function,
    begun,
    deltas,
    ended,
    exchanges,
    fake_training,
    plan,
    play,
    played,
)
from products import PRODUCTS, close, expected_mean, gauge, shares_of, turned

LAWS = settings(max_examples=25, deadline=None, derandomize=True, database=None)
STILL = fake_training(0.0)
both_widths = pytest.mark.parametrize("template", [TEMPLATE, WIDE], ids=["narrow", "wide"])
both_starts = pytest.mark.parametrize("start", ["warm", "merge"])
spectra = st.lists(st.just(0.0) | st.floats(1e-3, 100), min_size=1, max_size=12).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)


@both_widths
@both_starts
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("members", [(0, 1, 2, 3, 4, 5), (1, 4, 5), (2,)])
def test_with_tau_one_the_mean_is_exact(template, start, weighting, members):
    """τ = 1, first round: B A = Σ p_i s_i B_i A_i over those that came, the target of FLoRA; head Σ p_i h_i."""
    method = FLoRIST(tau=1.0, next_init=start, weighting=weighting)
    world, round = begun(method, template=template), plan(0, members, template=template)
    passed = exchanges(method, world, round)
    found = deltas(method.global_adapter(ended(method, world, round, passed).state))
    expected = expected_mean(passed, shares_of(passed, weighting))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        close(found[name], tensor)


@LAWS
@given(spectra, st.floats(0.05, 0.999), st.floats(0.05, 1), st.sampled_from([2.0**-20, 0.5, 8.0, 2.0**20]))
def test_the_threshold(S, tau, other, factor):
    """Smallest r with Σ_{j<r} σ² ≥ τ Σ σ²: r satisfies it, r - 1 does not; non-decreasing in τ; the same for c · σ."""
    rank, total = rank_of_energy(S, tau), float(S.square().sum())
    assert 0 <= rank <= len(S)
    assert rank_of_energy(S, 1.0) == len(S)
    if not total:
        assert rank == 0
        return
    assert float(S[:rank].square().sum()) >= tau * total * (1 - 1e-12)
    assert float(S[: rank - 1].square().sum()) < tau * total
    assert (rank <= rank_of_energy(S, other)) if tau <= other else (rank >= rank_of_energy(S, other))
    assert rank_of_energy(factor * S, tau) == rank


def test_the_threshold_by_hand():
    """σ² = 9, 4, 2, 1: shares 9/16, 13/16, 15/16, 1. Meeting the threshold exactly is enough."""
    S = torch.tensor([3.0, 2.0, 2**0.5, 1.0], dtype=torch.float64)
    assert [rank_of_energy(S, tau) for tau in (0.01, 0.56, 0.57, 0.81, 0.82, 0.93, 0.94, 0.99, 1.0)] == [
        1, 1, 2, 2, 3, 3, 4, 4, 4,
    ]  # fmt: skip
    assert rank_of_energy(torch.ones(4, dtype=torch.float64), 0.5) == 2
    assert rank_of_energy(torch.zeros(3), 0.9) == 0


@both_widths
@pytest.mark.parametrize("tau", [0.3, 0.8, 0.95])
def test_what_is_discarded_is_within_the_threshold(template, tau):
    """‖ΔW - B A‖² = Σ_{j≥r} σ_j² ≤ (1 - τ) ‖ΔW‖², with r by layer; one part less would be too little."""
    method, world, round = FLoRIST(tau=tau), begun(FLoRIST(), template=template), plan(0, template=template)
    passed = exchanges(method, world, round)
    after = ended(method, world, round, passed).state.adapter
    expected, found, ranks = expected_mean(passed, shares_of(passed)), deltas(after), []
    for name, pair in after.layers.items():
        W, S = expected[name], torch.linalg.svdvals(expected[name])
        total = S.square().sum()
        close((W - found[name]).square().sum() / total, S[pair.rank :].square().sum() / total)
        assert S[pair.rank :].square().sum() <= (1 - tau) * total
        assert S[pair.rank - 1 :].square().sum() > (1 - tau) * total
        ranks.append(pair.rank)
    assert all(rank < min(shape) for rank, shape in zip(ranks, template.layers.values(), strict=True)) or tau > 0.9


@both_widths
def test_singular_values_sit_in_b(template):
    """A Aᵀ = I; the columns of B are orthogonal with norms σ_j / s, s that of the server's rank."""
    method, world, round = FLoRIST(tau=0.9), begun(FLoRIST(), template=template), plan(0, template=template)
    passed = exchanges(method, world, round)
    for name, pair in ended(method, world, round, passed).state.adapter.layers.items():
        S = torch.linalg.svdvals(expected_mean(passed, shares_of(passed))[name])[: pair.rank]
        assert pair.scale == template.scale(template.rank)
        close(pair.A @ pair.A.T, torch.eye(pair.rank))
        close(pair.Bt @ pair.Bt.T, (S / pair.scale).square().diag())


def test_the_papers_two_svds_have_the_same_spectrum():
    """SVDs of B_st and A_st and of the core S_B (V_Bᵀ U_A) S_A, our QR and Gram routes, and the dense SVD: one S."""
    method = FLoRIST()
    passed = exchanges(method, begun(method, template=WIDE), plan(0, (1, 2, 4), template=WIDE))
    for name, product in expected_mean(passed, shares_of(passed)).items():
        if name not in WIDE.layers:
            continue
        stack = stacked([x.update.adapter.layers[name] for x in passed], shares_of(passed))
        _, s_b, vt_b = torch.linalg.svd(stack.scale * stack.Bt.T.double(), full_matrices=False)
        u_a, s_a, _ = torch.linalg.svd(stack.A.double(), full_matrices=False)
        paper = torch.linalg.svdvals(s_b.diag() @ vt_b @ u_a @ s_a.diag())
        for S in (svd_by_qr(stack).S, svd_by_gram(stack).S, torch.linalg.svdvals(product)[: stack.rank]):
            close(S, paper, 1e-6)  # the shares are rounded to float32 in the stack


def test_order_and_factoring_do_not_matter_and_weights_count_once():
    """Any order and (B_i M, M⁻¹ A_i): the same pair. Weights on both factors would make Σ p_i² B_i A_i (negative)."""
    method, world, round = FLoRIST(tau=0.9), begun(FLoRIST(), template=WIDE), plan(0, (1, 2, 4), template=WIDE)
    passed = exchanges(method, world, round)
    updates = [x.update for x in passed]
    plain = method.aggregate(world.state, iter(updates), round).adapter
    for other in (updates[::-1], [updates[0], turned(updates[1], gauge), updates[2]]):
        made = method.aggregate(world.state, iter(other), round).adapter
        assert_same_function(made, plain, PRODUCTS)
        assert {n: p.rank for n, p in made.layers.items()} == {n: p.rank for n, p in plain.layers.items()}
    assert (gauge(updates[1].adapter.layers["up"]).A - updates[1].adapter.layers["up"].A).abs().max() > 0.02
    exact = deltas(FLoRIST(tau=1.0).aggregate(world.state, iter(updates), round).adapter)["up"]
    wrong = expected_mean(passed, [share**2 for share in shares_of(passed)])["up"]
    assert (exact - wrong).abs().max() > 0.05


def test_all_b_times_a_constant_keep_the_ranks():
    """r is a matter of shares of energy: every B_i times c gives B times c, and the same ranks."""
    method, world, round = FLoRIST(tau=0.8), begun(FLoRIST(), template=WIDE), plan(0, template=WIDE)
    updates = [x.update for x in exchanges(method, world, round)]
    larger = [turned(update, lambda pair: LoRA(pair.A, 1000 * pair.Bt, pair.scale)) for update in updates]
    one, two = (method.aggregate(world.state, iter(sent), round).adapter for sent in (updates, larger))
    for name in WIDE.layers:
        assert one.layers[name].rank == two.layers[name].rank
        close(deltas(two)[name] / 1000, deltas(one)[name])


@pytest.mark.parametrize("tau", [0.5, 1.0])
@both_starts
def test_an_update_of_zero_keeps_one_part(start, tau):
    """B = 0 everywhere: no 0/0; one part of rank one whose B is zero, and nothing served."""
    method = FLoRIST(tau=tau, next_init=start)
    world = play(method, begun(method), plan(0), STILL)
    served = method.global_adapter(world.state)
    for pair in served.layers.values():
        assert pair.rank == 1
        assert pair.A.any()
        assert not pair.Bt.any()
    assert all(torch.equal(served.dense[name], tensor) for name, tensor in TEMPLATE.dense.items())


# --- the next start ---


def test_a_warm_start_goes_on_from_the_pair_and_can_use_all_of_its_rank():
    """Client i starts from the first min(r, k_i) parts at s_i; beyond r its A is random and its B zero.

    Filled with zeros in both factors instead, those parts would have no gradient, and the rank could only shrink.
    """
    method = FLoRIST(tau=0.5)
    world = play(method, begun(method, template=WIDE), plan(0, template=WIDE))
    for exchange in exchanges(method, world, plan(1, (0, 1, 2, 3, 4, 5), template=WIDE)):
        k = exchange.site.client.rank
        for name, pair in exchange.start.adapter.layers.items():
            carried = world.state.adapter.layers[name]
            r = min(carried.rank, k)
            assert (pair.rank, pair.scale) == (k, WIDE.scale(k))
            product = carried.scale * carried.Bt[:r].T @ carried.A[:r]
            close(pair.scale * pair.Bt.T @ pair.A, product)
            assert not pair.Bt[r:].any()
            assert torch.linalg.matrix_rank(pair.A) == k
    assert max(pair.rank for pair in world.state.adapter.layers.values()) < 8
    grown = play(FLoRIST(tau=1.0), world, plan(1, (3, 4), template=WIDE)).state.adapter
    assert all(pair.rank == 16 for pair in grown.layers.values())


def test_nobody_trains_and_a_warm_pair_stays():
    """τ = 1 and clients that can hold the whole pair: a fixed point. τ < 1 cuts again what was cut before."""
    method, template = FLoRIST(tau=1.0), replace(WIDE, rank=16)
    fleet = tuple(replace(client, rank=16) for client in FLEET)
    world = play(method, begun(method, template=template, fleet=fleet), plan(0, (0,), fleet, template))
    again = play(method, world, plan(1, (0, 1, 2), fleet, template), STILL)
    assert_same_function(again.state.adapter, world.state.adapter, PRODUCTS)
    cut = play(FLoRIST(tau=0.5), world, plan(1, (0, 1, 2), fleet, template), STILL)
    for name in template.layers:
        share = (deltas(cut.state.adapter)[name].norm() / deltas(world.state.adapter)[name].norm()) ** 2
        assert 0.5 <= share < 0.95


def test_one_rank_for_all_goes_down():
    """Down r_τ (d_in + d_out) numbers per layer to whoever can hold them, k_i otherwise; the head; 8 bytes of seed.

    Up k_i (d_in + d_out) and the head.
    """
    method = FLoRIST(tau=0.6)
    world = play(method, begun(method, template=WIDE), plan(0, template=WIDE))
    ranks = {name: pair.rank for name, pair in world.state.adapter.layers.items()}
    head = sum(tensor.numel() for tensor in WIDE.dense.values())
    for exchange in exchanges(method, world, plan(1, (0, 2, 3), template=WIDE)):
        k = exchange.site.client.rank
        pairs = sum(min(ranks[name], k) * sum(shape) for name, shape in WIDE.layers.items())
        assert exchange.broadcast.nbytes == 4 * (pairs + head) + 8
        assert exchange.update.nbytes == 4 * (k * sum(sum(shape) for shape in WIDE.layers.values()) + head)
    assert 1 < min(ranks.values()) < 8


@pytest.mark.parametrize("tau", [0.6, 1.0])
def test_merging_leaves_what_is_served_as_it_was(tau):
    """The base after merging, with fresh pairs of B = 0, computes what the base with the pair attached did."""
    method = FLoRIST(tau=tau, next_init="merge")
    passed = exchanges(method, begun(method), plan(0))
    world = ended(method, begun(method), plan(0), passed)
    base = method.base(world.state)
    assert_same_function(Adapter(base.layers, world.state.adapter.dense), method.global_adapter(world.state), PRODUCTS)
    attached = ended(FLoRIST(tau=tau), begun(method), plan(0), passed).state.adapter
    assert_same_function(method.global_adapter(world.state), attached, PRODUCTS)
    for exchange in exchanges(method, world, plan(1, (0, 2, 3))):
        for pair in exchange.start.adapter.layers.values():
            assert not pair.Bt.any()
            assert (pair.rank, pair.scale) == (exchange.site.client.rank, TEMPLATE.scale(exchange.site.client.rank))
    still = play(method, world, plan(1), STILL)
    assert_same_function(method.global_adapter(still.state), method.global_adapter(world.state), PRODUCTS)


def test_merged_pairs_add_up_and_reach_those_who_were_absent():
    """After two rounds W = W0 + s B¹A¹ + s B²A²; a client gets, in order, exactly the changes that it has not."""
    method = FLoRIST(tau=0.9, next_init="merge")
    first = play(method, begun(method, template=WIDE), plan(0, (0, 1), template=WIDE))
    second = plan(1, (1, 2), template=WIDE)
    passed = exchanges(method, first, second)
    last = ended(method, first, second, passed)
    added = FLoRIST(tau=0.9).aggregate(first.state, iter([x.update for x in passed]), second).adapter
    total, before = deltas(method.global_adapter(last.state)), deltas(method.global_adapter(first.state))
    for name in WIDE.layers:
        close(total[name], before[name] + deltas(added)[name])
    round = plan(2, (0, 1, 3), template=WIDE)
    versions = {c.id: [u.version for u in method.broadcast(last.state, c, round).base] for c in round.cohort}
    assert versions == {0: [1, 2], 1: [2], 3: [1, 2]}


def test_merging_sends_the_changes_and_a_seed():
    """Down: the missed pairs of r_τ parts, the head and 8 bytes; neither factor of the fresh pair travels."""
    method = FLoRIST(tau=0.6, next_init="merge")
    world = play(method, begun(method, template=WIDE), plan(0, template=WIDE))
    head = sum(tensor.numel() for tensor in WIDE.dense.values())
    change = sum(method.base(world.state).layers[name].rank * sum(shape) for name, shape in WIDE.layers.items())
    for client in plan(1, template=WIDE).cohort:
        assert method.broadcast(world.state, client, plan(1, template=WIDE)).nbytes == 4 * (change + head) + 8


@both_starts
def test_random_rows_are_the_rounds_own(start):
    """All clients of a round draw the same rows, part by part; another round draws others."""
    method = FLoRIST(tau=0.1, next_init=start)
    world = played(method, 1)
    starts = [x.start.adapter.layers["down"].A for x in exchanges(method, world, plan(1, (2, 3, 4)))]
    assert torch.equal(starts[0], starts[1][:4])
    assert torch.equal(starts[1], starts[2])
    (other,) = exchanges(method, world, plan(2, (3,)))
    assert not torch.equal(other.start.adapter.layers["down"].A[4:], starts[1][4:])


def test_every_round_is_exact():
    """Per-layer SVDs are always whole: report.svd_error is 0."""
    assert played(FLoRIST(), 2).state.scalars["report.svd_error"] == 0.0
