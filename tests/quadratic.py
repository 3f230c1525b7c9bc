"""A local problem that can be solved on paper: Σ ½ ‖W + s B A - M‖² over the layers, under plain SGD.

The gradient with respect to W is G = W + s B A - M; with respect to B it is s G Aᵀ, to A it is s Bᵀ G.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fslora.rng import Rng
from fslora.types import Adapter, Client, Round, Start, Template, Tensor, Trained
from kit import TEMPLATE, Training

Targets = Mapping[int, Mapping[str, Tensor]]
"""Client → layer → M [o i]."""


def drawn_targets(fleet: tuple[Client, ...], template: Template = TEMPLATE, common: bool = False) -> Targets:
    """Entries of N(0, 1), others for every client (or the same for all)."""

    def target(client: int, layer: str, shape: tuple[int, int]) -> Tensor:
        stream = Rng(9).child("target", 0 if common else client, layer).torch()
        return torch.randn(shape[1], shape[0], generator=stream)

    return {c.id: {name: target(c.id, name, shape) for name, shape in template.layers.items()} for c in fleet}


def descent(targets: Targets, lr: float, steps: int = 1, base: Mapping[str, Tensor] | None = None) -> Training:
    """Plain SGD on the factors that a start trains; ``base`` is W by layer, zero where there is none."""

    def train(start: Start, client: Client, round: Round) -> Trained:
        del round
        resting = {"A": ":Bt", "B": ":A", "both": "-"}[start.trains]
        tensors = {name: tensor.detach().clone() for name, tensor in start.adapter.tensors().items()}
        leaves = {n: t.requires_grad_() for n, t in tensors.items() if not n.endswith((resting, ":dense"))}
        losses = []
        for _ in range(steps):
            loss = quadratic(start.adapter.with_tensors(tensors), targets[client.id], base)
            gradients = torch.autograd.grad(loss, list(leaves.values()))
            with torch.no_grad():
                for leaf, gradient in zip(leaves.values(), gradients, strict=True):
                    leaf.sub_(lr * gradient)
            losses.append(loss.item())
        values = {name: tensor.detach() for name, tensor in tensors.items()}
        return Trained(client.id, start.adapter.with_tensors(values), tuple(losses))

    return train


def quadratic(adapter: Adapter, target: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None) -> Tensor:
    """Σ ½ ‖W + s B A - M‖²."""
    errors = [pair.delta + (base or {}).get(name, 0.0) - target[name] for name, pair in adapter.layers.items()]
    return 0.5 * torch.stack([error.square().sum() for error in errors]).sum()
