"""What server and sites write to each other: one letter to a site and one back, with all that its clients need.

A letter is a `Record`: its arrays are those of the clients' payloads, under ``CLIENT/``, and its header is JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from fslora.config import MOST_EXAMPLES
from fslora.deploy.envelope import Entry, Record
from fslora.deploy.records import Limits, to_payload, to_record
from fslora.errors import WireError
from fslora.wire import Payload


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""Of a run or a site: it may become the name of a folder."""


class Order(_Part):
    """What one client is asked."""

    client: NonNegativeInt
    known: NonNegativeInt
    """The rounds after which an update of this client was last used: what it keeps is of then. 0: never."""
    header: str
    """Of its payload."""


class Task(_Part):
    """A round at one site."""

    run: Name
    round: NonNegativeInt
    """From 0."""
    lr: float
    durable: NonNegativeInt
    """The rounds of the server's newest checkpoint: older memories will not be asked for."""
    orders: tuple[Order, ...]


class Result(_Part):
    """What came of one order."""

    client: NonNegativeInt
    header: str = ""
    """Of its payload; empty where there is none."""
    refused: Annotated[str, Field(max_length=500)] = ""
    """Why there is none."""
    losses: Annotated[tuple[float, ...], Field(max_length=1_000_000)] = ()
    rank: NonNegativeInt = 0
    flops: Annotated[float, Field(ge=0)] = 0.0
    memory: NonNegativeInt = 0


class Results(_Part):
    """A site's answer to a task."""

    run: Name
    round: NonNegativeInt
    results: tuple[Result, ...]


class Examination(_Part):
    """A question for the scores of a site's clients on their own held-out examples."""

    run: Name
    round: NonNegativeInt
    """The rounds that are done."""
    model: str
    """Header of the payload that is scored; empty: the base with its fresh head, before any training."""
    orders: tuple[Order, ...]
    """Whose; they have no payloads of their own."""


class Mark(_Part):
    """The scores of one client."""

    client: NonNegativeInt
    examples: NonNegativeInt = 0
    """How many were scored."""
    scores: Annotated[dict[str, float], Field(max_length=32)] = {}
    refused: Annotated[str, Field(max_length=500)] = ""
    """Why there are none."""


class Marks(_Part):
    """A site's answer to an examination."""

    run: Name
    round: NonNegativeInt
    marks: tuple[Mark, ...]


class Member(_Part):
    """One client of a site, as far as the server has to know it."""

    id: NonNegativeInt
    rank: Annotated[int, Field(ge=1)]
    examples: Annotated[int, Field(ge=1, le=MOST_EXAMPLES)]
    held_out: Annotated[int, Field(ge=0, le=MOST_EXAMPLES)]
    """Examples that it keeps for its own test."""


class Hello(_Part):
    """How a site introduces itself."""

    site: Name
    version: str
    """Of fslora."""
    experiment: str
    """Digest of the experiment that it was told."""
    data: str
    """Digest of the partition of the data."""
    members: tuple[Member, ...]


P = TypeVar("P", bound=_Part)


def sealed(head: _Part, payloads: Mapping[int, Payload] | None = None) -> Record:
    """Returns a letter of this head, with the payloads of its clients (their headers are in the head)."""
    entries: list[Entry] = []
    for client, payload in (payloads or {}).items():
        entries += [replace(entry, name=f"{client}/{entry.name}") for entry in to_record(payload).entries]
    return Record(tuple(entries), head.model_dump_json())


def opened(kind: type[P], record: Record, limits: Limits | None = None) -> tuple[P, dict[int, Payload]]:
    """Returns the head of a letter that came, and the payloads by client (with empty headers: see `payloads_of`).

    Raises:
        WireError: It is damaged, or not of this kind; the text says where.
    """
    whole = to_payload(record, limits)
    try:
        head = kind.model_validate_json(record.header)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise WireError(f"its head is damaged: {where}: {first['msg']}") from None
    by_client: dict[int, dict[str, object]] = {}
    for name, tensor in whole.tensors.items():
        number, slash, rest = name.partition("/")
        if not slash or not number.isascii() or not number.isdigit() or str(int(number)) != number:
            raise WireError(f"{name!r} does not say which client it is of")
        by_client.setdefault(int(number), {})[rest] = tensor
    return head, {client: Payload(tensors, "") for client, tensors in by_client.items()}  # type: ignore[arg-type]


def payloads_of(parts: Iterable[Order | Result], arrays: Mapping[int, Payload]) -> dict[int, Payload]:
    """Returns the payload of each client that a head names with a header.

    Raises:
        WireError: A client is named twice, or there are arrays of one that is not named.
    """
    found: dict[int, Payload] = {}
    seen: set[int] = set()
    for part in parts:
        if part.client in seen:
            raise WireError(f"client {part.client} is in it twice")
        seen.add(part.client)
        if part.header:
            tensors = arrays[part.client].tensors if part.client in arrays else {}
            found[part.client] = Payload(tensors, part.header)
    strange = sorted(arrays.keys() - found.keys())
    if strange:
        raise WireError(f"it has arrays of client {strange[0]}, which has no place in it")
    return found
