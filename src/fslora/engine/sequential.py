"""The oracle: one client after the other, with plain torch and nothing batched over clients.

Written to be read and to be compared with; `fslora.engine.cohort` must give the same result to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from fslora.config import LocalConfig
from fslora.engine.optim import make_optimizer
from fslora.models.base import Base
from fslora.models.slots import Change, Dropout, SinglePair
from fslora.types import LocalProblem, Tensor, Trained


class SequentialEngine:
    """Trains each client on its own."""

    def __init__(self, base: Base, local: LocalConfig, dropout: float) -> None:
        self.base = base
        self.local = local
        self.dropout = dropout

    def train(self, problems: Iterable[LocalProblem], lr: float) -> Iterator[Trained]:
        """Yields each problem's result, in order."""
        for problem in problems:
            yield self._train_one(problem, lr)

    def _train_one(self, problem: LocalProblem, lr: float) -> Trained:
        start, device = problem.start, self.base.device
        tensors = {name: tensor.to(device, copy=True) for name, tensor in start.adapter.tensors().items()}
        resting = {"A": ":Bt", "B": ":A", "both": "-"}[start.trains]
        leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items() if not name.endswith(resting)}
        optimizer = make_optimizer(list(leaves.values()), self.local, lr, fused=False)
        losses: list[float] = []
        measured: dict[str, Tensor] = {}
        for step, batch in enumerate(problem.batches):
            optimizer.zero_grad()
            with self.base.attached(*self._changes(problem, tensors, step)):
                each, _ = self.base.objective.losses(self.base, batch)
                loss = each.sum() / max(1, len(each))
                penalty = start.penalty(start.adapter.with_tensors(tensors)) if start.penalty else 0.0
                (loss + penalty).backward()  # type: ignore[no-untyped-call]
            for leaf in leaves.values():
                if leaf.grad is None:  # a layer that the model never ran: no gradient is a gradient of zero
                    leaf.grad = torch.zeros_like(leaf)
            if start.measures_sensitivity:
                for name in start.adapter.layers:
                    measured[name] = measured.get(name, 0.0) + sensitivity(leaves, name) / len(problem.batches)
            if self.local.clip_norm:
                torch.nn.utils.clip_grad_norm_(leaves.values(), self.local.clip_norm)
            optimizer.step()
            losses.append(loss.item())
        values = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        return Trained(problem.client, start.adapter.with_tensors(values), tuple(losses), measured)

    def _changes(
        self, problem: LocalProblem, tensors: dict[str, Tensor], step: int
    ) -> tuple[dict[str, Change], dict[str, Change]]:
        start, device = problem.start, self.base.device
        dropout = Dropout(self.dropout, problem.rng.child(step)) if self.dropout else None
        frozen = {name: SinglePair(p.A.to(device), p.Bt.to(device), p.scale) for name, p in start.frozen.items()}
        pairs: dict[str, Change] = {
            name: SinglePair(tensors[f"{name}:A"], tensors[f"{name}:Bt"], pair.scale, dropout, frozen.get(name))
            for name, pair in start.adapter.layers.items()
        }
        return pairs, self.base.single_heads({name: tensors[f"{name}:dense"] for name in start.adapter.dense})


def sensitivity(leaves: dict[str, Tensor], layer: str) -> Tensor:
    """Returns mean |w · gradient| over the trained entries of each rank-one part of a layer, [k]."""
    moved = []
    for key in (f"{layer}:A", f"{layer}:Bt"):
        if key in leaves:
            gradient = leaves[key].grad
            assert gradient is not None
            moved.append((leaves[key].detach() * gradient).abs())
    return torch.cat(moved, dim=1).mean(dim=1).cpu()
