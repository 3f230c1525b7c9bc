"""FlexLoRA: the exact mean of products, its best approximations per client, and the collapse under unequal ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora.methods.fedit import FedIT
from fslora.methods.flexlora import FlexLoRA
from fslora.rng import Rng
from fslora.types import Adapter, Client, LoRA, Round, ServerState, Template
from kit import (
    FLEET,
    TEMPLATE,
    WIDE,
    World,
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
both_widths = pytest.mark.parametrize("template", [TEMPLATE, WIDE], ids=["narrow", "wide"])


def trained_world(template: Template = TEMPLATE, method: FlexLoRA | None = None) -> World:
    """After one round of the whole fleet: B is no longer zero."""
    method = method or FlexLoRA()
    return play(method, begun(method, template=template), plan(0, template=template))


@both_widths
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("members", [(0, 1, 2, 3, 4, 5), (1, 4, 5), (2,)])
def test_the_server_holds_the_mean_product(template, weighting, members):
    """ΔW = Σ p_i s_i B_i A_i over those that came, unequal ranks and counts; head Σ p_i h_i; A Aᵀ = I."""
    method = FlexLoRA(weighting=weighting)
    world, round = trained_world(template, method), plan(1, members, template=template)
    passed = exchanges(method, world, round)
    after = ended(method, world, round, passed)
    found = deltas(method.global_adapter(after.state))
    for name, expected in expected_mean(passed, shares_of(passed, weighting)).items():
        close(found[name], expected)
    for pair in after.state.adapter.layers.values():
        close(pair.A @ pair.A.T, torch.eye(pair.rank))
        assert pair.scale == template.scale(template.rank)
        gram = pair.Bt @ pair.Bt.T
        close(gram, gram.diag().diag(), 1e-4)  # squares of numbers near 5


@both_widths
@pytest.mark.parametrize("rslora", [False, True])
def test_a_message_is_the_best_approximation_of_its_rank(template, rslora):
    """s_k B A = the rank-k_i truncation of ΔW; its squared error is Σ_{j≥k} σ_j²; s_k = alpha / k or alpha / sqrt k."""
    template = replace(template, rslora=rslora)
    world = trained_world(template)
    global_product = deltas(world.state.adapter)
    for client in FLEET:
        message = FlexLoRA().broadcast(world.state, client, plan(1, template=template)).adapter
        for name, pair in message.layers.items():
            W = global_product[name]
            assert (pair.rank, pair.scale) == (client.rank, template.scale(client.rank))
            product = pair.scale * pair.Bt.double().T @ pair.A.double()
            close(product, best(W, client.rank))
            tail = torch.linalg.svdvals(W)[client.rank :].square().sum()
            close((W - product).square().sum(), tail, 1e-4)  # sums of squares of numbers near 5
        assert all(torch.equal(message.dense[n], world.state.adapter.dense[n]) for n in message.dense)


@LAWS
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 30)), min_size=1, max_size=5))
def test_without_training_an_index_shrinks_by_its_reach(clients):
    """Zero training: σ_j ← q_j σ_j, q_j = Σ p_i over clients with k_i > j; twice: q_j². The rank collapse."""
    fleet = tuple(Client(i, rank, examples) for i, (rank, examples) in enumerate(clients))
    method, template = FlexLoRA(), WIDE
    A, Bt = (torch.linalg.qr(torch.randn(d, 8, generator=Rng(d).torch())).Q.T for d in (24, 40))
    S = torch.linspace(8, 1, 8).unsqueeze(1)
    layers = {"up": LoRA(A, S * Bt, 2.0), "down": LoRA(Bt, S * A, 2.0)}
    world = World(ServerState(Adapter(layers, template.dense)))
    total = sum(client.examples for client in fleet)
    reach = torch.tensor([sum(c.examples for c in fleet if c.rank > j) / total for j in range(8)])
    for number in (1, 2):
        world = play(method, world, Round(number, fleet, Rng(0), template), STILL)
        found = deltas(world.state.adapter)
        expected = reach**number * S.squeeze(1)
        close(found["up"], 2.0 * (Bt.T * expected) @ A)
        close(found["down"], 2.0 * (A.T * expected) @ Bt)


@both_widths
def test_equal_ranks_as_wide_as_the_sum_are_exact(template):
    """Everybody holds min(d) parts: what each gets next is Σ p_i s_i B_i A_i itself, the target of FLoRA."""
    wide = max(min(shape) for shape in template.layers.values())
    template = replace(template, rank=wide)
    fleet = tuple(Client(i, wide, examples) for i, examples in enumerate((3, 1, 9)))
    method, world = FlexLoRA(), begun(FlexLoRA(), template=template, fleet=fleet)
    for number in (0, 1):
        round = plan(number, (0, 1, 2), fleet, template)
        passed = exchanges(method, world, round)
        world = ended(method, world, round, passed)
        expected = expected_mean(passed, shares_of(passed))
        for exchange in exchanges(method, world, plan(number + 1, (0, 1, 2), fleet, template), STILL):
            for name, product in expected.items():
                close(deltas(exchange.start.adapter)[name], product)


@both_widths
def test_the_factoring_of_a_clients_product_does_not_matter(template):
    """(B_k M, M⁻¹ A_k) changes nothing here; under FedIT it does (negative). Nor does the order of clients."""
    method, world, round = FlexLoRA(), trained_world(template), plan(1, (2, 3, 4), template=template)
    updates = [x.update for x in exchanges(method, world, round)]
    plain = method.aggregate(world.state, iter(updates), round).adapter
    moved = [turned(updates[0], gauge), *updates[1:]]
    assert (moved[0].adapter.layers["up"].A - updates[0].adapter.layers["up"].A).abs().max() > 0.02
    assert_same_function(method.aggregate(world.state, iter(moved), round).adapter, plain, PRODUCTS)
    assert_same_function(method.aggregate(world.state, iter(updates[::-1]), round).adapter, plain, PRODUCTS)

    fedit = FedIT(rank="server")
    state = begun(fedit, template=template).state
    sent = [x.update for x in exchanges(fedit, World(state), round)]
    one = fedit.aggregate(state, iter(sent), round).adapter
    two = fedit.aggregate(state, iter([turned(sent[0], gauge), *sent[1:]]), round).adapter
    assert (deltas(one)["up"] - deltas(two)["up"]).abs().max() > 1e-3


def test_scales_are_part_of_the_product():
    """Twice alpha at one client and half its B change nothing; twice alpha alone does."""
    method, world, round = FlexLoRA(), trained_world(), plan(1, (2, 3, 4))
    updates = [x.update for x in exchanges(method, world, round)]
    plain = method.aggregate(world.state, iter(updates), round).adapter
    same = turned(updates[0], lambda pair: LoRA(pair.A, pair.Bt / 2, 2 * pair.scale))
    assert_same_function(method.aggregate(world.state, iter([same, *updates[1:]]), round).adapter, plain, PRODUCTS)
    more = turned(updates[0], lambda pair: LoRA(pair.A, pair.Bt, 2 * pair.scale))
    other = method.aggregate(world.state, iter([more, *updates[1:]]), round).adapter
    assert (deltas(other)["up"] - deltas(plain)["up"]).abs().max() > 0.1


@both_widths
def test_one_client_is_factored_anew_and_no_more(template):
    """M = 1: the SVD of what it trained; the function is the client's."""
    method, world, round = FlexLoRA(), trained_world(template), plan(1, (3,), template=template)
    passed = exchanges(method, world, round)
    after = ended(method, world, round, passed)
    assert_same_function(method.global_adapter(after.state), passed[0].trained.adapter, PRODUCTS)


@both_widths
def test_what_the_server_keeps_is_bounded(template):
    """keep 'all': min(Σ k_i, d_in, d_out) parts; 'server': r of them, the best approximation; clients get the same."""
    template = replace(template, rank=4)
    fleet = tuple(Client(i, rank, 1 + i) for i, rank in enumerate((4, 1, 3, 2, 4)))
    states = {}
    for keep, most in (("all", 99), ("server", 4)):
        method = FlexLoRA(keep=keep)
        world = begun(method, template=template, fleet=fleet)
        states[keep] = play(method, world, plan(0, (0, 1, 2, 3, 4), fleet, template)).state
        for name, shape in template.layers.items():
            assert states[keep].adapter.layers[name].rank == min(14, most, *shape)
    everything = deltas(states["all"].adapter)
    for name, product in deltas(states["server"].adapter).items():
        close(product, best(everything[name], 4) if name in template.layers else everything[name])
    for client in fleet:
        round = plan(1, (0,), fleet, template)
        one, two = (FlexLoRA().broadcast(states[keep], client, round).adapter for keep in ("all", "server"))
        assert_same_function(one, two, 1e-6)


def test_a_rank_that_shrank_can_grow_again():
    """After a round of a rank-one client alone ΔW has rank 1; the others' further rows of A are drawn, and B = 0.

    They are those of the round, the same for every client, and nobody's training of them is lost.
    """
    method, world = FlexLoRA(), trained_world(WIDE)
    world = play(method, world, plan(1, (0,), template=WIDE))
    assert {pair.rank for pair in world.state.adapter.layers.values()} == {1}
    round = plan(2, (2, 3), template=WIDE)
    small, large = (method.broadcast(world.state, client, round).adapter.layers for client in (FLEET[2], FLEET[3]))
    for name in WIDE.layers:
        assert torch.equal(large[name].A[:4], small[name].A)
        assert not large[name].Bt[1:].any()
        assert torch.linalg.matrix_rank(large[name].A) == 8
    again = method.broadcast(world.state, FLEET[3], plan(3, (3,), template=WIDE)).adapter.layers["up"]
    assert not torch.equal(again.A[1:], large["up"].A[1:])
    grown = play(method, world, round)
    assert {pair.rank for pair in grown.state.adapter.layers.values()} == {12}


def test_the_first_round_starts_from_one_common_adapter():
    """Round 0: the leading rows of the server's fresh A, the same for all, and B = 0."""
    world = begun(FlexLoRA())
    for client in FLEET:
        message = FlexLoRA().broadcast(world.state, client, plan(0)).adapter
        for name, pair in message.layers.items():
            assert torch.equal(pair.A, world.state.adapter.layers[name].A[: client.rank])
            assert not pair.Bt.any()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_bytes_are_the_papers(number):
    """k_i (d_in + d_out) numbers per layer and the head, down and up, in every round."""
    method = FlexLoRA()
    head = sum(tensor.numel() for tensor in TEMPLATE.dense.values())
    width = sum(sum(shape) for shape in TEMPLATE.layers.values())
    for exchange in exchanges(method, played(method, number), plan(0)):
        expected = 4 * (exchange.site.client.rank * width + head)
        assert exchange.broadcast.nbytes == exchange.update.nbytes == expected


def test_an_inexact_round_says_so():
    """report.svd_error: 0 by the exact routes; what the randomised one reports, where the stack is large."""
    assert trained_world().state.scalars["report.svd_error"] == 0.0
    template = Template({"l": (520, 560), "s": (6, 4)}, {"h": torch.zeros(2)}, 60, 60.0)
    fleet = tuple(Client(i, 60, 1) for i in range(9))
    states = {}
    for keep in ("all", "server"):
        method = FlexLoRA(keep=keep)
        world = begun(method, template=template, fleet=fleet)
        states[keep] = play(method, world, plan(0, tuple(range(9)), fleet, template)).state
    assert states["all"].scalars["report.svd_error"] == 0.0
    error = states["server"].scalars["report.svd_error"]
    assert 0 < error < 1
    W, found = (deltas(states[keep].adapter)["l"] for keep in ("all", "server"))
    excess = (W - found).square().sum() - (W - best(W, 60)).square().sum()
    assert 0 < excess < error**2 * W.square().sum()
    assert excess < 0.05 * W.square().sum()
