"""A message in its plainest form, and its way through a socket of this machine. Needs neither torch nor Flower.

A frame is a length, a line of JSON, and the bytes of the arrays one after the other, whose sizes the JSON says:

    4 bytes, big-endian │ {"head": {...}, "record": true, "version": 1, "header": "...", "entries": [...]} │ bytes ...
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fslora.errors import WireError

VERSION = 1
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
    data: bytes


@dataclass(frozen=True)
class Record:
    """A message in its plainest form."""

    entries: tuple[Entry, ...]
    header: str
    version: int = VERSION


def send(link: socket.socket, head: Mapping[str, Any], record: Record | None = None) -> None:
    """Sends a head, which JSON can hold, and a record or none."""
    frame: dict[str, Any] = {"head": dict(head), "record": record is not None}
    if record is not None:
        entries = [[e.name, e.dtype, list(e.shape), len(e.data)] for e in record.entries]
        frame |= {"version": record.version, "header": record.header, "entries": entries}
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
        named = [(str(name), str(dtype), tuple(shape), int(size)) for name, dtype, shape, size in frame["entries"]]
        header, version = frame["header"], frame["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise WireError(f"what came through the socket is no frame: {error!r}") from None
    entries = tuple(Entry(name, dtype, shape, _exactly(link, size)) for name, dtype, shape, size in named)
    return head, Record(entries, header, version)


def _exactly(link: socket.socket, size: int) -> bytes:
    pieces = []
    while size:
        piece = link.recv(min(size, PIECE))
        if not piece:
            raise ConnectionResetError("the other end has gone")
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)
