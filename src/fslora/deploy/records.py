"""Payloads as records: arrays given as name, type, shape and bytes, and a line of text. Any transport carries these.

Lossless, for every type that is on the wire: bytes are those of the tensor, row by row, little-endian. A receiver
trusts nothing: names, types, shapes and sizes are checked, against each other and against limits, before any tensor is
made. What the tensors mean is checked by `fslora.wire`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch

from fslora.deploy.envelope import Entry, Record, check_version
from fslora.errors import WireError
from fslora.types import Tensor
from fslora.wire import Payload

TYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}
NAMES = {dtype: name for name, dtype in TYPES.items()}


@dataclass(frozen=True)
class Limits:
    """The most that a receiver takes."""

    entries: int = 100_000
    nbytes: int = 2**36
    """Of all arrays together."""
    header: int = 2**24
    """Characters."""
    name: int = 512
    """Characters."""
    dims: int = 4


def to_record(payload: Payload) -> Record:
    """Returns a payload as a record; ``to_payload`` is its inverse."""
    entries = (Entry(name, _type_name(name, t), tuple(t.shape), _bytes(t)) for name, t in payload.tensors.items())
    return Record(tuple(entries), payload.header)


def to_payload(record: Record, limits: Limits | None = None) -> Payload:
    """Returns the payload of a record that came.

    Raises:
        WireError: It is damaged, of another version, or larger than the limits; the text names the array.
    """
    check(record, limits or Limits())
    return Payload({entry.name: _tensor(entry) for entry in record.entries}, record.header)


def check(record: Record, limits: Limits) -> None:
    """Raises WireError where a record contradicts itself or exceeds the limits; makes no tensor."""
    check_version(record.version)
    if not isinstance(record.header, str) or len(record.header) > limits.header:
        raise WireError(f"its header is no text of at most {limits.header} characters")
    if len(record.entries) > limits.entries:
        raise WireError(f"it has {len(record.entries)} arrays; there can be {limits.entries}")
    _check_names([entry.name for entry in record.entries], limits)
    total = 0
    for entry in record.entries:
        total += _checked_size(entry, limits)
        if total > limits.nbytes:
            raise WireError(f"with {entry.name!r} it has more than {limits.nbytes} bytes")


def _check_names(names: Iterable[str], limits: Limits) -> None:
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= limits.name:
            raise WireError(f"{str(name)[:40]!r} is no name of an array: 1 to {limits.name} printable characters")
        if name in seen:
            raise WireError(f"{name!r} is in it twice")
        seen.add(name)


def _checked_size(entry: Entry, limits: Limits) -> int:
    """Returns the bytes of an entry, once its type, its shape and its bytes agree."""
    if entry.dtype not in TYPES:
        raise WireError(f"{entry.name!r} has type {str(entry.dtype)[:40]!r}; there are {', '.join(TYPES)}")
    shape = entry.shape
    whole = isinstance(shape, tuple) and all(type(size) is int and 0 <= size < 2**48 for size in shape)
    if not whole or len(shape) > limits.dims:
        raise WireError(f"{entry.name!r} has shape {str(shape)[:60]}; at most {limits.dims} sizes from 0 up are one")
    expected = prod(shape) * TYPES[entry.dtype].itemsize
    if not isinstance(entry.data, bytes | memoryview) or len(entry.data) != expected:
        there = len(entry.data) if isinstance(entry.data, bytes | memoryview) else type(entry.data).__name__
        raise WireError(f"{entry.name!r} has {there} bytes; {entry.dtype} {list(shape)} takes {expected}")
    if entry.dtype == "bool" and bytes(entry.data).strip(b"\0\1"):
        raise WireError(f"{entry.name!r} has bytes that are no bool")
    return expected


def _type_name(name: str, tensor: Tensor) -> str:
    if tensor.dtype not in NAMES:
        raise WireError(f"{name!r} has type {tensor.dtype}, which does not travel; there are {', '.join(TYPES)}")
    return NAMES[tensor.dtype]


def _bytes(tensor: Tensor) -> bytes:
    _little_endian()
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _tensor(entry: Entry) -> Tensor:
    _little_endian()
    dtype = TYPES[entry.dtype]
    if not entry.data:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(bytearray(entry.data), dtype=dtype).reshape(entry.shape)


def _little_endian() -> None:
    if sys.byteorder != "little":
        raise WireError("records are little-endian, and this machine is not; run fslora on x86 or ARM")
