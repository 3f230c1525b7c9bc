"""raFLoRA: the index-normalised mean of products, its fixed point, and how it differs from FlexLoRA."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora.methods.flexlora import FlexLoRA
from fslora.methods.raflora import RaFLoRA, normalised_mean, shares_by_index
from fslora.rng import Rng
from fslora.types import Adapter, Client, LoRA, Round, ServerState, Template
from kit import (
    FLEET,
    TEMPLATE,
    WIDE,
    Exchange,
    World,
    assert_same_adapter,
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
from products import PRODUCTS, best, close, expected_mean, gauge, shares_of, turned

LAWS = settings(max_examples=25, deadline=None, derandomize=True, database=None)
STILL = fake_training(0.0)


def trained_world(method: RaFLoRA | None = None, template: Template = WIDE) -> World:
    """After one round of the whole fleet: B is no longer zero."""
    method = method or RaFLoRA()
    return play(method, begun(method, template=template), plan(0, template=template))


def mean_of(passed: list[Exchange], weighting: str = "examples") -> dict[str, torch.Tensor]:
    """ΔW as the method makes it of the updates, before it is decomposed."""
    weights = [x.update.examples if weighting == "examples" else 1.0 for x in passed]
    ranks = [x.site.client.rank for x in passed]
    return deltas(normalised_mean([x.update.adapter for x in passed], ranks, weights))


def by_segments(passed: list[Exchange], levels: list[int], weighting: str = "examples") -> dict[str, torch.Tensor]:
    """Σ_h Σ_{i: k_i ≥ r_h} (p_i / Σ p) s_i B_i[:, seg] A_i[seg], dense, with any levels that hold all the ranks."""
    shares = shares_of(passed, weighting)
    result = {}
    for name in passed[0].trained.adapter.layers:
        total = 0.0
        for low, high in zip([0, *levels], levels, strict=False):
            inside = [
                (share, x.trained.adapter.layers[name])
                for share, x in zip(shares, passed, strict=True)
                if x.site.client.rank >= high
            ]
            for share, pair in inside:
                weight = share / sum(share for share, _ in inside)
                total = total + weight * pair.scale * pair.Bt[low:high].double().T @ pair.A[low:high].double()
        result[name] = total
    return result


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("members", [(0, 1, 2, 3, 4, 5), (0, 2, 3), (3, 4), (3,)])
def test_segments_and_indices_are_the_same_mean(members, weighting):
    """ΔW by the paper's segments = Σ s_i B_i diag(p_i / q_j) A_i; bounds that no client has change nothing."""
    method = RaFLoRA(weighting=weighting)
    world, round = trained_world(method), plan(1, members, template=WIDE)
    passed = exchanges(method, world, round)
    found = mean_of(passed, weighting)
    for levels in ([1, 2, 3, 4, 8], [1, 2, 3, 4, 5, 6, 7, 8]):
        for name, product in by_segments(passed, levels, weighting).items():
            close(found[name], product)
    after = deltas(ended(method, world, round, passed).state.adapter)
    for name in WIDE.layers:  # every one of these cohorts reaches rank 8, the fleet's largest
        close(after[name], best(found[name], 8))
    for name in WIDE.dense:
        close(after[name], expected_mean(passed, shares_of(passed, weighting))[name])


def test_shares_by_index_by_hand():
    """Ranks 1, 3 and 2 with weights 5, 1 and 4: q = (1, 0.5, 0.1)."""
    close(shares_by_index([1, 3, 2], [5, 1, 4]), torch.tensor([1.0, 0.5, 0.1]), 1e-7)


@pytest.mark.parametrize("template", [TEMPLATE, WIDE], ids=["narrow", "wide"])
def test_at_equal_ranks_it_is_flexlora(template):
    """q_j = 1 for all: the same bits as FlexLoRA that keeps the server's rank, over three rounds."""
    fleet = tuple(replace(client, rank=8) for client in FLEET)
    ours, theirs = RaFLoRA(), FlexLoRA(keep="server")
    left, right = (begun(method, template=template, fleet=fleet) for method in (ours, theirs))
    for number in range(3):
        round = plan(number, fleet=fleet, template=template)
        left, right = play(ours, left, round), play(theirs, right, round)
        assert_same_adapter(left.state.adapter, right.state.adapter)


@LAWS
@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 30)), min_size=1, max_size=5),
    st.sampled_from(["B", "sqrt"]),
)
def test_nobody_trains_and_nothing_collapses(clients, split):
    """Zero training: ΔW stays; under FlexLoRA index j of the same state becomes q_j σ_j (the collapse test)."""
    fleet = tuple(Client(i, rank, examples) for i, (rank, examples) in enumerate(clients))
    A, Bt = (torch.linalg.qr(torch.randn(d, 8, generator=Rng(d).torch())).Q.T for d in (24, 40))
    S = torch.linspace(8, 1, 8).unsqueeze(1)
    layers = {"up": LoRA(A, S * Bt, 2.0), "down": LoRA(Bt, S * A, 2.0)}
    world = World(ServerState(Adapter(layers, WIDE.dense), scalars={"largest_rank": 8.0}))
    round = Round(1, fleet, Rng(0), WIDE)
    kept = play(RaFLoRA(split=split), world, round, STILL).state
    assert_same_function(kept.adapter, world.state.adapter, PRODUCTS)
    collapsed = torch.linalg.svdvals(deltas(play(FlexLoRA(), world, round, STILL).state.adapter)["up"])
    total = sum(client.examples for client in fleet)
    reach = torch.tensor([sum(c.examples for c in fleet if c.rank > j) / total for j in range(8)])
    close(collapsed[:8], (2 * S.squeeze(1) * reach).sort(descending=True).values)


def test_what_is_more_than_flexlora_lies_beyond_the_smallest_rank():
    """ΔW - ΔW_FlexLoRA = Σ s_i B_i diag(p_i (1/q_j - 1)) A_i."""
    world, round = trained_world(), plan(1, (1, 2, 4, 5), template=WIDE)
    passed = exchanges(RaFLoRA(), world, round)
    ours, theirs = mean_of(passed), deltas(ended(FlexLoRA(), world, round, passed).state.adapter)
    shares, ranks = shares_of(passed), [x.site.client.rank for x in passed]
    reach = torch.tensor([sum(p for p, k in zip(shares, ranks, strict=True) if k > j) for j in range(8)])
    for name in WIDE.layers:
        expected = 0.0
        for share, exchange in zip(shares, passed, strict=True):
            pair = exchange.trained.adapter.layers[name]
            weight = (share * (1 / reach[: pair.rank].double() - 1)).unsqueeze(1)
            expected = expected + pair.scale * (weight * pair.Bt).T @ pair.A.double()
        assert expected.abs().max() > 0.1
        close(ours[name] - theirs[name], expected)


@pytest.mark.parametrize("examples", [1, 1000])
def test_a_lone_large_client_owns_the_tail(examples):
    """One client above rank 2: its parts from there on enter with weight exactly 1, whatever its n_i."""
    fleet = (Client(0, 2, 10), Client(1, 1, 7), Client(2, 6, examples))
    world, round = begun(RaFLoRA(), template=WIDE, fleet=fleet), plan(0, (0, 1, 2), fleet, WIDE)
    passed = exchanges(RaFLoRA(), world, round)
    pairs = [x.trained.adapter.layers["up"] for x in passed]
    low = by_segments(passed, [1, 2])["up"]
    tail = pairs[2].scale * pairs[2].Bt[2:].double().T @ pairs[2].A[2:].double()
    close(mean_of(passed)["up"], low + tail)


def test_factors_may_be_mixed_within_a_segment_only():
    """(B_i M, M⁻¹ A_i): no change for M block-diagonal in the segments 1 | 2 | 3, 4; another ΔW for a full M."""
    passed = exchanges(RaFLoRA(), trained_world(), plan(1, (0, 1, 2), template=WIDE))
    plain, last = mean_of(passed), passed[2]
    mixed = replace(last, update=turned(last.update, lambda pair: gauge(pair, (1, 1, 2))))
    assert (mixed.update.adapter.layers["up"].A - last.update.adapter.layers["up"].A).abs().max() > 0.02
    full = replace(last, update=turned(last.update, gauge))
    for name in WIDE.layers:
        close(mean_of([*passed[:2], mixed])[name], plain[name])
        assert (mean_of([*passed[:2], full])[name] - plain[name]).abs().max() > 1e-3


def test_indices_that_nobody_reaches():
    """Zero training without the clients of rank 8, next level 4: 'keep' is the old ΔW, 'drop' its best rank 4."""
    world, round = trained_world(), plan(1, (1, 2, 5), template=WIDE)
    before = deltas(world.state.adapter)
    assert world.state.adapter.layers["up"].rank == 8
    for absent in ("keep", "drop"):
        after = deltas(play(RaFLoRA(absent=absent), world, round, STILL).state.adapter)
        for name in WIDE.layers:
            close(after[name], before[name] if absent == "keep" else best(before[name], 4))
    assert torch.linalg.svdvals(before["up"])[4] > 0.1


def test_kept_indices_are_added_to_what_was_trained():
    """With training, ΔW has rank 2 + 4 + 3 and the old parts from index 4 on; what is kept of it is the best rank 8."""
    method, world, round = RaFLoRA(), trained_world(), plan(1, (1, 2, 5), template=WIDE)
    passed = exchanges(method, world, round)
    after = deltas(ended(method, world, round, passed).state.adapter)
    for name, pair in world.state.adapter.layers.items():
        tail = pair.scale * pair.Bt[4:].double().T @ pair.A[4:].double()
        assert tail.abs().max() > 0.01
        close(after[name], best(mean_of(passed)[name] + tail, 8))


def test_the_update_ends_at_the_fleets_largest_rank():
    """r_L is the fleet's: a server of rank 8 with clients up to rank 4 holds 4 parts, from the first round on.

    Parts beyond would be out of every client's reach, and "keep" would keep them for ever.
    """
    method, fleet = RaFLoRA(), tuple(replace(client, rank=min(client.rank, 4)) for client in FLEET)
    world = begun(method, template=WIDE, fleet=fleet)
    for number in range(3):
        assert {pair.rank for pair in world.state.adapter.layers.values()} == {4}
        world = play(method, world, plan(number, fleet=fleet, template=WIDE))
    assert {pair.scale for pair in world.state.adapter.layers.values()} == {WIDE.scale(8)}


def test_scales_are_part_of_the_product():
    """Twice s_i and half of B_i change nothing; twice s_i alone does."""
    method, world, round = RaFLoRA(), trained_world(), plan(1, (2, 3, 4), template=WIDE)
    updates = [x.update for x in exchanges(method, world, round)]
    plain = method.aggregate(world.state, iter(updates), round).adapter
    same = turned(updates[0], lambda pair: LoRA(pair.A, pair.Bt / 2, 2 * pair.scale))
    assert_same_function(method.aggregate(world.state, iter([same, *updates[1:]]), round).adapter, plain, PRODUCTS)
    more = turned(updates[0], lambda pair: LoRA(pair.A, pair.Bt, 2 * pair.scale))
    other = method.aggregate(world.state, iter([more, *updates[1:]]), round).adapter
    assert (deltas(other)["up"] - deltas(plain)["up"]).abs().max() > 0.1


def test_who_carries_the_singular_values():
    """split 'B': A Aᵀ = I; 'sqrt': A Aᵀ = B Bᵀ (rank-major), at the server's scale. The function is the same."""
    states = {split: trained_world(RaFLoRA(split=split)).state.adapter for split in ("B", "sqrt")}
    assert_same_function(states["B"], states["sqrt"], PRODUCTS)
    for name in WIDE.layers:
        plain, rooted = (states[split].layers[name] for split in ("B", "sqrt"))
        close(plain.A @ plain.A.T, torch.eye(plain.rank))
        close(rooted.A @ rooted.A.T, rooted.Bt @ rooted.Bt.T, 1e-4)  # squares of numbers near 3


def test_a_message_is_the_leading_part_of_the_update():
    """Client i gets the best rank-k_i approximation, at s_i; bytes are k_i (d_in + d_out) and the head, both ways."""
    world = played(RaFLoRA(), 2)
    head = sum(tensor.numel() for tensor in TEMPLATE.dense.values())
    width = sum(sum(shape) for shape in TEMPLATE.layers.values())
    whole = deltas(world.state.adapter)
    for exchange in exchanges(RaFLoRA(), world, plan(0)):
        rank = exchange.site.client.rank
        assert exchange.broadcast.nbytes == exchange.update.nbytes == 4 * (rank * width + head)
        for name, pair in exchange.start.adapter.layers.items():
            assert pair.scale == TEMPLATE.scale(rank)
            close(pair.scale * pair.Bt.double().T @ pair.A.double(), best(whole[name], rank))


def test_an_inexact_round_says_so():
    """report.svd_error: 0 by the exact routes, more where the stack is large enough for the randomised one."""
    assert trained_world().state.scalars["report.svd_error"] == 0.0
    template = Template({"l": (520, 560)}, {"h": torch.zeros(2)}, 60, 60.0)
    fleet = tuple(Client(i, 60, 1) for i in range(9))
    method = RaFLoRA()
    after = play(method, begun(method, template=template, fleet=fleet), plan(0, tuple(range(9)), fleet, template))
    assert 0 < after.state.scalars["report.svd_error"] < 1
