"""The round loop: sample a cohort, broadcast, train, gate, aggregate, evaluate, checkpoint. No method's name."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from math import isfinite
from typing import Any, Protocol

import torch

from fslora.algebra.adapters import all_finite
from fslora.algebra.rows import holders
from fslora.data.batches import length_order, local_batches
from fslora.engine.cohort import CohortEngine
from fslora.engine.sequential import SequentialEngine
from fslora.errors import TrainingError
from fslora.evaluate import predict
from fslora.fleet import sample_cohort
from fslora.prepare import Federation
from fslora.runfolder import RunFolder
from fslora.types import Broadcast, Client, ClientUpdate, LocalProblem, Round, ServerState, Trained


class Watcher(Protocol):
    """Who is told how a run goes on."""

    def round_started(self, number: int, clients: int) -> None:
        """Round ``number`` (from 1) begins with so many clients."""

    def client_done(self, loss: float) -> None:
        """One more client of the round has finished training."""

    def round_done(self, row: Mapping[str, Any]) -> None:
        """A round is over; ``row`` is its line in metrics.jsonl."""


@dataclass
class Tally:
    """What one round sent, measured on the values that travelled."""

    bytes_down: dict[int, int] = field(default_factory=dict)
    bytes_up: dict[int, int] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    dropped: dict[int, str] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)
    coverage: torch.Tensor | None = None
    """int64 [layers r]: how many clients hold each rank-one part; None when all hold all."""

    def sent(self, client: Client, broadcast: Broadcast, rank: int) -> None:
        """Counts what went down to a client."""
        self.bytes_down[client.id] = broadcast.nbytes
        self.ranks[client.id] = max(pair.rank for pair in broadcast.adapter.layers.values())
        if broadcast.rows is not None:
            held = holders(broadcast.rows, rank)
            self.coverage = held if self.coverage is None else self.coverage + held


class Simulation:
    """Runs a federation's rounds in this process."""

    def __init__(self, federation: Federation, folder: RunFolder, watcher: Watcher) -> None:
        self.federation = federation
        self.experiment = federation.experiment
        self.method = federation.experiment.method
        self.folder = folder
        self.watcher = watcher
        local, engine = self.experiment.local, self.experiment.engine
        dropout = self.experiment.adapter.dropout
        self.engine = (
            CohortEngine(federation.base, local, dropout, engine.chunk)
            if engine.name == "cohort"
            else SequentialEngine(federation.base, local, dropout)
        )
        self.lengths = federation.train.lengths

    def initial_state(self) -> ServerState:
        """Returns the server's state before the first round."""
        return self.method.init(self.federation.template, self.federation.sites.fleet, self.federation.rng)

    def run(self) -> ServerState:
        """Runs every round that is not yet in the folder's checkpoint, and returns the last state.

        Ends bit-identical to a run that never stopped: every draw has an address, and nothing but the
        server's state is carried from round to round.

        Raises:
            TrainingError: No client of a round sent a usable update.
            ArtifactError: The run folder cannot be written or its checkpoint is damaged.
        """
        run = self.experiment.run
        done, state = self.folder.load_checkpoint() or (0, self.initial_state())
        rows = self.folder.rewind(done)
        total = rows[-1]["bytes_total"] if rows else 0
        if not rows:
            self._record({"round": 0, "bytes_total": 0, "validation": self._evaluate(state)})
        for number in range(done, run.rounds):
            began = time.perf_counter()
            state, tally = self.round(state, number)
            last = number + 1 == run.rounds
            seconds = time.perf_counter() - began
            row = self._row(number, tally, total, seconds)
            total = row["bytes_total"]
            if last or (number + 1) % run.eval_every == 0:
                row["validation"] = self._evaluate(state)
            self._record(row)
            if last or (number + 1) % run.checkpoint_every == 0:
                self.folder.save_checkpoint(number + 1, state)
        return state

    def round(self, state: ServerState, number: int) -> tuple[ServerState, Tally]:
        """Returns the state after one round (numbered from 0), and what it sent."""
        rng = self.federation.rng.child("round", number)
        cohort = sample_cohort(self.federation.sites.fleet, self.experiment.fleet.cohort, rng.child("cohort"))
        plan, tally = Round(number, cohort, rng), Tally()
        self.watcher.round_started(number + 1, len(cohort))
        updates = self._updates(state, plan, tally)
        first = next(updates, None)
        if first is None:
            reasons = "; ".join(f"client {c}: {why}" for c, why in tally.dropped.items())
            raise TrainingError(
                f"round {number + 1}: no client sent a usable update ({reasons}). The rounds before are in "
                f"{self.folder.path}; try a smaller local.lr"
            )
        state = self.method.aggregate(state, chain([first], updates), plan)
        return state, tally

    def _updates(self, state: ServerState, plan: Round, tally: Tally) -> Iterator[ClientUpdate]:
        """Yields usable updates by increasing client id, training a chunk at a time."""
        pending: dict[int, Broadcast] = {}
        clients = {client.id: client for client in plan.cohort}

        def problems() -> Iterator[LocalProblem]:
            for client in plan.cohort:
                broadcast = self.method.broadcast(state, client, plan)
                tally.sent(client, broadcast, self.experiment.adapter.rank)
                pending[client.id] = broadcast
                yield self.problem(client, broadcast, plan)

        lr = self.experiment.local.lr_at(plan.number, self.experiment.run.rounds)
        for trained in self.engine.train(problems(), lr):
            client, broadcast = clients[trained.client], pending.pop(trained.client)
            self.watcher.client_done(trained.losses[-1])
            update = self.method.client_update(broadcast, trained.adapter, client)
            tally.bytes_up[client.id] = update.nbytes
            reason = refusal(update, trained)
            if reason:
                tally.dropped[client.id] = reason
                continue
            tally.losses[client.id] = sum(trained.losses) / len(trained.losses)
            yield update

    def problem(self, client: Client, broadcast: Broadcast, plan: Round) -> LocalProblem:
        """Returns what the engine trains for one client: the broadcast and the batches of its local steps."""
        local = self.experiment.local
        index = self.federation.sites.partition.train[client.id]
        stream = plan.rng.child("batches", client.id)
        parts = local_batches(self.lengths, index, local.batch_size, local.steps, local.epochs, stream)
        order = length_order(len(parts), plan.rng.child("order"))
        batches = [self.federation.train.batch(parts[i]) for i in order.tolist()]
        return LocalProblem(client.id, broadcast.adapter, batches, plan.rng.child("dropout", client.id))

    def _evaluate(self, state: ServerState) -> dict[str, float]:
        adapter = self.method.global_adapter(state)
        return predict(self.federation.base, adapter, self.federation.validation).scores()

    def _record(self, row: Mapping[str, Any]) -> None:
        self.folder.append_metrics(row)
        self.watcher.round_done(row)

    def _row(self, number: int, tally: Tally, total: int, seconds: float) -> dict[str, Any]:
        down, up = sum(tally.bytes_down.values()), sum(tally.bytes_up.values())
        return {
            "round": number + 1,
            "loss": sum(tally.losses.values()) / len(tally.losses),
            "lr": self.experiment.local.lr_at(number, self.experiment.run.rounds),
            "clients": list(tally.bytes_down),
            "bytes_down": down,
            "bytes_up": up,
            "bytes_total": total + down + up,
            "client_bytes_down": {str(client): n for client, n in tally.bytes_down.items()},
            "client_bytes_up": {str(client): n for client, n in tally.bytes_up.items()},
            "client_loss": {str(client): loss for client, loss in tally.losses.items()},
            "client_ranks": {str(client): rank for client, rank in tally.ranks.items()},
            "coverage": None if tally.coverage is None else tally.coverage.sum(0).tolist(),
            "unheld": None if tally.coverage is None else int((tally.coverage == 0).sum()),
            "layers": len(self.federation.base.targets),
            "dropped": {str(client): reason for client, reason in tally.dropped.items()},
            "seconds": seconds,
            "validation": None,
        }


def refusal(update: ClientUpdate, trained: Trained) -> str | None:
    """Returns why an update must not be averaged, or None when it may."""
    if not all(isfinite(loss) for loss in trained.losses):
        return "its loss was not finite"
    if not all_finite(update.delta):
        return "its update was not finite"
    return None
