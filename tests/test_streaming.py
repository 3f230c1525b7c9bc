"""The server's memory: no method that streams holds an update beyond its turn, or needs more for more clients."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fslora.algebra.adapters import combine
from fslora.footprint import StorageTracker
from fslora.methods import METHODS, Method
from fslora.methods.fslora import FSLoRA
from fslora.methods.server import ServerOptimizer
from fslora.types import Adapter, Client, ClientUpdate, Round, ServerState
from kit import WIDE, World, exchanges, plan, play

FLEET = tuple(Client(number, (1, 2, 4, 8)[number % 4], 5 + number % 3) for number in range(48))
STREAMING = [kind for kind in METHODS.values() if kind.streams]


def begun(method: Method) -> World:
    """After a round of four clients: optimizers have moments, clients have memories."""
    world = World(method.init(WIDE, FLEET, plan(0).rng))
    return play(method, world, plan(0, (0, 1, 2, 3), FLEET, WIDE))


def one_by_one(method: Method, world: World, round: Round, seen: list[weakref.ref[ClientUpdate]]) -> Iterator:
    """The updates of a round, each made when it is asked for; fails where more than the one before is still held."""
    for client in round.cohort:
        alive = [number for number, reference in enumerate(seen) if reference() is not None]
        assert alive == list(range(len(seen)))[-1:][: len(alive)], f"{method.name} holds updates {alive}"
        (passed,) = exchanges(method, world, replace(round, cohort=(client,)))
        update = passed.update
        seen.append(weakref.ref(update))
        del passed
        yield update
        del update


@pytest.mark.parametrize("kind", STREAMING, ids=lambda kind: kind.name)
def test_a_streaming_method_holds_no_update_beyond_its_turn(kind):
    """While an update is made, at most the one before it lives; in the end the state holds none of their tensors."""
    method, seen = kind(), []
    world = begun(method)
    round = plan(1, tuple(range(12)), FLEET, WIDE)
    state = method.aggregate(world.state, one_by_one(method, world, round, seen), round)
    assert len(seen) == 12
    assert not [number for number, reference in enumerate(seen) if reference() is not None]
    assert state.adapter.layers.keys() == world.state.adapter.layers.keys()


def peak_of(method: Method, clients: int) -> tuple[int, ServerState, ServerState]:
    """Bytes that aggregation allocates at its peak beside the state and the updates, and the states before and after.

    The updates are there beforehand and do not count.
    """
    world, round = begun(method), plan(1, tuple(range(clients)), FLEET, WIDE)
    updates = [passed.update for passed in exchanges(method, world, round)]
    with StorageTracker() as tracker:
        state = method.aggregate(world.state, iter(updates), round)
    return tracker.peak["cpu"], world.state, state


@pytest.mark.parametrize("kind", STREAMING, ids=lambda kind: kind.name)
def test_the_servers_memory_does_not_grow_with_the_clients(kind):
    """The same peak for 4 and for 48 clients of the same ranks."""
    few, many = (peak_of(kind(), clients)[0] for clients in (4, 48))
    assert few == many


@pytest.mark.parametrize("average", ["cohort", "holders"])
@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_a_sum_and_nothing_else_stands_beside_the_state(average, lr):
    """Peak of FSLoRA = one adapter, and by layer a few numbers per part (its holders, its divisor, its indices)."""
    method = FSLoRA(average=average, server=ServerOptimizer(lr=lr))
    peak, before, after = peak_of(method, 24)
    parts = sum(pair.rank for pair in before.adapter.layers.values())
    assert before.adapter.nbytes <= peak <= before.adapter.nbytes + 16 * parts + 1024
    assert after.adapter.nbytes == before.adapter.nbytes
    old = {tensor.data_ptr() for tensor in before.adapter.tensors().values()}
    assert not old & {tensor.data_ptr() for tensor in after.adapter.tensors().values()}, "states do not share memory"


@pytest.mark.parametrize("kind", STREAMING, ids=lambda kind: kind.name)
def test_aggregation_leaves_the_state_before_it_alone(kind):
    """Work in place never reaches the old state: it can still be saved, and served to clients that are late."""
    method = kind()
    world, round = begun(method), plan(1, tuple(range(8)), FLEET, WIDE)
    adapters = {"adapter": world.state.adapter, **world.state.slots}
    copies = {name: combine(torch.clone, adapter) for name, adapter in adapters.items()}
    updates = [passed.update for passed in exchanges(method, world, round)]
    sent = [combine(torch.clone, update.adapter) for update in updates]
    method.aggregate(world.state, iter(updates), round)
    for name, adapter in adapters.items():
        assert_same_bits(adapter, copies[name])
    for update, copy in zip(updates, sent, strict=True):
        assert_same_bits(update.adapter, copy)


def assert_same_bits(left: Adapter, right: Adapter) -> None:
    a, b = left.tensors(), right.tensors()
    assert a.keys() == b.keys()
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
