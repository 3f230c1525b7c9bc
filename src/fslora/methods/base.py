"""What a method is: values in, values out. The round loop and the engines know no method by name.

A method is a frozen record of hyperparameters with the steps of a paper's box: what goes down, what a client makes of
it, what comes up, how that is averaged, what is served. It never trains (that is the engine's work) and never stores
anything in itself: what the server carries is in `ServerState`, what a client keeps is in its `ClientMemory`.
To add one: a file here, a line in the registry of `fslora.methods`, a test (docs/add-a-method.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from fslora.algebra.adapters import initial, sub
from fslora.algebra.lowrank import with_identity
from fslora.rng import Rng
from fslora.types import (
    Adapter,
    BaseUpdate,
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


class Method(BaseModel, ABC):
    """A federated LoRA method. Its fields are the keys of the experiment's ``[method]`` table."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)

    name: ClassVar[str]
    """The registry's name."""
    paper: ClassVar[str]
    """Title and link of the paper."""
    differs: ClassVar[str]
    """What differs from client to client, in a few words."""
    travels: ClassVar[str]
    """What goes down and up, in a few words."""
    streams: ClassVar[bool] = True
    """Whether the server's memory does not grow with the cohort; False where all updates are needed at once."""
    personal: ClassVar[bool] = False
    """Whether every client ends with a model of its own, so that there is no global one."""

    error_feedback: ClassVar[bool] = True
    """Whether uploads are changes, of what has the same place in every round: then what a lossy wire left out of one
    can be added to the next. False where trained values are sent, or changes of factors that are drawn anew."""

    def check(self, rank: int) -> None:
        """Raises ValueError when the method's own fields do not fit the server's rank; by default all do."""
        del rank

    @property
    def changes_base(self) -> bool:
        """Whether rounds change the weights of the base, so that these cannot be kept in a few bits."""
        return False

    def init(self, template: Template, fleet: Sequence[Client], rng: Rng) -> ServerState:
        """Server, before round 0: a fresh adapter of the server's rank. Every method starts from the same draw."""
        del fleet
        return ServerState(initial_adapter(template, template.rank, rng))

    @abstractmethod
    def broadcast(self, state: ServerState, client: Client, round: Round) -> Broadcast:
        """Server, once per client of the cohort: what this client gets."""

    def start(self, broadcast: Broadcast, site: Site) -> Start:
        """Client, on receipt: what it trains from. By default the adapter that it got, all of it."""
        del site
        return Start(broadcast.adapter)

    def client_update(self, broadcast: Broadcast, start: Start, trained: Trained, site: Site) -> ClientUpdate:
        """Client, after training: what it sends back. By default trained minus start, of the factors it trained."""
        delta = sub(trained.adapter, start.adapter).only(start.trains)
        return ClientUpdate(site.client.id, delta, site.client.examples, broadcast.rows)

    def remember(self, broadcast: Broadcast, start: Start, trained: Trained, site: Site) -> ClientMemory:
        """Client, after training: what it keeps until its next round. By default what it kept before."""
        del broadcast, start, trained
        return site.memory

    @abstractmethod
    def aggregate(self, state: ServerState, updates: Iterator[ClientUpdate], round: Round) -> ServerState:
        """Server, at the end of a round. Updates arrive once, by increasing client id, and need not be kept."""

    def base(self, state: ServerState) -> Adapter | None:
        """Server, at any time: the sum of all changes of the base so far, on which every client trains."""
        return state.slots.get("base")

    def base_update(self, update: BaseUpdate, template: Template) -> Adapter:
        """Client, on receipt: the pairs that a message stands for. By default those in it, identities filled in."""
        del template
        return Adapter({name: with_identity(pair) for name, pair in update.adapter.layers.items()})

    def global_adapter(self, state: ServerState) -> Adapter:
        """Server, at any time: what is evaluated and exported, relative to the base before any change."""
        return state.adapter

    def client_adapter(self, state: ServerState, site: Site) -> Adapter:
        """Client, at any time: its own model, where it has one (``personal``); otherwise the global one.

        Of the state, no more than ``global_adapter`` reaches a client: it is the adapter of the state that is given.
        """
        del site
        return self.global_adapter(state)

    @model_serializer(mode="wrap")
    def _with_name(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"name": self.name, **handler(self)}


def initial_adapter(template: Template, rank: int, rng: Rng) -> Adapter:
    """Returns a fresh adapter whose draw depends on the seed and the layer alone (papers: a common A⁰)."""
    generators = {name: rng.child("init", name).torch() for name in template.layers}
    return initial(template, rank, generators)
