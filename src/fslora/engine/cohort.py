"""The cohort engine: every client of a chunk takes its local step in one forward and one backward pass.

The clients' batches are concatenated, so the frozen layers run once over all of them; the low-rank path and
the heads are batched products over the clients (`fslora.models.slots`). One backward of the *sum* of the
clients' mean losses gives each client exactly its own gradient. All that the clients train lies in one buffer, at
each client's own rank: casting, clipping and the optimizer step cost what is trained, not what the largest rank takes.

A step of many tokens goes through the model in several passes, clients with texts of similar length together: less
padding, and activations that stay in a processor's cache. A client is never split.

Memory is one base, the chunk's adapters with their optimizer state, and the activations of one pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice

import torch

from fslora.config import LocalConfig
from fslora.data.batches import padded, step_width
from fslora.engine.optim import make_optimizer, narrowed
from fslora.memory import Heap
from fslora.models.base import Base
from fslora.models.slots import Change, Dropout, Layout, StackedDense, StackedPair
from fslora.types import Adapter, Batch, LocalProblem, Start, Tensor, Trained

PASS_TOKENS = {"cpu": 2048}
"""Tokens that go through the model at once, about: measured with three models (docs/performance.md). Others: all."""
PASS_COST = 150
"""Tokens that take as long as what every pass takes beside its tokens, measured likewise."""


class CohortEngine:
    """Trains clients together, ``chunk`` at a time.

    Args:
        base: What they adapt.
        local: The optimizer and the clipping.
        dropout: Of the adapters' inputs.
        chunk: How many clients take a step together.
        device: The type of device that passes are made for: the base's, or that which a meta base stands for.
    """

    def __init__(self, base: Base, local: LocalConfig, dropout: float, chunk: int, device: str | None = None) -> None:
        self.base = base
        self.local = local
        self.dropout = dropout
        self.chunk = chunk
        self._tokens = PASS_TOKENS.get(device or base.device.type)
        self._heap = Heap()

    def train(self, problems: Iterable[LocalProblem], lr: float) -> Iterator[Trained]:
        """Yields each problem's result, in order; no more than one chunk of problems is held at a time."""
        iterator = iter(problems)
        while chunk := list(islice(iterator, self.chunk)):
            yield from self._train_chunk(chunk, lr)

    def _train_chunk(self, problems: list[LocalProblem], lr: float) -> list[Trained]:
        # Most steps first: the clients still active at any step are then the first ones of the stack. Equal ranks
        # side by side: their tensors are one view.
        order = sorted(range(len(problems)), key=lambda c: (-len(problems[c].batches), problems[c].start.adapter.rank))
        ordered = [problems[c] for c in order]
        stack = Stack([problem.start for problem in ordered], self.base.device)
        losses: list[Tensor] = []
        active, optimizer = 0, None
        for step in range(len(ordered[0].batches)):
            batches = [problem.batches[step] for problem in ordered if step < len(problem.batches)]
            if len(batches) != active:
                active = len(batches)
                stack.activate(active)
                optimizer = narrowed(optimizer, make_optimizer([stack.flat_leaf], self.local, lr, fused=True))
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
        """Leaves the active clients' clipped gradients in the stack, and returns their mean losses [c]."""
        means = torch.empty(len(batches), device=self.base.device)
        for place in self.places(batches):
            means[place.members] = self.one_pass(stack, place, batches, dropout)
            self._heap.settle()
        stack.add_penalties()
        stack.measure()
        stack.clip(self.local.clip_norm)
        return means

    def places(self, batches: Sequence[Batch]) -> list[Place]:
        """Returns the passes of a step."""
        sizes = [len(batch["labels"]) for batch in batches]
        found = passes(sizes, [tokens_of(batch) for batch in batches], self._tokens)
        return [Place(number, members) for number, members in enumerate(found)]

    def one_pass(self, stack: Stack, place: Place, batches: Sequence[Batch], dropout: Dropout | None) -> Tensor:
        """Leaves the gradients of a pass's clients in the stack, and returns their mean losses [m].

        Reads no value of a tensor, so that it also runs on the meta device, where there are none.
        """
        if dropout and place.number:
            dropout = Dropout(dropout.p, dropout.rng.child("pass", place.number))
        own = [batches[c] for c in place.members]
        layout = Layout([len(batch["labels"]) for batch in own], self.base.device)
        batch = concatenated(own, self.base.pad_id, self.base.positions)
        pairs, heads = stack.changes(self.base, place, layout, dropout)
        # Attached until the gradients are there: with gradient checkpointing the backward pass computes layers again.
        with self.base.attached(pairs, heads):
            each, example = self.base.objective.losses(self.base, batch)
            owner = layout.owner[example]
            sizes = owner.new_zeros(layout.clients).index_add(0, owner, torch.ones_like(owner)).clamp(min=1)
            means = each.new_zeros(layout.clients).index_add(0, owner, each) / sizes
            stack.backward(means.sum())
        return means.detach()


def tokens_of(batch: Batch) -> int:
    """Returns to how many positions an example of a batch is padded."""
    return max((tensor.shape[1] for tensor in batch.values() if tensor.dim() == 2), default=1)


def passes(sizes: Sequence[int], widths: Sequence[int], most: int | None) -> list[list[int]]:
    """Returns which clients of a step go through the model together, each time in order of their places.

    The passes are halves of halves of the clients sorted by width, so that steps come in few shapes: so many that they
    have at most 1.5 times ``most`` tokens in the mean, where clients allow it, or more where that saves padding.

    Args:
        sizes: Examples, by client.
        widths: Tokens that each of its examples is padded to, by client.
        most: None for one pass.
    """
    order = sorted(range(len(sizes)), key=lambda c: widths[c])
    tokens = sum(size * width for size, width in zip(sizes, widths, strict=True))

    def cut(count: int) -> list[list[int]]:
        each = -(-len(order) // count)
        return [sorted(order[first : first + each]) for first in range(0, len(order), each)]

    def cost(found: list[list[int]]) -> int:
        return sum(PASS_COST + sum(sizes[c] for c in own) * max(widths[c] for c in own) for own in found)

    if most is None:
        return [sorted(order)]
    counts = [1]
    while counts[-1] < len(order):
        counts.append(2 * counts[-1])
    roomy = [count for count in counts if 2 * tokens <= 3 * most * count] or counts[-1:]
    return min(map(cut, roomy), key=cost)


@dataclass(frozen=True)
class Place:
    """One of a step's passes."""

    number: int
    members: list[int]
    """Places of its clients in the stack, ascending."""

    def tokens(self, batches: Sequence[Batch]) -> int:
        """Returns the positions of a pass over these of a step's batches, about: beside widths that are rounded up."""
        own = [batches[c] for c in self.members]
        return sum(len(batch["labels"]) for batch in own) * max(map(tokens_of, own))


@dataclass(frozen=True)
class Block:
    """Neighbours of a stack that train tensors of the same shapes: a matrix [clients p] within its buffer."""

    first: int
    """The first client's place."""
    clients: int
    offset: int
    """Where it begins in the buffer."""
    shapes: Mapping[str, torch.Size]

    @property
    def size(self) -> int:
        """Numbers per client, p."""
        return sum(shape.numel() for shape in self.shapes.values())

    def rows(self, flat: Tensor, clients: int | None = None) -> Tensor:
        """Returns its part of a buffer [clients p], or that of its first clients."""
        count = self.clients if clients is None else clients
        return flat[self.offset : self.offset + count * self.size].view(count, self.size)

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """Returns rows [n p] by name, each [n *shape]."""
        parts = torch.split(rows, [shape.numel() for shape in self.shapes.values()], dim=1)
        return {
            name: part.view(len(rows), *shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }


@dataclass(frozen=True)
class Run:
    """Members of a pass that are neighbours in one block."""

    block: int
    """Its number."""
    first: int
    """The first one's place within the block."""
    clients: int
    place: int
    """The first one's place in the pass."""

    def within(self, view: Tensor) -> Tensor:
        """Returns its part of a block's tensor [p *shape]."""
        return view[self.first : self.first + self.clients]


class Stack:
    """What c clients train, in one buffer, and their gradients likewise; each client takes the room of its own rank.

    The model sees them side by side, padded with zeros to the largest rank, in the base's type; these copies are made
    once a step. A factor that is not trained, and the frozen pairs, are stacked too but lie outside the buffer: no
    gradient, no optimizer state.

    Args:
        starts: One per client; those of equal ranks are to be neighbours, as few as there are then act at once.
        device: Where all of it lies.
    """

    def __init__(self, starts: Sequence[Start], device: torch.device) -> None:
        if len({start.trains for start in starts}) > 1:
            raise ValueError("the clients of one chunk train different factors; a method has to choose per round")
        self._starts = starts
        self._adapters = [start.adapter for start in starts]
        self._measured: dict[str, Tensor] = {}
        resting = {"A": ":Bt", "B": ":A", "both": None}[starts[0].trains]
        tensors = [adapter.tensors() for adapter in self._adapters]
        self._trained = [name for name in tensors[0] if not (resting and name.endswith(resting))]
        self._widest = {
            name: (len(starts), *map(max, zip(*(own[name].shape for own in tensors), strict=True)))
            for name in tensors[0]
        }
        self._blocks = self._blocks_of(tensors)
        self._flat = torch.empty(sum(block.clients * block.size for block in self._blocks), device=device)
        self._flat_gradient = torch.zeros_like(self._flat)
        self._resting = {
            name: torch.zeros(shape, device=device) for name, shape in self._widest.items() if name not in self._trained
        }
        for c, own in enumerate(tensors):
            views = {**self._own(self._flat, c), **{n: filled(t[c], own[n].shape) for n, t in self._resting.items()}}
            for name, tensor in own.items():
                views[name].copy_(tensor)
        self._scales = {
            name: torch.tensor([a.layers[name].scale for a in self._adapters], device=device).view(-1, 1, 1)
            for name in self._adapters[0].layers
        }
        self._frozen = stacked_frozen(starts, device)

    def activate(self, clients: int) -> None:
        """Makes the first ``clients`` clients the ones that train; the others keep their values."""
        self.clients = clients
        self._active = [(b, min(b.clients, clients - b.first)) for b in self._blocks if b.first < clients]
        count = sum(n * block.size for block, n in self._active)
        self.flat_leaf = self._flat[:count].detach().requires_grad_()
        self.gradient = self._flat_gradient[:count]
        self.flat_leaf.grad = self.gradient
        self._values = [block.views(block.rows(self._flat, n)) for block, n in self._active]
        self._gradients = [block.views(block.rows(self._flat_gradient, n)) for block, n in self._active]
        self._padded: dict[int, tuple[list[int], dict[str, Tensor]]] = {}
        """By number of the pass: whose values lie side by side there."""

    def changes(
        self, base: Base, place: Place, layout: Layout, dropout: Dropout | None
    ) -> tuple[dict[str, Change], dict[str, Change]]:
        """Returns what the slots of the base apply for the clients of a pass: pairs by layer, heads by layer.

        It is rounded to the base's type once, here: gradients then come in that type, and are widened as they are
        copied into the buffer.
        """
        dtype, members = base.dtype, place.members
        self._runs = self._runs_of(members)
        self._leaves = {name: tensor.requires_grad_() for name, tensor in self._side_by_side(place, dtype).items()}
        which = slice(members[0], members[-1] + 1) if members[-1] - members[0] < len(members) else members
        tensors = {**self._leaves, **{name: tensor[which].to(dtype) for name, tensor in self._resting.items()}}
        frozen = {name: (A[which], Bt[which]) for name, (A, Bt) in self._frozen.items()}
        pairs: dict[str, Change] = {}
        for name, scale in self._scales.items():
            A, Bt = tensors[f"{name}:A"], tensors[f"{name}:Bt"]
            rank = min(A.shape[1], Bt.shape[1])  # a factor at rest is as wide as the stack's largest rank
            pairs[name] = StackedPair(A[:, :rank], Bt[:, :rank], scale[which], layout, dropout, frozen.get(name))
        dense = {name.removesuffix(":dense"): leaf for name, leaf in tensors.items() if name.endswith(":dense")}
        heads: dict[str, Change] = {
            path: StackedDense(weight, bias, layout) for path, (weight, bias) in base.head_tensors(dense).items()
        }
        return pairs, heads

    def add_penalties(self) -> None:
        """Adds to the buffer the gradients of the active clients' penalties, each of its own client's tensors alone."""
        for c, start in enumerate(self._starts[: self.clients]):
            if not start.penalty:
                continue
            own = {name: tensor.to(self._flat.device) for name, tensor in start.adapter.tensors().items()}
            trained = {name: view.detach().requires_grad_() for name, view in self._own(self._flat, c).items()}
            penalty = start.penalty(start.adapter.with_tensors({**own, **trained}))
            gradients = torch.autograd.grad(penalty, list(trained.values()), allow_unused=True)
            for view, gradient in zip(self._own(self._flat_gradient, c).values(), gradients, strict=True):
                if gradient is not None:
                    view.add_(gradient)

    def backward(self, loss: Tensor) -> None:
        """Writes the gradients of a pass's ``loss`` into the buffer; zero for what the model never used."""
        leaves = list(self._leaves.values())
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(loss, leaves, allow_unused=True)
        targets, sources = [], []
        for run in self._runs:
            for view, gradient in zip(self._gradients[run.block].values(), gradients, strict=True):
                target = run.within(view)
                if gradient is None:
                    target.zero_()
                else:
                    targets.append(target)
                    sources.append(filled(gradient[run.place : run.place + run.clients], target.shape))
        torch._foreach_copy_(targets, sources)

    def measure(self) -> None:
        """Adds this step's |w · gradient|, where clients ask for sensitivities; before the gradient is clipped."""
        if not any(start.measures_sensitivity for start in self._starts):
            return
        for name in self._scales:
            factors = [key for key in (f"{name}:A", f"{name}:Bt") if key in self._trained]
            rank = self._widest[factors[0]][1]
            total = self._measured.setdefault(name, self._flat.new_zeros(len(self._starts), rank))
            for (block, n), values, gradients in zip(self._active, self._values, self._gradients, strict=True):
                moved = torch.cat([(values[key] * gradients[key]).abs() for key in factors], dim=2).mean(dim=2)
                filled(total[block.first : block.first + n], moved.shape).add_(moved)

    def sensitivity(self, c: int, steps: int) -> dict[str, Tensor]:
        """Returns client c's mean sensitivity over its steps, by layer [k]; empty when it did not ask."""
        start = self._starts[c]
        if not start.measures_sensitivity:
            return {}
        layers = start.adapter.layers
        return {name: (total[c, : layers[name].rank] / steps).cpu() for name, total in self._measured.items()}

    def clip(self, largest: float) -> None:
        """Scales each client's gradient down to a norm of at most ``largest``; 0 leaves it as it is."""
        for block, n in self._active if largest else ():
            gradient = block.rows(self._flat_gradient, n)
            norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
            gradient.mul_((largest / (norms + 1e-6)).clamp(max=1.0))

    def adapter(self, c: int) -> Adapter:
        """Returns the trained adapter of client c, at its own rank, as its own memory on the CPU."""
        like = self._adapters[c]
        trained = {name: view.to("cpu", copy=True) for name, view in self._own(self._flat, c).items()}
        return like.with_tensors({**like.tensors(), **trained})

    def _blocks_of(self, tensors: Sequence[Mapping[str, Tensor]]) -> list[Block]:
        blocks: list[Block] = []
        shapes = [{name: own[name].shape for name in self._trained} for own in tensors]
        for _, members in groupby(range(len(shapes)), key=lambda c: shapes[c]):
            clients = list(members)
            before = blocks[-1] if blocks else Block(0, 0, 0, {})
            offset = before.offset + before.clients * before.size
            blocks.append(Block(clients[0], len(clients), offset, shapes[clients[0]]))
        return blocks

    def _own(self, flat: Tensor, c: int) -> dict[str, Tensor]:
        """Returns what client c has of a buffer, by name."""
        block = next(block for block in self._blocks if c < block.first + block.clients)
        return {name: view[0] for name, view in block.views(block.rows(flat)[c - block.first :][:1]).items()}

    def _runs_of(self, members: Sequence[int]) -> list[Run]:
        """Members that are neighbours in one block."""
        runs: list[Run] = []
        for place, c in enumerate(members):
            number = next(i for i, (block, n) in enumerate(self._active) if c < block.first + n)
            first, last = c - self._active[number][0].first, runs[-1] if runs else None
            if last and last.block == number and last.first + last.clients == first:
                runs[-1] = replace(last, clients=last.clients + 1)
            else:
                runs.append(Run(number, first, 1, place))
        return runs

    def _side_by_side(self, place: Place, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns what a pass's clients train [n *shape], zero beyond a client's own rank; of one shape, views."""
        own = [{name: run.within(view) for name, view in self._values[run.block].items()} for run in self._runs]
        if len(own) == 1 and dtype == self._flat.dtype:
            return {name: view.detach() for name, view in own[0].items()}
        if self._padded.get(place.number, (None, {}))[0] != place.members:
            largest = {name: map(max, zip(*(views[name].shape[1:] for views in own), strict=True)) for name in own[0]}
            shapes = {name: (len(place.members), *shape) for name, shape in largest.items()}
            zeros = {name: self._flat.new_zeros(shape, dtype=dtype) for name, shape in shapes.items()}
            self._padded[place.number] = place.members, zeros
        padded = self._padded[place.number][1]
        targets = [
            filled(padded[name][run.place : run.place + run.clients], view.shape)
            for run, views in zip(self._runs, own, strict=True)
            for name, view in views.items()
        ]
        torch._foreach_copy_(targets, [view for views in own for view in views.values()])
        return {name: tensor.detach() for name, tensor in padded.items()}


def filled(padded: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns the leading part of ``padded`` that has this shape, as a view."""
    return padded[tuple(slice(0, size) for size in shape)]


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


def concatenated(batches: Sequence[Batch], pad_id: int, positions: int) -> Batch:
    """Returns the batches one after the other, texts padded on the right to the longest among them.

    Where there is padding at all, to one of a few widths (``step_width``); a step of equal lengths stays without.
    """
    if "input_ids" in batches[0]:
        width = step_width([batch["input_ids"].shape[1] for batch in batches], positions)
        batches = [padded(batch, width, pad_id) for batch in batches]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
