"""What travels: a message as named tensors, whose bytes are counted, and a header; and what may be lost on the way.

    server   broadcast ─ pack ─ payload ─ unpack ─ broadcast   client
    client   update + residual ─ pack ─ payload ─ unpack ─ update   server (the gate, then ``aggregate``)

No method is known here. The adapter of a message is encoded (`fslora.algebra.codes`), head included; all else travels
as it is:

- Changes of the base, because every client has to end with the server's own bits: an error there would stay for good.
- Extras: seeds and ranks have to be exact, and scores are few.
- Index sets: each index as the smallest integer type that holds the server's rank. Down only. The server drew them, so
  a client that repeated them would tell it nothing, and could only tell it something wrong.

Rounding. Down, to the nearest level: the server's own state is never rounded, so errors do not add up, and the smallest
is best. Up with error feedback, likewise: what is lost is sent later. Up without, at random and without bias, so that
errors of many clients and rounds average out. Every draw has an address: round, client, tensor.

Error feedback (Karimireddy et al., arXiv 1901.09847, EF-SGD; the memory of arXiv 1809.07599): with C the encoding,

    client i:  sends c = C(Δ + e_i)[I],   e_i[I] ← Δ + e_i[I] - c,   e_i elsewhere as it was

so that what it sent so far plus e_i is the sum of its true changes. e_i lies in the server's coordinates (slot RESIDUAL
of the client's memory, as many parts as the server has where clients hold random ones): another index set takes from it
the parts that it holds. A factor that does not travel in a round leaves its own residual alone.

A receiver trusts nothing: names, types, shapes, ranks, places and finiteness are checked against what it knows itself
(the model's shapes, the settings, and at the server the broadcast that is answered) before a tensor is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from fslora.algebra.codes import EXACT, Code
from fslora.config import WireConfig
from fslora.errors import WireError
from fslora.rng import Rng
from fslora.types import (
    Adapter,
    BaseUpdate,
    Broadcast,
    Client,
    ClientMemory,
    ClientUpdate,
    LoRA,
    Rows,
    Template,
    Tensor,
)

RESIDUAL = "wire.residual"
"""The slot of a client's memory that holds what it did not manage to send."""
INDEX_TYPES = ((2**8, torch.uint8), (2**15, torch.int16), (2**31, torch.int32))
"""How many indices there may be for a type to hold each of them."""


@dataclass(frozen=True)
class Payload:
    """A message as it travels: arrays and a line of text, which is what any transport can carry."""

    tensors: Mapping[str, Tensor]
    """``adapter/LAYER:A/values``, ``rows/LAYER``, ``base.0/LAYER:Bt``, ``extras/NAME``, ..."""
    header: str
    """JSON: scales and shapes. Like a transport's own framing it is not counted."""

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Returns the tensors of one part of the message, without its prefix."""
        start = f"{prefix}/"
        return {name.removeprefix(start): t for name, t in self.tensors.items() if name.startswith(start)}


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


H = TypeVar("H", bound=_Header)


class Form(_Header):
    """What an encoded adapter looks like."""

    scales: dict[str, float]
    """Layer → scale."""
    shapes: dict[str, tuple[NonNegativeInt, ...]]
    """Name, as `Adapter.tensors` has it → shape."""


class Change(_Header):
    """A change of the base."""

    version: PositiveInt
    whole: bool
    scales: dict[str, float]


class DownHeader(_Header):
    """What a broadcast says beside its tensors."""

    form: Form
    base: tuple[Change, ...]


class UpHeader(_Header):
    """What an update says beside its tensors."""

    form: Form
    client: NonNegativeInt
    examples: PositiveInt


@dataclass(frozen=True)
class Wire:
    """Both ways of one run's messages. The default loses nothing and copies nothing."""

    down: Code = EXACT
    up: Code = EXACT
    error_feedback: bool = True

    @classmethod
    def of(cls, config: WireConfig) -> Self:
        """Returns the wire of an experiment's settings."""
        return cls(Code(config.down), config.up_code, config.error_feedback)

    @property
    def feeds_back(self) -> bool:
        """Whether clients keep what they did not manage to send."""
        return self.error_feedback and not self.up.lossless

    def pack_broadcast(self, broadcast: Broadcast, template: Template) -> Payload:
        """Server: returns what goes down to a client."""
        tensors = _encoded(broadcast.adapter, self.down)
        dtype = next(dtype for most, dtype in INDEX_TYPES if template.rank <= most)
        tensors.update({f"rows/{layer}": index.to(dtype) for layer, index in (broadcast.rows or {}).items()})
        for number, update in enumerate(broadcast.base):
            tensors.update(_prefixed(f"base.{number}", update.adapter.tensors()))
        tensors.update(_prefixed("extras", broadcast.extras))
        base = tuple(Change(version=u.version, whole=u.whole, scales=_scales(u.adapter)) for u in broadcast.base)
        return Payload(tensors, DownHeader(form=_form(broadcast.adapter), base=base).model_dump_json())

    def unpack_broadcast(self, payload: Payload, template: Template) -> Broadcast:
        """Client: returns the broadcast that came.

        Raises:
            WireError: It is not what a server may send; the text names the tensor.
        """
        header = _header(DownHeader, payload)
        bases = [f"base.{number}" for number in range(len(header.base))]
        _nothing_else(payload, {"adapter", "rows", "extras", *bases})
        adapter = _decoded(payload.below("adapter"), header.form, self.down, template)
        _check_layers(adapter, template, dict.fromkeys(template.layers, template.rank))
        rows = _indices(payload.below("rows"), adapter, template.rank)
        base = tuple(
            _change(payload.below(name), change, template) for name, change in zip(bases, header.base, strict=True)
        )
        return Broadcast(adapter, rows, base, _extras(payload.below("extras"), template.rank))

    def pack_update(
        self, update: ClientUpdate, template: Template, memory: ClientMemory, rng: Rng
    ) -> tuple[Payload, Adapter | None]:
        """Client: returns what goes up, and what could not be sent so far (None where nothing is kept).

        Args:
            update: What the client means to send.
            template: The server's rank.
            memory: The client's, of its last round.
            rng: This round's and client's own stream, for rounding.
        """
        residual = None
        if self.feeds_back:
            kept = memory.slots[RESIDUAL].tensors() if RESIDUAL in memory.slots else {}
            tensors, unsent = dict[str, Tensor](), dict[str, Tensor]()
            for name, change in update.adapter.tensors().items():
                whole, places = _residual(kept.get(name), change, name, update, template)
                meant = change + whole[places]
                parts = self.up.encode(meant)
                whole[places] = meant - self.up.rebuild(parts, meant.shape)
                tensors.update(_prefixed(f"adapter/{name}", parts))
                unsent[name] = whole
            residual = update.adapter.with_tensors(unsent)
        else:
            tensors = _encoded(update.adapter, self.up, rng)
        header = UpHeader(form=_form(update.adapter), client=update.client, examples=update.examples)
        return Payload({**tensors, **_prefixed("extras", update.extras)}, header.model_dump_json()), residual

    def unpack_update(self, payload: Payload, client: Client, broadcast: Broadcast, template: Template) -> ClientUpdate:
        """Server: returns the update that came from a client, with the index sets of its broadcast.

        Raises:
            WireError: It is no answer to this broadcast; the text names the tensor.
        """
        header = _header(UpHeader, payload)
        _nothing_else(payload, {"adapter", "extras"})
        if header.client != client.id:
            raise WireError(f"it says that it comes from client {header.client}, not {client.id}")
        if header.form.scales.keys() != template.layers.keys():
            raise WireError(f"its layers are {sorted(header.form.scales)}, not the model's {sorted(template.layers)}")
        adapter = _decoded(payload.below("adapter"), header.form, self.up, template)
        if adapter.dense.keys() != broadcast.adapter.dense.keys():
            raise WireError(f"its whole tensors are {sorted(adapter.dense)}, not {sorted(broadcast.adapter.dense)}")
        most = dict.fromkeys(template.layers, client.rank)
        for layer, pair in broadcast.adapter.layers.items():
            most[layer] = max(client.rank, pair.rank)
        _check_layers(adapter, template, most, broadcast.rows)
        extras = _extras(payload.below("extras"), template.rank)
        return ClientUpdate(header.client, adapter, header.examples, broadcast.rows, extras)


def remembering(memory: ClientMemory, residual: Adapter | None) -> ClientMemory:
    """Returns a client's memory with what it could not send."""
    return memory if residual is None else replace(memory, slots={**memory.slots, RESIDUAL: residual})


def _residual(
    kept: Tensor | None, change: Tensor, name: str, update: ClientUpdate, template: Template
) -> tuple[Tensor, Tensor | EllipsisType]:
    """Returns a copy of what is unsent of one tensor, in the server's coordinates, and which rows ``change`` is of."""
    layer, _, kind = name.rpartition(":")
    if kind == "dense":
        return torch.zeros_like(change) if kept is None else kept.clone(), ...
    rank = len(change)
    places, rows = torch.arange(rank), rank
    if update.rows is not None and rank:
        places, rows = update.rows[layer].long(), template.rank
    old = change.new_zeros(0, change.shape[1]) if kept is None else kept
    return torch.cat([old, change.new_zeros(max(0, rows - len(old)), change.shape[1])]), places


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _encoded(adapter: Adapter, code: Code, rng: Rng | None = None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in adapter.tensors().items():
        tensors.update(_prefixed(f"adapter/{name}", code.encode(tensor, rng.child(name) if rng else None)))
    return tensors


def _form(adapter: Adapter) -> Form:
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.tensors().items()}
    return Form(scales=_scales(adapter), shapes=shapes)


def _scales(adapter: Adapter) -> dict[str, float]:
    return {layer: pair.scale for layer, pair in adapter.layers.items()}


def _header(kind: type[H], payload: Payload) -> H:
    try:
        return kind.model_validate_json(payload.header)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise WireError(f"its header is damaged: {where}: {first['msg']}") from None


def _nothing_else(payload: Payload, prefixes: set[str]) -> None:
    strange = [name for name in payload.tensors if name.partition("/")[0] not in prefixes]
    if strange:
        raise WireError(f"{strange[0]!r} has no place in it")


def _decoded(tensors: Mapping[str, Tensor], form: Form, code: Code, template: Template) -> Adapter:
    """Returns an adapter of the model's shapes, at any rank up to the server's."""
    factors = {f"{layer}:{factor}" for layer in form.scales for factor in ("A", "Bt")}
    dense = [name for name in template.dense if f"{name}:dense" in form.shapes]
    named = factors | {f"{name}:dense" for name in dense}
    if not form.scales.keys() <= template.layers.keys() or form.shapes.keys() != named:
        strange = (form.shapes.keys() ^ named) | (form.scales.keys() - template.layers.keys())
        raise WireError(f"its header lacks, or has no place for, {sorted(strange)}")
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in form.shapes}
    for path, tensor in tensors.items():
        name, _, part = path.rpartition("/")
        if name not in parts:
            raise WireError(f"'adapter/{path}' is not in its header")
        parts[name][part] = tensor
    values = {name: _value(name, parts[name], shape, code, template) for name, shape in form.shapes.items()}
    layers = {name: LoRA(values[f"{name}:A"], values[f"{name}:Bt"], scale) for name, scale in form.scales.items()}
    return Adapter(layers, {name: values[f"{name}:dense"] for name in dense})


def _value(name: str, parts: Mapping[str, Tensor], shape: tuple[int, ...], code: Code, template: Template) -> Tensor:
    expected = _shape(name, shape, template)
    if shape != expected:
        raise WireError(f"{name} has shape {list(shape)}, not {list(expected)}")
    try:
        return code.decode(parts, shape)
    except WireError as error:
        raise WireError(f"{name}: {error}") from None


def _shape(name: str, claimed: tuple[int, ...], template: Template) -> tuple[int, ...]:
    """The shape that a tensor may have: its rank is its sender's, up to the server's."""
    own, _, kind = name.rpartition(":")
    if kind == "dense":
        return tuple(template.dense[own].shape)
    d_in, d_out = template.layers[own]
    return min(claimed[0], template.rank) if claimed else 0, d_in if kind == "A" else d_out


def _check_layers(adapter: Adapter, template: Template, most: Mapping[str, int], rows: Rows | None = None) -> None:
    """Refuses pairs of two ranks, of more parts than there may be, or not as many as were asked for."""
    for name, pair in adapter.layers.items():
        sizes = {len(pair.A), len(pair.Bt)}
        if len(sizes - {0}) > 1:
            raise WireError(f"{name} has {len(pair.A)} rows of A and {len(pair.Bt)} of B")
        if pair.rank > most[name]:
            raise WireError(f"{name} has {pair.rank} parts; there can be {most[name]}")
        if rows is not None and pair.rank not in (0, len(rows[name])):
            raise WireError(f"{name} has {pair.rank} parts; its index set has {len(rows[name])}")


def _indices(tensors: Mapping[str, Tensor], adapter: Adapter, rank: int) -> Rows | None:
    """Returns index sets as int32; None where none came."""
    if not tensors:
        return None
    if tensors.keys() != adapter.layers.keys():
        raise WireError(f"it has index sets of {sorted(tensors)}, and pairs of {sorted(adapter.layers)}")
    for layer, index in tensors.items():
        whole = index.dtype in {dtype for _, dtype in INDEX_TYPES} and index.dim() == 1
        wide = index.long()
        if not whole or (wide < 0).any() or (wide >= rank).any() or (wide.diff() <= 0).any():
            raise WireError(f"the index set of {layer} does not increase within 0..{rank - 1}")
    return {layer: index.to(torch.int32) for layer, index in tensors.items()}


def _exact(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Returns what travelled as it is."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise WireError(f"{name}: it is not finite")
    return tensors


def _extras(tensors: Mapping[str, Tensor], rank: int) -> Mapping[str, Tensor]:
    """Returns seeds, ranks and scores: single numbers, or one for each part of a layer."""
    for name, tensor in tensors.items():
        if tensor.dim() > 1 or tensor.numel() > rank:
            raise WireError(f"{name} has shape {list(tensor.shape)}; there can be {rank} numbers")
    return _exact(tensors)


def _change(tensors: Mapping[str, Tensor], change: Change, template: Template) -> BaseUpdate:
    """Returns a change of the base: pairs of any rank; what else there is (seeds) is dense."""
    _exact(tensors)
    factors = {f"{layer}:{factor}": layer for layer in change.scales for factor in ("A", "Bt")}
    if not (change.scales.keys() <= template.layers.keys() and factors.keys() <= tensors.keys()):
        raise WireError("a change of the base is of layers that the model does not have, or lacks a factor")
    for name, layer in factors.items():
        width = template.layers[layer][0 if name.endswith(":A") else 1]
        if tensors[name].dtype != torch.float32 or tensors[name].dim() != 2 or tensors[name].shape[1] != width:
            raise WireError(f"a change of the base has {name} as {list(tensors[name].shape)}, not [k, {width}]")
    layers = {name: LoRA(tensors[f"{name}:A"], tensors[f"{name}:Bt"], scale) for name, scale in change.scales.items()}
    rest = {name.removesuffix(":dense"): tensor for name, tensor in tensors.items() if name not in factors}
    return BaseUpdate(change.version, Adapter(layers, rest), change.whole)
