"""Where adapters act: what is added to, or put in the place of, a frozen linear layer's output.

A cohort's batches lie one after the other along the first dimension. The base layer sees them as one batch;
the low-rank path is a batched product over the clients:

    y[c n o] = x W0ᵀ  +  scale[c] · (x[c n i] A[c k i]ᵀ) Bt[c k o],     n = b · t

Clients of smaller rank are padded with zero rows in A and in Bt. Both being zero, such rows get zero
gradients from each other and stay zero under every optimizer used here, so no mask is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fslora.rng import Rng
from fslora.types import Tensor


class Change(Protocol):
    """What a slot computes instead of its layer while it is attached."""

    def apply(self, x: Tensor, layer: Slot) -> Tensor:
        """Returns the changed output [n ... o] for input ``x`` [n ... i]."""


class Slot:
    """One frozen layer whose forward can be changed; without a change it is the layer's own.

    The forward of the module object is replaced, not the module: the model's code goes on seeing its own
    modules (some read ``.weight`` of their linear layers), and names stay those of the checkpoint.
    """

    def __init__(self, module: nn.Module, path: str) -> None:
        self.module = module
        self.path = path
        self.frozen: Callable[[Tensor], Tensor] = module.forward
        self.change: Change | None = None
        module.forward = self._forward

    def _forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) if self.change is None else self.change.apply(x, self)

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None] | None:
        """Returns ([o i], [o]) of a layer that is nothing but x Wᵀ + b, or None (quantised layers, say)."""
        module = self.module
        if type(module) is nn.Linear:
            return module.weight, module.bias
        if type(module) is Conv1D:
            convolution: Any = module
            return convolution.weight.T, convolution.bias
        return None


@dataclass(frozen=True)
class Dropout:
    """Inverted dropout of one local step. Masks have addresses: a layer that is computed again gets the same one."""

    p: float
    rng: Rng

    def mask(self, x: Tensor, path: str) -> Tensor:
        """Returns what the input x of the layer ``path`` is multiplied with: 0 for a share p, 1 / (1 - p) elsewhere."""
        keep = torch.empty_like(x)
        if not x.is_meta:  # there is nothing to draw, and no generator, where only shapes are followed
            keep.bernoulli_(1 - self.p, generator=self.rng.child(path).torch(x.device))
        return keep.div_(1 - self.p)


@dataclass(frozen=True)
class SinglePair:
    """One adapter for the whole batch."""

    A: Tensor
    """[k i]."""
    Bt: Tensor
    """[k o]."""
    scale: float
    dropout: Dropout | None = None
    frozen: SinglePair | None = None
    """A second pair in the forward pass; dropout does not touch it."""

    def apply(self, x: Tensor, layer: Slot) -> Tensor:
        """Returns the frozen output + scale · (x Aᵀ) Bt."""
        y = layer.frozen(x)
        if self.frozen:
            y = y + self.frozen.low_rank(x)
        return y + self.low_rank(x * self.dropout.mask(x, layer.path) if self.dropout else x)

    def low_rank(self, x: Tensor) -> Tensor:
        """Returns scale · (x Aᵀ) Bt."""
        return self.scale * (x @ self.A.to(x.dtype).T) @ self.Bt.to(x.dtype)


@dataclass(frozen=True)
class SingleDense:
    """One trained weight in the place of the frozen layer's own."""

    weight: Tensor
    """[o i]."""
    bias: Tensor | None

    def apply(self, x: Tensor, layer: Slot) -> Tensor:
        """Returns x Wᵀ + bias."""
        return functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Layout:
    """How a concatenated batch splits into clients: sizes[c] examples each, in order."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.clients = len(sizes)
        self.examples = sum(sizes)
        self._widest = max(sizes)
        self._equal = min(sizes) == self._widest
        owner = torch.repeat_interleave(torch.arange(self.clients), torch.tensor(sizes))
        within = torch.cat([torch.arange(size) for size in sizes])
        self.owner = owner.to(device)
        """[examples] which client of the stack each example belongs to."""
        self._place = (owner * self._widest + within).to(device)

    def split(self, x: Tensor) -> Tensor:
        """Returns x [examples ... d] as [c n d]; clients with fewer examples are filled up with zeros."""
        if self._equal:
            return x.reshape(self.clients, -1, x.shape[-1])
        rows = x.reshape(self.examples, -1, x.shape[-1])
        padded = rows.new_zeros(self.clients * self._widest, *rows.shape[1:])
        return padded.index_copy(0, self._place, rows).reshape(self.clients, -1, x.shape[-1])

    def join(self, z: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Returns z [c n d] in the shape of the concatenated batch, without what ``split`` filled up."""
        if self._equal:
            return z.reshape(shape)
        rows = z.reshape(self.clients * self._widest, -1, z.shape[-1])
        return rows.index_select(0, self._place).reshape(shape)

    @property
    def equal(self) -> bool:
        """Whether every client has the same number of examples, so that ``split`` copies nothing."""
        return self._equal


class AdaptedLinear(torch.autograd.Function):
    """x W0ᵀ + b + scale · (x Aᵀ) Bt per client as one step, forward and backward.

    The low-rank products are added into the frozen layer's output, and into its input gradient, where these lie.
    Left to autograd, writing into a view clones the gradient, and the two gradients of x are added by a further pass
    over memory; on wide layers those copies cost as much as the low-rank products themselves.

    A mask of dropout acts on the input of the low-rank path alone. A second pair (``frozen_A``, ``frozen_Bt``, with its
    scale folded in) may take part without being trained; the mask does not touch it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        Bt: Tensor,
        scale: Tensor,
        mask: Tensor | None,
        frozen_A: Tensor | None,
        frozen_Bt: Tensor | None,
    ) -> Tensor:
        """Returns [... o]; x and mask [... i], weight [o i], A [c k i], Bt [c k o], scale [c 1 1]."""
        split = x.reshape(A.shape[0], -1, x.shape[-1])
        y = functional.linear(split, weight, bias)
        low = split if mask is None else split * mask.view_as(split)
        h = torch.bmm(low, A.transpose(1, 2)).mul_(scale)
        y.baddbmm_(h, Bt)
        if frozen_A is not None and frozen_Bt is not None:
            y.baddbmm_(torch.bmm(split, frozen_A.transpose(1, 2)), frozen_Bt)
        ctx.save_for_backward(low, weight, A, Bt, scale, h, mask, frozen_A, frozen_Bt)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients by x, A and Bt, where they are asked for; what is frozen has none."""
        low, weight, A, Bt, scale, h, mask, frozen_A, frozen_Bt = ctx.saved_tensors
        g = gradient.reshape(len(A), -1, gradient.shape[-1])
        wants_x, wants_A, wants_Bt = ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        dx = dh = None
        if wants_x or wants_A:
            dh = torch.bmm(g, Bt.transpose(1, 2)).mul_(scale)
        if wants_x:
            assert dh is not None
            dx = torch.matmul(g, weight)
            if mask is None:
                dx.baddbmm_(dh, A)
            else:
                dx.addcmul_(torch.bmm(dh, A), mask.view_as(dx))
            if frozen_A is not None:
                dx.baddbmm_(torch.bmm(g, frozen_Bt.transpose(1, 2)), frozen_A)
            dx = dx.view(*gradient.shape[:-1], -1)
        dA = torch.bmm(dh.transpose(1, 2), low) if wants_A and dh is not None else None
        dBt = torch.bmm(h.transpose(1, 2), g) if wants_Bt else None
        return dx, None, None, dA, dBt, None, None, None, None


@dataclass(frozen=True)
class StackedPair:
    """One adapter per client of a concatenated batch."""

    A: Tensor
    """[c k i], zero rows beyond a client's own rank."""
    Bt: Tensor
    """[c k o], likewise."""
    scale: Tensor
    """[c 1 1]."""
    layout: Layout
    dropout: Dropout | None = None
    frozen: tuple[Tensor, Tensor] | None = None
    """A second pair [c f i], [c f o] in the forward pass, its scale folded in; dropout does not touch it."""

    def apply(self, x: Tensor, layer: Slot) -> Tensor:
        """Returns the frozen output plus each client's low-rank path."""
        A, Bt, scale = self.A.to(x.dtype), self.Bt.to(x.dtype), self.scale.to(x.dtype)
        frozen_A, frozen_Bt = [tensor.to(x.dtype) for tensor in self.frozen] if self.frozen else (None, None)
        plain = layer.weight_and_bias()
        mask = self.dropout.mask(x, layer.path) if self.dropout else None
        if plain and self.layout.equal:
            fused: Tensor = AdaptedLinear.apply(x, *plain, A, Bt, scale, mask, frozen_A, frozen_Bt)  # type: ignore[no-untyped-call]
            return fused
        y = layer.frozen(x)
        if frozen_A is not None and frozen_Bt is not None:
            y = y + self.layout.join(self.layout.split(x) @ frozen_A.transpose(1, 2) @ frozen_Bt, y.shape)
        if mask is not None:
            x = x * mask
        h = torch.bmm(self.layout.split(x), A.transpose(1, 2)) * scale
        return y + self.layout.join(torch.bmm(h, Bt), y.shape)


@dataclass(frozen=True)
class StackedDense:
    """One trained weight per client in the place of the frozen layer's own."""

    weight: Tensor
    """[c o i]."""
    bias: Tensor | None
    """[c o]."""
    layout: Layout

    def apply(self, x: Tensor, layer: Slot) -> Tensor:
        """Returns x Wᵀ + bias with each client's own weight."""
        z = torch.bmm(self.layout.split(x), self.weight.to(x.dtype).transpose(1, 2))
        if self.bias is not None:
            z = z + self.bias.to(x.dtype).unsqueeze(1)
        return self.layout.join(z, (*x.shape[:-1], z.shape[-1]))
