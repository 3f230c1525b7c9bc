"""Evaluation at sites: what the server asks, what a site answers, and what of an answer may be used.

The model travels as a change of the base does: pairs of any rank and the head, in float32 whatever the wire. A personal
method puts each client's own model together from it and from what the client keeps. Scores go back, of each client on
its own held-out examples; examples and predictions stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite

from fslora.deploy.envelope import Record
from fslora.deploy.letters import Examination, Mark, Marks, Order, opened, sealed
from fslora.deploy.records import Limits
from fslora.errors import WireError
from fslora.evaluate import predict, untrained
from fslora.metrics import RANGES
from fslora.prepare import Federation
from fslora.types import Adapter, BaseUpdate, Broadcast, Client, ClientMemory, ServerState, Site, Template
from fslora.wire import Payload, Wire

EVERYBODY = 0
"""The place of the one model in a letter."""
EXACT = Wire()


def question(run: str, rounds: int, orders: Sequence[Order], model: Adapter | None, template: Template) -> Record:
    """Returns the letter that asks for scores of a model; of None, before any training."""
    if model is None:
        return sealed(Examination(run=run, round=rounds, model="", orders=tuple(orders)))
    message = Broadcast(Adapter({}), base=(BaseUpdate(1, model, whole=True),))
    payload = EXACT.pack_broadcast(message, template)
    head = Examination(run=run, round=rounds, model=payload.header, orders=tuple(orders))
    return sealed(head, {EVERYBODY: payload})


def model_of(head: Examination, arrays: Mapping[int, Payload], federation: Federation) -> Adapter:
    """Returns what is to be scored.

    Raises:
        WireError: It is no model of this experiment.
    """
    if not head.model:
        return untrained(federation)
    template = federation.template
    tensors = arrays[EVERYBODY].tensors if EVERYBODY in arrays else {}
    received = EXACT.unpack_broadcast(Payload(tensors, head.model), template).base
    if len(received) != 1:
        raise WireError(f"it holds {len(received)} models, not one")
    model = received[0].adapter
    shapes = {name: tuple(tensor.shape) for name, tensor in model.dense.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in template.dense.items()}:
        raise WireError(f"its whole tensors are {shapes}, not those of the model's head")
    return model


def own_model(
    federation: Federation, model: Adapter, client: Client, memory: ClientMemory | None, trained: bool
) -> Adapter:
    """Returns the model that a client is scored with: its own, where the method has one, once there was a round."""
    method = federation.experiment.method
    if not (method.personal and trained):
        return model
    site = Site(client, federation.template, memory or ClientMemory())
    return method.client_adapter(ServerState(model), site)


def mark(federation: Federation, client: int, model: Adapter) -> Mark:
    """Returns a client's scores on its held-out examples, which are here; none where there are none."""
    held = federation.sites.partition.holdout[client]
    if not len(held):
        return Mark(client=client, refused="it has no held-out example")
    scores = predict(federation.base, model, federation.train.take(held)).scores()
    strange = [name for name, value in scores.items() if not isfinite(value)]
    if strange:
        return Mark(client=client, refused=f"its {strange[0]} is not finite")
    return Mark(client=client, examples=len(held), scores=scores)


def answered(reply: Record, limits: Limits, run: str, rounds: int) -> dict[int, Mark]:
    """Returns a site's marks by client.

    Raises:
        WireError: The letter is damaged, or about something else.
    """
    head, arrays = opened(Marks, reply, limits)
    if arrays:
        raise WireError("it has arrays; there is no place for them in it")
    if (head.run, head.round) != (run, rounds):
        raise WireError(f"it is about the state after {head.round} rounds of run {head.run}")
    marks = {mark.client: mark for mark in head.marks}
    if len(marks) < len(head.marks):
        raise WireError("a client is in it twice")
    return marks


def usable(mark: Mark, examples: int, names: Sequence[str]) -> dict[str, float]:
    """Returns a mark's scores.

    Args:
        mark: What came.
        examples: The client's held-out examples, as its site introduced them.
        names: The scores that the task has.

    Raises:
        WireError: There are none, or they cannot be.
    """
    if mark.refused or not mark.scores:
        raise WireError(mark.refused or "it says no score")
    if mark.examples != examples:
        raise WireError(f"it says that it scored {mark.examples} examples; it has {examples}")
    if set(mark.scores) != set(names):
        raise WireError(f"its scores are {sorted(mark.scores)}, not {sorted(names)}")
    for name, value in mark.scores.items():
        least, most = RANGES[name]
        if not least <= value <= most:
            raise WireError(f"its {name} is {value:g}; it can be {least:g} to {most:g}")
    return {name: mark.scores[name] for name in names}
