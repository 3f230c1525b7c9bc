"""Records as Flower's messages hold them. Needs no torch: Flower starts a process for each message to a site.

All arrays of a record are one for Flower, which makes a request for each: a letter with the 74 tensors of one client of
the default took it more processor time than the training of that client.
"""

from __future__ import annotations

import json
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fslora.deploy.envelope import Record, check_version, entries_of, index_of
from fslora.errors import WireError

STYPE = "fslora.bytes"
"""How an array's bytes are to be read: by `fslora.deploy.records`. Flower's own readers refuse an unknown one."""
ARRAYS, LETTER, BYTES = "arrays", "letter", "bytes"
KEYS = {"version", "header", "index"}
"""Of the letter."""


def to_flower(record: Record) -> RecordDict:
    """Returns a record as the content of a message."""
    data = b"".join(entry.data for entry in record.entries)
    arrays = ArrayRecord(array_dict={BYTES: Array("uint8", (len(data),), STYPE, data)})
    letter = {"version": record.version, "header": record.header, "index": json.dumps(index_of(record))}
    return RecordDict({ARRAYS: arrays, LETTER: ConfigRecord(letter)})


def from_flower(content: RecordDict) -> Record:
    """Returns the record of a message that came; what its arrays say is checked where it is opened.

    Raises:
        WireError: It holds something else.
    """
    if set(content.keys()) != {ARRAYS, LETTER}:
        raise WireError(f"it holds {sorted(map(str, content.keys()))[:5]}, not {ARRAYS} and {LETTER}")
    arrays, letter = content[ARRAYS], content[LETTER]
    if not isinstance(arrays, ArrayRecord) or not isinstance(letter, ConfigRecord):
        raise WireError(f"its {ARRAYS} or {LETTER} are of another kind of record")
    check_version(letter.get("version"))
    if set(letter) != KEYS:
        raise WireError(f"its {LETTER} holds {sorted(map(str, letter))[:5]}, not {', '.join(sorted(KEYS))}")
    left = memoryview(_data(arrays))

    def take(size: int) -> memoryview:
        nonlocal left
        piece, left = left[:size], left[size:]
        if len(piece) < size:
            raise WireError(f"it ends {size - len(piece)} bytes before its arrays do")
        return piece

    entries = entries_of(_index(letter["index"]), take)
    if left:
        raise WireError(f"it has {len(left)} bytes more than its arrays")
    header: Any = letter["header"]
    return Record(entries, header)


def _data(arrays: ArrayRecord) -> bytes:
    if set(arrays) != {BYTES} or arrays[BYTES].stype != STYPE:
        there = {name[:40]: array.stype[:40] for name, array in list(arrays.items())[:5]}
        raise WireError(f"its {ARRAYS} are {there}, not {BYTES!r} written as {STYPE!r}")
    data: bytes = arrays[BYTES].data
    return data


def _index(text: object) -> object:
    try:
        return json.loads(str(text))
    except (ValueError, RecursionError):
        raise WireError(f"its index is no JSON: {str(text)[:60]!r}") from None
