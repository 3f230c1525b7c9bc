"""Every registered method: one contract; then the equations of FSLoRA, FedIT and the server optimizers.

The contract is driven with a fake local training on small tensors, so that it needs no model; a method added to the
registry falls under it by itself. What needs real gradients runs on a tiny real model at the end. The other methods'
own equations are in ``test_method_NAME.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from conftest import LABELS
from fslora.algebra.adapters import add, all_finite, combine, sub, zeros_like
from fslora.config import AdapterConfig, LocalConfig
from fslora.data.batches import encode
from fslora.data.types import Examples
from fslora.engine.cohort import CohortEngine
from fslora.engine.sequential import SequentialEngine
from fslora.errors import ConfigError
from fslora.evaluate import predict_dealt
from fslora.methods import METHODS, Method, method_class
from fslora.methods.fedex_lora import FedExLoRA
from fslora.methods.fedit import FedIT
from fslora.methods.fedsa_lora import FedSALoRA
from fslora.methods.ffa_lora import FFALoRA
from fslora.methods.flexlora import FlexLoRA
from fslora.methods.florist import FLoRIST
from fslora.methods.fslora import FSLoRA
from fslora.methods.hafl_lora import HAFLLoRA
from fslora.methods.hetlora import HetLoRA
from fslora.methods.lora_fair import LoRAFAIR
from fslora.methods.rac_lora import RACLoRA
from fslora.methods.raflora import RaFLoRA
from fslora.methods.replication import Replication
from fslora.methods.rolora import RoLoRA
from fslora.methods.server import ServerOptimizer, server_step
from fslora.rng import Rng
from fslora.types import (
    Adapter,
    Client,
    ClientUpdate,
    LocalProblem,
    LoRA,
    Round,
    ServerState,
    Start,
    Trained,
)
from kit import (
    COHORTS,
    FLEET,
    RANK,
    SEED,
    TEMPLATE,
    World,
    assert_same_adapter,
    assert_same_function,
    assert_same_world,
    begun,
    ended,
    exchanges,
    fake_training,
    parts_of,
    plan,
    play,
    played,
    served,
    through_disk,
)

# Two orders of summing at most six float32 numbers near 1.
SUMMATION = 1e-6
# x + (y - x) against y in float32, with |x|, |y| < 4.
ROUND_TRIP = 1e-6
# Float64 products and means of a few numbers near 1.
EXACT = 1e-12
# Our Adam and torch's multiply the same factors in another order; steps of size lr, some rounds of them.
OPTIMIZER = 2e-6
# Products of sums of some dozens of float32 numbers below 4, through a QR or an SVD and back.
PRODUCTS = 2e-5
LAWS = settings(max_examples=25, deadline=None, derandomize=True, database=None)

DEFAULTS: dict[str, Method] = {name: kind() for name, kind in METHODS.items()}
CONFIGURED: dict[str, Method] = {
    "fslora, the paper's mean": FSLoRA(average="cohort"),
    "fslora, balanced": FSLoRA(sketch="balanced"),
    "fslora, nested": FSLoRA(sketch="nested", average="cohort"),
    "fslora, shared rows": FSLoRA(shared_rows=True),
    "fslora, by examples": FSLoRA(weighting="examples"),
    "fslora, momentum": FSLoRA(server=ServerOptimizer(momentum=0.9, lr=0.5)),
    "fslora, adam": FSLoRA(average="cohort", server=ServerOptimizer(optimizer="adam", lr=0.01)),
    "fedit, server's rank": FedIT(rank="server", weighting="uniform"),
    "fedit, rank 3": FedIT(rank=3),
    "fedsa-lora, shared head": FedSALoRA(share_head=True),
    "ffa-lora, random rows": FFALoRA(subset="random"),
    "flexlora, server's rank": FlexLoRA(keep="server"),
    "florist, merged": FLoRIST(next_init="merge", tau=1.0),
    "fedex-lora, residual of rank 2": FedExLoRA(residual_rank=2),
    "hafl-lora, truncation": HAFLLoRA(mode="truncation", random_share=0.5),
    "hetlora, no pruning": HetLoRA(prune=False, average="delta", weighting="uniform"),
    "lora-fair, a cosine": LoRAFAIR(distance="flattened-cosine"),
    "rac-lora, trains A": RACLoRA(side="A"),
    "rac-lora, gaussian": RACLoRA(sketch="gaussian"),
    "raflora, drop, sqrt": RaFLoRA(absent="drop", split="sqrt"),
    "replication, judged": Replication(best=0.5, low=2),
    "rolora, holders": RoLoRA(average="holders"),
    "fedit, adamw": FedIT(server=ServerOptimizer(optimizer="adamw", lr=0.01, weight_decay=0.1)),
}
METHOD_CASES = {**DEFAULTS, **CONFIGURED}
ADDS_THE_MEAN = {
    name: method
    for name, method in METHOD_CASES.items()
    if getattr(method, "server", None) in (None, ServerOptimizer())
}
"""Those whose server adds the mean delta as it is."""
SHRINK = {"flexlora", "flora-na", "hetlora", "lora-fair", "zero-padding"}
"""Those that lose something when nobody trains: what only a part of the cohort can hold.

Their own tests say how much: rank index j falls to the share of the weight that reaches it, or to its square.
"""
every_method = pytest.mark.parametrize("method", METHOD_CASES.values(), ids=METHOD_CASES.keys())
every_default = pytest.mark.parametrize("method", DEFAULTS.values(), ids=DEFAULTS.keys())
plain_server = pytest.mark.parametrize("method", ADDS_THE_MEAN.values(), ids=ADDS_THE_MEAN.keys())
keeping = pytest.mark.parametrize(
    "method",
    [m for n, m in ADDS_THE_MEAN.items() if n.split(",")[0] not in SHRINK],
    ids=[n for n in ADDS_THE_MEAN if n.split(",")[0] not in SHRINK],
)


def updates_of(method: Method, state: ServerState, round: Round, size: float = 0.2) -> list[ClientUpdate]:
    return [x.update for x in exchanges(method, World(state), round, fake_training(size))]


def after_round(method: Method, state: ServerState, round: Round, size: float = 0.2) -> ServerState:
    return method.aggregate(state, iter(updates_of(method, state, round, size)), round)


def assert_same_state(left: ServerState, right: ServerState) -> None:
    assert_same_world(World(left), World(right))


@lru_cache
def start_of(method: Method) -> ServerState:
    return begun(method).state


@lru_cache
def trained_world(method: Method) -> World:
    """After two rounds: B is no longer zero, server optimizers have their moments, clients their memories."""
    return played(method, 2)


def trained_state(method: Method) -> ServerState:
    return trained_world(method).state


def assert_close(left: Adapter, right: Adapter, tolerance: float) -> None:
    a, b = left.tensors(), right.tensors()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def cloned(world: World) -> World:
    slots = {name: combine(torch.clone, slot) for name, slot in world.state.slots.items()}
    state = ServerState(combine(torch.clone, world.state.adapter), slots, dict(world.state.scalars))
    memories = {
        client: replace(memory, slots={name: combine(torch.clone, slot) for name, slot in memory.slots.items()})
        for client, memory in world.memories.items()
    }
    return World(state, memories)


def total_bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- the contract ---


def test_the_registry_names_its_methods():
    """METHODS[name].name = name; fields are described, tables frozen; an unknown name lists the known."""
    for name, kind in METHODS.items():
        assert kind.name == name
        assert method_class(name) is kind
        assert kind().model_dump()["name"] == name
        assert "arXiv" in kind.paper or name == "local"
        assert kind.differs
        assert kind.travels
        with pytest.raises(ValidationError):
            kind(no_such_key=1)
        for table in tables_of(kind()):
            for field, info in type(table).model_fields.items():
                assert info.description or isinstance(getattr(table, field), BaseModel), f"{name}: {field}"
                with pytest.raises(ValidationError, match="frozen"):
                    setattr(table, field, getattr(table, field))
    with pytest.raises(ConfigError, match=r"did you mean 'fslora'\? Known methods: .*fedit.*fslora"):
        method_class("fslorra")


def tables_of(table: BaseModel) -> Iterator[BaseModel]:
    yield table
    for field in type(table).model_fields:
        if isinstance(getattr(table, field), BaseModel):
            yield from tables_of(getattr(table, field))


@every_method
def test_starts_as_the_base_model(method):
    """Before round 0 every B A is zero and the head is the template's own, in memory of its own."""
    for adapter in served(method, begun(method)):
        assert adapter.layers.keys() == TEMPLATE.layers.keys()
        for name, pair in adapter.layers.items():
            assert not pair.delta.any(), name
        assert {name: t.tolist() for name, t in adapter.dense.items()} == {
            name: t.tolist() for name, t in TEMPLATE.dense.items()
        }
        assert all(adapter.dense[name].data_ptr() != tensor.data_ptr() for name, tensor in TEMPLATE.dense.items())


@every_method
def test_every_client_can_learn_from_the_first_round(method):
    """What a client starts from computes the base model, and one factor of every part is alive: A or B is not zero."""
    for exchange in exchanges(method, begun(method), plan(0)):
        assert exchange.start.adapter.layers.keys() == TEMPLATE.layers.keys()
        for pair in exchange.start.adapter.layers.values():
            assert not pair.delta.any()
            assert (pair.A.any(dim=1) | pair.Bt.any(dim=1)).all()
            assert pair.rank >= 1
            assert len(pair.A) == len(pair.Bt)


@every_method
def test_what_is_served_fits_the_model(method):
    """Served pairs have the layers' shapes and the head's; two rounds of training have moved them."""
    for adapter in served(method, trained_world(method)):
        assert adapter.layers.keys() == TEMPLATE.layers.keys()
        for name, pair in adapter.layers.items():
            d_in, d_out = TEMPLATE.layers[name]
            assert pair.A.shape == (pair.rank, d_in)
            assert pair.Bt.shape == (pair.rank, d_out)
            assert pair.delta.any(), "two rounds trained nothing"
        assert {n: t.shape for n, t in adapter.dense.items()} == {n: t.shape for n, t in TEMPLATE.dense.items()}


@every_method
def test_no_client_trains_more_than_it_can_afford(method):
    """Trained parts number at most the client's rank, except where the method asks one rank of everybody (FedIT)."""
    if isinstance(method, FedIT):
        pytest.skip(
            "FedIT asks one rank of everybody, whatever they can afford: test_fedit_trains_everybody_at_one_rank"
        )
    for number in (0, 1, 2):
        for exchange in exchanges(method, trained_world(method), plan(number)):
            for pair in exchange.start.adapter.layers.values():
                assert pair.rank <= exchange.site.client.rank


@every_method
def test_deterministic_and_finite(method):
    """Two runs of three rounds end in the same bits, all finite, and the third round moved what is served."""
    first = played(method, 3)
    assert_same_world(first, played(method, 3))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in parts_of(first).values())
    before, after = served(method, trained_world(method)), served(method, first)
    assert any(not torch.equal(b.layers["up"].delta, a.layers["up"].delta) for b, a in zip(before, after, strict=True))


@every_method
def test_every_seed_and_layer_has_its_own_start(method):
    """Another seed, and another layer of the same shape, start from other values; a further layer changes none."""

    def starts(seed: int, template=TEMPLATE) -> Mapping[str, LoRA]:
        round = replace(plan(0, (3,)), rng=Rng(seed).child("round", 0), template=template)
        (exchange,) = exchanges(method, begun(method, seed, template), round)
        return exchange.start.adapter.layers

    here, other = starts(SEED), starts(SEED + 1)
    assert not torch.equal(other["up"].A, here["up"].A) or not torch.equal(other["up"].Bt, here["up"].Bt)
    more = replace(TEMPLATE, layers={"before": TEMPLATE.layers["up"], **TEMPLATE.layers})
    wider = starts(SEED, more)
    assert not torch.equal(wider["before"].A, here["up"].A) or not torch.equal(wider["before"].Bt, here["up"].Bt)
    assert torch.equal(wider["up"].A, here["up"].A)
    assert torch.equal(wider["up"].Bt, here["up"].Bt)


@every_method
def test_the_order_of_asking_does_not_matter(method):
    """Broadcasts depend on state, client and round alone: asked again, and backwards, they are equal.

    So does the initial state on the fleet as a set.
    """
    state, round = trained_state(method), plan(0)
    forwards = {client.id: method.broadcast(state, client, round) for client in round.cohort}
    backwards = {client.id: method.broadcast(state, client, round) for client in reversed(round.cohort)}
    for number, broadcast in forwards.items():
        assert_same_adapter(broadcast.adapter, backwards[number].adapter)
        assert (broadcast.rows is None) == (backwards[number].rows is None)
        for name, index in (broadcast.rows or {}).items():
            assert torch.equal(index, backwards[number].rows[name])
    assert_same_state(start_of(method), method.init(TEMPLATE, FLEET[::-1], Rng(SEED)))


@every_default
def test_the_cohorts_order_does_not_matter(method):
    """As configured by default, a cohort listed in another order gets the same broadcasts."""
    state, round = trained_state(method), plan(0)
    mixed = replace(round, cohort=tuple(round.cohort[i] for i in (3, 0, 5, 1, 4, 2)))
    for client in round.cohort:
        assert_same_adapter(
            method.broadcast(state, client, round).adapter, method.broadcast(state, client, mixed).adapter
        )


@every_method
def test_the_order_of_updates_only_rounds(method):
    """Aggregation is a function of the set of updates: another order changes rounding and nothing else."""
    world, round = trained_world(method), plan(0)
    updates = [x.update for x in exchanges(method, world, round)]
    forwards = method.aggregate(world.state, iter(updates), round)
    for order in ((5, 4, 3, 2, 1, 0), (2, 0, 5, 1, 4, 3)):
        other = method.aggregate(world.state, iter([updates[i] for i in order]), round)
        # Adam divides by the root of a second moment that may be small, and lr is 0.01; factors of an SVD may turn.
        assert_same_function(method.global_adapter(other), method.global_adapter(forwards), PRODUCTS)


@every_method
def test_a_dropped_client_does_not_stop_the_round(method):
    """With one update missing, the round ends with the others', and the next round goes on from there."""
    world, round = trained_world(method), plan(0)
    passed = exchanges(method, world, round)
    after = play(method, ended(method, world, round, passed[:3] + passed[4:]), plan(1))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in parts_of(after).values())


@every_method
def test_a_world_survives_the_disk(method):
    """unflatten(flatten(world)) has the same bits, and going on from it equals never having stopped."""
    world = trained_world(method)
    restored = through_disk(world)
    assert_same_world(restored, world)
    assert_same_world(play(method, restored, plan(2)), play(method, world, plan(2)))
    assert_same_world(through_disk(begun(method)), begun(method))


@every_method
def test_bytes_are_those_of_the_tensors(method):
    """Broadcast.nbytes and ClientUpdate.nbytes are sums over all that travels: pairs, heads, indices, the rest."""
    for exchange in exchanges(method, trained_world(method), plan(0)):
        down, up = exchange.broadcast, exchange.update
        for sent, message in ((down.nbytes, down), (up.nbytes, up)):
            base = [tensor for update in getattr(message, "base", ()) for tensor in update.adapter.tensors().values()]
            travelling = [*message.adapter.tensors().values(), *(message.rows or {}).values(), *message.extras.values()]
            assert sent == total_bytes(*travelling, *base)
            assert all(tensor.dtype == torch.float32 for tensor in message.adapter.tensors().values())


@every_method
def test_an_update_answers_its_broadcast(method):
    """It names its client, counts its examples, and holds no more parts than were trained, the same ones everywhere."""
    for exchange in exchanges(method, trained_world(method), plan(0)):
        client, update = exchange.site.client, exchange.update
        assert (update.client, update.examples) == (client.id, client.examples)
        assert update.adapter.layers.keys() == TEMPLATE.layers.keys()
        for name, pair in update.adapter.layers.items():
            trained = exchange.trained.adapter.layers[name]
            assert pair.rank <= trained.rank  # HetLoRA prunes
            assert {len(pair.A), len(pair.Bt)} <= {0, pair.rank}
            if update.rows is not None:
                assert len(update.rows[name]) == pair.rank


@keeping
def test_no_local_change_is_a_fixed_point(method):
    """If nobody trains, a server with plain SGD goes on serving the same function."""
    world = trained_world(method)
    still = play(method, world, plan(2), fake_training(0.0))
    for before, after in zip(served(method, world), served(method, still), strict=True):
        assert_same_function(before, after, PRODUCTS)


@pytest.mark.parametrize("name", sorted(SHRINK))
def test_where_it_is_none_the_update_shrinks(name):
    """If nobody trains, those named in SHRINK serve less than before; in no layer more."""
    method = DEFAULTS[name]
    world = trained_world(method)
    before = method.global_adapter(world.state).layers
    after = method.global_adapter(play(method, world, plan(2), fake_training(0.0)).state).layers
    norms = [(pair.delta.norm(), after[layer].delta.norm()) for layer, pair in before.items()]
    assert all(new <= old * (1 + PRODUCTS) for old, new in norms)
    assert any(new < 0.99 * old for old, new in norms)


@plain_server
def test_a_client_that_trains_moves_what_is_served(method):
    """The fixed point above is not for want of aggregating: one client's training changes every layer and the head."""
    world, round = trained_world(method), plan(2, (2, 3, 4))
    noise, still = fake_training(0.2), fake_training(0.0)
    alone = play(method, world, round, lambda start, client, r: (noise if client.id == 3 else still)(start, client, r))
    nobody = play(method, world, round, still)
    who = 3 if method.personal else 0
    moved, rest = served(method, alone)[who], served(method, nobody)[who]
    for name, tensor in moved.dense.items():
        assert not torch.equal(tensor, rest.dense[name]), name
    for name, pair in moved.layers.items():
        assert (pair.delta - rest.layers[name].delta).abs().max() > 1e-3, name


@every_method
def test_nothing_is_written_to(method):
    """A method is values in, values out: neither world, template nor an update is changed by a round."""
    world, round = trained_world(method), plan(0)
    kept, head = cloned(world), {name: tensor.clone() for name, tensor in TEMPLATE.dense.items()}
    passed = exchanges(method, world, round)
    sent = [combine(torch.clone, x.update.adapter) for x in passed]
    ended(method, world, round, passed)
    assert_same_world(world, kept)
    for exchange, adapter in zip(passed, sent, strict=True):
        assert_same_adapter(exchange.update.adapter, adapter)
    assert all(torch.equal(TEMPLATE.dense[name], tensor) for name, tensor in head.items())


@pytest.mark.parametrize("method", [m for m in ADDS_THE_MEAN.values() if isinstance(m, (FSLoRA, FedIT))], ids=str)
def test_one_client_is_its_own_training(method):
    """A round of one client under server SGD with lr 1 ends with what it trained, at the rows that it held."""
    state, round = trained_state(method), plan(0, (2,))
    (exchange,) = exchanges(method, World(state), round)
    after = method.aggregate(state, iter([exchange.update]), round)
    rows = exchange.broadcast.rows
    for name, pair in exchange.trained.adapter.layers.items():
        held = slice(None) if rows is None else rows[name].long()
        for kind in ("A", "Bt"):
            server = getattr(after.adapter.layers[name], kind)[held]
            torch.testing.assert_close(server, getattr(pair, kind), atol=ROUND_TRIP, rtol=0)
    for name, tensor in exchange.trained.adapter.dense.items():
        torch.testing.assert_close(after.adapter.dense[name], tensor, atol=ROUND_TRIP, rtol=0)


# --- FSLoRA ---

FSLORAS = {name: method for name, method in METHOD_CASES.items() if isinstance(method, FSLoRA)}
PLAIN_FSLORAS = {name: method for name, method in FSLORAS.items() if name in ADDS_THE_MEAN}
every_fslora = pytest.mark.parametrize("method", FSLORAS.values(), ids=FSLORAS.keys())
plain_fslora = pytest.mark.parametrize("method", PLAIN_FSLORAS.values(), ids=PLAIN_FSLORAS.keys())


def algorithm_box(method: FSLoRA, state: ServerState, updates: list[ClientUpdate]) -> dict[str, np.ndarray]:
    """Algorithm 1's server line in float64, by entries: x_j + Σ w_i Δ_ij / Σ w_i (of cohort or of holders)."""
    weights = [float(u.examples) if method.weighting == "examples" else 1.0 for u in updates]
    result = {}
    for key, tensor in state.adapter.tensors().items():
        layer, kind = key.rsplit(":", 1)
        value = tensor.double().numpy().copy()
        deltas = [update.adapter.tensors()[key].double().numpy() for update in updates]
        if kind == "dense":
            value += sum(w * d for w, d in zip(weights, deltas, strict=True)) / sum(weights)
        else:
            for j in range(RANK):
                held = [
                    (w, d[u.rows[layer].tolist().index(j)])
                    for w, d, u in zip(weights, deltas, updates, strict=True)
                    if j in u.rows[layer].tolist()
                ]
                divisor = sum(weights) if method.average == "cohort" else sum(w for w, _ in held)
                value[j] += sum(w * d for w, d in held) / divisor if held else 0.0
        result[key] = value
    return result


@plain_fslora
def test_fslora_aggregates_as_its_algorithm_box(method):
    """B, A ← B, A + mean of the scattered deltas, against the entry-by-entry float64 loop."""
    state, round = trained_state(method), plan(1)
    updates = updates_of(method, state, round)
    found = method.aggregate(state, iter(updates), round).adapter.tensors()
    for name, expected in algorithm_box(method, state, updates).items():
        np.testing.assert_allclose(found[name].double().numpy(), expected, atol=SUMMATION, rtol=0, err_msg=name)


@every_fslora
def test_fslora_bytes_follow_the_papers_formula(method):
    """Per layer and direction k (d_in + d_out) · 4, plus 4 k for the index set; the head goes whole."""
    state, round = trained_state(method), plan(0)
    for client, update in zip(round.cohort, updates_of(method, state, round), strict=True):
        layers = sum(client.rank * (d_in + d_out) * 4 + 4 * client.rank for d_in, d_out in TEMPLATE.layers.values())
        head = sum(tensor.numel() * 4 for tensor in TEMPLATE.dense.values())
        assert method.broadcast(state, client, round).nbytes == layers + head
        assert update.nbytes == layers + head


@plain_fslora
def test_fslora_leaves_unselected_parts_alone(method):
    """Under plain server SGD, parts outside every client's I keep their bits, and parts inside move."""
    state, round = trained_state(method), plan(2, (0, 1))
    updates = updates_of(method, state, round)
    after = method.aggregate(state, iter(updates), round)
    for name, pair in state.adapter.layers.items():
        held = sorted({j for update in updates for j in update.rows[name].tolist()})
        outside = [j for j in range(RANK) if j not in held]
        assert outside
        for kind in ("A", "Bt"):
            old, new = getattr(pair, kind), getattr(after.adapter.layers[name], kind)
            assert torch.equal(new[outside], old[outside])
            assert (new[held] != old[held]).any(dim=1).all()


def test_server_adam_moves_parts_that_nobody_holds():
    """The edge case of the notes: under Adam, momentum moves even indices that nobody sampled this round."""
    method = CONFIGURED["fslora, adam"]
    state, round = trained_state(method), plan(2, (0,))
    (update,) = updates_of(method, state, round)
    after = method.aggregate(state, iter([update]), round)
    outside = [j for j in range(RANK) if j not in update.rows["up"].tolist()]
    assert (after.adapter.layers["up"].A[outside] != state.adapter.layers["up"].A[outside]).any(dim=1).all()


def all_full(method: Method, average: str = "holders") -> ServerState:
    """Three rounds in which every client has the server's rank."""
    fleet = tuple(replace(client, rank=RANK) for client in FLEET)
    state = method.init(TEMPLATE, fleet, Rng(0))
    for number in range(3):
        round = replace(plan(number), cohort=tuple(fleet[i] for i in COHORTS[number]))
        state = after_round(method, state, round)
    return state


@pytest.mark.parametrize("sketch", ["independent", "balanced", "nested"])
@pytest.mark.parametrize("average", ["cohort", "holders"])
def test_fslora_at_full_rank_is_fedit(sketch, average):
    """k_i = r for all, server lr 1: three rounds of FSLoRA are FedIT's at the server's rank, bit for bit."""
    ours = all_full(FSLoRA(sketch=sketch, average=average))
    assert_same_state(ours, all_full(FedIT(rank="server", weighting="uniform")))


def test_fslora_by_examples_at_full_rank_is_fedit():
    """The same with clients weighted by their number of examples, FedIT's own weighting."""
    assert_same_state(all_full(FSLoRA(weighting="examples")), all_full(FedIT(rank="server")))


def test_holders_and_cohort_differ_by_the_share_of_holders():
    """Δ_cohort[j] = (holders of j / M) · Δ_holders[j]: the papers' mean under-steps parts that few hold."""
    state, round = trained_state(DEFAULTS["fslora"]), plan(0)
    updates = updates_of(FSLoRA(), state, round)
    cohort, over_holders = (
        sub(FSLoRA(average=average).aggregate(state, iter(updates), round).adapter, state.adapter)
        for average in ("cohort", "holders")
    )
    for name, pair in cohort.layers.items():
        held = torch.zeros(RANK, 1)
        for update in updates:
            held[update.rows[name].long()] += 1
        assert held.min() < len(updates)
        torch.testing.assert_close(
            pair.A, over_holders.layers[name].A * held / len(updates), atol=ROUND_TRIP, rtol=ROUND_TRIP
        )
    assert all(torch.equal(tensor, over_holders.dense[name]) for name, tensor in cohort.dense.items())


# --- FedIT ---


def double_state(rank: int, layers: Mapping[str, tuple[int, int]], seed: int) -> ServerState:
    """A float64 server state with B not zero."""
    stream = Rng(seed).torch()

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=stream, dtype=torch.float64)

    return ServerState(
        Adapter({name: LoRA(draw(rank, d_in), draw(rank, d_out), 0.5) for name, (d_in, d_out) in layers.items()})
    )


def moved_clients(state: ServerState, examples: tuple[int, ...], seed: int = 0) -> list[tuple[Adapter, ClientUpdate]]:
    """(what each client trained to, what it sends)."""
    sent = []
    for number, count in enumerate(examples):
        stream = Rng(seed).child("moved", number).torch()
        delta = combine(lambda t, s=stream: torch.randn(t.shape, generator=s, dtype=torch.float64), state.adapter)
        sent.append((add(state.adapter, delta), ClientUpdate(number, delta, count)))
    return sent


def aggregated(method: FedIT, state: ServerState, sent: list[tuple[Adapter, ClientUpdate]]) -> Adapter:
    return method.aggregate(state, (update for _, update in sent), plan(0)).adapter


def product(pair: LoRA) -> torch.Tensor:
    return pair.Bt.T @ pair.A


@LAWS
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=5),
    st.sampled_from(["uniform", "examples"]),
    st.randoms(),
)
def test_fedit_is_the_weighted_mean_of_factors(examples, weighting, shuffler):
    """A = Σ p_i A_i and B = Σ p_i B_i with Σ p_i = 1, in any order of the clients."""
    state = double_state(2, {"l": (5, 3)}, 0)
    sent = moved_clients(state, tuple(examples))
    weights = np.array(examples, dtype=np.float64) if weighting == "examples" else np.ones(len(examples))
    weights /= weights.sum()
    order = list(range(len(sent)))
    shuffler.shuffle(order)
    mean = aggregated(FedIT(weighting=weighting), state, [sent[i] for i in order]).layers["l"]
    for kind in ("A", "Bt"):
        expected = sum(
            weight * getattr(trained.layers["l"], kind) for weight, (trained, _) in zip(weights, sent, strict=True)
        )
        torch.testing.assert_close(getattr(mean, kind), expected, atol=EXACT, rtol=0)


@pytest.mark.parametrize("clients", [2, 3, 5])
def test_fedit_misses_the_mean_product_by_a_covariance(clients):
    """mean(B_i A_i) - mean(B) mean(A) = mean((B_i - B̄)(A_i - Ā)), of rank at most (K - 1) r."""
    r = 2
    state = double_state(r, {"l": (20, 24)}, 1)
    sent = moved_clients(state, (1,) * clients)
    mean = aggregated(FedIT(weighting="uniform"), state, sent).layers["l"]
    pairs = [trained.layers["l"] for trained, _ in sent]
    residual = sum(product(pair) for pair in pairs) / clients - product(mean)
    covariance = sum((pair.Bt - mean.Bt).T @ (pair.A - mean.A) for pair in pairs) / clients
    # Sums of r products of numbers near 3 in float64.
    torch.testing.assert_close(residual, covariance, atol=100 * EXACT, rtol=0)
    assert torch.linalg.matrix_rank(residual, atol=1e-9) == (clients - 1) * r


def test_fedit_is_exact_where_one_factor_is_common():
    """Equal A_i: B̄ A is the mean of the products B_i A."""
    state = double_state(2, {"l": (5, 3)}, 2)
    sent = []
    for trained, update in moved_clients(state, (1, 1, 1)):
        pair, delta = trained.layers["l"], update.adapter.layers["l"]
        common = LoRA(state.adapter.layers["l"].A, pair.Bt, pair.scale)
        still = LoRA(torch.zeros_like(delta.A), delta.Bt, delta.scale)
        sent.append((Adapter({"l": common}), replace(update, adapter=Adapter({"l": still}))))
    mean = aggregated(FedIT(weighting="uniform"), state, sent).layers["l"]
    exact = sum(product(trained.layers["l"]) for trained, _ in sent) / len(sent)
    torch.testing.assert_close(product(mean), exact, atol=10 * EXACT, rtol=0)


def test_fedit_errs_in_second_order_after_one_step():
    """One SGD step from a common start: ‖mean(B_i A_i) - B̄ Ā‖ = O(η²); halving η quarters it."""
    state = double_state(2, {"l": (5, 3)}, 3)
    start = state.adapter.layers["l"]
    stream = Rng(4).torch()
    targets = [torch.randn(3, 5, generator=stream, dtype=torch.float64) for _ in range(4)]

    def error(eta: float) -> float:
        sent = []
        for number, target in enumerate(targets):
            A, Bt = start.A.clone().requires_grad_(), start.Bt.clone().requires_grad_()
            (0.5 * Bt.T @ A - target).square().sum().backward()
            trained = Adapter({"l": LoRA(A.detach() - eta * A.grad, Bt.detach() - eta * Bt.grad, 0.5)})
            sent.append((trained, ClientUpdate(number, sub(trained, state.adapter), 1)))
        mean = aggregated(FedIT(weighting="uniform"), state, sent).layers["l"]
        exact = sum(product(trained.layers["l"]) for trained, _ in sent) / len(sent)
        return float((exact - product(mean)).norm())

    assert error(0.1) > 1e-4
    for eta in (0.1, 0.05, 0.025):
        assert error(eta) / error(eta / 2) == pytest.approx(4.0, rel=1e-6)


def test_fedit_depends_on_how_a_product_is_factored():
    """Negative: (B M, M⁻¹ A) is the same client function, and yet another average."""
    state = double_state(2, {"l": (5, 3)}, 5)
    (first, update), other = moved_clients(state, (1, 1))
    M = torch.tensor([[2.0, 1.0], [0.0, 0.5]], dtype=torch.float64)
    pair = first.layers["l"]
    turned = Adapter({"l": LoRA(torch.linalg.inv(M) @ pair.A, M.T @ pair.Bt, pair.scale)})
    torch.testing.assert_close(product(turned.layers["l"]), product(pair), atol=10 * EXACT, rtol=0)
    plain = aggregated(FedIT(), state, [(first, update), other]).layers["l"]
    changed = aggregated(FedIT(), state, [(turned, replace(update, adapter=sub(turned, state.adapter))), other]).layers[
        "l"
    ]
    assert (product(plain) - product(changed)).norm() > 0.1


@pytest.mark.parametrize(("rank", "expected"), [("smallest", 1), ("server", RANK), (3, 3)])
def test_fedit_trains_everybody_at_one_rank(rank, expected):
    """'smallest' is the weakest client's rank, 'server' the server's; all get the whole adapter, no index set.

    Bytes per layer are r (d_in + d_out) · 4.
    """
    method = FedIT(rank=rank)
    state = start_of(method)
    for client in FLEET:
        broadcast = method.broadcast(state, client, plan(0))
        assert broadcast.rows is None
        assert {pair.rank for pair in broadcast.adapter.layers.values()} == {expected}
        assert {pair.scale for pair in broadcast.adapter.layers.values()} == {16.0 / expected}
        layers = sum(expected * (d_in + d_out) * 4 for d_in, d_out in TEMPLATE.layers.values())
        assert broadcast.nbytes == layers + sum(tensor.numel() * 4 for tensor in TEMPLATE.dense.values())


def test_methods_of_one_rank_start_from_the_same_draw():
    """FSLoRA and FedIT at the server's rank begin with the same A, so that comparisons are paired."""
    assert_same_state(start_of(FSLoRA()), start_of(FedIT(rank="server")))


# --- the server's step ---

SERVERS = {
    "sgd": ServerOptimizer(),
    "sgd, lr": ServerOptimizer(lr=0.3),
    "sgd, momentum": ServerOptimizer(momentum=0.9),
    "sgd, lr and momentum": ServerOptimizer(lr=0.3, momentum=0.5),
    "adam": ServerOptimizer(optimizer="adam", lr=0.01),
    "adam, other betas": ServerOptimizer(optimizer="adam", lr=0.1, beta1=0.0, beta2=0.5, eps=1e-3),
    "adam, decay is adamw's": ServerOptimizer(optimizer="adam", lr=0.01, weight_decay=0.1),
    "adamw": ServerOptimizer(optimizer="adamw", lr=0.01, beta2=0.999, weight_decay=0.1),
    "adamw, no decay": ServerOptimizer(optimizer="adamw", lr=0.01),
}


def torch_optimizer(server: ServerOptimizer, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    if server.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=server.lr, momentum=server.momentum)
    options = {"lr": server.lr, "betas": (server.beta1, server.beta2), "eps": server.eps}
    if server.optimizer == "adam":
        return torch.optim.Adam(parameters, **options)
    return torch.optim.AdamW(parameters, weight_decay=server.weight_decay, **options)


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS.keys())
def test_the_servers_step_is_torchs(server):
    """server_step(Δ) = torch's optimizer on the pseudo-gradient -Δ, over rounds, its state through the disk."""
    state = trained_state(FSLoRA())
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in state.adapter.tensors().items()}
    stepper = torch_optimizer(server, list(leaves.values()))
    for number in range(5):
        stream = Rng(8).child(number).torch()
        delta = combine(lambda t, s=stream: 0.1 * torch.randn(t.shape, generator=s), state.adapter)
        delta.layers["up"].A[number % RANK] = 0  # a part that nobody held
        for name, leaf in leaves.items():
            leaf.grad = -delta.tensors()[name]
        stepper.step()
        before = state
        state = server_step(through_disk(World(state)).state, delta, server)
        for name, leaf in leaves.items():
            torch.testing.assert_close(
                state.adapter.tensors()[name],
                leaf.detach(),
                atol=OPTIMIZER,
                rtol=OPTIMIZER,
                msg=lambda m, n=name: n + m,
            )
        assert (state.adapter.layers["up"].A - before.adapter.layers["up"].A).abs().max() > 100 * OPTIMIZER
    assert {name: pair.scale for name, pair in state.adapter.layers.items()} == {
        name: pair.scale for name, pair in trained_state(FSLoRA()).adapter.layers.items()
    }


def test_the_first_adam_step_by_hand():
    """Bias-corrected: the first step is lr · Δ / (|Δ| + eps), whatever the betas."""
    state = ServerState(Adapter({}, {"w": torch.tensor([1.0, 1.0, 1.0])}))
    delta = Adapter({}, {"w": torch.tensor([4.0, -0.25, 0.0])})
    after = server_step(state, delta, ServerOptimizer(optimizer="adam", lr=0.5, eps=0.25))
    assert after.adapter.dense["w"].tolist() == pytest.approx([1 + 0.5 * 4 / 4.25, 1 - 0.25, 1.0], rel=1e-6)
    assert after.scalars == {"server_steps": 1.0}


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS.keys())
def test_a_first_step_along_zero_is_no_step(server):
    """Δ = 0 before any momentum leaves the adapter's bits, but for AdamW's decay by 1 - lr · weight_decay."""
    state = trained_state(FSLoRA())
    after = server_step(state, zeros_like(state.adapter), server)
    decay = 1 - server.lr * server.weight_decay if server.optimizer == "adamw" else 1.0
    assert_same_adapter(after.adapter, combine(lambda t: t * decay, state.adapter))


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer": "lion"},
        {"lr": 0.0},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"momentum": 1.0},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"eps": 0.0},
        {"weight_decay": -1.0},
        {"learning_rate": 1.0},
    ],
    ids=str,
)
def test_a_server_that_cannot_be_is_refused(fields):
    """Values outside an optimizer's range, and unknown keys, do not become a server."""
    with pytest.raises(ValidationError):
        ServerOptimizer(**fields)


# --- on a real model ---

LOCAL = LocalConfig(lr=3e-3, clip_norm=1.0)


class Federation:
    """Four clients of one tiny BERT; the label is which of three words stands in the text."""

    def __init__(self, base, ranks: tuple[int, ...]) -> None:
        self.base = base
        self.template = base.template(AdapterConfig(rank=RANK, alpha=16.0))
        self.fleet = tuple(Client(i, rank, 12) for i, rank in enumerate(ranks))
        draw = Rng(0).child("texts").numpy()
        labels = draw.integers(0, len(LABELS), 72)
        texts = tuple(
            " ".join([*draw.choice(["the", "a", "of", "to"], 2), ("good", "bad", "cat")[label], "file"])
            for label in labels
        )
        self.data = encode(Examples(texts, labels), base.tokenizer, 32)
        self.held_out = self.data.take(np.arange(48, 72))

    def round(self, method: Method, world: World, number: int, engine) -> World:
        round = Round(number, self.fleet, Rng(0).child("round", number), self.template)
        changes = method.base(world.state)
        assert changes is None or method.changes_base
        with self.base.changed(changes.layers if changes else {}):

            def train(start: Start, client: Client, round: Round) -> Trained:
                (trained,) = engine.train([self.problem(client, start, round)], LOCAL.lr)
                return trained

            return play(method, world, round, train)

    def run(self, method: Method, rounds: int, engine=None) -> World:
        world = World(method.init(self.template, self.fleet, Rng(0)))
        for number in range(rounds):
            world = self.round(method, world, number, engine or CohortEngine(self.base, LOCAL, 0.0, 4))
        return world

    def loss(self, method: Method, world: World) -> float:
        if method.personal:
            sites = [world.site(client, self.template) for client in self.fleet]
            adapters = [method.client_adapter(world.state, site) for site in sites]
        else:
            adapters = [method.global_adapter(world.state)]
        return predict_dealt(self.base, adapters, self.held_out).scores()["loss"]

    def problem(self, client: Client, start: Start, round: Round) -> LocalProblem:
        mine = np.arange(12 * client.id, 12 * client.id + 12)
        order = round.rng.child("batches", client.id).numpy().permutation(mine)
        batches = [self.data.batch(order[start : start + 4]) for start in (0, 4, 8)]
        return LocalProblem(client.id, start, batches, round.rng.child("dropout", client.id))


@pytest.fixture(scope="module")
def bert(tiny_base):
    return tiny_base("bert", ("query", "value"))


@every_default
def test_every_method_learns(bert, method):
    """On a separable task, eight rounds of real training lower the held-out loss well below the start's."""
    federation = Federation(bert, (1, 2, 4, 8))
    before = federation.loss(method, World(method.init(federation.template, federation.fleet, Rng(0))))
    world = federation.run(method, 8)
    assert all_finite(world.state.adapter)
    assert federation.loss(method, world) < 0.8 * before


def test_fslora_at_full_rank_is_fedit_on_a_real_model(bert):
    """Three rounds of real training at k_i = r: the same bits as FedIT's."""
    federation = Federation(bert, (RANK,) * 4)
    ours = federation.run(FSLoRA(), 3)
    assert_same_world(ours, federation.run(FedIT(rank="server", weighting="uniform"), 3))


def test_one_client_under_fslora_trains_as_if_alone(bert):
    """One client at full rank: two rounds of FSLoRA are two local trainings, one after the other."""
    federation = Federation(bert, (RANK,))
    method, engine = FSLoRA(), SequentialEngine(bert, LOCAL, 0.0)
    state = federation.run(method, 2, engine).state
    adapter = method.init(federation.template, federation.fleet, Rng(0)).adapter
    for number in range(2):
        round = Round(number, federation.fleet, Rng(0).child("round", number), federation.template)
        (result,) = engine.train([federation.problem(federation.fleet[0], Start(adapter), round)], LOCAL.lr)
        adapter = result.adapter
    # Two rounds of x + (y - x) against y, through AdamW, which divides by small second moments.
    assert_close(state.adapter, adapter, 100 * ROUND_TRIP)
