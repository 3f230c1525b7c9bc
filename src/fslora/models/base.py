"""A frozen base model, shared by every client, with slots where adapters and heads act."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fslora.config import AdapterConfig
from fslora.errors import ModelError
from fslora.models.output import FrozenCrossEntropy, Noted, Picked, Skipped
from fslora.models.quantized import is_quantized
from fslora.models.slots import Change, SingleDense, SinglePair, Slot
from fslora.objectives import Objective
from fslora.types import Adapter, Batch, LoRA, Template, Tensor

NOT_INPUTS = ("labels", "token_labels")
"""What a batch holds beside the model's inputs."""


class Base:
    """The one copy of the base in memory.

    Args:
        model: A transformers model whose output has logits; it is frozen and put in evaluation mode.
        tokenizer: Its tokenizer, or its image processor; None where nothing has to be read.
        objective: What it is trained and judged by.
        head: Names of the modules that are trained whole (the classification head).
        targets: Which linear modules get a pair: names or a regular expression as in PEFT, or ``all-linear``.
        name: What adapters exported from this base call it.

    Raises:
        ModelError: No linear module matches the targets, or the head holds something other than linear layers.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        objective: Objective,
        head: tuple[str, ...],
        targets: str | tuple[str, ...],
        name: str,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.objective = objective
        self.head = head
        self.name = name
        linears = {path: module for path, module in model.named_modules() if _is_linear(module)}
        in_head = {path for path in linears if _within(path, head)}
        self.targets = tuple(_matching([path for path in linears if path not in in_head], targets, model))
        self._slots = {path: Slot(linears[path], path) for path in self.targets}
        self._head_slots = {path: Slot(linears[path], path) for path in sorted(in_head)}
        output = model.get_output_embeddings()
        self._output = None if output is None else Slot(output, "output")
        # Blocks compute again only in training mode; their parts stay in evaluation mode, so nothing else changes.
        self._checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
        self._checkpoint(True)
        self._check_head()
        self._last = None if objective.has_head or not self._ends_with_its_output_layer() else self._output

    def _checkpoint(self, on: bool) -> None:
        for module in self._checkpointed:
            module.training = on

    @property
    def device(self) -> torch.device:
        """Where the base lives."""
        device = self.model.device
        assert isinstance(device, torch.device)
        return device

    @property
    def dtype(self) -> torch.dtype:
        """What the base computes in."""
        dtype = self.model.dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def pad_id(self) -> int:
        """The padding token; 0 where there are no tokens."""
        return int(getattr(self.tokenizer, "pad_token_id", None) or 0)

    @property
    def vocabulary(self) -> int:
        """How many tokens the model tells apart."""
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def parameters(self) -> int:
        """The number of frozen parameters, however many of them a byte holds."""
        linears = filter(_is_linear, self.model.modules())
        whole = {id(module.weight): prod(_shape(module)) for module in linears}
        return sum(whole.get(id(parameter), parameter.numel()) for parameter in self.model.parameters())

    @property
    def quantized(self) -> bool:
        """Whether linear layers are kept in 4 or 8 bits."""
        return any(is_quantized(module) for module in self.model.modules())

    @property
    def linear_shapes(self) -> list[tuple[int, int]]:
        """(d_in, d_out) of each frozen linear layer, without the head and the output layer over the vocabulary."""
        output = None if self._output is None else self._output.module
        modules = (m for path, m in self.model.named_modules() if not _within(path, self.head) and m is not output)
        return list(map(_shape, filter(_is_linear, modules)))

    @property
    def linear_parameters(self) -> int:
        """The number of frozen weights that a token is multiplied with: those of ``linear_shapes``."""
        return sum(d_in * d_out for d_in, d_out in self.linear_shapes)

    @property
    def output_parameters(self) -> int:
        """The number of weights of the output layer over the vocabulary, which only predicted tokens see."""
        if self._output is None:
            return 0
        d_in, d_out = _shape(self._output.module)
        return d_in * d_out

    def tokens(self, batch: Batch) -> int:
        """Returns how many positions the model computes for a batch: padded tokens, or patches of images."""
        if "input_ids" in batch:
            return batch["input_ids"].numel()
        patch = getattr(self.model.config, "patch_size", None) or 16
        return len(batch["labels"]) * (1 + batch["pixel_values"][0, 0].numel() // patch**2)

    @property
    def positions(self) -> int:
        """The longest sequence that the model has room for."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or 2**31)

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the adapted layers keep their weight as [in out], as GPT-2's Conv1D does."""
        return any(self.is_transposed(path) for path in self.targets)

    def is_transposed(self, path: str) -> bool:
        """Returns whether one adapted layer keeps its weight as [in out]."""
        return isinstance(self._slots[path].module, Conv1D)

    def shape(self, path: str) -> tuple[int, int]:
        """Returns (d_in, d_out) of one adapted layer."""
        return _shape(self._slots[path].module)

    def template(self, adapter: AdapterConfig) -> Template:
        """Returns the shapes of the adapted layers and the head's initial tensors (copies, on the CPU).

        Of a base without weights (on the meta device) the head's tensors are zero.
        """
        layers = {path: self.shape(path) for path in self.targets}
        parameters = dict(self.model.named_parameters())
        names = [f"{path}.{kind}" for path in self._head_slots for kind in ("weight", "bias")]
        dense = {name: _on_cpu(parameters[name]) for name in names if name in parameters}
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
                "set model.quantize to 'none', or choose a method that keeps its adapter apart"
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

    def logits(self, batch: Batch, at: Tensor | None = None) -> Tensor:
        """Returns the model's logits for a batch; what is no input of the model is left out.

        Args:
            batch: Inputs [b ...] and labels.
            at: bool [b t]: only these positions of a causal model, [u vocabulary], in reading order; the others'
                logits are never computed.
        """
        if at is None:
            return self._run(batch, None)
        return self._run(batch, Picked(self._places(at)))[0]

    def token_losses(self, batch: Batch, at: Tensor, labels: Tensor) -> Tensor:
        """Returns the cross-entropy of a causal model at some positions, [u] float32.

        Where nothing follows the output layer, its logits are never held as a whole.

        Args:
            batch: Inputs [b t].
            at: bool [b t]: where tokens are predicted.
            labels: int64 [u]: those tokens, in reading order.
        """
        labels, plain = labels.to(self.device), self._last and self._last.weight_and_bias()
        if not plain:
            return functional.cross_entropy(self.logits(batch, at).float(), labels, reduction="none")
        hidden = self._run(batch, Skipped(self._places(at)))[0]
        losses: Tensor = FrozenCrossEntropy.apply(hidden, *plain, labels)  # type: ignore[no-untyped-call]
        return losses

    def _places(self, at: Tensor) -> Tensor:
        return at.flatten().nonzero()[:, 0].to(self.device)

    def _run(self, batch: Batch, output: Change | None) -> Tensor:
        """The model's logits, with something else in the place of its output layer."""
        inputs = {name: tensor.to(self.device) for name, tensor in batch.items() if name not in NOT_INPUTS}
        if output is not None:
            assert self._output is not None, "only models with an output layer over the vocabulary can be read so"
            self._output.change = output
        try:
            logits = self.model(**inputs).logits
        finally:
            if self._output is not None:
                self._output.change = None
        assert isinstance(logits, Tensor)
        return logits

    def _ends_with_its_output_layer(self) -> bool:
        """Whether nothing follows the output layer: some models squash or scale its output into another tensor."""
        noted, batch = Noted(), {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
        if self.device.type == "meta":  # a mask of four dimensions is taken as it is; of others, values would be read
            batch["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        with torch.no_grad():
            return self._run(batch, noted) is noted.output

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[str]:
        """Returns what a causal model writes after each prompt, greedily, at most so many tokens, decoded."""
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # on the left, so that every text goes on at the same place
            ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=ids.dtype)
            mask[row, width - len(prompt) :] = 1
        self._checkpoint(False)
        written = self.model.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            max_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=self.pad_id,
        )
        self._checkpoint(True)
        texts: list[str] = self.tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
        return texts

    def _check_head(self) -> None:
        covered = {f"{path}.{kind}" for path in self._head_slots for kind in ("weight", "bias")}
        for name, _ in self.model.named_parameters():
            if _within(name, self.head) and name not in covered:
                raise ModelError(
                    f"the head of {self.name} holds {name}, which is not part of a linear layer; "
                    "only heads made of linear layers can be trained per client"
                )
        packed = [path for path, slot in self._head_slots.items() if is_quantized(slot.module)]
        if packed:
            raise ModelError(
                f"the head of {self.name} holds {packed[0]}, whose weights are quantised and cannot be trained; "
                "set model.quantize to 'none', or name a checkpoint whose head is not quantised"
            )


def _on_cpu(parameter: Tensor) -> Tensor:
    return torch.zeros(parameter.shape) if parameter.is_meta else parameter.detach().float().cpu().clone()


def _within(path: str, parents: tuple[str, ...]) -> bool:
    return any(path == parent or path.startswith(parent + ".") for parent in parents)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _shape(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out); GPT-2's Conv1D keeps its weight as [in out], nn.Linear as [out in], quantised ones packed."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return rows, columns


def _matching(paths: list[str], targets: str | tuple[str, ...], model: Any) -> list[str]:
    """The paths that a configuration means. The output layer and experts, which see a part of the tokens, are none."""
    output = model.get_output_embeddings()
    known = [path for path in paths if output is None or model.get_submodule(path) is not output]
    paths = [path for path in known if "experts" not in path.split(".")]
    if targets == "all-linear":
        chosen = paths
    elif isinstance(targets, str):
        chosen = [path for path in paths if re.fullmatch(targets, path)]
        _check_used([targets] if not chosen else [], paths, known)
    else:
        chosen = [path for path in paths if any(_named(path, target) for target in targets)]
        _check_used([t for t in targets if not any(_named(path, t) for path in paths)], paths, known)
    if not chosen:
        raise ModelError("this model has no linear module outside its head; nothing can be adapted")
    return chosen


def _named(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _check_used(unused: list[str], paths: list[str], known: list[str]) -> None:
    if not unused:
        return
    kinds = sorted({path.rsplit(".", 1)[-1] for path in paths})
    apart = [path for path in known if path not in paths]
    experts = [t for t in unused if any(_named(path, t) or re.fullmatch(t, path) for path in apart)]
    reason = (
        "only names experts, which see a part of the tokens and cannot be adapted"
        if experts
        else "no linear module of this model is called so"
    )
    raise ModelError(
        f"adapter.targets names {', '.join(map(repr, unused))}: {reason}; there are: {', '.join(kinds)} "
        "(or 'all-linear'; a single text is a regular expression over whole paths such as "
        f"{paths[0] if paths else ''!r})"
    )
