"""What would travel: a method's real messages, without a model and without training.

The first round is rehearsed with one client of every rank: its broadcast and its update are built as in a run, so their
bytes are a run's own. Of small adapters the next two rounds are rehearsed too, with noise in the place of training:
some methods alternate what travels, some change the base, which those who were absent have to catch up with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from fslora.config import LocalConfig
from fslora.cost import client_memory
from fslora.methods import Method
from fslora.rng import Rng
from fslora.types import (
    Broadcast,
    Client,
    ClientMemory,
    ClientUpdate,
    Round,
    ServerState,
    Site,
    Start,
    Template,
    Trained,
)
from fslora.wire import Payload, Wire, remembering

SMALL = 2**25
"""Entries of all adapters of a cohort: up to here three rounds are rehearsed."""
NOISE = 0.02


@dataclass(frozen=True)
class Exchange:
    """One client's messages in one round."""

    down: int
    """Bytes down, changes of the base left out."""
    changes: Mapping[str, int]
    """Layer → bytes down for the changes of the base that the client has missed."""
    up: int
    memory: int
    """Bytes that the client holds because of the method, while it trains."""
    kept: int
    """Bytes that it keeps between rounds."""
    start: Start


@dataclass(frozen=True)
class Rehearsal:
    """A method's first rounds."""

    rounds: tuple[Mapping[int, Exchange], ...]
    """By round: rank → exchange. One round, or three."""
    state: int
    """Bytes of the server's state after them."""
    served: int
    """Bytes of one adapter that is served."""
    shapes: Mapping[str, tuple[int, int]]
    """Layer → (d_in, d_out)."""

    def exchange(self, number: int, rank: int) -> Exchange:
        """Returns what a client of this rank exchanges in a round (from 0): later rounds alternate between two."""
        if number == 0 or len(self.rounds) == 1:
            return self.rounds[0][rank]
        return self.rounds[1 + (number - 1) % 2][rank]

    @property
    def change(self) -> int:
        """Bytes of a round's change of the base, mean; 0 where the base stays, or only one round was rehearsed."""
        return round(sum(sum(by.values()) for by in self._changes) / 2)

    @cached_property
    def _changes(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """Layer → bytes of the first round's change, and of the second's: what a client gets who missed no other."""
        if len(self.rounds) == 1:
            return {}, {}
        least = [min((x.changes for x in by.values()), key=lambda c: sum(c.values())) for by in self.rounds[1:]]
        return least[0], least[1]

    def _catching_up(self, seen: int, made: int) -> int:
        """Bytes for a client that has seen so many of the changes made: one by one, or all that were made as a sum.

        Changes differ where they hold what each member of a cohort sent; later ones count as the first two's mean.
        """

        def size(count: int, layer: str) -> float:
            sizes = [by.get(layer, 0) for by in self._changes]
            return sum(sizes[:count]) + max(0, count - 2) * sum(sizes) / 2

        layers = self._changes[0]
        missed = sum(size(made, layer) - size(seen, layer) for layer in layers)
        whole = sum(self._summed(layer, size(made, layer)) for layer in layers)
        return round(min(missed, whole))

    def _summed(self, layer: str, size: float) -> float:
        """Bytes of one layer's changes as one sum: stacked, and dense once their ranks exceed the layer's."""
        d_in, d_out = self.shapes.get(layer, (0, 0))
        return size if size <= 4 * min(d_in, d_out) * (d_in + d_out) else 4.0 * d_in * d_out

    def down(self, cohorts: Sequence[Sequence[Client]]) -> list[int]:
        """Returns the bytes down of every round, with what absent clients catch up with."""
        seen: dict[int, int] = {}
        result = []
        for number, cohort in enumerate(cohorts):
            total = 0
            for client in cohort:
                caught_up = self._catching_up(seen.get(client.id, 0), number)
                total += self.exchange(number, client.rank).down + caught_up
                seen[client.id] = number
            result.append(total)
        return result

    def up(self, cohorts: Sequence[Sequence[Client]]) -> list[int]:
        """Returns the bytes up of every round."""
        return [sum(self.exchange(t, client.rank).up for client in cohort) for t, cohort in enumerate(cohorts)]


def rehearse(
    method: Method,
    template: Template,
    fleet: Sequence[Client],
    cohorts: Sequence[Sequence[Client]],
    local: LocalConfig,
    rng: Rng,
    wire: Wire,
) -> Rehearsal:
    """Returns what a method's clients exchange.

    Args:
        method: The method.
        template: Shapes of the adapted layers and the head.
        fleet: Everybody.
        cohorts: Who takes part, round by round.
        local: What the optimizer keeps.
        rng: The run's root stream.
        wire: How messages are encoded.
    """
    state, memories = method.init(template, fleet, rng), dict[int, ClientMemory]()
    small = len(cohorts[0]) * state.adapter.nbytes <= 4 * SMALL
    rounds: list[Mapping[int, Exchange]] = []
    for number, cohort in enumerate(cohorts[: 3 if small else 1]):
        plan = Round(number, tuple(cohort), rng.child("round", number), template)
        speakers = _speakers(fleet, cohort)
        heard = replace(plan, cohort=tuple(sorted({*cohort, *speakers}, key=lambda client: client.id)))
        passed = [_passed(method, wire, state, client, heard, memories, number > 0) for client in speakers]
        rounds.append({p.site.client.rank: p.exchange(local) for p in passed})
        if small and number < 2:
            state = _after(method, wire, state, plan, memories)
    if len(rounds) == 2:  # of a run of two rounds
        rounds.append(rounds[1])
    served = (state.adapter if method.personal else method.global_adapter(state)).nbytes
    return Rehearsal(tuple(rounds), state.nbytes, served, template.layers)


@dataclass(frozen=True)
class Passed:
    """All that passes between the server and one client."""

    site: Site
    broadcast: Broadcast
    start: Start
    update: ClientUpdate
    """As it arrives."""
    down: Payload
    up: Payload
    memory: ClientMemory
    """What the client keeps."""

    def exchange(self, local: LocalConfig) -> Exchange:
        """Returns what is to be known of it."""
        changes: Counter[str] = Counter()
        for update in self.broadcast.base:
            for name, tensor in update.adapter.tensors().items():
                changes[name.rpartition(":")[0]] += tensor.nbytes
        return Exchange(
            down=self.down.nbytes - changes.total(),
            changes=changes,
            up=self.up.nbytes,
            memory=client_memory(self.start, self.site.memory, local),
            kept=self.memory.nbytes,
            start=self.start,
        )


def _speakers(fleet: Sequence[Client], cohort: Sequence[Client]) -> list[Client]:
    """One client of every rank, of the cohort if it has one."""
    by_rank = {client.rank: client for client in (*reversed(fleet), *reversed(cohort))}
    return [by_rank[rank] for rank in sorted(by_rank)]


def _passed(
    method: Method,
    wire: Wire,
    state: ServerState,
    client: Client,
    plan: Round,
    memories: Mapping[int, ClientMemory],
    moves: bool,
) -> Passed:
    site = Site(client, plan.template, memories.get(client.id, ClientMemory()))
    broadcast = method.broadcast(state, client, plan)
    down = wire.pack_broadcast(broadcast, plan.template)
    received = wire.unpack_broadcast(down, plan.template)
    start = method.start(received, site)
    trained = _moved(start, client, plan) if moves else _still(start, client)
    update = method.client_update(received, start, trained, site)
    up, unsent = wire.pack_update(update, plan.template, site.memory, plan.rng.child("wire", client.id))
    memory = remembering(method.remember(received, start, trained, site), unsent)
    arrived = wire.unpack_update(up, client, broadcast, plan.template)
    return Passed(site, received, start, arrived, down, up, memory)


def _after(
    method: Method, wire: Wire, state: ServerState, plan: Round, memories: dict[int, ClientMemory]
) -> ServerState:
    """The state after a round of noise; what clients keep is put into ``memories``."""
    updates = []
    for client in plan.cohort:
        passed = _passed(method, wire, state, client, plan, memories, moves=True)
        updates.append(passed.update)
        memories[client.id] = passed.memory
    return method.aggregate(state, iter(updates), plan)


def _still(start: Start, client: Client) -> Trained:
    """As if training had moved nothing."""
    scores = {name: torch.zeros(pair.rank) for name, pair in start.adapter.layers.items()}
    return Trained(client.id, start.adapter, (1.0,), scores if start.measures_sensitivity else {})


def _moved(start: Start, client: Client, plan: Round) -> Trained:
    """As if training had moved everything that it trains a little, anywhere."""
    rng = plan.rng.child("rehearsal", client.id)
    resting = {"A": ":Bt", "B": ":A", "both": "-"}[start.trains]
    tensors = {
        name: tensor
        if name.endswith(resting)
        else tensor + NOISE * torch.randn(tensor.shape, generator=rng.child(name).torch())
        for name, tensor in start.adapter.tensors().items()
    }
    scores = {
        name: torch.rand(pair.rank, generator=rng.child("score", name).torch())
        for name, pair in start.adapter.layers.items()
    }
    adapter = start.adapter.with_tensors(tensors)
    return Trained(client.id, adapter, (1.0,), scores if start.measures_sensitivity else {})
