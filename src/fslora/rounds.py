"""The round loop of a server: sample a cohort, broadcast, gate, aggregate, evaluate, checkpoint. No method's name.

Where the clients are is not its concern: ``exchange`` takes what goes down and gives back what came up. In one process
that is `fslora.simulate`, over a network `fslora.deploy`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Protocol, overload

import torch

from fslora.algebra.lowrank import energy_by_index
from fslora.algebra.rows import holders
from fslora.clients import Answer, Request
from fslora.config import BUDGETS
from fslora.cost import simulated_seconds
from fslora.errors import TrainingError, WireError
from fslora.evaluate import mean_over_clients, own_scores, predict_dealt, untrained
from fslora.fleet import sample_cohort
from fslora.memory import keep_freed_memory, peak_memory, release_memory
from fslora.metrics import Scores
from fslora.prepare import Federation
from fslora.rng import Rng
from fslora.runfolder import RunFolder
from fslora.types import Adapter, Broadcast, Client, ClientMemory, ClientUpdate, Round, ServerState, Site
from fslora.wire import Payload, Wire

TOTALS = ("bytes_total", "flops_total", "time_total")
"""What a row of metrics.jsonl sums up since the start of the run."""
TOTALS_OF_BUDGETS = dict(zip(BUDGETS, TOTALS, strict=True))


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
    """What one round sent and cost, measured on the values that travelled."""

    bytes_down: dict[int, int] = field(default_factory=dict)
    bytes_up: dict[int, int] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    dropped: dict[int, str] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)
    flops: dict[int, float] = field(default_factory=dict)
    memory: dict[int, int] = field(default_factory=dict)
    coverage: torch.Tensor | None = None
    """int64 [layers r]: how many clients hold each rank-one part; None where the method draws no index sets."""
    server_seconds: float = 0.0
    """Time in the method's own server steps, without the training that they wait for."""

    def sent(self, client: Client, broadcast: Broadcast, payload: Payload, rank: int) -> None:
        """Counts what went down to a client."""
        self.bytes_down[client.id] = payload.nbytes
        if broadcast.rows is not None:
            held = holders(broadcast.rows, rank)
            self.coverage = held if self.coverage is None else self.coverage + held

    @contextmanager
    def at_the_server(self) -> Iterator[None]:
        """Counts the time spent inside as the server's."""
        began = time.perf_counter()
        yield
        self.server_seconds += time.perf_counter() - began

    def waiting(self, updates: Iterator[ClientUpdate]) -> Iterator[ClientUpdate]:
        """Yields the same updates; the time they take to come is taken off the server's."""
        while True:
            began = time.perf_counter()
            update = next(updates, None)
            self.server_seconds -= time.perf_counter() - began
            if update is None:
                return
            yield update


class Rounds(ABC):
    """A server's rounds, wherever its clients are."""

    def __init__(self, federation: Federation, folder: RunFolder, watcher: Watcher) -> None:
        self.federation = federation
        self.experiment = federation.experiment
        self.method = federation.experiment.method
        self.folder = folder
        self.watcher = watcher
        self.wire = wire_of(federation)
        self.template = federation.template
        self.trainers = federation.trainers
        self.largest = int(self.trainers.ranks.max())
        self.memories = folder.clients(0)
        """What each client keeps from round to round, by id, where clients are in this process."""

    @abstractmethod
    def exchange(
        self, requests: Iterator[Request], state: ServerState, plan: Round, lr: float
    ) -> Generator[Answer, None, None]:
        """Sends requests to their clients, and yields the answer of each by increasing client id."""

    @abstractmethod
    def keep(self, answer: Answer, rounds: int) -> None:
        """Is told of every answer that is used, before it is."""

    def asked(self, cohort: tuple[Client, ...], rng: Rng) -> tuple[Client, ...]:
        """Returns whom a round asks, by id: its cohort. Where some may not answer, there can be more."""
        del rng
        return cohort

    def initial_state(self) -> ServerState:
        """Returns the server's state before the first round."""
        return self.method.init(self.template, self.trainers, self.federation.rng)

    def run(self) -> ServerState:
        """Runs every round that is not yet in the folder's checkpoint, and returns the last state.

        Ends bit-identical to a run that never stopped: every draw has an address, and nothing is carried from round
        to round but the server's state and the clients' memories.

        Raises:
            TrainingError: No client of a round sent a usable update.
            ArtifactError: The run folder cannot be written or its checkpoint is damaged.
        """
        keep_freed_memory()
        run = self.experiment.run
        done, state, self.memories = self.folder.load_checkpoint() or (0, self.initial_state(), self.folder.clients(0))
        rows = self.folder.rewind(done)
        totals = rows[-1] if rows else {"round": 0, **dict.fromkeys(TOTALS, 0)}
        if not rows:
            self._record({**totals, **self._evaluation(state), **self._spectrum(state)})
        for number in range(done, run.rounds):
            if self.spent(totals) >= 1:
                break
            began = time.perf_counter()
            state, tally = self.round(state, number, self.spent(totals))
            row = totals = self._row(number, tally, totals, time.perf_counter() - began, state)
            last = number + 1 == run.rounds or self.spent(totals) >= 1
            if last or (number + 1) % run.eval_every == 0:
                row.update(**self._evaluation(state), **self._spectrum(state))
                release_memory()
            self._record(row)
            if last or (number + 1) % run.checkpoint_every == 0:
                self.folder.save_checkpoint(number + 1, state)
                self.memories.checkpointed(number + 1)
        return state

    def spent(self, totals: Mapping[str, Any]) -> float:
        """Returns the share of the run's budget that is used up: of its rounds, where it has no other."""
        budget = self.experiment.run.budget
        if budget is None:
            return float(totals["round"] / self.experiment.run.rounds)
        key, amount = budget
        return float(totals[TOTALS_OF_BUDGETS[key]] / amount)

    def round(self, state: ServerState, number: int, spent: float = 0.0) -> tuple[ServerState, Tally]:
        """Returns the state after one round (numbered from 0), and what it sent and cost."""
        rng = self.federation.rng.child("round", number)
        size = "all" if self.experiment.fleet.pooled else self.experiment.fleet.cohort
        cohort = sample_cohort(self.trainers, size, rng.child("cohort"))
        plan, tally = Round(number, self.asked(cohort, rng), rng, self.template), Tally()
        self.watcher.round_started(number + 1, len(plan.cohort))
        with closing(self._updates(state, plan, tally, self._lr(number, spent))) as updates, tally.at_the_server():
            state = self.method.aggregate(state, tally.waiting(updates), plan)
        return state, tally

    def _lr(self, number: int, spent: float) -> float:
        run = self.experiment.run
        return self.experiment.local.lr_at(number, run.rounds, spent if run.budget else None)

    def _updates(self, state: ServerState, plan: Round, tally: Tally, lr: float) -> Generator[ClientUpdate, None, None]:
        """Yields usable updates by increasing client id, as they come; raises where there are none."""
        sent: dict[int, Broadcast] = {}
        # Closed whatever happens: an exchange may have changed the base for as long as it lasts.
        with closing(self.exchange(self._requests(state, plan, tally, sent), state, plan, lr)) as answers:
            for answer in answers:
                update = self._accepted(answer, sent.pop(answer.client), tally)
                if update is not None:
                    self.keep(answer, plan.number + 1)
                    tally.losses[answer.client] = sum(answer.losses) / len(answer.losses)
                    yield update
        if not tally.losses:
            reasons = "; ".join(f"client {c}: {why}" for c, why in tally.dropped.items())
            raise TrainingError(
                f"round {plan.number + 1}: no client sent a usable update ({reasons}). The rounds before are in "
                f"{self.folder.path}; try a smaller local.lr"
            )

    def _requests(self, state: ServerState, plan: Round, tally: Tally, sent: dict[int, Broadcast]) -> Iterator[Request]:
        """Yields what goes to each client of the cohort; the broadcasts are left in ``sent``."""
        for client in plan.cohort:
            with tally.at_the_server():
                broadcast = self.method.broadcast(state, client, plan)
            payload = self.wire.pack_broadcast(broadcast, self.template)
            tally.sent(client, broadcast, payload, self.experiment.adapter.rank)
            if self.experiment.fleet.pooled:
                tally.bytes_down[client.id] = 0  # the data are where the server is
            sent[client.id] = broadcast
            yield Request(client, payload)

    def _accepted(self, answer: Answer, broadcast: Broadcast, tally: Tally) -> ClientUpdate | None:
        """The gate: returns the update of an answer that may be used; of another one, the reason is recorded."""
        client = answer.client
        if answer.payload is None:
            tally.dropped[client] = answer.refused
            return None
        tally.ranks[client], tally.flops[client], tally.memory[client] = answer.rank, answer.flops, answer.memory
        self.watcher.client_done(answer.losses[-1])
        tally.bytes_up[client] = 0 if self.experiment.fleet.pooled else answer.payload.nbytes
        if not all(isfinite(loss) for loss in answer.losses):
            tally.dropped[client] = "its loss was not finite"
            return None
        member = self.trainers[client]
        try:
            update = self.wire.unpack_update(answer.payload, member, broadcast, self.template)
            if update.examples > member.examples:
                raise WireError(f"it says that it is of {update.examples} examples; the client has {member.examples}")
            return update
        except WireError as error:
            tally.dropped[client] = f"its update was refused: {error}"
            return None

    def served(self, state: ServerState) -> Sequence[Adapter]:
        """Returns what the method ends with: the global adapter alone, or one for each client of the fleet, by id.

        None of them, where the clients' own are not in this process.
        """
        return served(self.federation, state, self.memories)

    def peak_memory(self) -> int:
        """Returns what the run has held at most, in bytes."""
        return peak_memory()

    def evaluate(self, state: ServerState) -> dict[str, float]:
        """Returns the scores on the validation split; those of personal models are the mean over clients."""
        return predict_dealt(self.federation.base, self.served(state), self.federation.validation).scores()

    def held_out(self, state: ServerState | None) -> dict[int, Scores]:
        """Returns the scores of each client's model on its own held-out examples; of None, before any training."""
        return own_scores(self.federation, [untrained(self.federation)] if state is None else self.served(state))

    def _evaluation(self, state: ServerState) -> dict[str, Any]:
        """What a row says of an evaluation; the clients' own scores where these are what is scored."""
        if self.experiment.run.eval_on == "server":
            return {"validation": self.evaluate(state)}
        own = self.held_out(state)
        return {"validation": mean_over_clients(self.federation, own), "client_validation": _by_id(own)}

    def _spectrum(self, state: ServerState) -> dict[str, Any]:
        """How the global update's energy is spread over its singular values: where ranks collapse, it shows here."""
        adapters = self.served(state)
        shares = spectrum(adapters[0]) if adapters else None
        rank = None if shares is None else float(1 / shares.square().sum())
        return {"spectrum": None if shares is None else shares[:64].tolist(), "effective_rank": rank}

    def _record(self, row: Mapping[str, Any]) -> None:
        self.folder.append_metrics(row)
        self.watcher.round_done(row)

    def _row(
        self, number: int, tally: Tally, totals: Mapping[str, Any], seconds: float, state: ServerState
    ) -> dict[str, Any]:
        down, up = sum(tally.bytes_down.values()), sum(tally.bytes_up.values())
        flops, simulated = sum(tally.flops.values()), max(self._seconds(tally).values())
        return {
            "round": number + 1,
            "loss": sum(tally.losses.values()) / len(tally.losses),
            "lr": self._lr(number, self.spent(totals)),
            "clients": list(tally.bytes_down),
            "bytes_down": down,
            "bytes_up": up,
            "bytes_total": totals["bytes_total"] + down + up,
            "flops_total": totals["flops_total"] + flops,
            "simulated_seconds": simulated,
            "time_total": totals["time_total"] + simulated,
            "client_bytes_down": _by_id(tally.bytes_down),
            "client_bytes_up": _by_id(tally.bytes_up),
            "client_loss": _by_id(tally.losses),
            "client_ranks": _by_id(tally.ranks),
            "client_flops": _by_id(tally.flops),
            "client_memory": _by_id(tally.memory),
            "coverage": None if tally.coverage is None else tally.coverage.sum(0).tolist(),
            "unheld": None if tally.coverage is None else int((tally.coverage == 0).sum()),
            "layers": len(self.federation.base.targets),
            "dropped": _by_id(tally.dropped),
            "server_seconds": tally.server_seconds,
            "server_bytes": state.nbytes,
            "server": {n.removeprefix("report."): x for n, x in state.scalars.items() if n.startswith("report.")},
            "seconds": seconds,
            "validation": None,
        }

    def _seconds(self, tally: Tally) -> dict[int, float]:
        """How long each client of the round takes, in simulated time; the server waits for the slowest."""
        fleet, up, flops = self.experiment.fleet, tally.bytes_up, tally.flops
        return {
            client: simulated_seconds(
                # A client that refused its broadcast has sent and computed nothing.
                fleet,
                self.trainers[client],
                self.largest,
                down,
                up.get(client, 0),
                flops.get(client, 0.0),
            )
            for client, down in tally.bytes_down.items()
        }


def wire_of(federation: Federation) -> Wire:
    """Returns the wire of an experiment; data in one place do not travel, and neither does what is trained on them."""
    experiment = federation.experiment
    return Wire() if experiment.fleet.pooled else Wire.of(experiment.wire)


class Personal(Sequence[Adapter]):
    """Every client's own model, by id; each is put together when it is asked for, and not kept."""

    def __init__(self, federation: Federation, state: ServerState, memories: Mapping[int, ClientMemory]) -> None:
        self.federation, self.state, self.memories = federation, state, memories
        self.template = federation.template

    def __len__(self) -> int:
        """Returns the number of clients."""
        return len(self.federation.trainers)

    @overload
    def __getitem__(self, client: int) -> Adapter: ...
    @overload
    def __getitem__(self, client: slice) -> Sequence[Adapter]: ...
    def __getitem__(self, client: int | slice) -> Adapter | Sequence[Adapter]:
        """Returns one client's model, or several."""
        if isinstance(client, slice):
            return [self[i] for i in range(*client.indices(len(self)))]
        member = self.federation.trainers[client]
        site = Site(member, self.template, self.memories.get(member.id, ClientMemory()))
        return self.federation.experiment.method.client_adapter(self.state, site)


def served(federation: Federation, state: ServerState, memories: Mapping[int, ClientMemory]) -> Sequence[Adapter]:
    """Returns what a method ends with: the global adapter alone, or one for each client of the fleet, by id."""
    method = federation.experiment.method
    return Personal(federation, state, memories) if method.personal else (method.global_adapter(state),)


def spectrum(adapter: Adapter) -> torch.Tensor | None:
    """Returns the share of energy by singular value, decreasing, mean over layers; None while the update is zero."""
    energies = [energy_by_index(pair) for pair in adapter.layers.values()]
    shares = [energy / energy.sum() for energy in energies if energy.sum() > 0]
    if not shares:
        return None
    mean = torch.zeros(max(len(share) for share in shares), dtype=torch.float64)
    for share in shares:
        mean[: len(share)] += share / len(shares)
    return mean


def _by_id(values: Mapping[int, Any]) -> dict[str, Any]:
    return {str(client): value for client, value in values.items()}
