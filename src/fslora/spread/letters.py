"""What a run and its worker processes tell each other, as frames: a round, a chunk of requests, its answers, an error.

Memories of clients travel both ways: the run alone reads and writes their files, as it does without workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fslora import errors
from fslora.clients import Answer, Request
from fslora.config import Experiment, to_toml
from fslora.errors import FsloraError, TrainingError
from fslora.fleet import Fleet
from fslora.packing import pack, unpack
from fslora.spread.frames import Frame
from fslora.types import Adapter, ClientMemory, Tensor
from fslora.wire import Payload

KINDS = {kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type)}
"""What an error is called → what it is."""
BASE = "base"


def setup(experiment: Experiment) -> Frame:
    """Returns what a worker has to prepare."""
    return Frame({"kind": "setup", "experiment": to_toml(experiment)})


def round_letter(number: int, lr: float, changes: Adapter | None) -> Frame:
    """Returns what all chunks of a round share: its number, its learning rate, what is added to the base."""
    tensors, described = pack({BASE: changes} if changes else {})
    return Frame({"kind": "round", "number": number, "lr": lr, "changes": described}, tensors)


def changes_of(frame: Frame) -> Adapter | None:
    """Returns what is added to the base in a round."""
    return unpack(frame.tensors, frame.head["changes"]).get(BASE)


def chunk_letter(requests: Sequence[Request], memories: Mapping[int, ClientMemory]) -> Frame:
    """Returns the requests of clients that are trained together, with what each of them kept."""
    asked: list[Mapping[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for request in requests:
        client = request.client.id
        kept = memories.get(client)
        asked.append({"client": client, "header": request.payload.header, "memory": _packed(client, kept, tensors)})
        tensors.update({f"{client}/payload/{name}": t for name, t in request.payload.tensors.items()})
    return Frame({"kind": "chunk", "requests": asked}, tensors)


def requests_of(frame: Frame, fleet: Fleet) -> tuple[list[Request], dict[int, ClientMemory]]:
    """Returns the requests of a chunk, and what its clients kept."""
    requests, memories = [], {}
    for asked in frame.head["requests"]:
        client = asked["client"]
        requests.append(Request(fleet[client], Payload(frame.below(f"{client}/payload/"), asked["header"])))
        memory = _unpacked(client, asked["memory"], frame)
        if memory is not None:
            memories[client] = memory
    return requests, memories


def answers_letter(answers: Iterable[Answer], peak: int) -> Frame:
    """Returns the answers of a chunk, and the most memory that the worker has taken so far."""
    given: list[Mapping[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for answer in answers:
        payload = answer.payload or Payload({}, "")
        given.append(
            {
                "client": answer.client,
                "header": answer.payload and payload.header,
                "refused": answer.refused,
                "losses": list(answer.losses),
                "rank": answer.rank,
                "flops": answer.flops,
                "memory": answer.memory,
                "keeps": _packed(answer.client, answer.keeps, tensors),
            }
        )
        tensors.update({f"{answer.client}/payload/{name}": t for name, t in payload.tensors.items()})
    return Frame({"answers": given, "peak": peak}, tensors)


def answers_of(frame: Frame) -> Iterator[Answer]:
    """Yields the answers of a chunk."""
    for given in frame.head["answers"]:
        client, header = given["client"], given["header"]
        yield Answer(
            client,
            None if header is None else Payload(frame.below(f"{client}/payload/"), header),
            given["refused"],
            tuple(given["losses"]),
            given["rank"],
            given["flops"],
            given["memory"],
            _unpacked(client, given["keeps"], frame),
        )


def error_letter(error: Exception, trace: str) -> Frame:
    """Returns what went wrong in a worker."""
    return Frame({"error": type(error).__name__, "text": str(error), "trace": trace})


def error_of(frame: Frame) -> FsloraError | None:
    """Returns the error that a frame tells of, of the kind that it had in the worker; None where it tells of none.

    One that is not ours becomes a TrainingError that names it, with the worker's traceback as a note.
    """
    name = frame.head.get("error")
    if name is None:
        return None
    if name in KINDS:
        known: FsloraError = KINDS[name](frame.head["text"])
        return known
    error = TrainingError(f"a worker process failed: {name}: {frame.head['text']}")
    error.add_note(frame.head["trace"])
    return error


def _packed(client: int, memory: ClientMemory | None, tensors: dict[str, Tensor]) -> Mapping[str, Any] | None:
    """Describes what a client keeps, and adds its tensors to those of a frame."""
    if memory is None:
        return None
    own, description = pack(memory.slots)
    tensors.update({f"{client}/memory/{name}": t for name, t in own.items()})
    return {**description, "scalars": dict(memory.scalars)}


def _unpacked(client: int, description: Mapping[str, Any] | None, frame: Frame) -> ClientMemory | None:
    if description is None:
        return None
    return ClientMemory(unpack(frame.below(f"{client}/memory/"), description), description["scalars"])
