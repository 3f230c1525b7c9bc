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
from fslora.data.batches import padding
from fslora.engine.optim import make_optimizer, narrowed
from fslora.models.base import Base
from fslora.models.slots import Change, Dropout, Layout, StackedDense, StackedPair
from fslora.types import Adapter, Batch, LocalProblem, Start, Tensor, Trained


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
        stack = Stack([problem.start for problem in ordered], self.base.device)
        losses: list[Tensor] = []
        active, optimizer = 0, None
        for step in range(len(ordered[0].batches)):
            batches = [problem.batches[step] for problem in ordered if step < len(problem.batches)]
            if len(batches) != active:
                active = len(batches)
                stack.activate(active)
                optimizer = narrowed(optimizer, active, make_optimizer([stack.flat_leaf], self.local, lr, fused=True))
            dropout = Dropout(self.dropout, ordered[0].rng.child(step)) if self.dropout else None
            losses.append(self.backward(stack, batches, dropout))
            assert optimizer is not None
            optimizer.step()
        columns = [loss.tolist() for loss in losses]
        results = {
            order[c]: Trained(
                problem.client,
                stack.adapter(c),
                tuple(columns[s][c] for s in range(len(problem.batches))),
                stack.sensitivity(c, len(problem.batches)),
            )
            for c, problem in enumerate(ordered)
        }
        return [results[c] for c in range(len(problems))]

    def backward(self, stack: Stack, batches: Sequence[Batch], dropout: Dropout | None) -> Tensor:
        """Leaves the active clients' clipped gradients in the stack, and returns their mean losses [c].

        Reads no value of a tensor, so that it also runs on the meta device, where there are none.
        """
        layout = Layout([len(batch["labels"]) for batch in batches], self.base.device)
        batch = concatenated(batches, self.base.pad_id)
        pairs, heads = stack.changes(self.base, layout, dropout)
        # Attached until the gradients are there: with gradient checkpointing the backward pass computes layers again.
        with self.base.attached(pairs, heads):
            each, example = self.base.objective.losses(self.base, batch)
            owner = layout.owner[example]
            sizes = owner.new_zeros(layout.clients).index_add(0, owner, torch.ones_like(owner)).clamp(min=1)
            means = each.new_zeros(layout.clients).index_add(0, owner, each) / sizes
            stack.backward(means.sum())
        stack.add_penalties()
        stack.measure()
        stack.clip(self.local.clip_norm)
        return means.detach()


class Stack:
    """The trainable tensors of c clients as one buffer [c p] with named views, and their gradients likewise.

    A factor that is not trained, and the frozen pairs, are stacked too but lie outside the buffer: no gradient, no
    optimizer state.
    """

    def __init__(self, starts: Sequence[Start], device: torch.device) -> None:
        if len({start.trains for start in starts}) > 1:
            raise ValueError("the clients of one chunk train different factors; a method has to choose per round")
        self._starts = starts
        self._adapters = [start.adapter for start in starts]
        self._measured: dict[str, Tensor] = {}
        first, trains = self._adapters[0], starts[0].trains
        shapes: dict[str, tuple[int, ...]] = {}
        for name, pair in first.layers.items():
            rank = max(adapter.layers[name].rank for adapter in self._adapters)
            shapes[f"{name}:A"] = (rank, pair.A.shape[1])
            shapes[f"{name}:Bt"] = (rank, pair.Bt.shape[1])
        shapes.update({f"{name}:dense": tuple(tensor.shape) for name, tensor in first.dense.items()})
        resting = {"A": ":Bt", "B": ":A", "both": None}[trains]
        self._resting = {
            name: torch.zeros(len(starts), *shape, device=device)
            for name, shape in shapes.items()
            if resting and name.endswith(resting)
        }
        self._shapes = {name: shape for name, shape in shapes.items() if name not in self._resting}
        sizes = [torch.Size(shape).numel() for shape in self._shapes.values()]
        self._flat = torch.zeros(len(starts), sum(sizes), device=device)
        self._flat_gradient = torch.zeros_like(self._flat)
        self._scales = {
            name: torch.tensor([a.layers[name].scale for a in self._adapters], device=device).view(-1, 1, 1)
            for name in first.layers
        }
        for c, adapter in enumerate(self._adapters):
            views = {**self._views(self._flat[c : c + 1]), **{n: t[c : c + 1] for n, t in self._resting.items()}}
            for name, tensor in adapter.tensors().items():
                views[name][0][tuple(slice(0, n) for n in tensor.shape)].copy_(tensor)
        self._frozen = stacked_frozen(starts, device)

    def activate(self, clients: int) -> None:
        """Makes the first ``clients`` rows the ones that train; the others keep their values."""
        self.flat_leaf = self._flat[:clients].detach().requires_grad_()
        self.gradient = self._flat_gradient[:clients]
        self.flat_leaf.grad = self.gradient
        self._values = self._views(self._flat[:clients])
        self._gradients = self._views(self.gradient)

    def changes(
        self, base: Base, layout: Layout, dropout: Dropout | None
    ) -> tuple[dict[str, Change], dict[str, Change]]:
        """Returns what the slots of the base apply for the active clients: pairs by layer, heads by layer.

        It is rounded to the base's type once, here: gradients then come in that type, and are widened as they are
        copied into the buffer.
        """
        n, dtype = layout.clients, base.dtype
        self._leaves = {name: view.to(dtype).detach().requires_grad_() for name, view in self._values.items()}
        tensors = {**self._leaves, **{name: tensor[:n].to(dtype) for name, tensor in self._resting.items()}}
        frozen = {name: (A[:n], Bt[:n]) for name, (A, Bt) in self._frozen.items()}
        pairs: dict[str, Change] = {
            name: StackedPair(tensors[f"{name}:A"], tensors[f"{name}:Bt"], scale[:n], layout, dropout, frozen.get(name))
            for name, scale in self._scales.items()
        }
        dense = {name.removesuffix(":dense"): leaf for name, leaf in tensors.items() if name.endswith(":dense")}
        heads: dict[str, Change] = {
            path: StackedDense(weight, bias, layout) for path, (weight, bias) in base.head_tensors(dense).items()
        }
        return pairs, heads

    def add_penalties(self) -> None:
        """Adds to the buffer the gradients of the active clients' penalties, each of its own client's tensors alone."""
        for c, start in enumerate(self._starts[: len(self.flat_leaf)]):
            if not start.penalty:
                continue
            own = {name: tensor.to(self._flat.device) for name, tensor in start.adapter.tensors().items()}
            trained = {name: view[c][: len(own[name])].detach().requires_grad_() for name, view in self._values.items()}
            penalty = start.penalty(start.adapter.with_tensors({**own, **trained}))
            gradients = torch.autograd.grad(penalty, list(trained.values()), allow_unused=True)
            for name, gradient in zip(trained, gradients, strict=True):
                if gradient is not None:
                    self._gradients[name][c][: len(gradient)].add_(gradient)

    def backward(self, loss: Tensor) -> None:
        """Writes the gradients of ``loss`` into the buffer; zero for what the model never used."""
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(loss, list(self._leaves.values()), allow_unused=True)
        pairs = list(zip(self._gradients.values(), gradients, strict=True))
        for target, gradient in pairs:
            if gradient is None:
                target.zero_()
        used = [(target, gradient) for target, gradient in pairs if gradient is not None]
        torch._foreach_copy_([target for target, _ in used], [gradient for _, gradient in used])

    def measure(self) -> None:
        """Adds this step's |w · gradient|, where clients ask for sensitivities; before the gradient is clipped."""
        if not any(start.measures_sensitivity for start in self._starts):
            return
        for name in self._scales:
            factors = [key for key in (f"{name}:A", f"{name}:Bt") if key in self._values]
            moved = [(self._values[key] * self._gradients[key]).abs() for key in factors]
            mean = torch.cat(moved, dim=2).mean(dim=2)
            total = self._measured.setdefault(name, mean.new_zeros(len(self._starts), mean.shape[1]))
            total[: len(mean)].add_(mean)

    def sensitivity(self, c: int, steps: int) -> dict[str, Tensor]:
        """Returns client c's mean sensitivity over its steps, by layer [k]; empty when it did not ask."""
        start = self._starts[c]
        if not start.measures_sensitivity:
            return {}
        layers = start.adapter.layers
        return {name: (total[c, : layers[name].rank] / steps).cpu() for name, total in self._measured.items()}

    def clip(self, largest: float) -> None:
        """Scales each client's gradient down to a norm of at most ``largest``; 0 leaves it as it is."""
        if largest:
            norms = torch.linalg.vector_norm(self.gradient, dim=1, keepdim=True)
            self.gradient.mul_((largest / (norms + 1e-6)).clamp(max=1.0))

    def adapter(self, c: int) -> Adapter:
        """Returns the trained adapter of client c, at its own rank, as its own memory on the CPU."""
        like, views = self._adapters[c], self._views(self._flat[c : c + 1])
        values = like.tensors()
        trained = {name: view[0][: len(values[name])].detach().to("cpu", copy=True) for name, view in views.items()}
        return like.with_tensors({**values, **trained})

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        sizes = [torch.Size(shape).numel() for shape in self._shapes.values()]
        parts = zip(self._shapes.items(), torch.split(flat, sizes, dim=1), strict=True)
        return {name: part.view(len(flat), *shape) for (name, shape), part in parts}


def stacked_frozen(starts: Sequence[Start], device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns layer → the clients' frozen pairs [c f i], [c f o], zero-padded, scales folded into the second."""
    stacked = {}
    for name in sorted({name for start in starts for name in start.frozen}):
        pairs = [start.frozen.get(name) for start in starts]
        rank = max(pair.rank for pair in pairs if pair)
        d_in, d_out = next((pair.A.shape[1], pair.Bt.shape[1]) for pair in pairs if pair)
        A, Bt = torch.zeros(len(starts), rank, d_in), torch.zeros(len(starts), rank, d_out)
        for c, pair in enumerate(pairs):
            if pair:
                A[c, : pair.rank] = pair.A
                Bt[c, : pair.rank] = pair.scale * pair.Bt
        stacked[name] = (A.to(device), Bt.to(device))
    return stacked


def concatenated(batches: Sequence[Batch], pad_id: int) -> Batch:
    """Returns the batches one after the other, texts padded on the right to the longest among them."""
    joined = {}
    for name, first in batches[0].items():
        parts = [batch[name] for batch in batches]
        if first.dim() == 2:
            width = max(part.shape[1] for part in parts)
            value = padding(name, pad_id)
            parts = [functional.pad(part, (0, width - part.shape[1]), value=value) for part in parts]
        joined[name] = torch.cat(parts)
    return joined
