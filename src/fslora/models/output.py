"""The frozen output layer over the vocabulary: computed where it is asked for, and no more of it held than a chunk.

Logits are the largest tensors of a causal model (positions x vocabulary, several times over in float32). The layer is
frozen, so a loss needs of them only its value and its gradient by the hidden states, and both can be had chunk by chunk
in the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from fslora.memory import common_size
from fslora.models.slots import Slot
from fslora.types import Tensor

CHUNK = 2**25
"""Entries of the logits that are held at once: 128 MiB in float32."""


@dataclass(frozen=True)
class Picked:
    """An output layer that is computed at some positions only."""

    places: Tensor
    """int64 [u]: which of the b · t positions, in reading order. No mask: a GPU would have to wait for its sum."""

    def apply(self, x: Tensor, layer: Slot) -> Tensor:
        """Returns the frozen output [1 u o] at the u positions of x [b t i]."""
        return layer.frozen(x.flatten(0, 1)[self.places]).unsqueeze(0)


@dataclass(frozen=True)
class Skipped:
    """An output layer that hands on its input at some positions, for `FrozenCrossEntropy`."""

    places: Tensor
    """int64 [u], as in `Picked`."""

    def apply(self, x: Tensor, layer: Slot) -> Tensor:
        """Returns x [1 u i] at the u positions of x [b t i]."""
        del layer
        return x.flatten(0, 1)[self.places].unsqueeze(0)


class Noted:
    """An output layer as it is, whose output is remembered."""

    output: Tensor | None = None

    def apply(self, x: Tensor, layer: Slot) -> Tensor:
        """Returns the frozen output."""
        self.output = layer.frozen(x)
        return self.output


class FrozenCrossEntropy(torch.autograd.Function):
    """The cross-entropy of x Wᵀ + b, a chunk of positions at a time; W and b have no gradients.

    A chunk is padded to one of few numbers of rows: the processor's library keeps a kernel for every shape that it has
    met, and hardly two steps predict equally many tokens.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        """Returns each position's loss [u] float32; x [u i], weight [v i], bias [v], labels int64 [u]."""
        losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
        wants_x = ctx.needs_input_grad[0]
        gradient = torch.empty_like(x) if wants_x else None
        most = max(1, CHUNK // len(weight))
        for start in range(0, len(x), most):
            rows = slice(start, min(start + most, len(x)))
            count, room = rows.stop - start, common_size(rows.stop - start, most)
            wanted = functional.pad(labels[rows], (0, room - count)).unsqueeze(1)
            logits = functional.linear(functional.pad(x[rows], (0, 0, 0, room - count)), weight, bias).float()
            total = logits.logsumexp(1, keepdim=True)
            losses[rows] = (total - logits.gather(1, wanted))[:count, 0]
            if gradient is not None:
                share = logits.sub_(total).exp_()
                share.scatter_add_(1, wanted, share.new_full((room, 1), -1.0))
                gradient[rows] = (share.to(x.dtype) @ weight)[:count]
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradient by x."""
        (kept,) = ctx.saved_tensors
        dx = None if kept is None else (kept * gradient.unsqueeze(1)).to(kept.dtype)
        return dx, None, None, None
