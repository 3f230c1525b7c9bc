"""Records as Flower's messages hold them. Needs no torch: Flower starts a process for each message to a site."""

from __future__ import annotations

from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fslora.deploy.envelope import VERSION, Entry, Record
from fslora.errors import WireError

STYPE = "fslora.bytes"
"""How an array's bytes are to be read: by `fslora.deploy.records`. Flower's own readers refuse an unknown one."""
ARRAYS, LETTER = "arrays", "letter"


def to_flower(record: Record) -> RecordDict:
    """Returns a record as the content of a message."""
    arrays = {entry.name: Array(entry.dtype, entry.shape, STYPE, entry.data) for entry in record.entries}
    letter = ConfigRecord({"version": record.version, "header": record.header})
    return RecordDict({ARRAYS: ArrayRecord(array_dict=arrays), LETTER: letter})


def from_flower(content: RecordDict) -> Record:
    """Returns the record of a message that came; what it says is checked where it is opened.

    Raises:
        WireError: It holds something else.
    """
    if set(content.keys()) != {ARRAYS, LETTER}:
        raise WireError(f"it holds {sorted(map(str, content.keys()))[:5]}, not {ARRAYS} and {LETTER}")
    arrays, letter = content[ARRAYS], content[LETTER]
    if not isinstance(arrays, ArrayRecord) or not isinstance(letter, ConfigRecord):
        raise WireError(f"its {ARRAYS} or {LETTER} are of another kind of record")
    if set(letter) != {"version", "header"}:
        raise WireError(f"its {LETTER} holds {sorted(map(str, letter))[:5]}, not version and header")
    entries = []
    for name, array in arrays.items():
        if array.stype != STYPE:
            raise WireError(f"{name[:40]!r} is written as {array.stype[:40]!r}, not as {STYPE!r}")
        entries.append(Entry(name, array.dtype, tuple(array.shape), array.data))
    version: Any = letter["version"]
    header: Any = letter["header"]
    return Record(tuple(entries), header, version if isinstance(version, int) else VERSION - 1)
