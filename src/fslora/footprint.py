"""The memory that an experiment takes, found without weights: one real local step on torch's meta device.

Tensors on that device have shapes and no values. While the cohort engine takes a step of its largest chunk there, every
storage is followed from the operation that makes it to the moment at which nobody holds it any more; so activations are
counted for whatever the model's own code does, and not by a formula.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fslora.config import LocalConfig
from fslora.engine.cohort import CohortEngine, Stack
from fslora.engine.optim import make_optimizer
from fslora.memory import release_memory, resident
from fslora.models.base import Base
from fslora.models.slots import Dropout, Layout
from fslora.rng import Rng
from fslora.types import Adapter, Batch, Start

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.baddbmm_}
KEPT_KERNELS = 1024
"""oneDNN keeps so many kernels that it made for shapes; a bfloat16 one takes some 0.6 MB on a CPU with AMX."""
QUANTISED_BYTES = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}
"""Bytes per weight: NF4 keeps one float32 scale for 64 weights; of 8 bits the scales (one per row) do not show."""


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the bytes that operations allocate; what was there before is not counted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: set[object] = set()
        """The different matrix products of a pass: operation, shapes and strides."""
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        """By type of device: 'meta' stands for the base's own."""
        self._known: dict[int, Any] = {}

    def forget_peak(self) -> None:
        """Lets the peak begin anew at what lives now."""
        self.peak = Counter(self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation, and counts what it allocated."""
        del types
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            # The model asks for a value: whether a mask is all ones, mostly. It is not, as batches are padded.
            return args[0].dtype.is_floating_point and 0.0
        for tensor in _tensors((args, kwargs)):
            self._follow(tensor, counted=False)
        if func.overloadpacket in PRODUCTS:
            self.products.add((str(func), *((tensor.shape, tensor.stride()) for tensor in _tensors(args))))
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._follow(tensor, counted=True)
        return result

    def _follow(self, tensor: torch.Tensor, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size, device = storage.nbytes() if counted else 0, tensor.device.type

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.live[device] -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live[device] += size
        self.peak[device] = max(self.peak[device], self.live[device])


@contextmanager
def fused_attention() -> Iterator[None]:
    """While open, attention on the meta device is what the fused kernels do, which never hold the scores.

    PyTorch itself would choose the unfused kind there. No function mode does this: it would not be on while gradient
    checkpointing computes again.
    """
    own = functional.scaled_dot_product_attention

    def chosen(query: Any, *args: Any, **kwargs: Any) -> Any:
        return (_fused if query.is_meta else own)(query, *args, **kwargs)

    setattr(functional, own.__name__, chosen)
    try:
        yield
    finally:
        setattr(functional, own.__name__, own)


def _fused(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask, float("-inf"))
    flash = aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


@dataclass(frozen=True)
class Tracked:
    """Bytes of a local step, beyond the base, the data and what the server holds."""

    trained: int
    """What the clients of a chunk train: tensors, gradients, optimizer state; frozen pairs too."""
    activations: int
    """What the step takes beside it at its peak."""
    products: frozenset[object]
    """The different matrix products of a pass: operation, shapes and strides."""


def local_step(
    base: Base, starts: Sequence[Start], batches: Sequence[Batch], local: LocalConfig, p: float, device: str = "cpu"
) -> Tracked:
    """Returns the memory of one local step that these clients take together, in its largest pass.

    Args:
        base: A base without weights.
        starts: One per client.
        batches: One per client.
        local: The optimizer and the clipping.
        p: Dropout.
        device: The type of device that the base stands for.
    """
    engine = CohortEngine(base, local, p, len(starts), device)
    with StorageTracker() as tracker, fused_attention():
        stack = Stack(starts, base.device)
        stack.activate(len(starts))
        optimizer = make_optimizer([stack.flat_leaf], local, local.lr, fused=False)
        stack.gradient.zero_()
        optimizer.step()  # its state is there from the first step on; a fused step takes nothing beside it
        trained = tracker.live["meta"]
        tracker.forget_peak()
        places = engine.places(batches)
        for place in places:  # what lies side by side stays there
            stack.changes(base, place, Layout([len(batches[c]["labels"]) for c in place.members], base.device), None)
        engine.one_pass(
            stack, max(places, key=lambda place: place.tokens(batches)), batches, Dropout(p, Rng(0)) if p else None
        )
    return Tracked(trained, sum(tracker.peak.values()) - trained, frozenset(tracker.products))


@torch.no_grad()
def evaluation_step(base: Base, adapter: Adapter, batch: Batch) -> Tracked:
    """Returns the memory of one batch of an evaluation of an adapter; nothing is trained."""
    with StorageTracker() as tracker, fused_attention(), base.using(adapter):
        base.objective.losses(base, batch)
    return Tracked(0, sum(tracker.peak.values()), frozenset(tracker.products))


def kernel_bytes(base: Base, dtype: str, device: torch.device) -> int:
    """Returns what the processor's library keeps for a shape of a matrix product, measured on the base's layers.

    The mean over forward products of its frozen layers, few rows each (0.6 to 2.8 MB were seen, by the layer): the
    kernels of attention and of low-rank factors are smaller than those for many rows, the backward ones larger.
    """
    if device.type != "cpu" or dtype == "float32":
        return 0
    layers = Counter(base.linear_shapes)
    taken = sum(times * _kernel_bytes(*shape, getattr(torch, dtype)) for shape, times in layers.items())
    return taken // max(1, layers.total())


def _kernel_bytes(d_in: int, d_out: int, dtype: torch.dtype) -> int:
    counts = range(211, 223)
    weight, rows = torch.ones(d_out, d_in, dtype=dtype), torch.ones(counts.stop, d_in, dtype=dtype)
    rows[: counts.start - 1] @ weight.T
    release_memory()  # room that was freed would hide what is taken, or count as taken
    before = resident()
    for count in counts:
        rows[:count] @ weight.T
    release_memory()
    return max(0, resident() - before) // len(counts)


def weight_bytes(base: Base, quantize: str) -> int:
    """Returns the bytes of a base's weights and buffers as they lie on its device."""
    packed = QUANTISED_BYTES.get(quantize)
    total = 0.0
    seen: set[int] = set()
    for module in base.model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if id(tensor) in seen:  # tied
                continue
            seen.add(id(tensor))
            is_packed = packed is not None and name == "weight" and type(module).__name__ == "PackedLinear"
            total += tensor.numel() * packed if packed is not None and is_packed else tensor.nbytes
    return int(total)


def loading_bytes(parameters: int, stored: int, loaded: int, kept: int) -> int:
    """Returns the peak while a checkpoint is read, in bytes: pages of its files count until its last tensor is copied.

    Args:
        parameters: How many weights.
        stored: Bytes of one in the files.
        loaded: Bytes of one as it is read.
        kept: Bytes of one as it is kept.
    """
    mapped = loaded == stored  # not copied: these tensors are the files' own pages
    reading = stored + (0 if mapped else loaded)
    converting = 0 if kept == loaded else (stored if mapped else loaded) + (kept if mapped else 0)
    return parameters * max(reading, converting)


def machine_memory() -> Mapping[str, int]:
    """Returns the bytes that there are: 'host', and 'gpu' where there is one."""
    found = {}
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found["host"] = 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemTotal"))
    except (OSError, StopIteration):
        pass
    if torch.cuda.is_available():
        found["gpu"] = int(torch.cuda.get_device_properties(0).total_memory)
    return found
