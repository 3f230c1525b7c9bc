"""FFA-LoRA: A0 never moves and never travels, so averaging B is exact for any subsets of its columns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora.config import AdapterConfig, LocalConfig
from fslora.engine.sequential import SequentialEngine
from fslora.methods.ffa_lora import FFALoRA
from fslora.types import Adapter, Client, LocalProblem, Round, Site, Start, Trained
from kit import (
    FLEET,
    RANK,
    SEED,
    TEMPLATE,
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
from quadratic import descent, drawn_targets

# Sums of some dozens of float32 products of numbers near 1.
SUMS = 2e-5
LAWS = settings(max_examples=25, deadline=None, derandomize=True, database=None)
SUBSETS = ["leading", "random"]
subsets = pytest.mark.parametrize("subset", SUBSETS)


@LAWS
@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 30)), min_size=1, max_size=6),
    st.sampled_from(["examples", "uniform"]),
    st.sampled_from(SUBSETS),
)
def test_the_change_of_the_product_is_the_mean(clients, weighting, subset):
    """s (Σ p_k ΔB_k) A0 = Σ p_k s ΔB_k A0[I_k] at unequal ranks, for any subsets of columns, in every round."""
    fleet = tuple(Client(number, *facts) for number, facts in enumerate(clients))
    ids, method = tuple(range(len(fleet))), FFALoRA(weighting=weighting, subset=subset)
    world = begun(method, fleet=fleet)
    counts = [client.examples if weighting == "examples" else 1 for client in fleet]
    for number in range(2):
        round = plan(number, ids, fleet)
        passed = exchanges(method, world, round)
        before, world = world, ended(method, world, round, passed)
        for name, found in deltas(world.state.adapter).items():
            moved = [deltas(x.trained.adapter)[name] - deltas(x.start.adapter)[name] for x in passed]
            mean = sum(count / sum(counts) * change for count, change in zip(counts, moved, strict=True))
            torch.testing.assert_close(found - deltas(before.state.adapter)[name], mean, atol=SUMS, rtol=SUMS)


@subsets
def test_equal_ranks_have_no_aggregation_error(subset):
    """At k_i = r: Σ p_k s B_k A0 - s B̄ A0 = 0, the covariance that FedIT misses."""
    fleet = tuple(replace(client, rank=RANK) for client in FLEET)
    method, round, total = FFALoRA(subset=subset), plan(0, None, fleet), sum(client.examples for client in FLEET)
    world = play(method, begun(method, fleet=fleet), round)
    passed = exchanges(method, world, round)
    for name, found in deltas(ended(method, world, round, passed).state.adapter).items():
        mean = sum(x.site.client.examples / total * deltas(x.trained.adapter)[name] for x in passed)
        torch.testing.assert_close(found, mean, atol=SUMS, rtol=SUMS)


@subsets
def test_a0_has_the_same_bits_everywhere_and_always(subset):
    """Every client's rows, drawn again from the seed in its message, are the server's; no round moves them."""
    method = FFALoRA(subset=subset)
    world = begun(method)
    frozen = {name: pair.A.clone() for name, pair in world.state.adapter.layers.items()}
    for number in range(4):
        round = plan(number)
        passed = exchanges(method, world, round)
        for x in passed:
            assert x.start.trains == "B"
            for name, pair in x.start.adapter.layers.items():
                index = x.broadcast.rows[name].long() if subset == "random" else slice(x.site.client.rank)
                assert torch.equal(pair.A, frozen[name][index])
                assert torch.equal(pair.Bt, world.state.adapter.layers[name].Bt[index])
                assert pair.scale == TEMPLATE.scale(RANK)
        world = ended(method, world, round, passed)
        for name, pair in world.state.adapter.layers.items():
            assert torch.equal(pair.A, frozen[name])
            assert pair.Bt.any()


def test_the_seed_is_exact_in_a_float():
    """Scalars are floats: the seed fits their 53 bits, and is not the run's own."""
    for seed in range(50):
        state = begun(FFALoRA(), seed).state
        number = state.scalars["seed"]
        assert number == int(number) < 2**53
        assert number != seed
        (x,) = exchanges(FFALoRA(), begun(FFALoRA(), seed), plan(0, (3,)))
        assert torch.equal(x.start.adapter.layers["up"].A, state.adapter.layers["up"].A)
    assert begun(FFALoRA(), SEED).state.scalars["seed"] != begun(FFALoRA(), SEED + 1).state.scalars["seed"]


def test_random_subsets_come_round():
    """Each client's columns are drawn anew per client, layer and round, k_i of r; over rounds they reach all."""
    method, reached = FFALoRA(subset="random"), set()
    state = begun(method).state
    for number in range(30):
        round = plan(number, (1, 2, 5))
        for client in round.cohort:
            rows = method.broadcast(state, client, round).rows
            assert {len(index) for index in rows.values()} == {client.rank}
            reached |= {(client.id, name, j) for name, index in rows.items() for j in index.tolist()}
    assert len(reached) == 3 * len(TEMPLATE.layers) * RANK
    alike = (Client(0, 4, 1), Client(1, 4, 1))
    drawn = [
        [tuple(index.tolist()) for index in method.broadcast(state, client, plan(number, (0, 1), alike)).rows.values()]
        for number in range(5)
        for client in alike
    ]
    assert any(len(set(layers)) > 1 for layers in drawn), "all layers share one draw"
    assert drawn[0::2] != drawn[1::2], "two clients share one draw"
    assert FFALoRA().broadcast(state, FLEET[0], plan(0)).rows is None


def test_alpha_is_a_step_size():
    """Under SGD, (c · alpha, lr / c²) is the same run with B smaller by c: s B A0 agrees after rounds of steps."""
    c, targets = 4.0, drawn_targets(FLEET)
    louder = replace(TEMPLATE, alpha=c * TEMPLATE.alpha)
    method = FFALoRA()
    one, other = begun(method), begun(method, template=louder)
    for number in range(3):
        one = play(method, one, plan(number), descent(targets, 0.01, steps=3))
        other = play(method, other, plan(number, template=louder), descent(targets, 0.01 / c**2, steps=3))
    for name, product in deltas(one.state.adapter).items():
        torch.testing.assert_close(deltas(other.state.adapter)[name], product, atol=SUMS, rtol=SUMS)
        if name in TEMPLATE.layers:
            assert product.abs().max() > 0.1
            torch.testing.assert_close(
                c * other.state.adapter.layers[name].Bt, one.state.adapter.layers[name].Bt, atol=SUMS, rtol=SUMS
            )


def test_one_client_is_lora_with_a_frozen_a():
    """M = 1 at full rank: the server's pair is what SGD on B alone reaches, round after round; A never moves."""
    fleet = (Client(0, RANK, 4),)
    method, training = FFALoRA(), descent(drawn_targets(fleet), 0.01, steps=2)
    world = begun(method, fleet=fleet)
    alone = world.state.adapter
    for number in range(3):
        round = plan(number, (0,), fleet)
        world = play(method, world, round, training)
        alone = training(Start(alone, "B"), fleet[0], round).adapter
        for name, tensor in alone.tensors().items():
            # x + (y - x) against y in float32.
            torch.testing.assert_close(world.state.adapter.tensors()[name], tensor, atol=1e-6, rtol=0)


@subsets
def test_nobody_training_changes_nothing(subset):
    """Deltas: with unequal ranks not one bit moves."""
    method = FFALoRA(subset=subset)
    world = played(method, 2)
    assert_same_adapter(play(method, world, plan(2), fake_training(0.0)).state.adapter, world.state.adapter)


@subsets
def test_holders_divide_by_the_share_that_holds_a_column(subset):
    """Δ_cohort[j] = q_j Δ_holders[j], q_j = Σ p_k over the clients that train column j; others rest."""
    world, round = played(FFALoRA(subset=subset), 2), plan(2, (0, 1, 5))
    passed = exchanges(FFALoRA(subset=subset), world, round)
    cohort, held = (
        ended(FFALoRA(subset=subset, average=average), world, round, passed).state.adapter.layers["down"].Bt
        - world.state.adapter.layers["down"].Bt
        for average in ("cohort", "holders")
    )
    q = torch.zeros(RANK)
    for x in passed:
        index = x.broadcast.rows["down"].long() if subset == "random" else slice(x.site.client.rank)
        q[index] += x.site.client.examples / sum(client.examples for client in round.cohort)
    assert 0 < q[q > 0].min() < 1
    torch.testing.assert_close(cohort, held * q.unsqueeze(1), atol=SUMS, rtol=0)
    assert torch.equal(held.any(dim=1), q > 0)


@subsets
def test_bytes_are_b_alone(subset):
    """k_i d_out · 4 per layer and direction; the head; 8 bytes of a seed down; 4 k_i of indices if they are drawn."""
    method = FFALoRA(subset=subset)
    head = 4 * sum(tensor.numel() for tensor in TEMPLATE.dense.values())
    for x in exchanges(method, played(method, 1), plan(1)):
        k = x.site.client.rank
        B = 4 * k * sum(d_out for _, d_out in TEMPLATE.layers.values())
        indices = 4 * k * len(TEMPLATE.layers) if subset == "random" else 0
        assert x.broadcast.nbytes == B + indices + head + 8
        assert x.update.nbytes == B + indices + head


def test_a_client_needs_nothing_but_its_message():
    """A client that was never there before starts from the same bits as one that was."""
    method, world = FFALoRA(), played(FFALoRA(), 2)
    broadcast = method.broadcast(world.state, FLEET[2], plan(2))
    here, new = method.start(broadcast, world.site(FLEET[2])), method.start(broadcast, Site(FLEET[2], TEMPLATE))
    assert_same_adapter(here.adapter, new.adapter)


def test_weight_decay_does_not_reach_a0(tiny_base):
    """On a real model under AdamW with weight decay, A keeps its bits at the client; B and the head move."""
    base = tiny_base("bert", ("query", "value"))
    template = base.template(AdapterConfig(rank=4, alpha=8.0))
    engine = SequentialEngine(base, LocalConfig(lr=0.01, weight_decay=0.5), 0.0)
    texts = {"input_ids": torch.tensor([[2, 5, 6, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}

    def train(start: Start, client: Client, round: Round) -> Trained:
        batches = [{**texts, "labels": torch.tensor([client.id])}] * 3
        (trained,) = engine.train([LocalProblem(client.id, start, batches, round.rng.child("dropout"))], 0.01)
        return trained

    method, fleet = FFALoRA(), FLEET[:3]
    world = begun(method, template=template, fleet=fleet)
    for x in exchanges(method, world, plan(0, (0, 1, 2), fleet, template), train):
        trained: Adapter = x.trained.adapter
        for name, pair in trained.layers.items():
            assert torch.equal(pair.A, world.state.adapter.layers[name].A[: x.site.client.rank])
            assert pair.Bt.any()
        assert all(not torch.equal(tensor, template.dense[name]) for name, tensor in trained.dense.items())
