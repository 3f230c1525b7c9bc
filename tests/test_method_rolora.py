"""RoLoRA: one factor rests and is common to all, so each round is exact; the other one's turn comes next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora.config import AdapterConfig, LocalConfig
from fslora.methods.fedit import FedIT
from fslora.methods.ffa_lora import FFALoRA
from fslora.methods.rolora import RoLoRA
from fslora.rng import Rng
from fslora.types import Adapter, Client, ClientMemory, LoRA, Round, Start, Template, Trained
from kit import (
    COHORTS,
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
    plan,
    play,
    played,
)
from quadratic import descent, drawn_targets, quadratic

# Sums of some dozens of float32 products of numbers near 1.
SUMS = 2e-5
LAWS = settings(max_examples=25, deadline=None, derandomize=True, database=None)
EVERYBODY = tuple(range(6))
TURNS = [0, 1, 2, 3]
"""Rounds done before the one looked at: B trains after an even number, A after an odd one."""


def world_after(method: RoLoRA, rounds: int) -> World:
    world = begun(method)
    for number in range(rounds):
        world = play(method, world, plan(number, EVERYBODY))
    return world


def factors(adapter: Adapter, which: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in adapter.tensors().items() if name.endswith({"A": ":A", "B": ":Bt"}[which])}


@LAWS
@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 30)), min_size=1, max_size=6),
    st.sampled_from(["examples", "uniform"]),
    st.sampled_from(TURNS),
)
def test_the_change_of_the_product_is_the_mean(clients, weighting, rounds):
    """s B A changes by s (Σ p_i ΔB_i) A, or by s B (Σ p_i ΔA_i), zeros for parts that a client lacks."""
    fleet = tuple(Client(number, *facts) for number, facts in enumerate(clients))
    ids, method = tuple(range(len(fleet))), RoLoRA(weighting=weighting)
    world = begun(method, fleet=fleet)
    for number in range(rounds):
        world = play(method, world, plan(number, ids, fleet))
    round = plan(rounds, ids, fleet)
    passed = exchanges(method, world, round)
    after = deltas(ended(method, world, round, passed).state.adapter)
    counts = [client.examples if weighting == "examples" else 1 for client in fleet]
    for name, before in deltas(world.state.adapter).items():
        moved = [deltas(x.trained.adapter)[name] - deltas(x.start.adapter)[name] for x in passed]
        mean = sum(count / sum(counts) * change for count, change in zip(counts, moved, strict=True))
        torch.testing.assert_close(after[name] - before, mean, atol=SUMS, rtol=SUMS)


def test_equal_ranks_average_values():
    """At k_i = r: B = Σ p_i B_i with A at rest, then A = Σ p_i A_i with B at rest; the products average exactly."""
    fleet = tuple(replace(client, rank=RANK) for client in FLEET)
    method = RoLoRA(weighting="examples")
    world, total = begun(method, fleet=fleet), sum(client.examples for client in fleet)
    for number in range(2):
        round = plan(number, EVERYBODY, fleet)
        passed = exchanges(method, world, round)
        world = ended(method, world, round, passed)
        for name, found in deltas(world.state.adapter).items():
            mean = sum(x.site.client.examples / total * deltas(x.trained.adapter)[name] for x in passed)
            torch.testing.assert_close(found, mean, atol=SUMS, rtol=SUMS)


@pytest.mark.parametrize("rounds", TURNS)
def test_the_factor_at_rest_keeps_its_bits(rounds):
    """B trains in rounds 1, 3, ..., A in 2, 4, ...; the other one's bits stay, at the server and at the clients."""
    method, trains = RoLoRA(), "AB"[rounds % 2 == 0]
    rests = "AB"[trains == "A"]
    world, round = world_after(method, rounds), plan(rounds)
    passed = exchanges(method, world, round)
    after = ended(method, world, round, passed).state.adapter
    for name, tensor in factors(world.state.adapter, rests).items():
        assert torch.equal(factors(after, rests)[name], tensor)
        for x in passed:
            assert x.start.trains == trains
            assert torch.equal(factors(x.start.adapter, rests)[name], tensor[: x.site.client.rank])
            assert not factors(x.update.adapter, rests)[name].numel()
    for name, tensor in factors(world.state.adapter, trains).items():
        assert not torch.equal(factors(after, trains)[name], tensor)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_factor_at_rest_is_out_of_the_optimizer(tiny_base, optimizer):
    """On a real model with weight decay, which would shrink it by (1 - lr · decay) a step: not one bit moves."""
    from fslora.engine.cohort import CohortEngine
    from fslora.types import LocalProblem

    base = tiny_base("bert", ("query", "value"))
    template = base.template(AdapterConfig(rank=4, alpha=8.0))
    engine = CohortEngine(base, LocalConfig(optimizer=optimizer, lr=0.01, weight_decay=0.1), 0.0, 4)
    batch = {"input_ids": torch.tensor([[2, 5, 6, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}

    def train(start: Start, client: Client, round: Round) -> Trained:
        batches = [{**batch, "labels": torch.tensor([client.id % 3])}] * 2
        (trained,) = engine.train([LocalProblem(client.id, start, batches, round.rng.child("dropout"))], 0.01)
        return trained

    method, fleet = RoLoRA(), FLEET[:3]
    world = begun(method, template=template, fleet=fleet)
    for number, rests in enumerate("ABAB"):
        round = plan(number, (0, 1, 2), fleet, template)
        passed = exchanges(method, world, round, train)
        after = ended(method, world, round, passed)
        for x in passed:
            for name, tensor in factors(x.start.adapter, rests).items():
                assert torch.equal(factors(x.trained.adapter, rests)[name], tensor)
        moved = {"A": "B", "B": "A"}[rests]
        for name, tensor in factors(world.state.adapter, rests).items():
            assert torch.equal(factors(after.state.adapter, rests)[name], tensor)
        assert any(
            not torch.equal(factors(after.state.adapter, moved)[name], tensor)
            for name, tensor in factors(world.state.adapter, moved).items()
        )
        world = after


def test_the_other_order_would_lose_a_round():
    """With B = 0 the gradient of A is s Bᵀ G = 0: an A-round first changes nothing, a B-round first does."""
    method, training = RoLoRA(), descent(drawn_targets(FLEET), lr=0.01, steps=3)
    world = begun(method)
    state = replace(world.state, scalars={"rounds": 1.0})  # as if a B-round had left B = 0
    swapped = play(method, World(state), plan(0), training).state
    assert_same_adapter(swapped.adapter, world.state.adapter)
    assert all(pair.Bt.any() for pair in play(method, world, plan(0), training).state.adapter.layers.values())


def test_always_b_is_ffa_lora():
    """With every round a B-round from the same A0, three rounds are FFA-LoRA's, bit for bit; ranks unequal."""
    ours, theirs = RoLoRA(), FFALoRA(weighting="uniform")
    ffa = begun(theirs)
    world = World(replace(begun(ours).state, adapter=ffa.state.adapter))
    for number in range(3):
        ffa = play(theirs, ffa, plan(number))
        world = play(ours, World(replace(world.state, scalars={})), plan(number))
        assert_same_adapter(world.state.adapter, ffa.state.adapter)


def test_one_client_is_block_alternating_lora():
    """M = 1 at full rank: the server's pair is what plain LoRA reaches that trains B, then A, then B, from the last."""
    fleet = (Client(0, RANK, 4),)
    training = descent(drawn_targets(fleet), lr=0.01, steps=2)
    method = RoLoRA()
    world = begun(method, fleet=fleet)
    alone = world.state.adapter
    for number, trains in enumerate(("B", "A", "B")):
        round = plan(number, (0,), fleet)
        world = play(method, world, round, training)
        alone = training(Start(alone, trains), fleet[0], round).adapter
        for name, tensor in alone.tensors().items():
            # x + (y - x) against y in float32.
            torch.testing.assert_close(world.state.adapter.tensors()[name], tensor, atol=1e-6, rtol=0)


def test_exact_solves_of_a_rank_one_target():
    """f = ½ ‖B A - b* a*ᵀ‖²: a B-round leaves ½ ‖b*‖² sin²(a0, a*), FFA-LoRA's floor; the A-round after it leaves 0."""
    d_in, d_out = 7, 5
    template = Template({"l": (d_in, d_out)}, {}, rank=1, alpha=1.0)
    fleet = (Client(0, 1, 1), Client(1, 1, 3))
    stream = Rng(0).torch()
    a, b = torch.randn(d_in, generator=stream).double(), torch.randn(d_out, generator=stream).double()
    target = torch.outer(b, a / a.norm())

    def solve(start: Start, client: Client, round: Round) -> Trained:
        del round
        pair = start.adapter.layers["l"]
        A, Bt = pair.A.double(), pair.Bt.double()
        if start.trains == "B":
            pair = replace(pair, Bt=(target @ A.T / A.square().sum()).T.float())
        else:
            pair = replace(pair, A=(Bt @ target / Bt.square().sum()).float())
        return Trained(client.id, Adapter({"l": pair}), (1.0,))

    def loss(world: World) -> float:
        return float(quadratic(world.state.adapter, {"l": target}))

    method = RoLoRA()
    world = begun(method, template=template, fleet=fleet)
    start = world.state.adapter.layers["l"].A[0].double()
    cosine = float(start @ a / (start.norm() * a.norm()))
    world = play(method, world, plan(0, (0, 1), fleet, template), solve)
    floor = 0.5 * float(b.square().sum()) * (1 - cosine**2)
    assert floor > 0.1
    assert loss(world) == pytest.approx(floor, rel=1e-5)
    world = play(method, world, plan(1, (0, 1), fleet, template), solve)
    assert loss(world) == pytest.approx(0.0, abs=1e-10)


def test_nobody_training_changes_nothing():
    """Deltas: at unequal ranks not one bit moves. Negative: the mean of zero-padded B_i would shrink parts by q_j."""
    method = RoLoRA()
    world = world_after(method, 2)
    for number in (2, 3):
        still = play(method, world, plan(number, EVERYBODY), fake_training(0.0))
        assert_same_adapter(still.state.adapter, world.state.adapter)
    padded = torch.zeros(RANK, 4)
    for client in FLEET:
        padded[: client.rank] += world.state.adapter.layers["up"].Bt[: client.rank] / len(FLEET)
    assert (padded - world.state.adapter.layers["up"].Bt).abs().max() > 0.05


def test_holders_divide_by_the_share_that_holds_a_part():
    """Δ_cohort[j] = q_j Δ_holders[j], q_j = Σ p_i over clients with k_i > j; a part that nobody holds rests."""
    world, round = world_after(RoLoRA(), 2), plan(2, (0, 1, 2, 5))
    passed = exchanges(RoLoRA(weighting="examples"), world, round)
    cohort, held = (
        ended(RoLoRA(weighting="examples", average=average), world, round, passed).state.adapter.layers["down"].Bt
        - world.state.adapter.layers["down"].Bt
        for average in ("cohort", "holders")
    )
    total = sum(client.examples for client in round.cohort)
    q = torch.tensor([sum(c.examples for c in round.cohort if c.rank > j) / total for j in range(RANK)])
    assert q.tolist()[3:] == pytest.approx([20 / total, 0, 0, 0, 0])
    torch.testing.assert_close(cohort, held * q.unsqueeze(1), atol=SUMS, rtol=0)
    assert held[:4].any(dim=1).all()
    assert not held[4:].any()


# --- messages ---


def sizes(template: Template = TEMPLATE) -> Mapping[str, int]:
    """Bytes of one row of each factor, summed over layers, and of the head."""
    return {
        "A": 4 * sum(d_in for d_in, _ in template.layers.values()),
        "B": 4 * sum(d_out for _, d_out in template.layers.values()),
        "head": 4 * sum(tensor.numel() for tensor in template.dense.values()),
    }


def test_two_rounds_send_what_one_of_fedit_sends():
    """Present in both: k (d_in + d_out) · 4 in each direction over two rounds, beside two heads and two flag bytes."""
    fleet = tuple(replace(client, rank=4) for client in FLEET)
    method, fedit = RoLoRA(), FedIT(rank=4)
    world = play(method, begun(method, fleet=fleet), plan(0, EVERYBODY, fleet))
    (theirs, *_) = exchanges(fedit, begun(fedit, fleet=fleet), plan(0, EVERYBODY, fleet))
    down = up = 0
    for number in (1, 2):
        round = plan(number, EVERYBODY, fleet)
        passed = exchanges(method, world, round)
        down, up = down + passed[0].broadcast.nbytes, up + passed[0].update.nbytes
        world = ended(method, world, round, passed)
    assert down == theirs.broadcast.nbytes + sizes()["head"] + 2
    assert up == theirs.update.nbytes + sizes()["head"]


def test_who_was_absent_gets_both_factors():
    """Down: the factor changed last to clients of the last round, both to all others; the trained one goes up."""
    method, row = RoLoRA(), sizes()
    world = begun(method)
    for number in range(6):
        round = plan(number)
        previous = COHORTS[(number - 1) % 3] if number else ()
        trains, rests = ("B", "A") if number % 2 == 0 else ("A", "B")
        passed = exchanges(method, world, round)
        for x in passed:
            k = x.site.client.rank
            pair = row[rests] + (0 if x.site.client.id in previous else row[trains])
            assert x.broadcast.nbytes == k * pair + row["head"] + 1
            assert x.update.nbytes == k * row[trains] + row["head"]
        world = ended(method, world, round, passed)


def test_all_start_from_the_servers_pair():
    """Whatever a client keeps or gets, after absences and lost answers, it starts from the server's first k_i parts."""
    method = RoLoRA()
    world = begun(method)
    for number, members in enumerate([EVERYBODY, (0, 2, 3), (0, 1, 3), (1, 3, 4), EVERYBODY, EVERYBODY, (0, 5)]):
        round = plan(3 * number, members)  # rounds in between failed: the turn does not depend on their number
        passed = exchanges(method, world, round)
        for x in passed:
            assert x.start.trains == "BA"[number % 2]
            for name, pair in x.start.adapter.layers.items():
                ours, k = world.state.adapter.layers[name], x.site.client.rank
                assert torch.equal(pair.A, ours.A[:k])
                assert torch.equal(pair.Bt, ours.Bt[:k])
                assert pair.scale == TEMPLATE.scale(RANK)
        # The last client trains and remembers, but its answer is lost.
        after = ended(method, world, round, passed[:-1])
        lost = passed[-1]
        memory = method.remember(lost.broadcast, lost.start, lost.trained, lost.site)
        world = World(after.state, {**after.memories, lost.site.client.id: memory})


def test_a_client_keeps_one_factor_of_its_own_rank():
    """What it keeps is the factor that rested, k_i rows in memory of its own: not a view of what the server holds."""
    world = played(RoLoRA(), 1)
    for client in FLEET:
        memory = world.memories[client.id]
        assert memory.nbytes == client.rank * sizes()["A"]
        for name, pair in memory.slots["rested"].layers.items():
            assert torch.equal(pair.A, world.state.adapter.layers[name].A[: client.rank])
            assert pair.A.untyped_storage().nbytes() == pair.A.nbytes
    assert isinstance(world.memories[0], ClientMemory)


def test_a_change_of_gauge_is_the_same_function_and_another_path():
    """Negative: from (B M, M⁻¹ A) the function is the same, but one SGD round of B is not; an exact solve for B is."""
    template, fleet = Template({"up": (6, 4)}, {}, 2, 4.0), (Client(0, 2, 4),)
    target = torch.randn(4, 6, generator=Rng(2).torch())
    method, round, step = RoLoRA(), plan(0, (0,), fleet, template), descent({0: {"up": target}}, 0.05)
    pair = play(method, begun(method, template=template, fleet=fleet), round, step).state.adapter.layers["up"]
    M = torch.tensor([[2.0, 1.0], [0.0, 0.5]])
    turned = LoRA(torch.linalg.inv(M) @ pair.A, M.T @ pair.Bt, pair.scale)
    torch.testing.assert_close(turned.delta, pair.delta, atol=SUMS, rtol=SUMS)

    def solve(start: Start, client: Client, round: Round) -> Trained:
        own = start.adapter.layers["up"]
        best = replace(own, Bt=(target @ torch.linalg.pinv(own.A)).T / own.scale)
        return Trained(client.id, Adapter({"up": best}), (1.0,))

    def after(start: LoRA, training) -> torch.Tensor:
        world = World(replace(begun(method, template=template).state, adapter=Adapter({"up": start})))
        return play(method, world, round, training).state.adapter.layers["up"].delta

    assert (after(turned, step) - after(pair, step)).abs().max() > 0.05
    torch.testing.assert_close(after(turned, solve), after(pair, solve), atol=SUMS, rtol=SUMS)
