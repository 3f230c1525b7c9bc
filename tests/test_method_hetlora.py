"""HetLoRA: weights by norm, the tail's penalty, ranks that only fall; zero padding itself is in another file."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import LABELS, WORDS
from fslora.algebra.adapters import combine
from fslora.algebra.lowrank import product_norm
from fslora.algebra.rows import leading, padded
from fslora.config import AdapterConfig, LocalConfig
from fslora.data.batches import encode
from fslora.data.types import Examples
from fslora.engine.cohort import CohortEngine
from fslora.engine.sequential import SequentialEngine
from fslora.methods.fedit import FedIT
from fslora.methods.hetlora import HetLoRA
from fslora.rng import Rng
from fslora.types import Adapter, Client, LocalProblem, LoRA, ServerState, Trained
from kit import (
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
    mean_product,
    plan,
    play,
    played,
)

# Means of at most six float32 numbers below 4, with float32 weights, by another formula (old + mean of differences).
ROUNDING = 5e-6
LAWS = settings(max_examples=25, deadline=None, derandomize=True, database=None)
HEAD = sum(tensor.numel() * 4 for tensor in TEMPLATE.dense.values())


def norms(passed, norm: str) -> dict[str, np.ndarray]:
    """‖s B_k A_k‖ of every client in every layer (or of all layers together), from dense products."""
    dense = [deltas(Adapter(x.trained.adapter.layers)) for x in passed]
    by_layer = {name: np.array([float(torch.linalg.norm(d[name])) for d in dense]) for name in dense[0]}
    whole = np.sqrt(sum(values**2 for values in by_layer.values()))
    return by_layer if norm == "layer" else dict.fromkeys(by_layer, whole)


@LAWS
@given(
    st.lists(st.tuples(st.integers(1, RANK), st.integers(1, 40)), min_size=1, max_size=5),
    st.sampled_from(["frobenius", "examples", "uniform"]),
    st.sampled_from(["layer", "adapter"]),
    st.booleans(),
)
def test_the_server_averages_padded_factors_by_norm(clients, weighting, norm, prune):
    """A = Σ_k p_k pad(A_k), p_k = ‖B_k A_k‖ / Σ_j ‖B_j A_j‖ (step 7), in float64; the head by examples."""
    fleet = tuple(Client(number, *properties) for number, properties in enumerate(clients))
    method = HetLoRA(weighting=weighting, norm=norm, prune=prune)
    world = World(ServerState(played(HetLoRA(prune=False), 2).state.adapter))
    passed = exchanges(method, world, plan(0, tuple(range(len(fleet))), fleet))
    after = ended(method, world, plan(0), passed).state.adapter
    examples = np.array([client.examples for client in fleet], dtype=np.float64)
    if weighting == "uniform":
        examples = np.ones(len(fleet))
    weights = norms(passed, norm) if weighting == "frobenius" else dict.fromkeys(TEMPLATE.layers, examples)
    largest = max(x.update.adapter.layers["up"].rank for x in passed)
    for name, pair in after.layers.items():
        p = weights[name] / weights[name].sum()
        for kind in ("A", "Bt"):
            stack = [getattr(padded(x.trained.adapter, RANK).layers[name], kind).double().numpy() for x in passed]
            expected = np.einsum("c,crd->rd", p, np.stack(stack))
            np.testing.assert_allclose(getattr(pair, kind).numpy()[:largest], expected[:largest], atol=ROUNDING)
    for name, tensor in after.dense.items():
        stack = np.stack([x.trained.adapter.dense[name].double().numpy() for x in passed])
        expected = np.tensordot(examples / examples.sum(), stack, 1)
        np.testing.assert_allclose(tensor.numpy(), expected, atol=ROUNDING)


def test_equal_ranks_and_weights_are_fedit():
    """k_i = r, uniform, no tail: the bits of FedIT after three rounds, whichever is averaged."""
    fleet = tuple(Client(client.id, RANK, client.examples) for client in FLEET)
    theirs = FedIT(rank="server", weighting="uniform")
    right = begun(theirs, fleet=fleet)
    for number in range(3):
        right = play(theirs, right, plan(number, fleet=fleet))
    for average in ("factor", "delta"):
        ours = HetLoRA(weighting="uniform", average=average, prune=False, penalty=0)
        left = begun(ours, fleet=fleet)
        for number in range(3):
            left = play(ours, left, plan(number, fleet=fleet))
        assert_same_adapter(left.state.adapter, right.state.adapter)


def test_nobody_trains_and_each_part_shrinks_by_the_norms_of_its_holders():
    """q_j = Σ p_k over r_k > j by norm: the product's part j shrinks by q_j²; averaged changes keep every bit."""
    world, round = played(HetLoRA(), 2), plan(1)
    passed = exchanges(HetLoRA(), world, round, fake_training(0.0))
    after = ended(HetLoRA(), world, round, passed).state.adapter
    held = np.array([[client.rank > j for j in range(RANK)] for client in round.cohort])
    for name, old in world.state.adapter.layers.items():
        weights = norms(passed, "layer")[name]
        q = (weights[:, None] * held).sum(0) / weights.sum()
        assert q[0] == pytest.approx(1)
        assert 0 < q[-1] < 0.9
        for j in range(RANK):
            part = torch.outer(after.layers[name].Bt[j], after.layers[name].A[j])
            expected = q[j] ** 2 * torch.outer(old.Bt[j].double(), old.A[j].double())
            torch.testing.assert_close(part.double(), expected, atol=ROUNDING, rtol=0)
    kept = play(HetLoRA(average="delta"), world, round, fake_training(0.0)).state.adapter
    assert_same_adapter(kept, world.state.adapter)


@LAWS
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.floats(0.01, 100), st.integers(0, 99))
def test_the_cheap_norm_is_the_dense_one(rank, d_in, d_out, factor, seed):
    """‖s B A‖ = s sqrt(trace((Bᵀ B)(A Aᵀ))); c B has c times the norm."""
    stream = Rng(seed).torch()
    pair = LoRA(torch.randn(rank, d_in, generator=stream), torch.randn(rank, d_out, generator=stream), 0.7)
    assert product_norm(pair) == pytest.approx(float(torch.linalg.norm(deltas(Adapter({"l": pair}))["l"])), rel=1e-6)
    scaled = LoRA(pair.A, factor * pair.Bt, 0.7)
    # c B is rounded to float32.
    assert product_norm(scaled) == pytest.approx(factor * product_norm(pair), rel=1e-5)
    assert product_norm(LoRA(pair.A, torch.zeros_like(pair.Bt), 0.7)) == 0


def test_a_clients_weight_is_proportional_to_its_b():
    """One client's B_k times c: its weight against the other's is c times as large; examples would not notice."""
    world = World(ServerState(played(HetLoRA(), 2).state.adapter))

    def scaled(c: float):
        def train(start, client, round):
            trained = fake_training()(start, client, round)
            tensors = trained.adapter.tensors()
            if client.id == 4:
                tensors.update({name: c * tensor for name, tensor in tensors.items() if name.endswith(":Bt")})
            return Trained(client.id, trained.adapter.with_tensors(tensors), trained.losses)

        return train

    method, round = HetLoRA(prune=False), plan(0, (3, 4))
    odds = []
    for c in (1.0, 3.0):
        passed = exchanges(method, world, round, scaled(c))
        A = ended(method, world, round, passed).state.adapter.layers["up"].A
        first, second = (x.trained.adapter.layers["up"].A for x in passed)
        # A = (1 - p) A_1 + p A_2, solved for p.
        p = float(((A - first) * (second - first)).sum() / (second - first).square().sum())
        odds.append(p / (1 - p))
    assert odds[1] == pytest.approx(3 * odds[0], rel=1e-3)


def test_where_all_products_are_zero_clients_count_equally():
    """Only A moved, every ‖B_k A_k‖ = 0: the uniform mean in that layer, though examples differ; no division by 0."""

    def only_first(start, client, round):
        tensors = start.adapter.tensors()
        moved = {name: t + client.id + 1 for name, t in tensors.items() if name.endswith(":A")}
        return Trained(client.id, start.adapter.with_tensors({**tensors, **moved}), (1.0,))

    world = begun(HetLoRA())
    for norm in ("layer", "adapter"):
        after = play(HetLoRA(norm=norm), world, plan(0, (2, 4)), only_first).state.adapter
        for name, pair in after.layers.items():
            old = world.state.adapter.layers[name].A
            torch.testing.assert_close(pair.A[:4], old[:4] + (3 + 5) / 2, atol=ROUNDING, rtol=0)
            torch.testing.assert_close(pair.A[4:], (old[4:] + 5) / 2, atol=ROUNDING, rtol=0)
            assert not pair.Bt.any()


def test_one_client_gets_its_own_factors_back():
    """p = 1: the server holds what the client trained, and beyond its rank what it held before."""
    world = played(HetLoRA(), 2)
    passed = exchanges(HetLoRA(), world, plan(0, (2,)))
    after = ended(HetLoRA(), world, plan(0), passed).state.adapter
    kept = passed[0].update.adapter.layers["up"].rank
    for name, pair in leading(passed[0].trained.adapter, kept).layers.items():
        torch.testing.assert_close(after.layers[name].A[:kept], pair.A, atol=1e-6, rtol=0)
        torch.testing.assert_close(after.layers[name].Bt[:kept], pair.Bt, atol=1e-6, rtol=0)
        assert torch.equal(after.layers[name].A[kept:], world.state.adapter.layers[name].A[kept:])


def test_it_misses_the_mean_product_by_a_covariance():
    """mean(B_k A_k) - mean(B) mean(A) = mean((B_k - B̄)(A_k - Ā)) on padded factors; not zero."""
    method = HetLoRA(weighting="uniform", prune=False)
    world, round = played(method, 2), plan(0)
    passed = exchanges(method, world, round)
    mean = ended(method, world, round, passed).state.adapter
    pairs = {name: [padded(x.trained.adapter, RANK).layers[name] for x in passed] for name in TEMPLATE.layers}
    exact, ours = mean_product(pairs, [1 / 6] * 6), deltas(mean)
    for name, own in pairs.items():
        A, Bt = mean.layers[name].A, mean.layers[name].Bt
        apart = [LoRA(pair.A - A, pair.Bt - Bt, pair.scale) for pair in own]
        covariance = mean_product({name: apart}, [1 / 6] * 6)[name]
        # Products of eight parts with numbers near 2, times the scale 2.
        torch.testing.assert_close(exact[name] - ours[name], covariance, atol=1e-4, rtol=0)
        assert covariance.abs().max() > 0.01


# --- the tail ---


def shrinking(start, client, round):
    """A training that makes every tail smaller."""
    return Trained(client.id, combine(lambda t: 0.9 * t, start.adapter), (1.0,))


def growing(start, client, round):
    """A training that makes every tail larger."""
    return Trained(client.id, combine(lambda t: 1.1 * t, start.adapter), (1.0,))


def alive(world: World) -> World:
    """The same ranks over factors that are not zero."""
    stream = Rng(5).torch()
    return World(
        ServerState(
            combine(lambda t: torch.randn(t.shape, generator=stream), world.state.adapter), {}, world.state.scalars
        )
    )


def ranks_of(method, world, members=tuple(range(6))) -> list[int]:
    return [x.start.adapter.layers["up"].rank for x in exchanges(method, world, plan(0, members))]


@pytest.mark.parametrize(("gamma", "r_min"), [(0.99, 1), (0.7, 1), (0.5, 3), (0.01, 2)])
def test_ranks_fall_by_floor_and_never_rise(gamma, r_min):
    """After n prunings r_k = max(r_min, floor(γ floor(γ ...))), never above what the client can afford."""
    method = HetLoRA(gamma=gamma, r_min=r_min)
    world = alive(begun(method))
    expected = [client.rank for client in FLEET]
    for number in range(4):
        assert ranks_of(method, world) == expected
        world = play(method, world, plan(number, tuple(range(6))), shrinking)
        world = alive(world)  # all factors anew, so that every tail can shrink again
        expected = [min(rank, max(r_min, math.floor(gamma * rank + 1e-9))) for rank in expected]
    for training in (growing, fake_training(0.0)):
        assert ranks_of(method, play(method, world, plan(0, tuple(range(6))), training)) == expected
    assert expected != [client.rank for client in FLEET]


def test_floor_is_exact_and_no_tail_is_empty():
    """floor(0.29 · 100) = 29 (round-off says 28.99); with γ = 0.99 every rank has a tail, where round() empties it."""
    for gamma, rank, kept in ((0.29, 100, 29), (0.99, 100, 99), (0.99, 8, 7), (0.7, 10, 7), (0.99, 1, 1)):
        method = HetLoRA(gamma=gamma, r_min=1)
        pair = LoRA(torch.randn(rank, 3, generator=Rng(0).torch()), torch.ones(rank, 2), 1.0)
        fleet = (Client(0, rank, 1),)
        world = World(ServerState(Adapter({"up": pair}), {}, {"rank.0": float(rank)}))
        passed = exchanges(method, world, plan(0, (0,), fleet), shrinking)
        assert passed[0].update.adapter.layers["up"].rank == kept


def test_pruning_lowers_what_travels_from_the_same_round_on():
    """Up max(1, r_k - 1)(d_in + d_out) · 4 bytes at γ = 0.99 and one integer; down as much in the next round."""
    method = HetLoRA(r_min=1)
    world = alive(begun(method))
    first = exchanges(method, world, plan(0), shrinking)
    second = exchanges(method, ended(method, world, plan(0), first), plan(1, (0, 1, 2, 3, 4, 5)))

    def size(rank: int) -> int:
        return sum(rank * (d_in + d_out) * 4 for d_in, d_out in TEMPLATE.layers.values()) + HEAD

    for before, after in zip(first, second, strict=True):
        rank, kept = before.site.client.rank, max(1, before.site.client.rank - 1)
        assert before.broadcast.nbytes == size(rank)
        assert before.update.nbytes == size(kept) + 4
        assert after.broadcast.nbytes == size(kept)


def test_a_client_whose_update_is_lost_keeps_its_rank():
    """The server learns of a new rank by the update alone; the client is told by the rows that it gets."""
    method = HetLoRA(r_min=1)
    world = alive(begun(method))
    passed = exchanges(method, world, plan(0), shrinking)
    after = ended(method, world, plan(0), passed[:4] + passed[5:])
    assert ranks_of(method, after) == [1, 1, 3, 7, 8, 2]


def test_what_all_have_pruned_is_gone_and_what_the_absent_hold_is_kept():
    """Parts above every client's rank become zero; parts of strong clients that sat out the round keep their bits."""
    method = HetLoRA(r_min=1)
    world = alive(begun(method))
    absent = play(method, world, plan(0, (0, 1, 2)), shrinking).state.adapter
    assert torch.equal(absent.layers["up"].A[4:], world.state.adapter.layers["up"].A[4:])
    after = play(method, world, plan(0), shrinking).state.adapter
    for pair in after.layers.values():
        assert pair.rank == RANK
        assert not pair.A[7].any()
        assert not pair.Bt[7].any()
        assert (pair.A[:7].abs().sum(1) > 0).all()


def test_without_pruning_ranks_are_the_fleets():
    """prune = False: no rank travels or is kept; the paper's distribution step is the slice of the server's pair."""
    method = HetLoRA(prune=False)
    world = alive(begun(method))
    passed = exchanges(method, world, plan(0), shrinking)
    assert not any(x.update.extras for x in passed)
    after = ended(method, world, plan(0), passed)
    assert not after.state.scalars
    assert ranks_of(method, after) == [client.rank for client in FLEET]
    for exchange in passed:
        rank = exchange.site.client.rank
        assert_same_adapter(exchange.broadcast.adapter, leading(world.state.adapter, rank))
        assert_same_adapter(leading(padded(exchange.trained.adapter, RANK), rank), exchange.trained.adapter)
        assert {pair.scale for pair in exchange.broadcast.adapter.layers.values()} == {TEMPLATE.scale(RANK)}


@LAWS
@given(st.integers(2, 8), st.floats(0.05, 0.95), st.integers(0, 99))
def test_the_penalty_is_the_tails_norms(rank, gamma, seed):
    """λ Σ_layers ‖B[:, m:]‖ ‖A[m:, :]‖ with m = max(1, floor(γ r)); its gradient agrees with finite differences."""
    method = HetLoRA(gamma=gamma, penalty=0.25, r_min=1)
    stream = Rng(seed).torch()
    tensors = {
        name: LoRA(
            torch.randn(rank, d_in, generator=stream, dtype=torch.float64),
            torch.randn(rank, d_out, generator=stream, dtype=torch.float64),
            1.0,
        )
        for name, (d_in, d_out) in TEMPLATE.layers.items()
    }
    world = World(ServerState(Adapter(tensors), {}, {"rank.0": float(rank)}))
    (exchange,) = exchanges(method, world, plan(0, (0,), (Client(0, rank, 1),)))
    penalty = exchange.start.penalty
    m = max(1, math.floor(gamma * rank))
    expected = 0.25 * sum(
        math.sqrt(float((pair.Bt[m:] ** 2).sum())) * math.sqrt(float((pair.A[m:] ** 2).sum()))
        for pair in tensors.values()
    )
    assert float(penalty(Adapter(tensors))) == pytest.approx(expected)

    def of(A, Bt):
        return penalty(Adapter({**tensors, "up": LoRA(A, Bt, 1.0)}))

    leaves = [tensors["up"].A.clone().requires_grad_(), tensors["up"].Bt.clone().requires_grad_()]
    assert torch.autograd.gradcheck(of, leaves)


def test_the_penalty_is_harmless_where_b_is_zero():
    """At the start B = 0: the penalty is 0 and its gradient 0, not NaN, in both factors; λ = 0 leaves no penalty."""
    (exchange,) = exchanges(HetLoRA(penalty=1.0, r_min=1), begun(HetLoRA()), plan(0, (3,)))
    leaves = {name: t.clone().requires_grad_() for name, t in exchange.start.adapter.tensors().items()}
    value = exchange.start.penalty(exchange.start.adapter.with_tensors(leaves))
    value.backward()
    assert value.item() == 0
    assert all(not leaf.grad.any() for name, leaf in leaves.items() if not name.endswith(":dense"))
    (exchange,) = exchanges(HetLoRA(penalty=0), begun(HetLoRA()), plan(0, (3,)))
    assert exchange.start.penalty is None


@pytest.mark.parametrize("engine", ["cohort", "sequential"])
def test_under_a_strong_penalty_clients_prune_themselves(tiny_base, engine):
    """Real training from B = 0: nobody prunes in round 0 (no tail yet), everybody in round 1; without λ nobody."""
    base, local = tiny_base("bert", ("query", "value")), LocalConfig(lr=1e-2)
    template = base.template(AdapterConfig(rank=RANK, alpha=16.0))
    fleet = tuple(Client(number, rank, 8) for number, rank in enumerate((2, 5, 8)))

    def train(start, client, round):
        rng = Rng(1).child(client.id)
        draw = rng.numpy()
        texts = tuple(" ".join(draw.choice(WORDS, 5)) for _ in range(8))
        data = encode(Examples(texts, draw.integers(0, len(LABELS), 8)), base.tokenizer, 32)
        problem = LocalProblem(client.id, start, [data.batch(range(8))] * 4, rng)
        made = CohortEngine(base, local, 0.0, 1) if engine == "cohort" else SequentialEngine(base, local, 0.0)
        return next(iter(made.train([problem], local.lr)))

    ranks = {}
    for penalty in (0.0, 10.0):
        method = HetLoRA(gamma=0.5, penalty=penalty, r_min=1)
        world = begun(method, template=template, fleet=fleet)
        for number in range(2):
            world = play(method, world, plan(number, (0, 1, 2), fleet, template), train)
            ranks[penalty, number] = [int(world.state.scalars[f"rank.{client.id}"]) for client in fleet]
    assert ranks[0.0, 0] == ranks[10.0, 0] == ranks[0.0, 1] == [2, 5, 8]
    assert ranks[10.0, 1] == [1, 2, 4]
