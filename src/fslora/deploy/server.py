"""A deployed server: the same rounds as a simulation's, with the clients at sites that answer letters, or do not."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Literal, Protocol

from fslora.clients import Answer, Request
from fslora.deploy.envelope import Record
from fslora.deploy.letters import Hello, Mark, Order, Results, Task, opened, payloads_of, sealed
from fslora.deploy.patience import Patience
from fslora.deploy.records import Limits
from fslora.deploy.roster import Roster
from fslora.deploy.scores import answered, question, usable
from fslora.deploy.site import answer_of
from fslora.errors import TrainingError, WireError
from fslora.fleet import with_spares
from fslora.metrics import Scores
from fslora.prepare import Federation
from fslora.rng import Rng
from fslora.rounds import Rounds, Tally, Watcher
from fslora.runfolder import RunFolder
from fslora.types import Adapter, Client, Round, ServerState

Kind = Literal["train", "evaluate"]
"""Of letters: a `Task`, or an `Examination`."""


class Transport(Protocol):
    """How letters reach sites. A site is known by its name, never by a transport's own number for it."""

    def sites(self) -> Mapping[str, Hello]:
        """Returns who can be written to now."""

    def send(self, letters: Mapping[str, Record], round: int, kind: Kind = "train") -> None:
        """Sends each site its letter; answers to earlier ones are not waited for any more."""

    def poll(self) -> Iterable[tuple[str, Record | str]]:
        """Returns the answers that came since: a site's letter, or the reason why there will be none."""


class Deployed(Rounds):
    """Runs a federation's rounds with clients at sites."""

    def __init__(
        self,
        federation: Federation,
        folder: RunFolder,
        watcher: Watcher,
        transport: Transport,
        run: str,
        patience: Patience,
        note: Callable[[str], None] = lambda text: None,
        roster: Roster | None = None,
    ) -> None:
        super().__init__(federation, folder, watcher)
        self.note, self.roster = note, roster
        self._scored: tuple[ServerState, dict[int, int], dict[int, Scores]] | None = None
        """The newest state that was scored at sites, what was known then, and the scores."""
        self.transport = transport
        self.run_name = run
        self.patience = patience
        self.limits = Limits(nbytes=2**26 + 64 * max(1, self.initial_state().nbytes) * max(1, len(self.trainers)))
        self.known: dict[int, int] = {}
        """Client → the rounds after which an update of its own was last used."""

    def run(self) -> ServerState:
        """Runs every round that is not in the folder's checkpoint; what sites know is what its metrics say."""
        self.known = known_by(self.folder, self.folder.rounds_done)
        return super().run()

    def round(self, state: ServerState, number: int, spent: float = 0.0) -> tuple[ServerState, Tally]:
        """Returns the state after one round with the clients that are known by now."""
        self._meet()
        return super().round(state, number, spent)

    def _meet(self) -> None:
        """Takes over what sites state that have come since."""
        if self.roster is not None and self.roster.admit(self.transport.sites()):
            self.federation = self.roster.federation
            self.trainers = self.federation.trainers
            self.folder.write_json("data.json", self.federation.describe())

    def asked(self, cohort: tuple[Client, ...], rng: Rng) -> tuple[Client, ...]:
        """Returns the cohort with its spares: the round goes on with those who answer first."""
        return with_spares(self.trainers, cohort, self.patience.spares(len(cohort)), rng.child("spares"))

    def keep(self, answer: Answer, rounds: int) -> None:
        """Notes that this client's answer was used: what it keeps is of this round from now on."""
        self.known[answer.client] = rounds

    def exchange(
        self, requests: Iterator[Request], state: ServerState, plan: Round, lr: float
    ) -> Generator[Answer, None, None]:
        """Yields the clients' answers by id, whatever the order in which they came; also those that did not come."""
        del state  # the base is changed at the sites, by what they are told of it
        at = {member.id: site for site, hello in self.transport.sites().items() for member in hello.members}
        answers: dict[int, Answer] = {}
        groups: defaultdict[str, list[Request]] = defaultdict(list)
        for request in requests:
            client = request.client.id
            if client in at:
                groups[at[client]].append(request)
            else:
                answers[client] = Answer(client, refused="its site is not connected")
        letters = {site: self._letter(asked, plan, lr) for site, asked in groups.items()}
        asked = {site: [request.client.id for request in group] for site, group in groups.items()}
        self.transport.send(letters, plan.number)
        for answers_of_site in self._replies(asked, plan):
            answers.update(answers_of_site)
        for client in sorted(answers):
            yield answers[client]

    def served(self, state: ServerState) -> Sequence[Adapter]:
        """Returns the global adapter; nothing, where every client has a model of its own at its site."""
        return () if self.method.personal else super().served(state)

    def held_out(self, state: ServerState | None) -> dict[int, Scores]:
        """Returns the scores of the clients whose sites answer, on examples that stay there; who did not is noted.

        Asked again when nothing has happened since, it does not ask the sites again: a letter starts a process at each.
        """
        if state is None:
            return self._asked(None)
        # Both: of personal models the server's state may stay as it is while clients go on.
        if self._scored is None or self._scored[0] is not state or self._scored[1] != self.known:
            self._scored = state, dict(self.known), self._asked(state)
        return self._scored[2]

    def _asked(self, state: ServerState | None) -> dict[int, Scores]:
        self._meet()
        model = None if state is None else self.method.global_adapter(state)
        rounds = 0 if state is None else max(self.known.values(), default=0)
        at = {member.id: (site, member) for site, hello in self.transport.sites().items() for member in hello.members}
        asked: defaultdict[str, list[Order]] = defaultdict(list)
        for client, (site, member) in sorted(at.items()):
            # A personal model is put together, and kept, where nothing can be scored too.
            if member.held_out or (self.method.personal and model):
                asked[site].append(Order(client=client, known=self.known.get(client, 0), header=""))
        letters = {site: question(self.run_name, rounds, each, model, self.template) for site, each in asked.items()}
        own: dict[int, Scores] = {}
        for site, reply in self._marks(letters, rounds):
            try:
                if isinstance(reply, str):
                    raise WireError(reply)
                marks = answered(reply, self.limits, self.run_name, rounds)
            except WireError as error:
                self.note(f"site {site} was not evaluated: {error}")
                continue
            for order in asked[site]:
                member = at[order.client][1]
                if member.held_out:
                    self._mark(order.client, member.held_out, marks.get(order.client), own)
        return dict(sorted(own.items()))

    def _mark(self, client: int, examples: int, mark: Mark | None, own: dict[int, Scores]) -> None:
        names = (*self.federation.base.objective.metrics, "loss")
        try:
            if mark is None:
                raise WireError("its site did not answer for it")
            own[client] = usable(mark, examples, names)
        except WireError as error:
            self.note(f"client {client} was not evaluated: {error}")

    def _marks(self, letters: Mapping[str, Record], rounds: int) -> Iterator[tuple[str, Record | str]]:
        """Yields what sites answer until all have, or the deadline has passed: a run does not end for want of these."""
        self.transport.send(letters, rounds, "evaluate")
        waiting = set(letters)
        for site, reply in self._arrivals(letters):
            waiting.discard(site)
            yield site, reply
        yield from ((site, f"no answer within {self.patience.deadline:g} s") for site in sorted(waiting))

    def _arrivals(self, sites: Iterable[str]) -> Iterator[tuple[str, Record | str]]:
        """Yields what these sites answer as it comes, until all have or the deadline has passed."""
        waiting, began = set(sites), time.monotonic()
        while waiting:
            for site, reply in self.transport.poll():
                if site in waiting:
                    waiting.discard(site)
                    yield site, reply
            if time.monotonic() - began > self.patience.deadline:
                return
            if waiting:
                time.sleep(self.patience.poll)

    def _letter(self, requests: list[Request], plan: Round, lr: float) -> Record:
        orders = tuple(
            Order(client=r.client.id, known=self.known.get(r.client.id, 0), header=r.payload.header) for r in requests
        )
        durable = self.folder.rounds_done
        task = Task(run=self.run_name, round=plan.number, lr=lr, durable=durable, orders=orders)
        return sealed(task, {request.client.id: request.payload for request in requests})

    def _replies(self, asked: Mapping[str, list[int]], plan: Round) -> Iterator[dict[int, Answer]]:
        """Yields each site's answers, until all have answered, or the cohort is full, or the deadline has passed.

        Those who have not answered by then are among them, with the reason.

        Raises:
            TrainingError: The deadline has passed without a quorum.
        """
        patience, needed = self.patience, self._needed(plan)
        waiting, came = set(asked), 0
        for site, reply in self._arrivals(asked):
            waiting.discard(site)
            answers = self._read(site, reply, asked[site], plan)
            came += sum(answer.payload is not None for answer in answers.values())
            yield answers
            if came >= needed:
                break
        if waiting and came < patience.quorum * needed:
            raise TrainingError(
                f"round {plan.number + 1}: {came} of {len(plan.cohort)} clients answered within {patience.deadline:g} "
                f"s, and the quorum is {patience.quorum:g} of {needed} (sites still silent: "
                f"{', '.join(sorted(waiting))}). The rounds before are in {self.folder.path}; resume it, with a longer "
                "--deadline if need be"
            )
        late = f"no answer within {patience.deadline:g} s" if came < needed else f"late: {came} clients were faster"
        for site in sorted(waiting):
            yield {client: Answer(client, refused=f"site {site}: {late}") for client in asked[site]}

    def _needed(self, plan: Round) -> int:
        """Returns the number of answers with which a round is complete."""
        cohort = self.experiment.fleet.cohort
        return len(plan.cohort) if cohort == "all" else cohort

    def _read(self, site: str, reply: Record | str, asked: list[int], plan: Round) -> dict[int, Answer]:
        """Returns the answers in a site's letter: one for each client that was asked, and for no other."""
        try:
            if isinstance(reply, str):
                raise WireError(reply)
            head, arrays = opened(Results, reply, self.limits)
            if (head.run, head.round) != (self.run_name, plan.number):
                raise WireError(f"it is about round {head.round + 1} of run {head.run}")
            payloads = payloads_of(head.results, arrays)
        except WireError as error:
            return {client: Answer(client, refused=f"site {site}: {error}") for client in asked}
        results = {result.client: result for result in head.results}
        return {
            client: answer_of(results[client], payloads.get(client))
            if client in results
            else Answer(client, refused=f"site {site} did not answer for it")
            for client in asked
        }


def known_by(folder: RunFolder, rounds: int) -> dict[int, int]:
    """Returns client → the rounds after which an update of it was last used, from the metrics up to ``rounds``."""
    known: dict[int, int] = {}
    for row in folder.metrics(rounds):
        known.update(dict.fromkeys(map(int, row.get("client_loss", ())), row["round"]))
    return known
