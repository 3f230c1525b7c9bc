"""The log of base changes: whoever was absent, and whatever got lost, ends with the server's base."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora.algebra.adapters import combine
from fslora.methods import METHODS, Method
from fslora.methods.baselog import changed, confirmed, merged, missed, summed, version_of, with_base
from fslora.methods.flora import FLoRA
from fslora.methods.rac_lora import RACLoRA
from fslora.rng import Rng
from fslora.types import Adapter, BaseUpdate, LoRA, ServerState, Template
from kit import (
    FLEET,
    TEMPLATE,
    WIDE,
    World,
    assert_same_adapter,
    assert_same_function,
    begun,
    deltas,
    ended,
    exchanges,
    fake_training,
    plan,
    through_disk,
)

LAWS = settings(max_examples=25, deadline=None, derandomize=True, database=None)
# Sums of some dozens of float32 products of numbers near 1.
SUMS = 2e-5
SHAPES = {"up": (6, 4), "down": (4, 9)}


def change(number: int, rank: int = 1, scale: float = 2.0) -> Adapter:
    """One change of the layers SHAPES, with a head that has to be left out of the log."""
    stream = Rng(number).torch()

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=stream)

    pairs = {name: LoRA(draw(rank, d_in), draw(rank, d_out), scale) for name, (d_in, d_out) in SHAPES.items()}
    return Adapter(pairs, {"head": draw(3)})


def empty() -> ServerState:
    zero = {name: LoRA(torch.zeros(2, d_in), torch.zeros(2, d_out), 1.0) for name, (d_in, d_out) in SHAPES.items()}
    return ServerState(Adapter(zero, {"head": torch.ones(3)}))


def logged(state: ServerState) -> list[str]:
    return [name for name in state.slots if name.startswith("change.")]


@dataclass(frozen=True)
class Replica:
    """A client's base, kept as `fslora.types.BaseUpdate` asks."""

    version: int = 0
    pairs: Adapter | None = None

    def after(self, updates: tuple[BaseUpdate, ...], method: Method | None = None, template: Template = TEMPLATE):
        version, pairs = self.version, self.pairs
        for update in updates:
            if update.version <= version:
                continue
            new = (method or FLoRA()).base_update(update, template)
            assert update.whole or update.version == version + 1, "an update is missing"
            version, pairs = update.version, new if update.whole else summed(pairs, new)
        return Replica(version, pairs)


# --- the log itself ---


def test_the_sum_is_the_sum_of_all_changes():
    """base = Σ_t scale_t B_t A_t, whatever the ranks and scales; dense tensors are no part of it."""
    state, dense = empty(), {name: torch.zeros(o, i).double() for name, (i, o) in SHAPES.items()}
    for number, (rank, scale) in enumerate([(1, 2.0), (3, 0.5), (5, 1.0), (1, 3.0)]):
        one = change(number, rank, scale)
        state = changed(state, one)
        dense = {name: dense[name] + deltas(one)[name] for name in SHAPES}
        found = deltas(state.slots["base"])
        assert found.keys() == SHAPES.keys()
        for name, tensor in dense.items():
            torch.testing.assert_close(found[name], tensor, atol=SUMS, rtol=SUMS)
        assert version_of(state) == number + 1
    for pair in state.slots["base"].layers.values():
        assert pair.rank <= min(pair.A.shape[1], pair.Bt.shape[1])


def test_the_adapter_on_the_base_is_their_sum():
    """with_base: base + scale B A, at most of full rank; merged: the base alone, with the head of the state."""
    state = empty()
    assert with_base(state, state.adapter) is state.adapter
    assert merged(state) is state.adapter
    state, top = changed(changed(state, change(0, 2)), change(1, 2)), change(2, 3, 0.25)
    both, base = with_base(state, top), deltas(state.slots["base"])
    for name in SHAPES:
        torch.testing.assert_close(deltas(both)[name], base[name] + deltas(top)[name], atol=SUMS, rtol=SUMS)
        assert both.layers[name].rank <= 4
    assert both.dense is top.dense
    assert_same_adapter(merged(state), Adapter(state.slots["base"].layers, state.adapter.dense))


@LAWS
@given(st.lists(st.integers(1, 7), min_size=1, max_size=12))
def test_the_log_never_outgrows_the_sum(ranks):
    """Bytes of all logged changes ≤ bytes of the sum ≤ twice the dense weights; the newest are the ones kept."""
    state = empty()
    dense = sum(4 * i * o for i, o in SHAPES.values())
    for number, rank in enumerate(ranks, start=1):
        state = changed(state, change(number, rank))
        held = logged(state)
        assert sum(state.slots[name].nbytes for name in held) <= state.slots["base"].nbytes <= 2 * dense
        assert held == [f"change.{v:09d}" for v in range(number + 1 - len(held), number + 1)]
        if sum(ranks[:number]) <= 4:  # both layers have room: nothing was multiplied out, and nothing dropped
            assert len(held) == number


def test_a_client_gets_what_it_missed_and_no_more():
    """Versions seen + 1 ... newest, one by one; nothing when it has them all; the sum once the log is too short."""
    state = empty()
    assert missed(state, 0) == ()
    for number in range(3):
        state = changed(state, change(number))
    assert [update.version for update in missed(state, 0)] == [1, 2, 3]
    assert not any(update.whole for update in missed(state, 0))
    state = confirmed(state, [0])
    assert missed(state, 0) == ()
    assert [update.version for update in missed(state, 1)] == [1, 2, 3]
    state = changed(state, change(3))
    assert [update.version for update in missed(state, 0)] == [4]
    for number in range(4, 20):
        state = changed(state, change(number))
    (update,) = missed(state, 0)
    assert (update.version, update.whole) == (20, True)
    assert_same_adapter(FLoRA().base_update(update, TEMPLATE), state.slots["base"])
    assert update.adapter.nbytes == sum(4 * d_in * d_out for d_in, d_out in SHAPES.values())  # no identities travel


@LAWS
@given(st.lists(st.integers(1, 7), min_size=1, max_size=12), st.data())
def test_what_is_sent_is_never_more_than_the_sum(ranks, data):
    """Bytes down for an absence of any length ≤ bytes of the sum."""
    state = empty()
    for number, rank in enumerate(ranks):
        if data.draw(st.booleans()):
            state = confirmed(state, [0])
        state = changed(state, change(number, rank))
        for client in (0, 1):
            assert sum(update.adapter.nbytes for update in missed(state, client)) <= state.slots["base"].nbytes


def test_a_change_is_sent_again_until_it_is_confirmed():
    """A lost answer: the same versions come again, with newer ones; who has them leaves them out."""
    state = changed(changed(empty(), change(0)), change(1))
    replica = Replica().after(missed(state, 4))
    assert replica.version == 2
    state = changed(confirmed(state, [1, 2]), change(2))  # client 4 did not answer
    again = missed(state, 4)
    assert [update.version for update in again] == [1, 2, 3]
    assert_same_adapter(replica.after(again).pairs, state.slots["base"])
    twice = replace(replica, version=0).after(again).pairs  # adding them twice would be seen
    assert (deltas(twice)["up"] - deltas(state.slots["base"])["up"]).abs().max() > 0.1
    whole = (BaseUpdate(3, state.slots["base"], whole=True),)
    assert_same_adapter(replica.after(whole).pairs, state.slots["base"])
    assert_same_adapter(replica.after(again).after(whole).pairs, state.slots["base"])


def test_who_is_confirmed_has_the_changes_before_this_round():
    """``confirmed`` before ``changed``: this round's own change is still to be sent, to everybody."""
    state = changed(confirmed(changed(empty(), change(0)), [3]), change(1))
    assert [update.version for update in missed(state, 3)] == [2]
    assert [update.version for update in missed(state, 0)] == [1, 2]


def test_what_travels_may_be_less_than_the_change():
    """A factor drawn from a seed stays out of the log's copy, and the seed is in it; the sum has both factors."""
    one, seed = change(0, 2), torch.tensor(2**62 + 1)
    state = changed(empty(), one, Adapter(one.only("B").layers, {"seed": seed}))
    (update,) = missed(through_disk(World(state)).state, 0)
    assert int(update.adapter.dense["seed"]) == 2**62 + 1
    assert update.adapter.nbytes == 2 * 4 * sum(o for _, o in SHAPES.values()) + 8
    assert_same_function(state.slots["base"], Adapter(one.layers), 0)


def test_every_logged_state_can_be_written():
    """From the first change on, sum and log have memory of their own: safetensors refuses shared tensors."""
    state, kept = empty(), change(0)
    before = combine(torch.clone, kept)
    for number in range(4):
        state = changed(state, change(number) if number else kept)
        assert_same_adapter(through_disk(World(state)).state.slots["base"], state.slots["base"])
    assert_same_adapter(kept, before)


def test_a_sum_of_full_rank_goes_on_exactly():
    """Once one factor is the identity, a further change is added without a rounding of the old sum."""
    state = empty()
    for number in range(3):
        state = changed(state, change(number, 6))
    once = changed(state, Adapter({n: replace(p, Bt=torch.zeros_like(p.Bt)) for n, p in change(9, 6).layers.items()}))
    assert_same_adapter(once.slots["base"], state.slots["base"])


# --- every method that changes the base ---

COHORTS = ((0, 1, 2, 3, 4, 5), (0, 2, 3), (0, 1, 4), (0, 2), (2, 3), (0, 3), (0, 1, 3), (0, 1, 2, 3, 4, 5), (4, 5))
"""Absences of none to six rounds."""
LOST = {(0, 5), (1, 2), (2, 4), (5, 0), (6, 0), (7, 4)}
"""(round, client) whose answer never arrives, although the client got the broadcast."""
MORE = {
    "rac-lora, A": RACLoRA(side="A"),
    "rac-lora, gaussian": RACLoRA(sketch="gaussian"),
}
METHOD_CASES: dict[str, Method] = {**{name: kind() for name, kind in METHODS.items()}, **MORE}


def replayed(method: Method, template: Template) -> tuple[ServerState, set[bool]]:
    """The state after all rounds, in each of which the clients' replicas are checked; and what was sent whole."""
    world = begun(method, template=template)
    replicas = {client.id: Replica() for client in FLEET}
    kinds = set()
    for number, members in enumerate(COHORTS):
        round = plan(2 * number, members, template=template)  # every other round failed
        passed = exchanges(method, world, round, fake_training())
        base = method.base(world.state)
        for x in passed:
            client = x.site.client.id
            replicas[client] = replicas[client].after(x.broadcast.base, method, template)
            kinds |= {update.whole for update in x.broadcast.base}
            assert replicas[client].version == version_of(world.state)
            assert (replicas[client].pairs is None) == (base is None)
            if base is not None:
                assert_same_adapter(replicas[client].pairs, base)
        world = ended(method, world, round, [x for x in passed if (number, x.site.client.id) not in LOST])
    return world.state, kinds


@pytest.mark.parametrize("template", [TEMPLATE, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("method", METHOD_CASES.values(), ids=METHOD_CASES.keys())
def test_every_client_trains_on_the_servers_base(method, template):
    """Replaying its messages in order, each client has Method.base(state), bit for bit, when it begins to train."""
    state, kinds = replayed(method, template)
    base = method.base(state)
    if base is None:
        assert not kinds
    else:
        assert all(deltas(base)[name].any() for name in template.layers)


def test_the_replay_goes_both_ways():
    """The schedule above sends single changes as well as sums; FLoRA's stacks exceed narrow layers at once."""
    for method, template in ((RACLoRA(), TEMPLATE), (RACLoRA(), WIDE), (FLoRA(), WIDE)):
        assert replayed(method, template)[1] == {False, True}
    assert replayed(FLoRA(), TEMPLATE)[1] == {True}
