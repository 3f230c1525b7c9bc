"""Adapters as named tensors and a JSON description, as they lie in files; without loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fslora.types import Adapter, LoRA, Tensor


def pack(parts: Mapping[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns named adapters as (named tensors, description); ``unpack`` is its inverse."""
    return _unshared(parts), {
        "scales": {part: {name: pair.scale for name, pair in a.layers.items()} for part, a in parts.items()},
        "dense": {part: list(adapter.dense) for part, adapter in parts.items()},
    }


def _unshared(parts: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """Every tensor under a unique name; those that share memory are copied, because safetensors takes no aliases."""
    tensors, seen = {}, set()
    for part, adapter in parts.items():
        for name, tensor in adapter.tensors().items():
            packed = tensor.contiguous()
            memory = packed.untyped_storage().data_ptr()
            tensors[f"{part}|{name}"] = packed.clone() if memory in seen else packed
            seen.add(memory)
    return tensors


def unpack(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> dict[str, Adapter]:
    """Returns the named adapters that ``pack`` took apart."""
    parts = {}
    for part, scales in description["scales"].items():
        layers = {
            name: LoRA(tensors[f"{part}|{name}:A"], tensors[f"{part}|{name}:Bt"], scale)
            for name, scale in scales.items()
        }
        parts[part] = Adapter(layers, {name: tensors[f"{part}|{name}:dense"] for name in description["dense"][part]})
    return parts
