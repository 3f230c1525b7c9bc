"""Adapters as PEFT folders, and back; and merged models. PEFT's own layout is made here and nowhere else."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from math import isclose
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fslora.algebra.lowrank import truncated
from fslora.errors import ArtifactError, ModelError
from fslora.models.base import Base
from fslora.types import Adapter, LoRA, Tensor

PREFIX = "base_model.model."


def export_peft(
    adapter: Adapter,
    head: tuple[str, ...],
    base_name: str,
    folder: Path,
    card: str = "",
    fan_in_fan_out: bool = False,
    task: str | None = "SEQ_CLS",
) -> Path:
    """Writes an adapter as ``adapter_config.json``, ``adapter_model.safetensors`` and ``README.md``.

    ``peft.PeftModel.from_pretrained(model, folder)`` then computes what we compute. The scale is written as a
    plain ``lora_alpha = scale · rank`` whatever convention it came from.

    Args:
        adapter: Layers that differ in rank or scale from most others go into ``rank_pattern``, ``alpha_pattern``.
        head: Modules that are trained whole, for ``modules_to_save``.
        base_name: What ``base_model_name_or_path`` says.
        folder: Replaced as a whole.
        card: Text for the folder's README.
        fan_in_fan_out: Whether the adapted layers keep their weight as [in out] (GPT-2's Conv1D).
        task: PEFT's name for the kind of task, if it has one.

    Raises:
        ArtifactError: The folder cannot be written.
    """
    from peft import LoraConfig

    ranks = {name: pair.rank for name, pair in adapter.layers.items()}
    alphas = {name: _alpha(pair) for name, pair in adapter.layers.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    config = LoraConfig(
        r=int(rank),
        lora_alpha=alpha,  # any number is computed with and written as it is
        rank_pattern={re.escape(name): own for name, own in ranks.items() if own != rank},
        alpha_pattern={re.escape(name): own for name, own in alphas.items() if own != alpha},
        target_modules=list(adapter.layers),
        modules_to_save=list(head) or None,
        task_type=task,
        base_model_name_or_path=base_name,
        fan_in_fan_out=fan_in_fan_out,
        inference_mode=True,
    )
    partial = folder.with_name(f".partial-{folder.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        config.save_pretrained(partial)
        save_file(peft_tensors(adapter), partial / "adapter_model.safetensors", metadata={"format": "pt"})
        (partial / "README.md").write_text(_card(base_name, card), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ArtifactError(f"{folder} cannot be written: {error}") from None
    return folder


def _alpha(pair: LoRA) -> float:
    alpha = pair.scale * pair.rank
    return round(alpha) if isclose(alpha, round(alpha), rel_tol=1e-9) else alpha


def _most_common(values: Iterable[float]) -> float:
    return Counter(values).most_common(1)[0][0]


def peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Returns the adapter under PEFT's names and layout: lora_A [r i], lora_B [o r], the head as it is."""
    tensors = {}
    for name, pair in adapter.layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = pair.A.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = pair.Bt.T.contiguous()
    tensors.update({f"{PREFIX}{name}": tensor.contiguous() for name, tensor in adapter.dense.items()})
    return tensors


def import_peft(folder: Path) -> Adapter:
    """Returns the adapter of a PEFT folder.

    Raises:
        ArtifactError: Files are missing or damaged, or the adapter is of a kind that is not a plain LoRA.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtifactError(f"{folder} is no readable PEFT adapter: {error}") from None
    try:
        return _plain_lora(config, tensors, folder)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{folder} is no complete PEFT adapter: {error!r} is missing or malformed") from None


def _plain_lora(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> Adapter:
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise ArtifactError(f"{folder} is not a plain LoRA ({kind})")
    layers, dense = {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            B = tensors[f"{PREFIX}{layer}.lora_B.weight"]
            rank = _patterned(config.get("rank_pattern"), layer, config["r"])
            alpha = _patterned(config.get("alpha_pattern"), layer, config["lora_alpha"])
            scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
            layers[layer] = LoRA(tensor.float(), B.float().T.contiguous(), scale)
        elif not name.endswith(".lora_B.weight"):
            dense[name] = tensor.float()
    return Adapter(layers, dense)


def _patterned(patterns: dict[str, Any] | None, layer: str, default: Any) -> Any:
    """What PEFT takes for a layer: the first pattern that is the layer's name or ends it, else the default."""
    matching = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", layer))
    return next(matching, default)


def lower_rank(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """Returns the best approximation of a lower rank, layer by layer, and the mean share of energy kept."""
    kept = {name: truncated(pair, min(rank, pair.rank)) for name, pair in adapter.layers.items()}
    energy = sum(share for _, share in kept.values()) / len(kept)
    return Adapter({name: pair for name, (pair, _) in kept.items()}, adapter.dense), energy


def rank_for_energy(adapter: Adapter, energy: float) -> int:
    """Returns the smallest rank that keeps at least this share of energy on average over the layers."""
    low, high = 1, adapter.rank
    while low < high:
        middle = (low + high) // 2
        if lower_rank(adapter, middle)[1] >= energy:
            high = middle
        else:
            low = middle + 1
    return low


def export_merged(adapter: Adapter, base: Base, folder: Path) -> Path:
    """Writes base and adapter as one ordinary transformers model with its tokenizer.

    The base in memory is changed while this runs, and put back from a copy (never by subtracting).

    Raises:
        ModelError: The base is quantised: nothing can be added to its weights.
        ArtifactError: The folder exists or cannot be written.
    """
    if base.quantized:
        raise ModelError(
            f"{base.name} is quantised, and nothing can be added to its weights; export the adapter without --merge, "
            "and merge it with PEFT into the base as it is when not quantised"
        )
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ArtifactError(f"{folder} cannot be written: it exists already; name a new folder")
    model: Any = base.model
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        with torch.no_grad():
            parameters = dict(model.named_parameters())
            for name, pair in adapter.layers.items():
                weight = parameters[f"{name}.weight"]
                delta = pair.delta.T if base.is_transposed(name) else pair.delta
                weight.add_(delta.to(weight))
            for name, tensor in adapter.dense.items():
                parameters[name].copy_(tensor)
        model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be written: {error}") from None
    finally:
        model.load_state_dict(saved)
    return folder


def _card(base_name: str, text: str) -> str:
    return f"---\nlibrary_name: peft\nbase_model: {base_name}\ntags: [lora, federated-learning, fslora]\n---\n{text}"
