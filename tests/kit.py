"""What the tests of methods share: small layers, an unequal fleet, and a fake local training that any method takes.

`play` drives a method as the round loop does, clients' memories included, without a model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from fslora.clientstore import ClientStore
from fslora.methods import Method
from fslora.rng import Rng
from fslora.runfolder import flatten, unflatten
from fslora.types import (
    Adapter,
    Broadcast,
    Client,
    ClientMemory,
    ClientUpdate,
    LoRA,
    Round,
    ServerState,
    Site,
    Start,
    Template,
    Trained,
)

RANK = 8
TEMPLATE = Template(
    layers={"up": (6, 4), "down": (4, 9), "out": (3, 3)},
    dense={
        "head.weight": torch.linspace(-1, 1, 18).reshape(3, 6),
        "head.bias": torch.tensor([0.5, 0.0, -0.5]),
    },
    rank=RANK,
    alpha=16.0,
)
"""Layers narrower than the rank are among them, and none but ``out`` is square."""
WIDE = replace(TEMPLATE, layers={"up": (24, 40), "down": (40, 24)})
"""Layers wider than the stack of a few clients."""
FLEET = tuple(
    Client(number, rank, examples)
    for number, (rank, examples) in enumerate([(1, 5), (2, 1), (4, 20), (8, 3), (8, 7), (3, 11)])
)
COHORTS = ((0, 1, 2, 3, 4, 5), (0, 2, 3), (1, 4, 5))
"""Who takes part in rounds 0, 1 and 2."""
SEED = 3

Training = Callable[[Start, Client, Round], Trained]


def plan(
    number: int,
    members: tuple[int, ...] | None = None,
    fleet: tuple[Client, ...] = FLEET,
    template: Template = TEMPLATE,
) -> Round:
    """A round: of COHORTS, or of the fleet's members named."""
    ids = COHORTS[number % len(COHORTS)] if members is None else members
    return Round(number, tuple(fleet[i] for i in ids), Rng(SEED).child("round", number), template)


def fake_training(size: float = 0.2) -> Training:
    """A local training that any method can be driven with: noise addressed by round, client and tensor.

    It moves the factors that are trained and no others, and has a sensitivity for every part.
    """

    def train(start: Start, client: Client, round: Round) -> Trained:
        rng = round.rng.child("fake", client.id)
        resting = {"A": ":Bt", "B": ":A", "both": "-"}[start.trains]
        values = {
            name: tensor + size * torch.randn(tensor.shape, generator=rng.child(name).torch(), dtype=tensor.dtype)
            for name, tensor in start.adapter.tensors().items()
            if not name.endswith(resting)
        }
        trained = start.adapter.with_tensors({**start.adapter.tensors(), **values})
        scores = {
            name: torch.rand(pair.rank, generator=rng.child("score", name).torch())
            for name, pair in start.adapter.layers.items()
        }
        return Trained(client.id, trained, (1.0,), scores if start.measures_sensitivity else {})

    return train


@dataclass(frozen=True)
class Exchange:
    """All that passes between server and one client in a round."""

    site: Site
    broadcast: Broadcast
    start: Start
    trained: Trained
    update: ClientUpdate


@dataclass(frozen=True)
class World:
    """The server's state and the clients' memories."""

    state: ServerState
    memories: Mapping[int, ClientMemory] = field(default_factory=dict)

    def site(self, client: Client, template: Template = TEMPLATE) -> Site:
        """What a client knows."""
        return Site(client, template, self.memories.get(client.id, ClientMemory()))


def begun(method: Method, seed: int = SEED, template: Template = TEMPLATE, fleet: tuple[Client, ...] = FLEET) -> World:
    """The world before round 0."""
    return World(method.init(template, fleet, Rng(seed)))


def exchanges(method: Method, world: World, round: Round, training: Training | None = None) -> list[Exchange]:
    """What passes in a round, client by client; nothing is aggregated yet."""
    train, result = training or fake_training(), []
    for client in round.cohort:
        site = world.site(client, round.template)
        broadcast = method.broadcast(world.state, client, round)
        start = method.start(broadcast, site)
        trained = train(start, client, round)
        update = method.client_update(broadcast, start, trained, site)
        result.append(Exchange(site, broadcast, start, trained, update))
    return result


def ended(method: Method, world: World, round: Round, passed: list[Exchange]) -> World:
    """The world after a round in which this passed."""
    state = method.aggregate(world.state, iter([x.update for x in passed]), round)
    kept = {x.site.client.id: method.remember(x.broadcast, x.start, x.trained, x.site) for x in passed}
    return World(state, {**world.memories, **kept})


def play(method: Method, world: World, round: Round, training: Training | None = None) -> World:
    """The world after one round."""
    return ended(method, world, round, exchanges(method, world, round, training))


def played(method: Method, rounds: int, training: Training | None = None, seed: int = SEED) -> World:
    """The world after the first rounds of COHORTS."""
    world = begun(method, seed)
    for number in range(rounds):
        world = play(method, world, plan(number), training)
    return world


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    """What an adapter does to each layer, float64 [o i], and its dense tensors."""
    products = {name: pair.scale * pair.Bt.double().T @ pair.A.double() for name, pair in adapter.layers.items()}
    return {**products, **{name: tensor.double() for name, tensor in adapter.dense.items()}}


def served(method: Method, world: World, fleet: tuple[Client, ...] = FLEET) -> list[Adapter]:
    """The global adapter, or every client's own."""
    if not method.personal:
        return [method.global_adapter(world.state)]
    return [method.client_adapter(world.state, world.site(client)) for client in fleet]


def mean_product(updates: Mapping[str, list[LoRA]], weights: list[float]) -> dict[str, torch.Tensor]:
    """Σ_i weights_i · scale_i · B_i A_i by layer, dense, float64."""
    return {
        name: sum(w * p.scale * p.Bt.double().T @ p.A.double() for w, p in zip(weights, pairs, strict=True))
        for name, pairs in updates.items()
    }


def through_disk(world: World) -> World:
    """The world after flatten, safetensors and JSON text, and back; memories through the files of clients."""
    tensors, description = flatten(world.state)
    state = unflatten(load_tensors(save_tensors(tensors)), json.loads(json.dumps(description)))
    with TemporaryDirectory() as folder:
        store = ClientStore(Path(folder), 0)
        for client, memory in world.memories.items():
            store.put(client, memory, 1)
        return World(state, dict(ClientStore(Path(folder), 1)))


def parts_of(world: World) -> dict[str, torch.Tensor]:
    """Every tensor of a world under a unique name."""
    adapters = {"adapter": world.state.adapter, **world.state.slots}
    for client, memory in world.memories.items():
        adapters.update({f"client.{client}.{name}": slot for name, slot in memory.slots.items()})
    return {f"{part}/{name}": t for part, adapter in adapters.items() for name, t in adapter.tensors().items()}


def assert_same_world(left: World, right: World) -> None:
    """Same names, scales and scalars, same bits."""
    a, b = parts_of(left), parts_of(right)
    assert a.keys() == b.keys()
    assert dict(left.state.scalars) == dict(right.state.scalars)
    assert {c: dict(m.scalars) for c, m in left.memories.items()} == {
        c: dict(m.scalars) for c, m in right.memories.items()
    }
    for part, adapter in {"adapter": left.state.adapter, **left.state.slots}.items():
        other = right.state.adapter if part == "adapter" else right.state.slots[part]
        assert {n: p.scale for n, p in adapter.layers.items()} == {n: p.scale for n, p in other.layers.items()}
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def assert_same_adapter(left: Adapter, right: Adapter) -> None:
    """Same names and scales, same bits."""
    assert_same_world(World(ServerState(left)), World(ServerState(right)))


def assert_same_function(left: Adapter, right: Adapter, tolerance: float) -> None:
    """Equal products and dense tensors, whatever the factors."""
    a, b = deltas(left), deltas(right)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
