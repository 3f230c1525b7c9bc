"""HAFL-LoRA: what is important is trained, and averaged over those who trained it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import LABELS, WORDS
from fslora.algebra.adapters import combine
from fslora.algebra.rows import ScatterMean
from fslora.config import AdapterConfig, LocalConfig
from fslora.data.batches import encode
from fslora.data.types import Examples
from fslora.engine.sequential import SequentialEngine
from fslora.methods.fedit import FedIT
from fslora.methods.hafl_lora import HAFLLoRA, columns
from fslora.rng import Rng
from fslora.types import Adapter, Client, LocalProblem, LoRA, ServerState, Start
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

# Means of at most six float32 numbers below 4, by another formula (old + mean of differences).
ROUNDING = 3e-6
# Products of eight parts with numbers near 2, times the scale 2, in float64 from float32 factors.
PRODUCTS = 2e-5
LAWS = settings(max_examples=25, deadline=None, derandomize=True, database=None)
HEAD = sum(tensor.numel() * 4 for tensor in TEMPLATE.dense.values())
MODES = pytest.mark.parametrize("mode", ["freezing", "truncation"])


def importance(world: World) -> dict[str, torch.Tensor]:
    return {name: pair.A[:, 0] for name, pair in world.state.slots["importance"].layers.items()}


def with_importance(world: World, scores) -> World:
    """The same world, every layer of it with these scores."""
    slot = columns({name: torch.tensor(scores) for name in TEMPLATE.layers})
    return World(replace(world.state, slots={"importance": slot}))


def rows_of(method, world: World, round, layer: str = "up") -> list[list[int]]:
    return [x.broadcast.rows[layer].tolist() for x in exchanges(method, world, round)]


@MODES
@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_full_ranks_are_fedit(mode, weighting):
    """k_i = r: everybody holds every part, and the server ends with FedIT's bits over three rounds."""
    fleet = tuple(Client(client.id, RANK, client.examples) for client in FLEET)
    ours, theirs = HAFLLoRA(mode=mode, weighting=weighting), FedIT(rank="server", weighting=weighting)
    left, right = begun(ours, fleet=fleet), begun(theirs, fleet=fleet)
    for number in range(3):
        left, right = play(ours, left, plan(number, fleet=fleet)), play(theirs, right, plan(number, fleet=fleet))
    assert_same_adapter(left.state.adapter, right.state.adapter)


def test_freezing_starts_at_the_global_model():
    """Trained and frozen parts together are the server's adapter; parts that nobody trains keep their bits."""
    method = HAFLLoRA()
    world, round = played(method, 2), plan(0, (0, 1))
    served = deltas(world.state.adapter)
    passed = exchanges(method, world, round)
    for exchange in passed:
        trained, frozen = deltas(exchange.start.adapter), deltas(Adapter(exchange.start.frozen))
        for name in TEMPLATE.layers:
            torch.testing.assert_close(trained[name] + frozen[name], served[name], atol=PRODUCTS, rtol=0)
    after = ended(method, world, round, passed).state.adapter
    for name, pair in world.state.adapter.layers.items():
        held = sorted({j for x in passed for j in x.broadcast.rows[name].tolist()})
        rest = [j for j in range(RANK) if j not in held]
        assert len(rest) >= 5
        assert torch.equal(after.layers[name].A[rest], pair.A[rest])
        assert torch.equal(after.layers[name].Bt[rest], pair.Bt[rest])
        assert not torch.equal(after.layers[name].A[held], pair.A[held])


def test_truncation_starts_off_by_the_dropped_parts():
    """Client weight - server weight = -s Σ_{j ∉ S_i} b_j a_jᵀ; one dropped part: norm s ‖b_j‖ ‖a_j‖."""
    method = HAFLLoRA(mode="truncation")
    fleet = (*FLEET[:5], Client(5, RANK - 1, 11))
    world, round = played(method, 2), plan(0, fleet=fleet)
    served = deltas(world.state.adapter)
    for exchange in exchanges(method, world, round):
        assert not exchange.start.frozen
        for name, pair in world.state.adapter.layers.items():
            dropped = [j for j in range(RANK) if j not in exchange.broadcast.rows[name].tolist()]
            error = served[name] - deltas(exchange.start.adapter)[name]
            lost = deltas(Adapter({name: LoRA(pair.A[dropped], pair.Bt[dropped], pair.scale)}))[name]
            torch.testing.assert_close(error, lost, atol=PRODUCTS, rtol=0)
            if len(dropped) == 1:
                expected = pair.scale * pair.A[dropped].norm() * pair.Bt[dropped].norm()
                assert float(error.norm()) == pytest.approx(float(expected), rel=1e-4)
    assert {pair.scale for pair in exchange.start.adapter.layers.values()} == {TEMPLATE.scale(RANK)}


@MODES
def test_nobody_trains_and_nothing_moves(mode):
    """Adaptive aggregation leaves the server as it is, bit for bit."""
    method = HAFLLoRA(mode=mode)
    world = played(method, 2)
    for number in range(3):
        assert_same_adapter(play(method, world, plan(number), fake_training(0.0)).state.adapter, world.state.adapter)


@LAWS
@given(st.integers(0, 99), st.sampled_from(["uniform", "examples"]))
def test_parts_are_averaged_over_those_who_trained_them(number, weighting):
    """b_j = Σ p_i b_ij / q_j from dense stacks, NaN where j ∉ S_i; q_j (new - old) is the cohort's mean change."""
    method = HAFLLoRA(weighting=weighting, random_share=0.5)
    world, round = World(played(HAFLLoRA(), 2).state), plan(number, (0, 1, 2, 5))
    passed = exchanges(method, world, round)
    after = ended(method, world, round, passed).state.adapter
    weights = np.array([client.examples if weighting == "examples" else 1.0 for client in round.cohort])
    cohort = ScatterMean(world.state.adapter)
    for weight, exchange in zip(weights, passed, strict=True):
        cohort.add(exchange.update.adapter, exchange.broadcast.rows, float(weight))
    mean = cohort.mean("cohort")
    for name, pair in after.layers.items():
        old = world.state.adapter.layers[name]
        stack = np.full((len(passed), *pair.Bt.shape), np.nan)
        for c, exchange in enumerate(passed):
            stack[c, exchange.broadcast.rows[name]] = exchange.trained.adapter.layers[name].Bt
        for j in range(RANK):
            holders = ~np.isnan(stack[:, j, 0])
            if holders.any():
                expected = np.average(stack[holders, j], axis=0, weights=weights[holders])
                np.testing.assert_allclose(pair.Bt[j].numpy(), expected, atol=ROUNDING)
                q = weights[holders].sum() / weights.sum()
                torch.testing.assert_close(q * (pair.Bt[j] - old.Bt[j]), mean.layers[name].Bt[j], atol=ROUNDING, rtol=0)
            else:
                assert torch.equal(pair.Bt[j], old.Bt[j])


def test_it_misses_the_mean_product_by_one_covariance_per_part():
    """Σ_i w_ij b_ij a_ijᵀ - b_j a_jᵀ = Σ_i w_ij (b_ij - b_j)(a_ij - a_j)ᵀ, w_ij = p_i / q_j."""
    method = HAFLLoRA()
    world, round = played(method, 2), plan(0)
    passed = exchanges(method, world, round)
    after = ended(method, world, round, passed).state.adapter.layers["down"]
    largest = 0.0
    for j in range(RANK):
        holders = [x for x in passed if j in x.broadcast.rows["down"].tolist()]
        weights = np.array([x.site.client.examples for x in holders], dtype=np.float64)
        weights = list(weights / weights.sum())
        own = []
        for x in holders:
            place = x.broadcast.rows["down"].tolist().index(j)
            pair = x.trained.adapter.layers["down"]
            own.append(LoRA(pair.A[place : place + 1], pair.Bt[place : place + 1], 1.0))
        middle = LoRA(after.A[j : j + 1], after.Bt[j : j + 1], 1.0)
        apart = [LoRA(part.A - middle.A, part.Bt - middle.Bt, 1.0) for part in own]
        covariance = mean_product({"down": apart}, weights)["down"]
        residual = mean_product({"down": own}, weights)["down"] - mean_product({"down": [middle]}, [1.0])["down"]
        torch.testing.assert_close(residual, covariance, atol=PRODUCTS, rtol=0)
        largest = max(largest, float(covariance.abs().max()))
    assert largest > 0.01


# --- what is important ---


def test_the_k_most_important_parts_are_trained():
    """Top k per layer, ties to the lower index, increasing; the same for all clients of one rank."""
    world = with_importance(begun(HAFLLoRA()), [0.5, 0.1, 0.9, 0.1, 0.5, 0.0, 0.9, 0.1])
    for layer in TEMPLATE.layers:
        sets = rows_of(HAFLLoRA(), world, plan(0), layer)
        assert sets == [[2], [2, 6], [0, 2, 4, 6], list(range(8)), list(range(8)), [0, 2, 6]]
    fleet = tuple(Client(number, 5, 1) for number in range(6))
    assert rows_of(HAFLLoRA(), world, plan(0, fleet=fleet)) == [[0, 1, 2, 4, 6]] * 6


def test_permuted_parts_have_permuted_sets():
    """Importance without ties: renaming the parts renames what is chosen."""
    scores, order = [0.5, 0.1, 0.9, 0.2, 0.6, 0.05, 0.8, 0.3], [3, 0, 7, 5, 1, 6, 2, 4]
    plain = rows_of(HAFLLoRA(), with_importance(begun(HAFLLoRA()), scores), plan(0))
    turned = rows_of(HAFLLoRA(), with_importance(begun(HAFLLoRA()), [scores[j] for j in order]), plan(0))
    assert [sorted(order[j] for j in s) for s in turned] == plain


def test_before_anything_is_measured_the_sets_are_random():
    """Round 0: k distinct parts, different between clients, layers and rounds, each equally often."""
    state, counts, rounds = begun(HAFLLoRA()).state, np.zeros(RANK), 400
    fleet = tuple(Client(number, 2, 1) for number in range(6))
    for number in range(rounds):
        for client in fleet[:2]:
            chosen = HAFLLoRA().broadcast(state, client, plan(number, fleet=fleet)).rows["up"].tolist()
            assert chosen == sorted(set(chosen))
            assert len(chosen) == 2
            counts += np.bincount(chosen, minlength=RANK)
    # Five standard deviations of 800 draws of chance 1/4.
    assert np.abs(counts - rounds / 2).max() < 5 * (2 * rounds * 3 / 16) ** 0.5
    first = rows_of(HAFLLoRA(), begun(HAFLLoRA()), plan(0, fleet=fleet))
    assert len({tuple(s) for s in first}) > 1
    assert first != rows_of(HAFLLoRA(), begun(HAFLLoRA()), plan(0, fleet=fleet), "out")
    assert first != rows_of(HAFLLoRA(), begun(HAFLLoRA()), plan(3, fleet=fleet))
    zero = with_importance(begun(HAFLLoRA()), [0.0] * RANK)
    assert first == rows_of(HAFLLoRA(), zero, plan(0, fleet=fleet))


@pytest.mark.parametrize("share", [0.0, 0.125, 0.3, 0.75, 1.0])
def test_a_random_share_is_drawn_from_the_others(share):
    """k = 4: share · 4 parts in expectation are not by importance, and each of the others comes equally often."""
    world = with_importance(begun(HAFLLoRA()), [8.0, 7, 6, 5, 4, 3, 2, 1])
    method, rounds, counts = HAFLLoRA(random_share=share), 600, np.zeros(RANK)
    for number in range(rounds):
        chosen = method.broadcast(world.state, FLEET[2], plan(number)).rows["up"].tolist()
        assert len(set(chosen)) == 4
        counts += np.bincount(chosen, minlength=RANK)
    if share == 0:
        assert counts.tolist() == [rounds] * 4 + [0] * 4
        return
    # Parts 4 to 7 come by chance alone, and equally: 5 standard deviations of at most 1/2 per draw.
    others = counts[4:] / rounds
    assert np.abs(others - others.mean()).max() < 5 * 0.5 / rounds**0.5
    # Of a draw of m among the 4 + m parts left over, 4 / (4 + m) fall outside the most important four.
    expected = np.mean([m * 4 / (4 + m) for m in (int(share * 4 + u) for u in np.linspace(0, 0.999, 1000))])
    assert 4 * others.mean() == pytest.approx(expected, abs=5 / rounds**0.5)


def test_without_a_random_share_parts_starve():
    """Rank 2 for all: after the first round the same two parts for ever; with a share all parts get their turn."""
    fleet = tuple(Client(number, 2, 1) for number in range(6))
    for share, expected in ((0.0, 2), (0.5, RANK)):
        method, seen = HAFLLoRA(random_share=share), set()
        world = with_importance(begun(method, fleet=fleet), [1e3, 1e3, 1, 1, 1, 1, 1, 1])
        for number in range(20):
            seen |= {j for s in rows_of(method, world, plan(number, fleet=fleet)) for j in s}
        assert len(seen) == expected


def test_importance_is_smoothed_where_it_was_measured():
    """Ī ← beta Ī + (1 - beta) Σ p_i I_i / q_j; a first measurement as it is; not measured: the old bits."""
    method = HAFLLoRA(beta=0.75, random_share=0.5)
    world, expected = begun(method), {name: np.zeros(RANK) for name in TEMPLATE.layers}
    weights = {client.id: client.examples for client in FLEET}
    unmeasured = again = 0
    for number in range(4):
        round = plan(number, ((0, 1), (2, 5), (0, 5), (1, 2))[number])
        passed = exchanges(method, world, round)
        before, world = importance(world) if number else None, ended(method, world, round, passed)
        for name, old in expected.items():
            for j in range(RANK):
                found = [
                    (weights[x.update.client], float(x.trained.sensitivity[name][rows.index(j)]))
                    for x in passed
                    if j in (rows := x.broadcast.rows[name].tolist())
                ]
                if found:
                    new = sum(w * score for w, score in found) / sum(w for w, _ in found)
                    again += old[j] > 0
                    old[j] = 0.75 * old[j] + 0.25 * new if old[j] else new
                elif before:
                    assert importance(world)[name][j] == before[name][j]
                    unmeasured += 1
            np.testing.assert_allclose(importance(world)[name].numpy(), old, rtol=1e-5)
    assert unmeasured > 10
    assert again > 5


def test_what_travels():
    """Freezing: r D down; truncation: k_i D; up k_i D and k_i scores; indices both ways; D = d_in + d_out."""
    for mode in ("freezing", "truncation"):
        method = HAFLLoRA(mode=mode)
        for exchange in exchanges(method, played(method, 1), plan(0)):
            rank = exchange.site.client.rank
            widths = [d_in + d_out for d_in, d_out in TEMPLATE.layers.values()]
            per_part = 4 * rank * len(widths)
            sent = RANK if mode == "freezing" else rank
            assert exchange.broadcast.nbytes == sum(sent * width * 4 for width in widths) + per_part + HEAD
            assert exchange.update.nbytes == sum(rank * width * 4 for width in widths) + 2 * per_part + HEAD


# --- sensitivity on a real model ---


def sensitivities(base, adapter: Adapter) -> dict[str, torch.Tensor]:
    draw = Rng(1).numpy()
    texts = tuple(" ".join(draw.choice(WORDS, 6)) for _ in range(6))
    data = encode(Examples(texts, draw.integers(0, len(LABELS), 6)), base.tokenizer, 32)
    start = Start(adapter, measures_sensitivity=True)
    engine = SequentialEngine(base, LocalConfig(optimizer="sgd"), 0.0)
    return next(iter(engine.train([LocalProblem(0, start, [data.batch(range(6))], Rng(1))], 1e-3))).sensitivity


def test_sensitivity_is_of_the_part_and_not_of_its_scaling(tiny_base):
    """(c b_j, a_j / c) has the same entries |w ∂loss/∂w| and so the same score; permuted parts have permuted scores.

    That a scaled B alone would not do: the mean |b_j| is c times as large.
    """
    base = tiny_base("bert", ("query", "value"))
    template = base.template(AdapterConfig(rank=RANK, alpha=16.0))
    state = HAFLLoRA().init(template, (), Rng(0))
    stream = Rng(2).torch()
    adapter = combine(lambda t: 0.2 * torch.randn(t.shape, generator=stream), state.adapter)
    factors = torch.linspace(0.25, 4, RANK).unsqueeze(1)
    scaled = Adapter(
        {n: LoRA(p.A / factors, p.Bt * factors, p.scale) for n, p in adapter.layers.items()}, adapter.dense
    )
    order = torch.tensor([3, 0, 7, 5, 1, 6, 2, 4])
    turned = Adapter({n: LoRA(p.A[order], p.Bt[order], p.scale) for n, p in adapter.layers.items()}, adapter.dense)
    plain, other, permuted = (sensitivities(base, each) for each in (adapter, scaled, turned))
    assert plain.keys() == adapter.layers.keys()
    for name, scores in plain.items():
        assert (scores > 0).all()
        torch.testing.assert_close(other[name], scores, rtol=1e-4, atol=0)
        torch.testing.assert_close(permuted[name], scores[order], rtol=1e-4, atol=0)


def test_one_step_from_zero_measures_nothing_and_the_next_round_is_random_again(tiny_base):
    """B = 0: |w ∂loss/∂w| is 0 in both factors, so after a round of one step every choice is still open."""
    base = tiny_base("bert", ("query", "value"))
    template = base.template(AdapterConfig(rank=RANK, alpha=16.0))
    method, fleet = HAFLLoRA(), (Client(0, 2, 6), Client(1, 2, 6))
    state = method.init(template, fleet, Rng(0))
    scores = sensitivities(base, state.adapter)
    assert not any(score.any() for score in scores.values())

    def train(start, client, round):
        trained = fake_training()(start, client, round)
        rank = start.adapter.layers[next(iter(scores))].rank
        return replace(trained, sensitivity={name: score[:rank] for name, score in scores.items()})

    world = play(method, World(ServerState(state.adapter)), plan(0, (0, 1), fleet, template), train)
    layer = next(iter(template.layers))
    sets = [rows_of(method, world, plan(number, (0, 1), fleet, template), layer) for number in range(1, 9)]
    assert len({tuple(s) for pair in sets for s in pair}) > 3
