"""FLoRA: stacks are exact, weights count once, every round begins anew."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora.config import AdapterConfig
from fslora.data.batches import encode
from fslora.data.types import Examples
from fslora.methods.flora import FLoRA
from fslora.types import Adapter, Client
from kit import (
    COHORTS,
    FLEET,
    TEMPLATE,
    WIDE,
    World,
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
from quadratic import descent, drawn_targets

# Sums of some dozens of float32 products of numbers near 1.
SUMS = 2e-5
# Float32 forward passes through differently ordered products; merged layers round W0 + Δ once.
LOGITS = 2e-5
LAWS = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def assert_close(found, expected, tolerance: float = SUMS) -> None:
    assert expected
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def products_of(passed, weights: list[float]) -> dict[str, torch.Tensor]:
    """Σ_i weights_i s_i B_i A_i of what the clients trained, dense, float64."""
    layers = passed[0].trained.adapter.layers
    return mean_product({name: [x.trained.adapter.layers[name] for x in passed] for name in layers}, weights)


@LAWS
@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 30)), min_size=1, max_size=6),
    st.sampled_from(["examples", "uniform"]),
    st.booleans(),
    st.sampled_from([TEMPLATE, WIDE]),
)
def test_the_stack_is_the_mean_product(clients, weighting, rslora, template):
    """B A of the stack = Σ_i p_i s_i B_i A_i with s_i = alpha / k_i (or alpha / √k_i): ranks and scales unequal."""
    fleet = tuple(Client(number, *facts) for number, facts in enumerate(clients))
    template, method = replace(template, rslora=rslora), FLoRA(weighting=weighting)
    world = begun(method, template=template, fleet=fleet)
    round = plan(0, tuple(range(len(fleet))), fleet, template)
    passed = exchanges(method, world, round)
    counts = [client.examples if weighting == "examples" else 1 for client in fleet]
    state = ended(method, world, round, passed).state
    expected = products_of(passed, [count / sum(counts) for count in counts])
    assert_close(deltas(method.base(state)), expected)
    assert_close(deltas(method.global_adapter(state)), expected)


def test_a_weight_counts_once():
    """Negative: p_i on both factors would give Σ p_i² s_i B_i A_i, which is far from the stack."""
    method, round = FLoRA(), plan(0)
    world = begun(method)
    passed = exchanges(method, world, round)
    shares = [client.examples / sum(c.examples for c in FLEET) for client in FLEET]
    found = deltas(method.base(ended(method, world, round, passed).state))
    twice = products_of(passed, [share**2 for share in shares])
    assert all((found[name] - twice[name]).abs().max() > 0.1 for name in TEMPLATE.layers)


def test_rounds_add_up():
    """W after T rounds = Σ_t Σ_i p_i s_i B_i A_i, whoever took part; the sum goes on where the last round left it."""
    method = FLoRA()
    world, total = begun(method), {name: torch.zeros(o, i).double() for name, (i, o) in TEMPLATE.layers.items()}
    for number in range(4):
        round = plan(number)
        passed = exchanges(method, world, round)
        counts = [x.site.client.examples for x in passed]
        change = products_of(passed, [count / sum(counts) for count in counts])
        total = {name: total[name] + change[name] for name in total}
        world = ended(method, world, round, passed)
    assert_close(deltas(method.global_adapter(world.state)), total, 4 * SUMS)


def test_the_rank_is_the_sum_of_ranks():
    """rank(ΔW) = Σ k_i of the cohort, until the layer itself is full: each client adds parts of its own."""
    method = FLoRA()
    world = play(method, begun(method, template=WIDE), plan(1, template=WIDE))
    ranks = sum(FLEET[i].rank for i in COHORTS[1])
    for pair in method.global_adapter(world.state).layers.values():
        assert pair.rank == ranks
        assert torch.linalg.matrix_rank(pair.delta.double(), atol=1e-4) == ranks
    world = play(method, world, plan(2, template=WIDE))
    assert {pair.rank for pair in method.global_adapter(world.state).layers.values()} == {
        min(24, ranks + sum(FLEET[i].rank for i in COHORTS[2]))
    }


def test_one_client_is_plain_lora_with_restarts():
    """M = 1: W + s B A of what it trained, and its head as it trained it."""
    method, round = FLoRA(), plan(0, (2,))
    world = begun(method)
    (exchange,) = passed = exchanges(method, world, round)
    state = ended(method, world, round, passed).state
    assert_close(deltas(method.global_adapter(state)), deltas(exchange.trained.adapter))


def test_every_round_begins_anew_from_what_is_served():
    """After merging, B = 0 and A is drawn afresh: what a client starts from computes the merged base exactly."""
    method, world = FLoRA(), played(FLoRA(), 2)
    seen = []
    for number in (2, 3):
        for exchange in exchanges(method, world, plan(number, (2, 3, 4))):
            assert not any(pair.Bt.any() for pair in exchange.start.adapter.layers.values())
            assert exchange.start.adapter.dense is world.state.adapter.dense
            seen.append(exchange.start.adapter.layers["up"].A[:4])
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    served = method.global_adapter(world.state)
    assert served.dense is world.state.adapter.dense
    assert served.layers is method.base(world.state).layers


def test_a_client_repeats_its_draw_from_the_message():
    """The same broadcast at another site with the same client gives the same bits; A itself never travels down."""
    method, world = FLoRA(), played(FLoRA(), 1)
    for exchange in exchanges(method, world, plan(1, (1, 4))):
        again = method.start(exchange.broadcast, replace(exchange.site, memory=type(exchange.site.memory)()))
        for name, pair in exchange.start.adapter.layers.items():
            assert torch.equal(pair.A, again.adapter.layers[name].A)
        assert not exchange.broadcast.adapter.layers


def test_the_first_step_moves_b_alone():
    """With B = 0 the gradient of A is s Bᵀ G = 0: one SGD step after a restart leaves A's bits and moves B."""
    method, world = FLoRA(), played(FLoRA(), 1)
    training = descent(drawn_targets(FLEET), lr=0.01)
    for exchange in exchanges(method, world, plan(1), training):
        for name, pair in exchange.trained.adapter.layers.items():
            assert torch.equal(pair.A, exchange.start.adapter.layers[name].A)
            assert pair.Bt.any(dim=1).all()
    second = exchanges(method, world, plan(1), descent(drawn_targets(FLEET), lr=0.01, steps=2))
    assert not torch.equal(second[0].trained.adapter.layers["up"].A, second[0].start.adapter.layers["up"].A)


def test_the_head_is_averaged_and_replaced():
    """head = Σ_i p_i head_i, p_i by examples; it is no part of the stack."""
    method, round = FLoRA(), plan(0)
    world = begun(method)
    passed = exchanges(method, world, round)
    state = ended(method, world, round, passed).state
    total = sum(client.examples for client in FLEET)
    for name in TEMPLATE.dense:
        mean = sum(x.site.client.examples / total * x.trained.adapter.dense[name].double() for x in passed)
        torch.testing.assert_close(state.adapter.dense[name].double(), mean, atol=SUMS, rtol=0)
    assert not any(slot.dense for slot in state.slots.values())
    still = play(method, World(state), plan(1), fake_training(0.0)).state
    assert all(torch.equal(still.adapter.dense[name], tensor) for name, tensor in state.adapter.dense.items())


def test_bytes_are_the_papers():
    """Up k_i (d_in + d_out) · 4 per layer; down the last stack, Σ_j k_j (d_in + d_out) · 4, and 8 of a seed; heads."""
    method = FLoRA()
    width = 4 * sum(d_in + d_out for d_in, d_out in WIDE.layers.values())
    head = 4 * sum(tensor.numel() for tensor in WIDE.dense.values())
    world, last = begun(method, template=WIDE), 0
    for number in (0, 1):
        round = plan(number, (1, 2, 5), template=WIDE)
        passed = exchanges(method, world, round)
        for exchange in passed:
            assert exchange.update.nbytes == exchange.site.client.rank * width + head
            assert exchange.broadcast.nbytes == last * width + head + 8
        last = sum(client.rank for client in round.cohort)
        world = ended(method, world, round, passed)


def test_a_stack_wider_than_its_layer_goes_down_as_a_sum():
    """R > min(d_in, d_out): the stack would cost more than the dense weights, so the sum travels in its place."""
    method = FLoRA()
    world = play(method, begun(method), plan(0))
    (update,) = method.broadcast(world.state, FLEET[0], plan(1)).base
    assert update.whole
    assert update.adapter.nbytes < sum(c.rank for c in FLEET) * 4 * sum(i + o for i, o in TEMPLATE.layers.values())


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_merged_and_attached_compute_the_same(tiny_base, architecture):
    """x (W0 + s B A)ᵀ = x W0ᵀ + s (x Aᵀ) Bᵀ on a real model, also where weights are kept as [in out]."""
    base = tiny_base(architecture)
    template = base.template(AdapterConfig(rank=8, alpha=16.0))
    fleet = FLEET[:3]
    method = FLoRA()
    world = begun(method, template=template, fleet=fleet)
    world = play(method, world, plan(0, (0, 1, 2), fleet, template), fake_training(0.05))
    served = method.global_adapter(world.state)
    data = encode(Examples(("the cat ran", "a bad dog sat on the mat"), np.array([0, 1])), base.tokenizer, 32)
    batch = data.batch(np.arange(2))
    head = Adapter({}, served.dense)
    with torch.no_grad():
        with base.changed(served.layers), base.using(head):
            merged = base.logits(batch)
        with base.using(served):  # rank 7 on layers of width 32: attached, not merged
            attached = base.logits(batch)
        with base.using(head):
            untouched = base.logits(batch)
    torch.testing.assert_close(merged, attached, atol=LOGITS, rtol=LOGITS)
    assert (merged - untouched).abs().max() > 100 * LOGITS
