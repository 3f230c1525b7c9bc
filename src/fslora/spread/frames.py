"""Tensors and a head of JSON over a pipe, without loss and without copies: from memory to memory.

    8 bytes: length of the rest of the head │ {"head": ..., "arrays": [[names, type, shape], ...]} │ the arrays' bytes

Tensors that share their memory (a head that all clients of a chunk get, a change of the base) go through the pipe once,
and share their memory on the other side as well. Both ends are processes of one run on one machine, started by it: what
comes is not checked as messages of clients are (`fslora.wire`), and their bytes are never counted here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Any

import torch

from fslora.deploy.records import NAMES, TYPES
from fslora.types import Tensor


@dataclass(frozen=True)
class Frame:
    """What goes through a pipe at one time."""

    head: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Returns the tensors whose names begin so, without that beginning."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def send(stream: IO[bytes], frame: Frame) -> None:
    """Writes a frame.

    Raises:
        BrokenPipeError: Nobody reads it.
    """
    arrays: dict[tuple[Any, ...], tuple[list[str], Tensor]] = {}
    for name, tensor in frame.tensors.items():
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        arrays.setdefault(key, ([], tensor))[0].append(name)
    described = [[names, NAMES[tensor.dtype], list(tensor.shape)] for names, tensor in arrays.values()]
    head = json.dumps({"head": frame.head, "arrays": described}).encode()
    stream.write(len(head).to_bytes(8, "little") + head)
    for _, tensor in arrays.values():
        if tensor.numel():
            stream.write(_memory(tensor.detach().cpu().contiguous()))
    stream.flush()


def receive(stream: IO[bytes]) -> Frame:
    """Reads a frame.

    Raises:
        EOFError: The other side is gone.
    """
    text = _exactly(stream, int.from_bytes(_exactly(stream, 8), "little"))
    whole = json.loads(text)
    tensors: dict[str, Tensor] = {}
    for names, dtype, shape in whole["arrays"]:
        tensor = torch.empty(shape, dtype=TYPES[dtype])
        if tensor.numel() and stream.readinto(_memory(tensor)) != tensor.nbytes:  # type: ignore[attr-defined]
            raise EOFError
        tensors.update(dict.fromkeys(names, tensor))
    return Frame(whole["head"], tensors)


def _memory(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


def _exactly(stream: IO[bytes], count: int) -> bytes:
    found = stream.read(count)
    if len(found) != count:
        raise EOFError
    return found
