"""Where adapters act: what is added to, or put in the place of, a frozen linear layer's output.

A cohort's batches lie one after the other along the first dimension. The base layer sees them as one batch;
the low-rank path is a batched product over the clients:

    y[c n o] = x W0ᵀ  +  scale[c] · (x[c n i] A[c k i]ᵀ) Bt[c k o],     n = b · t

Clients of smaller rank are padded with zero rows in A and in Bt. Both being zero, such rows get zero
gradients from each other and stay zero under every optimizer used here, so no mask is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from fslora.types import Tensor


class Change(Protocol):
    """What a slot does to its layer's output while it is attached."""

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the changed output for input ``x`` [n ... i] and the frozen layer's output ``y`` [n ... o]."""


class Slot:
    """A forward hook on one module: does nothing until a change is attached."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.change: Change | None = None
        self._handle: RemovableHandle = module.register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return None if self.change is None else self.change.apply(args[0], output)


class Dropout:
    """Inverted dropout whose mask comes from an addressed stream, not from the global one."""

    def __init__(self, p: float, generator: torch.Generator) -> None:
        self.p = p
        self.generator = generator

    def __call__(self, x: Tensor) -> Tensor:
        """Returns x with a share p of its entries zeroed and the rest divided by 1 - p."""
        keep = torch.empty(x.shape, dtype=x.dtype).bernoulli_(1 - self.p, generator=self.generator)
        return x * keep.to(x.device).div_(1 - self.p)


@dataclass(frozen=True)
class SinglePair:
    """One adapter for the whole batch."""

    A: Tensor
    """[k i]."""
    Bt: Tensor
    """[k o]."""
    scale: float
    dropout: Dropout | None = None

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns y + scale · (x Aᵀ) Bt."""
        if self.dropout:
            x = self.dropout(x)
        return y + self.scale * (x @ self.A.to(x.dtype).T) @ self.Bt.to(x.dtype)


@dataclass(frozen=True)
class SingleDense:
    """One trained weight in the place of the frozen layer's own."""

    weight: Tensor
    """[o i]."""
    bias: Tensor | None

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
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

    def join(self, z: Tensor, shape: torch.Size) -> Tensor:
        """Returns z [c n d] in the shape of the concatenated batch, without what ``split`` filled up."""
        if self._equal:
            return z.reshape(shape)
        rows = z.reshape(self.clients * self._widest, -1, z.shape[-1])
        return rows.index_select(0, self._place).reshape(shape)

    def can_add_in_place(self, y: Tensor) -> bool:
        """Returns whether ``y`` can be viewed as [c n o] without a copy."""
        return self._equal and y.is_contiguous()


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

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns y plus each client's low-rank path; y's own memory is reused where it can be."""
        if self.dropout:
            x = self.dropout(x)
        h = torch.bmm(self.layout.split(x), self.A.to(x.dtype).transpose(1, 2)) * self.scale.to(x.dtype)
        Bt = self.Bt.to(x.dtype)
        if self.layout.can_add_in_place(y):
            y.view(self.layout.clients, -1, y.shape[-1]).baddbmm_(h, Bt)
            return y
        return y + self.layout.join(torch.bmm(h, Bt), y.shape)


@dataclass(frozen=True)
class StackedDense:
    """One trained weight per client in the place of the frozen layer's own."""

    weight: Tensor
    """[c o i]."""
    bias: Tensor | None
    """[c o]."""
    layout: Layout

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns x Wᵀ + bias with each client's own weight."""
        z = torch.bmm(self.layout.split(x), self.weight.to(x.dtype).transpose(1, 2))
        if self.bias is not None:
            z = z + self.bias.to(x.dtype).unsqueeze(1)
        return self.layout.join(z, y.shape)
