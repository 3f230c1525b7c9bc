"""A frozen base model, shared by every client, with slots where adapters and heads act."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fslora.config import AdapterConfig
from fslora.errors import ModelError
from fslora.models.slots import Change, SingleDense, SinglePair, Slot
from fslora.types import Adapter, Batch, LoRA, Template, Tensor


class Base:
    """The one copy of the base in memory.

    Args:
        model: A transformers model with logits [b classes]; it is frozen and put in evaluation mode.
        tokenizer: Its tokenizer.
        head: Names of the modules that are trained whole (the classification head).
        targets: Which linear modules get a pair: names as in PEFT, or ``all-linear``.
        name: What adapters exported from this base call it.

    Raises:
        ModelError: No linear module matches the targets, or the head holds something other than linear layers.
    """

    def __init__(
        self, model: Any, tokenizer: Any, head: tuple[str, ...], targets: str | tuple[str, ...], name: str
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.head = head
        self.name = name
        linears = {path: module for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
        in_head = {path for path in linears if _within(path, head)}
        self.targets = tuple(_matching([path for path in linears if path not in in_head], targets, model))
        self._slots = {path: Slot(linears[path]) for path in self.targets}
        self._head_slots = {path: Slot(linears[path]) for path in sorted(in_head)}
        self._check_head()

    @property
    def device(self) -> torch.device:
        """Where the base lives."""
        device = self.model.device
        assert isinstance(device, torch.device)
        return device

    @property
    def parameters(self) -> int:
        """The number of frozen parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def linear_parameters(self) -> int:
        """The number of frozen weights that a token is multiplied with: those of the linear layers outside the head."""
        modules = (module for path, module in self.model.named_modules() if not _within(path, self.head))
        return sum(module.weight.numel() for module in modules if isinstance(module, (nn.Linear, Conv1D)))

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the adapted layers keep their weight as [in out], as GPT-2's Conv1D does."""
        return any(self.is_transposed(path) for path in self.targets)

    def is_transposed(self, path: str) -> bool:
        """Returns whether one adapted layer keeps its weight as [in out]."""
        return isinstance(self._slots[path].module, Conv1D)

    def template(self, adapter: AdapterConfig) -> Template:
        """Returns the shapes of the adapted layers and the head's initial tensors (copies, on the CPU)."""
        layers = {path: _shape(self._slots[path].module) for path in self.targets}
        parameters = dict(self.model.named_parameters())
        names = [f"{path}.{kind}" for path in self._head_slots for kind in ("weight", "bias")]
        dense = {name: parameters[name].detach().float().cpu().clone() for name in names if name in parameters}
        return Template(layers, dense, adapter.rank, adapter.alpha, adapter.rslora)

    @contextmanager
    def attached(self, pairs: Mapping[str, Change], heads: Mapping[str, Change]) -> Iterator[None]:
        """While open, every named slot applies its change; outside, the base is itself again."""
        slots = [(self._slots[path], change) for path, change in pairs.items()]
        slots += [(self._head_slots[path], change) for path, change in heads.items()]
        try:
            for slot, change in slots:
                slot.change = change
            yield
        finally:
            for slot, _ in slots:
                slot.change = None

    @contextmanager
    def using(self, adapter: Adapter) -> Iterator[None]:
        """While open, the base computes with this one adapter for everybody."""
        # A pair that costs more than its layer's own product is merged for the time being (stacked adapters).
        wide = {path: pair for path, pair in adapter.layers.items() if self._merging_pays(path, pair)}
        with self.changed(wide), self.attached(self._single_pairs(adapter, wide), self.single_heads(adapter.dense)):
            yield

    @contextmanager
    def changed(self, layers: Mapping[str, LoRA]) -> Iterator[None]:
        """While open, the frozen weights are W0 + Δ; afterwards W0 itself is back (never by subtracting).

        The sum is made in float32 and rounded once to the base's own type.

        Raises:
            ModelError: A layer's weight is quantised, so that nothing can be added to it.
        """
        pristine = {path: self._changeable(path).data for path in layers}
        try:
            for path, pair in layers.items():
                weight = pristine[path]
                delta = pair.delta.T if self.is_transposed(path) else pair.delta
                self._changeable(path).data = (weight.float() + delta.to(weight.device)).to(weight.dtype)
            yield
        finally:
            for path, weight in pristine.items():
                self._changeable(path).data = weight

    def _changeable(self, path: str) -> Tensor:
        weight = self._slots[path].module.weight
        if self._slots[path].weight_and_bias() is None or not isinstance(weight, Tensor):
            raise ModelError(
                f"{path} of {self.name} is quantised, and this method changes the base's weights; "
                "load the base unquantised, or choose a method that keeps its adapter apart"
            )
        return weight

    def _merging_pays(self, path: str, pair: LoRA) -> bool:
        d_in, d_out = _shape(self._slots[path].module)
        return pair.rank * (d_in + d_out) > d_in * d_out and self._slots[path].weight_and_bias() is not None

    def _single_pairs(self, adapter: Adapter, without: Mapping[str, LoRA]) -> dict[str, Change]:
        device = self.device
        return {
            path: SinglePair(pair.A.to(device), pair.Bt.to(device), pair.scale)
            for path, pair in adapter.layers.items()
            if path not in without
        }

    def single_heads(self, dense: Mapping[str, Tensor]) -> dict[str, Change]:
        """Returns the head's changes for one set of dense tensors."""
        return {path: SingleDense(weight, bias) for path, (weight, bias) in self.head_tensors(dense).items()}

    def head_tensors(self, dense: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Returns module path → (weight, bias) of dense tensors named by parameter; a head without them is left out."""
        device = self.device
        found = {}
        for path in self._head_slots:
            if f"{path}.weight" not in dense:
                continue
            bias = dense.get(f"{path}.bias")
            found[path] = (dense[f"{path}.weight"].to(device), None if bias is None else bias.to(device))
        return found

    def logits(self, batch: Batch) -> Tensor:
        """Returns the model's logits [b classes] for a batch; ``labels`` in it are left out."""
        inputs = {name: tensor.to(self.device) for name, tensor in batch.items() if name != "labels"}
        logits = self.model(**inputs).logits
        assert isinstance(logits, Tensor)
        return logits

    def _check_head(self) -> None:
        covered = {f"{path}.{kind}" for path in self._head_slots for kind in ("weight", "bias")}
        for name, _ in self.model.named_parameters():
            if _within(name, self.head) and name not in covered:
                raise ModelError(
                    f"the head of {self.name} holds {name}, which is not part of a linear layer; "
                    "only heads made of linear layers can be trained per client"
                )


def _within(path: str, parents: tuple[str, ...]) -> bool:
    return any(path == parent or path.startswith(parent + ".") for parent in parents)


def _shape(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out); GPT-2's Conv1D keeps its weight as [in out], nn.Linear as [out in]."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def _matching(paths: list[str], targets: str | tuple[str, ...], model: Any) -> list[str]:
    output = model.get_output_embeddings()
    paths = [path for path in paths if output is None or model.get_submodule(path) is not output]
    if targets == "all-linear":
        chosen = paths
    else:
        chosen = [path for path in paths if any(path == t or path.endswith(f".{t}") for t in targets)]
        unused = [t for t in targets if not any(path == t or path.endswith(f".{t}") for path in paths)]
        if unused:
            kinds = sorted({path.rsplit(".", 1)[-1] for path in paths})
            raise ModelError(
                f"adapter.targets names {', '.join(map(repr, unused))}, which no linear module of this model "
                f"is called; there are: {', '.join(kinds)} (or 'all-linear')"
            )
    if not chosen:
        raise ModelError("this model has no linear module outside its head; nothing can be adapted")
    return chosen
