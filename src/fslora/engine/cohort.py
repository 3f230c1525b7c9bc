"""The cohort engine: every client of a chunk takes its local step in one forward and one backward pass.

The clients' batches are concatenated, so the frozen layers run once over all of them; the low-rank path and
the heads are batched products over the clients (`fslora.models.slots`). One backward of the *sum* of the
clients' mean losses gives each client exactly its own gradient. All that a client trains lies in one row of
one buffer [c p]: its norm, its clipping and its optimizer step are then row operations.

Memory is one base, the chunk's adapters with their optimizer state, and the activations of one step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch.nn import functional

from fslora.config import LocalConfig
from fslora.engine.optim import make_optimizer, narrowed
from fslora.models.base import Base
from fslora.models.slots import Change, Dropout, Layout, StackedDense, StackedPair
from fslora.types import Adapter, Batch, LocalProblem, Tensor, Trained


class CohortEngine:
    """Trains clients together, ``chunk`` at a time."""

    def __init__(self, base: Base, local: LocalConfig, dropout: float, chunk: int) -> None:
        self.base = base
        self.local = local
        self.dropout = dropout
        self.chunk = chunk

    def train(self, problems: Iterable[LocalProblem], lr: float) -> Iterator[Trained]:
        """Yields each problem's result, in order; no more than one chunk of problems is held at a time."""
        iterator = iter(problems)
        while chunk := list(islice(iterator, self.chunk)):
            yield from self._train_chunk(chunk, lr)

    def _train_chunk(self, problems: list[LocalProblem], lr: float) -> list[Trained]:
        # Longest first: the clients still active at any step are then the first rows of the stack.
        order = sorted(range(len(problems)), key=lambda c: -len(problems[c].batches))
        ordered = [problems[c] for c in order]
        stack = Stack([problem.adapter for problem in ordered], self.base.device)
        dropout = Dropout(self.dropout, ordered[0].rng.torch()) if self.dropout else None
        losses: list[Tensor] = []
        active, optimizer = 0, None
        for step in range(len(ordered[0].batches)):
            batches = [problem.batches[step] for problem in ordered if step < len(problem.batches)]
            if len(batches) != active:
                active = len(batches)
                stack.activate(active)
                optimizer = narrowed(optimizer, active, make_optimizer([stack.flat_leaf], self.local, lr, fused=True))
            losses.append(self._backward(stack, batches, dropout))
            stack.clip(self.local.clip_norm)
            assert optimizer is not None
            optimizer.step()
        columns = [loss.tolist() for loss in losses]
        results = {
            order[c]: Trained(
                problem.client, stack.adapter(c), tuple(columns[s][c] for s in range(len(problem.batches)))
            )
            for c, problem in enumerate(ordered)
        }
        return [results[c] for c in range(len(problems))]

    def _backward(self, stack: Stack, batches: Sequence[Batch], dropout: Dropout | None) -> Tensor:
        """One pass for all clients; returns their mean losses [c]."""
        layout = Layout([len(batch["labels"]) for batch in batches], self.base.device)
        batch = concatenated(batches, self.base.tokenizer.pad_token_id)
        pairs, heads = stack.changes(self.base, layout, dropout)
        with self.base.attached(pairs, heads):
            logits = self.base.logits(batch)
        each = functional.cross_entropy(logits.float(), batch["labels"].to(logits.device), reduction="none")
        sizes = torch.bincount(layout.owner, minlength=layout.clients)
        means = each.new_zeros(layout.clients).index_add(0, layout.owner, each) / sizes
        stack.backward(means.sum())
        return means.detach()


class Stack:
    """The trainable tensors of c clients as one buffer [c p] with named views, and their gradients likewise."""

    def __init__(self, adapters: Sequence[Adapter], device: torch.device) -> None:
        self._adapters = adapters
        first = adapters[0]
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, pair in first.layers.items():
            rank = max(adapter.layers[name].rank for adapter in adapters)
            self._shapes[f"{name}:A"] = (rank, pair.A.shape[1])
            self._shapes[f"{name}:Bt"] = (rank, pair.Bt.shape[1])
        self._shapes.update({f"{name}:dense": tuple(tensor.shape) for name, tensor in first.dense.items()})
        sizes = [torch.Size(shape).numel() for shape in self._shapes.values()]
        self._flat = torch.zeros(len(adapters), sum(sizes), device=device)
        self._flat_gradient = torch.zeros_like(self._flat)
        self._scales = {
            name: torch.tensor([a.layers[name].scale for a in adapters], device=device).view(-1, 1, 1)
            for name in first.layers
        }
        for c, adapter in enumerate(adapters):
            views = self._views(self._flat[c : c + 1])
            for name, tensor in adapter.tensors().items():
                views[name][0][tuple(slice(0, n) for n in tensor.shape)].copy_(tensor)

    def activate(self, clients: int) -> None:
        """Makes the first ``clients`` rows the ones that train; the others keep their values."""
        self.flat_leaf = self._flat[:clients].detach().requires_grad_()
        self.gradient = self._flat_gradient[:clients]
        self.flat_leaf.grad = self.gradient
        views = self._views(self._flat[:clients])
        # Leaves on the buffer's own memory: an optimizer step on the buffer is a step on each of them.
        self._leaves = {name: view.detach().requires_grad_() for name, view in views.items()}
        self._gradients = list(self._views(self.gradient).values())

    def changes(
        self, base: Base, layout: Layout, dropout: Dropout | None
    ) -> tuple[dict[str, Change], dict[str, Change]]:
        """Returns what the slots of the base apply for the active clients: pairs by layer, heads by layer."""
        leaves, n = self._leaves, layout.clients
        pairs: dict[str, Change] = {
            name: StackedPair(leaves[f"{name}:A"], leaves[f"{name}:Bt"], scale[:n], layout, dropout)
            for name, scale in self._scales.items()
        }
        dense = {name.removesuffix(":dense"): leaf for name, leaf in leaves.items() if name.endswith(":dense")}
        heads: dict[str, Change] = {
            path: StackedDense(weight, bias, layout) for path, (weight, bias) in base.head_tensors(dense).items()
        }
        return pairs, heads

    def backward(self, loss: Tensor) -> None:
        """Writes the gradients of ``loss`` into the buffer; zero for what the model never used."""
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(loss, list(self._leaves.values()), allow_unused=True)
        for target, gradient in zip(self._gradients, gradients, strict=True):
            if gradient is None:
                target.zero_()
            else:
                target.copy_(gradient)

    def clip(self, largest: float) -> None:
        """Scales each client's gradient down to a norm of at most ``largest``; 0 leaves it as it is."""
        if largest:
            norms = torch.linalg.vector_norm(self.gradient, dim=1, keepdim=True)
            self.gradient.mul_((largest / (norms + 1e-6)).clamp(max=1.0))

    def adapter(self, c: int) -> Adapter:
        """Returns the trained adapter of client c, at its own rank, as its own memory on the CPU."""
        like, views = self._adapters[c], self._views(self._flat[c : c + 1])
        own = {name: views[name][0][: len(tensor)] for name, tensor in like.tensors().items()}
        return like.with_tensors({name: view.detach().to("cpu", copy=True) for name, view in own.items()})

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        views, start = {}, 0
        for name, shape in self._shapes.items():
            size = torch.Size(shape).numel()
            views[name] = flat[:, start : start + size].view(len(flat), *shape)
            start += size
        return views


def concatenated(batches: Sequence[Batch], pad_id: int) -> Batch:
    """Returns the batches one after the other, padded on the right to the longest text among them."""
    width = max(batch["input_ids"].shape[1] for batch in batches)
    joined = {}
    for name in batches[0]:
        parts = [batch[name] for batch in batches]
        if name != "labels":
            value = pad_id if name == "input_ids" else 0
            parts = [functional.pad(part, (0, width - part.shape[1]), value=value) for part in parts]
        joined[name] = torch.cat(parts)
    return joined
