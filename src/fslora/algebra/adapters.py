"""Arithmetic on whole adapters: the same function applied to every tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from fslora.rng import Rng
from fslora.types import Adapter, LoRA, Template, Tensor


def combine(function: Callable[..., Tensor], first: Adapter, *others: Adapter) -> Adapter:
    """Returns ``function`` applied to corresponding tensors; scales are those of ``first``.

    Raises:
        ValueError: The adapters do not have the same layers and dense tensors.
    """
    for other in others:
        if other.layers.keys() != first.layers.keys() or other.dense.keys() != first.dense.keys():
            raise ValueError("adapters differ in their layers or dense tensors")
    layers = {
        name: LoRA(
            A=function(pair.A, *(other.layers[name].A for other in others)),
            Bt=function(pair.Bt, *(other.layers[name].Bt for other in others)),
            scale=pair.scale,
        )
        for name, pair in first.layers.items()
    }
    dense = {name: function(tensor, *(o.dense[name] for o in others)) for name, tensor in first.dense.items()}
    return Adapter(layers, dense)


def add(left: Adapter, right: Adapter) -> Adapter:
    """Returns left + right, tensor by tensor, with the scales of ``left``."""
    return combine(torch.add, left, right)


def add_into(delta: Adapter, base: Adapter) -> Adapter:
    """Returns base + delta with the scales of ``base``, in the memory of ``delta``, which is not to be used again.

    The same bits as ``add``, without a third adapter beside the two.
    """
    return combine(lambda left, right: right.add_(left), base, delta)


def sub(left: Adapter, right: Adapter) -> Adapter:
    """Returns left - right, tensor by tensor, with the scales of ``left``."""
    return combine(torch.sub, left, right)


def zeros_like(adapter: Adapter) -> Adapter:
    """Returns an adapter of zeros in the same shapes."""
    return combine(torch.zeros_like, adapter)


def rescaled(adapter: Adapter, factor: float) -> Adapter:
    """Returns the same tensors with every pair's scale multiplied by ``factor``; nothing is copied."""
    layers = {name: replace(pair, scale=pair.scale * factor) for name, pair in adapter.layers.items()}
    return Adapter(layers, adapter.dense)


def completed(part: Adapter, rest: Adapter) -> Adapter:
    """Returns ``part`` with every factor that has no rows in it taken from ``rest``; all else is that of ``part``."""
    layers = {
        name: LoRA(
            A=pair.A if len(pair.A) else rest.layers[name].A,
            Bt=pair.Bt if len(pair.Bt) else rest.layers[name].Bt,
            scale=pair.scale,
        )
        for name, pair in part.layers.items()
    }
    return Adapter(layers, part.dense)


def all_finite(adapter: Adapter) -> bool:
    """Returns whether no tensor holds a NaN or an infinity."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in adapter.tensors().values())


def initial(template: Template, rank: int, generators: Mapping[str, torch.Generator]) -> Adapter:
    """Returns a fresh adapter of one rank: A uniform in ±1/sqrt(d_in), as PEFT draws it, and B zero.

    Args:
        template: Shapes, scale and the head's initial values.
        rank: The number of rank-one parts.
        generators: Layer name → its own stream, so that adding a layer changes no other one's draw.
    """
    layers = {}
    for name, (d_in, d_out) in template.layers.items():
        A = fresh_rows(rank, d_in, generators[name])
        layers[name] = LoRA(A=A, Bt=torch.zeros(rank, d_out), scale=template.scale(rank))
    return Adapter(layers, {name: tensor.clone() for name, tensor in template.dense.items()})


def fresh_rows(rank: int, d_in: int, generator: torch.Generator) -> Tensor:
    """Returns rows of a fresh A: uniform in ±1/sqrt(d_in)."""
    A: Tensor = (torch.rand(rank, d_in, generator=generator) * 2 - 1) / d_in**0.5
    return A


def at_scale(pair: LoRA, scale: float) -> LoRA:
    """Returns the same product at another scale; their ratio goes into B."""
    return LoRA(pair.A, pair.Bt * (pair.scale / scale), scale)


def grown(adapter: Adapter, template: Template, rank: int, rng: Rng) -> Adapter:
    """Returns the first ``rank`` parts of every layer at that rank's scale, filled up with fresh ones: A drawn, B zero.

    A part whose two factors are zero would have no gradient ever again. Layers that the adapter lacks are fresh; parts
    of one place and stream are the same whatever ``rank`` is. Dense tensors are the adapter's.
    """
    layers, scale = {}, template.scale(rank)
    for name, (d_in, d_out) in template.layers.items():
        none = LoRA(torch.zeros(0, d_in), torch.zeros(0, d_out), scale)
        pair = at_scale(adapter.layers.get(name, none), scale)
        missing = max(0, rank - pair.rank)
        A = torch.cat([pair.A[:rank], fresh_rows(missing, d_in, rng.child(name).torch())])
        layers[name] = LoRA(A, torch.cat([pair.Bt[:rank], torch.zeros(missing, d_out)]), scale)
    return Adapter(layers, adapter.dense)
