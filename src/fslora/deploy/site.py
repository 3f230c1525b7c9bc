"""A site: it answers letters with its own clients' data, and keeps what they keep in its own storage.

    STORAGE/RUN/memories/0000042-000007.safetensors     what a method lets client 42 keep, after 7 rounds
    STORAGE/RUN/bases/0000042-000007.safetensors        the changes of the base that it has added up, if there are any
    STORAGE/RUN/adapters/client-0042/                   its own model, where the method has one, as last evaluated: PEFT

A site does not know which of its answers were used, because they may have been late or refused. The server says it
with the next letter (``Order.known``), and a client goes on from the file of then. So neither a lost answer nor a
server that goes back to its last checkpoint leaves the two with different pasts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

import torch

import fslora
from fslora.clients import Answer, Clients, Request
from fslora.clientstore import ClientStore
from fslora.deploy.envelope import Record
from fslora.deploy.letters import (
    Examination,
    Hello,
    Mark,
    Marks,
    Member,
    Order,
    Result,
    Results,
    Task,
    opened,
    payloads_of,
    sealed,
)
from fslora.deploy.records import Limits
from fslora.deploy.scores import mark, model_of, own_model
from fslora.errors import WireError
from fslora.methods.baselog import summed
from fslora.prepare import Federation, Sites
from fslora.rounds import wire_of
from fslora.runner import client_folder, write_adapter
from fslora.types import Adapter, BaseUpdate, ClientMemory
from fslora.wire import Payload

BASE, VERSION = "base", "version"
"""The slot and the scalar of a client's file below ``bases``."""


@dataclass(frozen=True)
class BaseLog:
    """The changes of the base that one client has added up."""

    version: int = 0
    total: Adapter | None = None

    def memory(self) -> ClientMemory:
        """Returns it as it is kept."""
        return ClientMemory({BASE: self.total} if self.total else {}, {VERSION: self.version})

    @classmethod
    def of(cls, memory: ClientMemory | None) -> BaseLog:
        """Returns what was kept."""
        return cls(int(memory.scalars[VERSION]), memory.slots.get(BASE)) if memory else cls()


class SiteWorker:
    """Trains the clients of one site."""

    def __init__(self, name: str, federation: Federation, members: frozenset[int], storage: Path) -> None:
        self.name = name
        self.federation = federation
        self.method = federation.experiment.method
        self.members = members
        self.storage = storage
        self.clients = Clients(federation, wire_of(federation))
        self.limits = Limits()

    def train(self, letter: Record) -> Record:
        """Returns the answer to a task.

        Raises:
            WireError: The letter is no task, so that nothing can be answered.
        """
        task, arrays = opened(Task, letter, self.limits)
        payloads = payloads_of(task.orders, arrays)
        answers = sorted(self._answers(task, payloads), key=lambda answer: answer.client)
        sent = {answer.client: answer.payload for answer in answers if answer.payload is not None}
        results = tuple(result_of(answer) for answer in answers)
        return sealed(Results(run=task.run, round=task.round, results=results), sent)

    def evaluate(self, letter: Record) -> Record:
        """Returns the answer to an examination: each client's scores on its own held-out examples.

        Raises:
            WireError: The letter is no examination, or its model none of this experiment.
        """
        task, arrays = opened(Examination, letter, self.limits)
        model = model_of(task, arrays, self.federation)
        return sealed(Marks(run=task.run, round=task.round, marks=tuple(self._marks(task, model))))

    def _marks(self, task: Examination, model: Adapter) -> Iterator[Mark]:
        for order in task.orders:
            if order.client not in self.members:
                yield Mark(client=order.client, refused=f"client {order.client} is not at site {self.name}")
                continue
            client, memory = self.federation.trainers[order.client], self._kept(task, "memories", order)
            own = own_model(self.federation, model, client, memory, trained=bool(task.model))
            if own is not model:
                folder = self.storage / task.run / "adapters" / client_folder(client.id)
                write_adapter(self.federation, own, folder, task.round)
            yield mark(self.federation, client.id, own)

    def _answers(self, task: Task, payloads: Mapping[int, Payload]) -> Iterator[Answer]:
        logs: dict[int, BaseLog] = {}
        for order in task.orders:
            if order.client not in self.members:
                yield Answer(order.client, refused=f"client {order.client} is not at site {self.name}")
                continue
            try:
                logs[order.client] = self._base_log(task, order, payloads)
            except WireError as error:
                yield Answer(order.client, refused=f"it refused its broadcast: {error}")
        # As a rule there is one version: all clients that are asked in a round get what they have missed.
        for version in sorted({log.version for log in logs.values()}):
            orders = {order.client: order for order in task.orders if order.client in logs}
            group = [order for client, order in sorted(orders.items()) if logs[client].version == version]
            yield from self._trained(task, group, payloads, logs)

    def _trained(
        self, task: Task, orders: list[Order], payloads: Mapping[int, Payload], logs: Mapping[int, BaseLog]
    ) -> Iterator[Answer]:
        """Trains the clients that have one version of the base."""
        fleet, rng = self.federation.trainers, self.federation.rng.child("round", task.round)
        memories = {order.client: kept for order in orders if (kept := self._kept(task, "memories", order)) is not None}
        requests = (Request(fleet[order.client], payloads[order.client]) for order in orders)
        total = logs[orders[0].client].total
        with self.federation.base.changed(total.layers if total else {}):
            for answer in self.clients.answers(requests, memories, self.method, rng, task.lr):
                if answer.payload is None or not all(isfinite(loss) for loss in answer.losses):
                    reason = answer.refused or "its loss was not finite"
                    yield Answer(answer.client, refused=reason)
                    continue
                if _finite(answer.payload):
                    self._keep(task, answer, memories.get(answer.client), logs[answer.client])
                yield answer

    def _base_log(self, task: Task, order: Order, payloads: Mapping[int, Payload]) -> BaseLog:
        """Returns a client's changes of the base with those that came."""
        if order.client not in payloads:
            raise WireError("there is none")
        received = self.clients.wire.unpack_broadcast(payloads[order.client], self.clients.template)
        log = BaseLog.of(self._kept(task, "bases", order))
        for update in received.base:
            log = self._after(log, update)
        return log

    def _after(self, log: BaseLog, update: BaseUpdate) -> BaseLog:
        if update.version <= log.version:
            return log
        new = self.method.base_update(update, self.clients.template)
        if update.whole:
            return BaseLog(update.version, new)
        if update.version != log.version + 1:
            raise WireError(
                f"change {update.version} of the base came, and the site has {log.version}: what it kept is lost; "
                "restore its storage, or start the run anew"
            )
        return BaseLog(update.version, summed(log.total, new))

    def _store(self, task: Task | Examination, kind: str, rounds: int) -> ClientStore:
        return ClientStore(self.storage / task.run / kind, rounds)

    def _kept(self, task: Task | Examination, kind: str, order: Order) -> ClientMemory | None:
        return self._store(task, kind, order.known).get(order.client)

    def _keep(self, task: Task, answer: Answer, before: ClientMemory | None, log: BaseLog) -> None:
        """Writes what a client keeps, for the case that its answer is used; also what did not change.

        Otherwise a file of an answer that was not used could be taken for the newest one later.
        """
        rounds = task.round + 1
        for kind, memory in (("memories", answer.keeps or before), ("bases", log.memory() if log.version else None)):
            if memory is not None:
                self._store(task, kind, rounds).put(answer.client, memory, rounds)
                self._store(task, kind, min(task.durable, rounds)).prune(answer.client)


def introduction(name: str, sites: Sites, members: frozenset[int], experiment: str) -> Hello:
    """Returns what a site says of itself: its clients' ids, ranks and numbers of examples, and digests."""
    clients, held = (sites.fleet[client] for client in sorted(members)), sites.partition.holdout.sizes
    return Hello(
        site=name,
        version=fslora.__version__,
        experiment=experiment,
        data=sites.partition.digest,
        members=tuple(Member(id=c.id, rank=c.rank, examples=c.examples, held_out=int(held[c.id])) for c in clients),
    )


def result_of(answer: Answer) -> Result:
    """Returns what is said of an answer beside its arrays."""
    if answer.payload is None:
        return Result(client=answer.client, refused=answer.refused[:500])
    return Result(
        client=answer.client,
        header=answer.payload.header,
        losses=answer.losses,
        rank=answer.rank,
        flops=answer.flops,
        memory=answer.memory,
    )


def answer_of(result: Result, payload: Payload | None) -> Answer:
    """Returns the answer that a result stands for; ``result_of`` is its inverse, but for what is kept."""
    if payload is None:
        return Answer(result.client, refused=result.refused or "it sent no update")
    answer = Answer(result.client, payload, "", result.losses, result.rank, result.flops, result.memory)
    return answer if result.losses else replace(answer, payload=None, refused="its update says no loss")


def _finite(payload: Payload) -> bool:
    return all(not t.is_floating_point() or bool(torch.isfinite(t).all()) for t in payload.tensors.values())
