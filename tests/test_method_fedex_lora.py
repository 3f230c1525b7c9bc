"""FedEx-LoRA: the residual in the base makes the averaged pair exact, for equal and for unequal ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora.methods.fedex_lora import FedExLoRA, residual
from fslora.methods.fedit import FedIT
from fslora.rng import Rng
from fslora.types import Adapter, Client, LoRA, Template, Trained
from kit import (
    FLEET,
    TEMPLATE,
    WIDE,
    Exchange,
    World,
    assert_same_adapter,
    begun,
    deltas,
    ended,
    exchanges,
    fake_training,
    plan,
    play,
    played,
)
from products import PRODUCTS, best, close, shares_of

LAWS = settings(max_examples=25, deadline=None, derandomize=True, database=None)
STILL = fake_training(0.0)
both_widths = pytest.mark.parametrize("template", [TEMPLATE, WIDE], ids=["narrow", "wide"])
EQUAL = tuple(replace(client, rank=4) for client in FLEET)
WEIGHTINGS = pytest.mark.parametrize("weighting", ["uniform", "examples"])


def weight(world: World, pairs: Adapter, frozen: dict[str, LoRA]) -> dict[str, torch.Tensor]:
    """The weights that a client computes with, relative to the base before any change: base, frozen parts, own pair."""
    total = deltas(pairs)
    for more in (world.state.slots["base"].layers if "base" in world.state.slots else {}, frozen):
        for name, product in deltas(Adapter(more)).items():
            total[name] = total[name] + product
    return total


def mean_weight(world: World, passed: list[Exchange], weighting: str) -> dict[str, torch.Tensor]:
    """Σ p_i of the weights with which the clients end."""
    ends = [weight(world, x.trained.adapter, x.start.frozen) for x in passed]
    shares = shares_of(passed, weighting)
    return {name: sum(p * end[name] for p, end in zip(shares, ends, strict=True)) for name in ends[0]}


@both_widths
@WEIGHTINGS
@pytest.mark.parametrize("fleet", [FLEET, EQUAL], ids=["unequal", "equal"])
def test_the_total_is_the_exact_mean_of_the_clients(template, weighting, fleet):
    """W_{t+1} + s B̄ Ā = Σ p_i (W_t + s B_i A_i), i.e. the mean of complete client weights, round after round.

    Layers are not square, p not uniform, clients absent now and then.
    """
    method = FedExLoRA(weighting=weighting)
    world = begun(method, template=template, fleet=fleet)
    for number in range(4):
        round = plan(number, fleet=fleet, template=template)
        passed = exchanges(method, world, round)
        expected = mean_weight(world, passed, weighting)
        world = ended(method, world, round, passed)
        found = deltas(method.global_adapter(world.state))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            close(found[name], tensor)
    averages_alone = deltas(world.state.adapter)
    assert all((averages_alone[name] - found[name]).abs().max() > 0.1 for name in template.layers)


@both_widths
def test_every_client_starts_from_the_same_total(template):
    """Base + frozen parts + own pair = T, whatever the rank: client i trains the first k_i parts, holds the others."""
    method = FedExLoRA()
    world = begun(method, template=template)
    for number in range(2):
        world = play(method, world, plan(number, template=template))
    total = deltas(method.global_adapter(world.state))
    for exchange in exchanges(method, world, plan(0, template=template)):
        k, start = exchange.site.client.rank, exchange.start
        for name, tensor in weight(world, start.adapter, start.frozen).items():
            close(tensor, total[name])
        for name, pair in world.state.adapter.layers.items():
            assert torch.equal(start.adapter.layers[name].A, pair.A[:k])
            assert start.adapter.layers[name].scale == template.scale(8)
            assert (name in start.frozen) == (k < 8)


@WEIGHTINGS
@pytest.mark.parametrize("members", [(0, 1, 2, 3, 4, 5), (1, 4, 5), (0, 3)])
def test_the_pair_is_the_mean_of_complete_pairs(weighting, members):
    """Ā = Σ p_i A_i, B̄ = Σ p_i B_i, where a part that client i did not train is the one that it got."""
    method = FedExLoRA(weighting=weighting)
    world, round = played(method, 2), plan(2, members)
    passed = exchanges(method, world, round)
    after = ended(method, world, round, passed).state.adapter
    shares = shares_of(passed, weighting)
    for name, old in world.state.adapter.layers.items():
        for kind in ("A", "Bt"):
            whole = [torch.cat([getattr(x.trained.adapter.layers[name], kind),
                                getattr(old, kind)[x.site.client.rank :]]) for x in passed]  # fmt: skip
            close(getattr(after.layers[name], kind), sum(p * t for p, t in zip(shares, whole, strict=True)))


# --- the residual ---


def made(ranks: list[int], weights: list[int], seed: int = 0) -> tuple[LoRA, list[LoRA], list[float]]:
    """(mean change, clients' changes, shares) of clients of these ranks, d_in 11, d_out 7."""
    stream = Rng(seed).torch()
    pairs = [LoRA(torch.randn(k, 11, generator=stream), torch.randn(k, 7, generator=stream), 0.5) for k in ranks]
    shares = [weight / sum(weights) for weight in weights]
    A, Bt = torch.zeros(max(ranks), 11), torch.zeros(max(ranks), 7)
    for share, pair in zip(shares, pairs, strict=True):
        A[: pair.rank] += share * pair.A
        Bt[: pair.rank] += share * pair.Bt
    return LoRA(A, Bt, 0.5), pairs, shares


def product(pair: LoRA) -> torch.Tensor:
    return pair.scale * pair.Bt.double().T @ pair.A.double()


def filled(pair: LoRA, rank: int) -> LoRA:
    A, Bt = torch.zeros(rank, 11), torch.zeros(rank, 7)
    A[: pair.rank], Bt[: pair.rank] = pair.A, pair.Bt
    return LoRA(A, Bt, pair.scale)


@LAWS
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 30)), min_size=2, max_size=5), st.integers(0, 99))
def test_the_residual_is_a_covariance(clients, seed):
    """R = Σ p_i B_i A_i - B̄ Ā = Σ p_i (B_i - B̄)(A_i - Ā) = Σ_{i<m} p_i (B_i - B̄)(A_i - A_m), in Σ_{i≠m} k_i parts."""
    ranks, weights = [k for k, _ in clients], [n for _, n in clients]
    mean, pairs, shares = made(ranks, weights, seed)
    found = residual(mean, pairs, shares)
    assert found.rank == sum(ranks) - min(ranks)
    whole = [filled(pair, max(ranks)) for pair in pairs]

    def covariance(reference: LoRA | None) -> torch.Tensor:
        other = reference or mean
        return sum(
            p * product(LoRA(pair.A - other.A, pair.Bt - mean.Bt, 0.5)) for p, pair in zip(shares, whole, strict=True)
        )

    plain = sum(p * product(pair) for p, pair in zip(shares, whole, strict=True)) - product(mean)
    for expected in (plain, covariance(None), covariance(whole[-1])):
        close(product(found), expected, 1e-5)


def test_the_residual_does_not_depend_on_what_the_changes_start_from():
    """Changes and values have the same covariance: a common shift of all A_i and B_i leaves R."""
    mean, pairs, shares = made([3, 3, 3], [1, 2, 4])
    shift = LoRA(torch.randn(3, 11, generator=Rng(1).torch()), torch.randn(3, 7, generator=Rng(2).torch()), 0.5)
    moved = [LoRA(pair.A + shift.A, pair.Bt + shift.Bt, 0.5) for pair in pairs]
    close(
        product(residual(LoRA(mean.A + shift.A, mean.Bt + shift.Bt, 0.5), moved, shares)),
        product(residual(mean, pairs, shares)),
        1e-5,
    )


@both_widths
@pytest.mark.parametrize("same", ["A", "B"])
def test_no_residual_where_a_factor_is_shared(template, same):
    """Equal A_i or equal B_i: R = 0, the averages are exact (FedIT, FFA-LoRA)."""
    method, noise, still = FedExLoRA(), fake_training(0.3), fake_training(0.0)

    def training(start, client, round):
        moved, rest = noise(start, client, round).adapter, still(start, client, round).adapter
        layers = {
            name: LoRA(moved.layers[name].A if same == "B" else rest.layers[name].A + 0.1,
                       moved.layers[name].Bt if same == "A" else rest.layers[name].Bt + 0.1, pair.scale)
            for name, pair in rest.layers.items()
        }  # fmt: skip
        return Trained(client.id, Adapter(layers, moved.dense), (1.0,))

    world = play(
        method, begun(method, template=template, fleet=EQUAL), plan(0, fleet=EQUAL, template=template), training
    )
    assert max(delta.abs().max() for delta in deltas(world.state.slots["base"]).values()) < 1e-6
    assert all(delta.abs().max() > 0.01 for name, delta in deltas(world.state.adapter).items())


@pytest.mark.parametrize("residual_rank", [None, 2])
def test_one_client_leaves_the_base_alone(residual_rank):
    """M = 1: no residual at all; the pair and the head are what it trained."""
    method, round = FedExLoRA(residual_rank=residual_rank), plan(0, (3,))
    world = begun(method)
    passed = exchanges(method, world, round)
    after = ended(method, world, round, passed)
    assert method.base(after.state) is None
    for name, tensor in passed[0].trained.adapter.tensors().items():
        close(after.state.adapter.tensors()[name], tensor, 1e-6)  # x + (y - x) in float32


def test_at_equal_ranks_the_pair_is_fedits():
    """k_i = r: after one round, FedIT's averages, bit for bit; the residual is what FedIT lacks."""
    fleet = tuple(replace(client, rank=8) for client in FLEET)
    ours, theirs = FedExLoRA(), FedIT(rank="server", weighting="uniform")
    left = play(ours, begun(ours, fleet=fleet), plan(0, fleet=fleet))
    right = play(theirs, begun(theirs, fleet=fleet), plan(0, fleet=fleet))
    assert_same_adapter(left.state.adapter, right.state.adapter)
    assert deltas(left.state.slots["base"])["up"].abs().max() > 0.1


@both_widths
def test_without_training_nothing_moves(template):
    """Zero training for two rounds, all ranks: pair, head and total keep their bits."""
    method = FedExLoRA()
    world = play(method, begun(method, template=template), plan(0, template=template))
    still = play(method, play(method, world, plan(1, template=template), STILL), plan(2, template=template), STILL)
    assert_same_adapter(still.state.adapter, world.state.adapter)
    before, after = (deltas(method.global_adapter(w.state)) for w in (world, still))
    for name, tensor in before.items():
        close(after[name], tensor, 1e-6)  # the sum of changes is made anew where stacks are bounded


# --- the truncated variant ---


@both_widths
@pytest.mark.parametrize("rank", [1, 2])
def test_the_truncated_residual_is_the_best_of_its_rank(template, rank):
    """‖R - R_r'‖² = the sum of the discarded σ²; all that is lost of the exact mean."""
    exact, cut = FedExLoRA(), FedExLoRA(residual_rank=rank)
    world, round = begun(exact, template=template), plan(0, template=template)
    passed = exchanges(exact, world, round, fake_training(0.6))
    R, found = (ended(m, world, round, passed).state for m in (exact, cut))
    wholes = deltas(R.slots["base"])
    tails = {name: torch.linalg.svdvals(whole)[rank:].square().sum() for name, whole in wholes.items()}
    assert max(tails.values()) > 0.01
    for name, whole in wholes.items():
        part = deltas(found.slots["base"])[name]
        close(part, best(whole, rank))
        close((whole - part).square().sum(), tails[name], 1e-4)  # sums of squares of numbers near 5
        assert found.slots["base"].layers[name].rank == rank
    assert_same_adapter(found.adapter, R.adapter)
    assert found.scalars["report.svd_error"] == 0.0


def test_residual_rank_zero_is_fedit():
    """r' = 0 never touches the base: at equal ranks FedIT, round after round."""
    fleet = tuple(replace(client, rank=8) for client in FLEET)
    ours, theirs = FedExLoRA(residual_rank=0), FedIT(rank="server", weighting="uniform")
    left, right = begun(ours, fleet=fleet), begun(theirs, fleet=fleet)
    for number in range(3):
        round = plan(number, fleet=fleet)
        left, right = play(ours, left, round), play(theirs, right, round)
    assert ours.base(left.state) is None
    assert_same_adapter(ours.global_adapter(left.state), right.state.adapter)


def test_a_residual_rank_above_its_own_is_exact():
    """r' ≥ Σ_{i≠m} k_i: the exact variant, in no more parts than that."""
    world, round = begun(FedExLoRA(), template=WIDE, fleet=EQUAL), plan(0, (0, 1, 2), EQUAL, WIDE)
    passed = exchanges(FedExLoRA(), world, round)
    one, two = (ended(FedExLoRA(residual_rank=r), world, round, passed).state for r in (None, 99))
    for name, whole in deltas(one.slots["base"]).items():
        close(deltas(two.slots["base"])[name], whole)
        assert one.slots["base"].layers[name].rank == two.slots["base"].layers[name].rank == 2 * 4


def test_an_inexact_truncation_says_so():
    """report.svd_error: what the randomised route reports, where the residual's stack is large."""
    template = Template({"l": (520, 560)}, {"h": torch.zeros(2)}, 60, 60.0)
    fleet = tuple(Client(i, 60, 1) for i in range(10))
    errors = {}
    for rank in (None, 8):
        method = FedExLoRA(residual_rank=rank)
        state = play(method, begun(method, template=template, fleet=fleet), plan(0, tuple(range(10)), fleet, template))
        errors[rank] = state.state.scalars["report.svd_error"]
    assert errors[None] == 0.0
    assert 0 < errors[8] < 1


# --- what travels ---


def numbers(template: Template, parts: int) -> int:
    return parts * sum(sum(shape) for shape in template.layers.values())


HEAD = sum(tensor.numel() for tensor in WIDE.dense.values())


def test_at_equal_ranks_bytes_are_the_papers():
    """Up r (d_in + d_out); down r (d_in + d_out) + (M - 1) r (d_in + d_out) = M r (d_in + d_out); heads."""
    template, method = replace(WIDE, rank=4), FedExLoRA()
    world = play(method, begun(method, template=template, fleet=EQUAL), plan(0, (0, 1, 2, 3), EQUAL, template))
    for exchange in exchanges(method, world, plan(1, (1, 2), EQUAL, template)):
        assert exchange.broadcast.nbytes == 4 * (numbers(template, 4 * 4) + HEAD)
        assert exchange.update.nbytes == 4 * (numbers(template, 4) + HEAD)


@pytest.mark.parametrize(("residual_rank", "parts"), [(None, 2 + 4 + 8), (5, 5), (0, 0)])
def test_at_unequal_ranks_all_parts_go_down(residual_rank, parts):
    """Down (r + Σ_{i≠m} k_i)(d_in + d_out), truncated (r + r'), whatever k_i is; up k_i (d_in + d_out)."""
    method = FedExLoRA(residual_rank=residual_rank)
    world = play(method, begun(method, template=WIDE), plan(0, (0, 1, 2, 3), template=WIDE))
    for exchange in exchanges(method, world, plan(1, (0, 2, 5), template=WIDE)):
        assert exchange.broadcast.nbytes == 4 * (numbers(WIDE, 8 + parts) + HEAD)
        assert exchange.update.nbytes == 4 * (numbers(WIDE, exchange.site.client.rank) + HEAD)


def test_a_stack_beyond_the_layer_is_sent_at_the_layers_rank():
    """Σ_{i≠m} k_i = 20 parts of a layer of width 3: no more than 3 travel; the other layer's 20 do."""
    method, template = FedExLoRA(), replace(WIDE, layers={"narrow": (3, 5), "wide": (60, 50)})
    world = begun(method, template=template)
    for number in range(3):
        world = play(method, world, plan(number, (1, 2, 3, 4), template=template))
    (update,) = method.broadcast(world.state, FLEET[1], plan(3, (1,), template=template)).base
    assert not update.whole
    assert {name: pair.rank for name, pair in update.adapter.layers.items()} == {"narrow": 3, "wide": 20}


def test_an_absent_client_gets_every_residual_that_it_missed():
    """In order, and no more; their sum is the change of the base."""
    method = FedExLoRA()
    world = begun(method, template=WIDE)
    for number, members in enumerate([(0, 1), (1, 2), (1, 3)]):
        world = play(method, world, plan(number, members, template=WIDE))
    round = plan(3, (0, 1, 2, 5), template=WIDE)
    sent = {client.id: method.broadcast(world.state, client, round).base for client in round.cohort}
    assert {c: [update.version for update in base] for c, base in sent.items()} == {
        0: [1, 2, 3],
        1: [3],
        2: [2, 3],
        5: [1, 2, 3],
    }
    total = deltas(method.base(world.state))
    for name in WIDE.layers:
        close(sum(deltas(update.adapter)[name] for update in sent[5]), total[name], PRODUCTS)
