"""A small base model from nothing: a byte-level BPE tokenizer and a Llama-architecture causal language model.

Both come from text on this machine, in a few minutes on two processor cores: by default from one half of the running
Python's standard library, sources with their docstrings. The packages of the other half are kept for federated
fine-tuning (``fslora.data.stdlib.pretraining_share``), so that no file a client holds was in the base's text. The
result is an ordinary transformers folder.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from itertools import count
from math import cos, exp, isfinite, log, pi
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy

from fslora.errors import ArtifactError, ConfigError, DataError, TrainingError
from fslora.pretrain_text import FEWEST_TOKENS, encoded, hold_out, in_rows, read_texts, train_tokenizer
from fslora.rng import Rng
from fslora.types import Tensor

EVALUATION_ROWS = 32
OPTIONS = ("source", "hidden", "layers", "vocabulary", "steps", "minutes", "seed")
"""Fields that the command line has options for."""

Progress = Callable[[int, float], None]
"""Called after each step with its number and its loss."""


@dataclass(frozen=True)
class PretrainConfig:
    """What is trained, on what, for how long. The defaults take about 400 s of processor time.

    Measured on a shared Xeon with AMX, bits per byte of held-out files at 160 to 175 s of processor time each: six
    layers of 256 in batches of 16, 2.16; four of 256 in batches of 8, 1.83; four of 192 (vocabulary 3072), 1.75; the
    same in batches of 4 (vocabulary 2048), 1.84. So few tokens pay best in a small model and many steps. The
    defaults end at 1.49, a perplexity of 41 per token.

    Raises:
        ConfigError: The sizes do not fit together, or a value is out of its range.
    """

    source: str = "stdlib"
    """'stdlib', or the path of a text file or of a folder of text files."""
    vocabulary: int = 3072
    """Tokens, at most: a short text gives fewer."""
    hidden: int = 192
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    """Grouped-query attention: so many heads of keys and values are shared by all heads."""
    positions: int = 512
    """The longest input the model accepts, in tokens."""
    sequence: int = 128
    """Tokens of a training row. Beyond this many positions the model has learned nothing."""
    batch: int = 8
    """Rows per step."""
    steps: int = 2400
    minutes: float | None = None
    """A limit of time in place of ``steps``; what comes out then depends on the machine's speed."""
    lr: float = 3e-3
    """Its peak, reached after the warm-up; it falls to zero along a cosine."""
    warmup: float = 0.1
    """Share of the training."""
    weight_decay: float = 0.1
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    held_out: float = 0.04
    """Share of the text that is not trained on."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "heads", "kv_heads", "sequence", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.hidden % self.heads or self.hidden // self.heads % 2:
            raise ConfigError(
                f"hidden is {self.hidden} and heads is {self.heads}: hidden must be an even multiple of heads "
                f"(a head's size is even), e.g. hidden {2 * self.heads * max(1, round(self.hidden / self.heads / 2))}"
            )
        if self.heads % self.kv_heads:
            raise ConfigError(f"heads is {self.heads} and kv_heads is {self.kv_heads}: heads must be a multiple of it")
        if self.vocabulary <= FEWEST_TOKENS:
            raise ConfigError(
                f"vocabulary is {self.vocabulary}, but every byte and three special tokens come first; "
                f"give more than {FEWEST_TOKENS}"
            )
        if not 2 <= self.sequence <= self.positions:
            raise ConfigError(f"sequence is {self.sequence}; give 2 to {self.positions}, which is positions")
        for name, low, high in (("lr", 0, 1), ("clip", 0, 1e9), ("held_out", 0, 0.5), ("minutes", 0, 1e6)):
            value = getattr(self, name)
            if value is not None and not low < value <= high:
                raise ConfigError(f"{name} is {value}; give more than {low} and at most {high:g}")
        for name, high in (("warmup", 0.9), ("weight_decay", 10)):
            if not 0 <= getattr(self, name) <= high:
                raise ConfigError(f"{name} is {getattr(self, name)}; give 0 to {high}")


@dataclass(frozen=True)
class Pretrained:
    """Where a base was written, and its figures."""

    folder: str
    parameters: int
    vocabulary: int
    """Tokens in use."""
    text_bytes: int
    """Of the text that was trained on, in UTF-8."""
    text_tokens: int
    steps: int
    tokens_seen: int
    """Predicted in training, repetitions counted."""
    training_loss: float
    """Mean of the last tenth of the steps, in nats per token."""
    held_out_bytes: int
    perplexity: float
    """Per token, on the held-out text."""
    bits_per_byte: float
    """On the held-out text; comparable across vocabularies."""
    seconds: float

    def summary(self) -> str:
        """Returns the figures for people, a line each."""
        return (
            f"folder      {self.folder}\n"
            f"parameters  {self.parameters:,}\n"
            f"tokens      {self.tokens_seen:,} seen, of a text of {self.text_tokens:,}\n"
            f"held out    perplexity {self.perplexity:.2f} per token, {self.bits_per_byte:.3f} bits per byte\n"
            f"seconds     {self.seconds:.0f}"
        )


def pretrain(config: PretrainConfig, folder: Path, progress: Progress | None = None) -> Pretrained:
    """Writes a tokenizer and a model trained from nothing as a transformers folder with a model card.

    Same configuration, text, libraries, processor and number of threads give the same weights, unless the budget is
    one of time. Nothing is left behind when this fails or is stopped.

    Raises:
        ArtifactError: The folder exists, or cannot be written.
        DataError: The source cannot be read, or holds too little text.
        TrainingError: The loss is no longer finite.
    """
    started = time.perf_counter()
    with _written_whole(folder) as partial:
        texts, described = read_texts(config.source)
        training, held_out = hold_out(texts, config.held_out, Rng(config.seed).child("held out"))
        tokenizer = train_tokenizer(training, config.vocabulary)
        tokens, held_out_tokens = encoded(training, tokenizer), encoded(held_out, tokenizer)
        rows, held_out_rows = in_rows(tokens, config.sequence), in_rows(held_out_tokens, config.sequence)
        _check_enough(config, _size(training), rows, held_out_rows)
        model = build_model(config, tokenizer)
        losses = train(model, rows, config, progress or (lambda _, __: None))
        nats = mean_loss(model, held_out_rows)
        figures = Pretrained(
            folder=str(folder),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            vocabulary=len(tokenizer),
            text_bytes=_size(training),
            text_tokens=len(tokens),
            steps=len(losses),
            tokens_seen=len(losses) * config.batch * config.sequence,
            training_loss=_tail_mean(losses),
            held_out_bytes=_size(held_out),
            perplexity=exp(nats),
            bits_per_byte=nats / log(2) * len(held_out_tokens) / _size(held_out),
            seconds=time.perf_counter() - started,
        )
        with _no_bars():
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card(config, figures, described), encoding="utf-8")
    return figures


def build_model(config: PretrainConfig, tokenizer: Any) -> Any:
    """Returns a ``LlamaForCausalLM`` in float32 with weights drawn from the seed; input and output share embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    architecture = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        intermediate_size=_feed_forward(config.hidden),
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # torch 2.13 has a slow bfloat16 backward for its fused attention on CPUs: 0.49 s a step instead of 0.42 s.
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(Rng(config.seed).child("weights").integer())
        return LlamaForCausalLM(architecture)


def train(model: Any, rows: Tensor, config: PretrainConfig, progress: Progress) -> list[float]:
    """Trains the model in place with AdamW, and returns each step's loss in nats per token.

    Args:
        model: As ``build_model`` made it.
        rows: [n sequence+1], at least ``config.batch`` of them.
        config: The budget and the optimizer.
        progress: Called after each step.

    Raises:
        TrainingError: The loss is no longer finite.
    """
    optimizer = torch.optim.AdamW(_decayed(model, config.weight_decay), lr=config.lr, betas=(0.9, 0.95), fused=True)
    losses: list[float] = []
    model.train()
    started = time.perf_counter()
    for batch in batches(rows, config.batch, Rng(config.seed).child("order")):
        minutes = (time.perf_counter() - started) / 60
        done = (len(losses) + 0.5) / config.steps if config.minutes is None else minutes / config.minutes
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = config.lr * schedule(done, config.warmup)
        loss = _loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if not isfinite(losses[-1]):
            raise TrainingError(f"the loss of step {len(losses)} is {losses[-1]}; lower lr, which is {config.lr:g}")
        progress(len(losses), losses[-1])
    return losses


def batches(rows: Tensor, size: int, rng: Rng) -> Iterator[Tensor]:
    """Yields batches [size ...] of rows for ever, in a new drawn order each time through; an incomplete one is left."""
    for epoch in count():
        order = torch.randperm(len(rows), generator=rng.child(epoch).torch())
        for start in range(0, len(rows) - size + 1, size):
            yield rows[order[start : start + size]]


def schedule(done: float, warmup: float) -> float:
    """Returns the share of the peak learning rate after a share ``done`` of the training: warm-up, then a cosine."""
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + cos(pi * (done - warmup) / (1 - warmup)))


@torch.no_grad()
def mean_loss(model: Any, rows: Tensor) -> float:
    """Returns the mean loss of predicting rows [n sequence+1], in nats per token; float32 throughout."""
    model.eval()
    total = 0.0
    for start in range(0, len(rows), EVALUATION_ROWS):
        part = rows[start : start + EVALUATION_ROWS]
        total += _loss(model, part, exact=True).item() * len(part)
    return total / len(rows)


def card(config: PretrainConfig, figures: Pretrained, described: str) -> str:
    """Returns the text of the folder's README: what this was trained on, how, and its figures."""
    source = config.source if config.source == "stdlib" else Path(config.source).name
    given = {**asdict(config), "source": source}
    options = [
        f"--{f.name} {given[f.name]}" for f in fields(config) if f.name in OPTIONS and given[f.name] != f.default
    ]
    settings = ", ".join(f"{name} {value}" for name, value in given.items())
    rows = {
        "parameters": f"{figures.parameters:,}",
        "vocabulary": f"{figures.vocabulary:,} tokens",
        "training text": f"{figures.text_bytes:,} bytes, {figures.text_tokens:,} tokens",
        "tokens seen": f"{figures.tokens_seen:,} in {figures.steps:,} steps",
        "perplexity per token, held-out text": f"{figures.perplexity:.2f}",
        "bits per byte, held-out text": f"{figures.bits_per_byte:.3f}",
        "seconds": f"{figures.seconds:.0f}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    command = " ".join(["fslora pretrain-tiny --to FOLDER", *options])
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [fslora]\n---\n"
        f"# A small causal language model from nothing\n\nA base for experiments with federated fine-tuning, made by "
        f"`{command}`. It is far too small to be of use as it is.\n\n"
        f"Trained on {described}.\n\n| figure | value |\n| --- | --- |\n{table}\n\n"
        f"Held out: {figures.held_out_bytes:,} bytes in whole files of the same source. "
        f"It has seen no more than {config.sequence} tokens at once; longer inputs are accepted, and predicted worse."
        f"\n\nLlama architecture, byte-level BPE, AdamW. Settings: {settings}.\n"
    )


def _check_enough(config: PretrainConfig, size: int, rows: Tensor, held_out_rows: Tensor) -> None:
    if len(rows) < config.batch or not len(held_out_rows):
        raise DataError(
            f"--source {config.source!r} holds too little text: {size:,} bytes to train on, which are "
            f"{len(rows):,} rows of {config.sequence} tokens, and {len(held_out_rows):,} held out; it takes "
            f"{config.batch} (the batch) and 1. Give more text: 100 kB are a start, some MB are better"
        )


def _size(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _feed_forward(hidden: int) -> int:
    """8/3 of the hidden size, as gated layers have, rounded up to a multiple of 64."""
    return -(-8 * hidden // (3 * 64)) * 64


def _decayed(model: Any, decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on the norms' scales."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]


def _loss(model: Any, rows: Tensor, exact: bool = False) -> Tensor:
    """Mean loss over rows [b sequence+1] in nats per token."""
    with nullcontext() if exact else _precision():
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def _precision() -> AbstractContextManager[Any]:
    """bfloat16 products where the processor has tiles for them (AMX): half the time a step takes in float32."""
    tiles = torch.cpu._is_amx_tile_supported()
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=tiles)


def _tail_mean(losses: Sequence[float]) -> float:
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


@contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """Gives a folder beside the wanted one, which takes its place at the end; it is removed if anything fails."""
    if os.path.lexists(folder):
        raise ArtifactError(f"{folder} exists already; name a new folder")
    partial = folder.with_name(f".partial-{folder.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{folder} cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keeps transformers from showing a bar of its own while it saves."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
