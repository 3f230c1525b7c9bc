"""What a method is: values in, values out. The round loop and the engines know no method by name.

A method is a frozen record of hyperparameters with five steps. It never trains (that is the engine's work),
never stores anything in itself (all that it carries is in `ServerState`), and sees one client at a time.
To add one: a file here, a line in the registry of `fslora.methods`, a test.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from fslora.algebra.adapters import initial, sub
from fslora.rng import Rng
from fslora.types import Adapter, Broadcast, Client, ClientUpdate, Round, ServerState, Template


class Method(BaseModel, ABC):
    """A federated LoRA method. Its fields are the keys of the experiment's ``[method]`` table."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)

    name: ClassVar[str]
    """The registry's name."""
    paper: ClassVar[str]
    """Title and link of the paper."""

    def check(self, rank: int) -> None:
        """Raises ValueError when the method's own fields do not fit the server's rank; by default all do."""
        del rank

    def init(self, template: Template, fleet: Sequence[Client], rng: Rng) -> ServerState:
        """Server, before round 0: a fresh adapter of the server's rank. Every method starts from the same draw."""
        del fleet
        return ServerState(initial_adapter(template, template.rank, rng))

    @abstractmethod
    def broadcast(self, state: ServerState, client: Client, round: Round) -> Broadcast:
        """Server, once per client of the cohort: what this client gets."""

    def client_update(self, broadcast: Broadcast, trained: Adapter, client: Client) -> ClientUpdate:
        """Client, after training: what it sends back. By default trained minus received."""
        return ClientUpdate(client.id, sub(trained, broadcast.adapter), client.examples, broadcast.rows)

    @abstractmethod
    def aggregate(self, state: ServerState, updates: Iterator[ClientUpdate], round: Round) -> ServerState:
        """Server, at the end of a round. Updates arrive once, by increasing client id, and need not be kept."""

    def global_adapter(self, state: ServerState) -> Adapter:
        """Server, at any time: what is evaluated and exported."""
        return state.adapter

    @model_serializer(mode="wrap")
    def _with_name(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"name": self.name, **handler(self)}


def initial_adapter(template: Template, rank: int, rng: Rng) -> Adapter:
    """Returns a fresh adapter whose draw depends on the seed and the layer alone (papers: a common A⁰)."""
    generators = {name: rng.child("init", name).torch() for name in template.layers}
    return initial(template, rank, generators)
