"""Client optimizers: torch's own, over stacked clients. They start fresh each round."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim import SGD, AdamW, Optimizer

from fslora.config import LocalConfig
from fslora.types import Tensor


def make_optimizer(parameters: Sequence[Tensor], local: LocalConfig, lr: float, fused: bool) -> Optimizer:
    """Returns the configured optimizer; all of them act elementwise, so stacked clients stay independent."""
    if local.optimizer == "adamw":
        return AdamW(parameters, lr=lr, weight_decay=local.weight_decay, fused=fused)
    return SGD(parameters, lr=lr, momentum=local.momentum, weight_decay=local.weight_decay, fused=fused)


def narrowed(old: Optimizer | None, new: Optimizer) -> Optimizer:
    """Returns ``new``, of the first numbers of ``old``'s, carrying their state: for when clients have finished."""
    if old is None:
        return new
    (source,), (target,) = old.param_groups[0]["params"], new.param_groups[0]["params"]
    new.state[target] = {
        name: value[: len(target)] if isinstance(value, torch.Tensor) and value.dim() else value
        for name, value in old.state[source].items()
    }
    return new
