"""Bases whose linear layers are kept in 4 bits (NF4) or 8 bits, through bitsandbytes.

A quantised layer is computed as x Wᵀ + b with W dequantised for the moment: in the forward pass, again in the backward
pass, and by nobody else. bitsandbytes' own forwards are not used, for they make a result depend on more than its input:
on CPUs with bfloat16 instructions, whatever is evaluated repacks the weights, after which the layer passes on no
gradient to its input; and in 8 bits activations are rounded too, with outliers looked for over the whole batch, so that
a client's result would depend on who is trained beside it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fslora.config import ModelConfig
from fslora.errors import ModelError
from fslora.objectives import Objective
from fslora.types import Tensor

BITS = {"4bit": "load_in_4bit", "8bit": "load_in_8bit"}
"""What transformers calls each kind."""
POOLER = "pooler"
"""It lies inside the backbone, and is fresh with some checkpoints."""


def quantization(config: ModelConfig, checkpoint: Any, objective: Objective, device: torch.device) -> dict[str, Any]:
    """Returns the options that load a base as ``model.quantize`` has it; none where it is 'none'.

    Args:
        config: What is asked for.
        checkpoint: The checkpoint's own configuration.
        objective: What kind of model is loaded.
        device: Where to.

    Raises:
        ModelError: bitsandbytes is not installed or has nothing for this device, or the checkpoint is quantised already
            in another way.
    """
    stored = _stored(config.name, checkpoint)
    if stored not in (None, config.quantize):
        raise ModelError(
            f"model.quantize is {config.quantize!r}, but the weights of {config.name!r} are kept in {stored} already; "
            f"set model.quantize to {stored!r}, or name a checkpoint that is not quantised"
        )
    if config.quantize == "none":
        return {}
    _check_installed(config.quantize, device)
    options: dict[str, Any] = {"device_map": {"": device}}
    if stored is None:
        options["quantization_config"] = _asked(config, _kept(checkpoint, objective))
    return options


def _stored(name: str, checkpoint: Any) -> str | None:
    """How a checkpoint's weights are quantised: None, '4bit' or '8bit'."""
    stored = getattr(checkpoint, "quantization_config", None)
    if stored is None:
        return None
    fields = stored if isinstance(stored, dict) else stored.to_dict()
    kinds = [kind for kind, flag in BITS.items() if fields.get(flag)]
    if not kinds:
        raise ModelError(
            f"model.name {name!r} is quantised ({fields.get('quant_method')}) in a way that cannot be trained here; "
            "name a checkpoint that is not quantised, and set model.quantize to '4bit' or '8bit'"
        )
    return kinds[0]


def _check_installed(asked: str, device: torch.device) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.quantize is {asked!r}, but bitsandbytes is not installed; "
            "run `pip install 'fslora[quantized]'`, or set model.quantize to 'none'"
        )
    import bitsandbytes

    supported = getattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    if device.type not in supported:
        raise ModelError(
            f"model.quantize is {asked!r}, but bitsandbytes {bitsandbytes.__version__} computes on "
            f"{', '.join(sorted(supported))} only, and model.device is {device.type!r}; "
            "run `pip install 'fslora[quantized]'` for a newer one, or set model.quantize to 'none'"
        )


def _asked(config: ModelConfig, kept: list[str]) -> Any:
    from transformers import BitsAndBytesConfig

    if config.quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        llm_int8_skip_modules=kept,
    )


def _kept(checkpoint: Any, objective: Objective) -> list[str]:
    """What is not quantised: heads, which are trained whole, and the output layer over the vocabulary."""
    import transformers

    with torch.device("meta"):
        return [*_unpacked(getattr(transformers, objective.auto).from_config(checkpoint)), f".*{POOLER}"]


def _unpacked(model: Any) -> list[str]:
    """The paths of what stands beside the backbone, and of the output layer."""
    output = model.get_output_embeddings()
    outputs = [path for path, module in model.named_modules() if output is not None and module is output]
    return [*(name for name, _ in model.named_children() if name != model.base_model_prefix), *outputs]


def pretend(model: Any) -> None:
    """Makes a model without weights, on the meta device, compute as a quantised one does."""
    kept = _unpacked(model)
    for path, module in model.named_modules():
        beside = any(path == name or path.startswith(f"{name}.") for name in kept) or POOLER in path.split(".")
        if type(module) is nn.Linear and not beside:
            module.__class__ = PackedLinear


class PackedLinear(nn.Linear):
    """In the place of a layer of bitsandbytes, where there are no weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns x Wᵀ + b."""
        return _linear(self, x)


def is_quantized(module: nn.Module) -> bool:
    """Returns whether a layer's weights are kept in bitsandbytes' 4 or 8 bits."""
    return isinstance(module, nn.Linear) and (
        hasattr(module.weight, "quant_state") or module.weight.dtype == torch.int8
    )


def prepare(model: Any) -> None:
    """Lets the quantised layers of a model compute as the head of this file says."""
    for module in model.modules():
        if is_quantized(module):
            module.forward = partial(_linear, module)


def dequantized(layer: nn.Linear) -> Tensor:
    """Returns a quantised layer's weights [o i], in a copy of its own."""
    weight: Any = layer.weight
    if isinstance(layer, PackedLinear):
        copied: Tensor = weight.clone()
        return copied
    import bitsandbytes.functional as bnb

    if weight.dtype == torch.int8:
        kept: Any = layer
        scale = kept.state.SCB if weight.SCB is None else weight.SCB
        back: Callable[..., Tensor] = bnb.int8_vectorwise_dequant
        return back(weight.data, scale)
    back = bnb.dequantize_4bit
    return back(weight.data, weight.quant_state)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    result: Tensor = QuantizedLinear.apply(x, layer)  # type: ignore[no-untyped-call]
    return result


class QuantizedLinear(torch.autograd.Function):
    """x Wᵀ + b of a frozen quantised layer; only the packed weights outlive the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        """Returns [... o]; x [... i]."""
        ctx.layer = layer
        return functional.linear(x, dequantized(layer).to(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        """Returns the gradient by x."""
        return gradient @ dequantized(ctx.layer).to(gradient.dtype), None
