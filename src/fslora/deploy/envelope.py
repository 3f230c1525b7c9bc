"""A message in its plainest form, and its way through a socket of this machine. Needs neither torch nor Flower.

A frame is a length, a line of JSON, and the bytes of the arrays one after the other, whose sizes the JSON says:

    4 bytes, big-endian │ {"head": {...}, "record": true, "version": 2, "header": "...", "entries": [...]} │ bytes ...
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fslora.errors import WireError

VERSION = 2
"""Of the form of records. Another one is refused."""
LENGTH = struct.Struct(">I")
PIECE = 2**20


@dataclass(frozen=True)
class Entry:
    """One array."""

    name: str
    dtype: str
    """A key of `fslora.deploy.records.TYPES`."""
    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True)
class Record:
    """A message in its plainest form."""

    entries: tuple[Entry, ...]
    header: str
    version: int = VERSION


def index_of(record: Record) -> list[list[Any]]:
    """Returns what it takes to cut the arrays from their bytes, one after the other; JSON can hold it."""
    return [[entry.name, entry.dtype, list(entry.shape), len(entry.data)] for entry in record.entries]


def entries_of(index: Any, take: Callable[[int], bytes | memoryview]) -> tuple[Entry, ...]:
    """Returns the arrays of an index that came; whether they make sense is checked by `fslora.deploy.records`.

    Args:
        index: As ``index_of`` has it, or anything else.
        take: Number of bytes → the next ones.

    Raises:
        WireError: It is no index.
    """
    entries = []
    for row in index if isinstance(index, list) else [None]:
        match row:
            case [str(name), str(dtype), list(shape), int(size)] if size >= 0:
                entries.append(Entry(name, dtype, tuple(shape), take(size)))
            case _:
                raise WireError(f"{str(row)[:60]} does not tell an array's name, type, shape and bytes")
    return tuple(entries)


def check_version(version: object) -> None:
    """Raises WireError where records have another form than these."""
    if version != VERSION:
        raise WireError(
            f"its records have version {repr(version)[:20]}, not {VERSION}; install the same fslora on both sides"
        )


def send(link: socket.socket, head: Mapping[str, Any], record: Record | None = None) -> None:
    """Sends a head, which JSON can hold, and a record or none."""
    frame: dict[str, Any] = {"head": dict(head), "record": record is not None}
    if record is not None:
        frame |= {"version": record.version, "header": record.header, "entries": index_of(record)}
    text = json.dumps(frame).encode()
    link.sendall(LENGTH.pack(len(text)) + text)
    for entry in record.entries if record is not None else ():
        link.sendall(entry.data)


def receive(link: socket.socket) -> tuple[dict[str, Any], Record | None]:
    """Returns what was sent; both ends are processes of one user, so what the arrays are is checked where it is used.

    Raises:
        ConnectionError: The other end has gone before all was there.
        WireError: It was no frame.
    """
    (length,) = LENGTH.unpack(_exactly(link, LENGTH.size))
    try:
        frame = json.loads(_exactly(link, length))
        head = dict(frame["head"])
        if not frame["record"]:
            return head, None
        index, header, version = frame["entries"], frame["header"], frame["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise WireError(f"what came through the socket is no frame: {error!r}") from None
    return head, Record(entries_of(index, lambda size: _exactly(link, size)), header, version)


def _exactly(link: socket.socket, size: int) -> bytes:
    pieces = []
    while size:
        piece = link.recv(min(size, PIECE))
        if not piece:
            raise ConnectionResetError("the other end has gone")
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)
