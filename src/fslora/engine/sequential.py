"""The oracle: one client after the other, with plain torch and nothing batched over clients.

Written to be read and to be compared with; `fslora.engine.cohort` must give the same result to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.nn import functional

from fslora.config import LocalConfig
from fslora.engine.optim import make_optimizer
from fslora.models.base import Base
from fslora.models.slots import Change, Dropout, SinglePair
from fslora.types import LocalProblem, Trained


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
        start = problem.adapter
        leaves = {
            name: tensor.to(self.base.device, copy=True).requires_grad_() for name, tensor in start.tensors().items()
        }
        dropout = Dropout(self.dropout, problem.rng.torch()) if self.dropout else None
        pairs: dict[str, Change] = {
            name: SinglePair(leaves[f"{name}:A"], leaves[f"{name}:Bt"], pair.scale, dropout)
            for name, pair in start.layers.items()
        }
        dense = {name: leaves[f"{name}:dense"] for name in start.dense}
        optimizer = make_optimizer(list(leaves.values()), self.local, lr, fused=False)
        losses = []
        for batch in problem.batches:
            optimizer.zero_grad()
            with self.base.attached(pairs, self.base.single_heads(dense)):
                logits = self.base.logits(batch)
            loss = functional.cross_entropy(logits.float(), batch["labels"].to(logits.device))
            loss.backward()  # type: ignore[no-untyped-call]
            if self.local.clip_norm:
                torch.nn.utils.clip_grad_norm_(leaves.values(), self.local.clip_norm)
            optimizer.step()
            losses.append(loss.item())
        values = {name: leaf.detach().cpu() for name, leaf in leaves.items()}
        return Trained(problem.client, start.with_tensors(values), tuple(losses))
