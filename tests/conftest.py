"""Small real models made from config, with a real tokenizer, saved as ordinary transformers folders."""

from __future__ import annotations

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a hub
os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side; tiny models gain nothing from more threads

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fslora import runner
from fslora.config import AdapterConfig, ModelConfig
from fslora.models.base import Base
from fslora.models.load import load_base
from fslora.objectives import Classes
from fslora.rng import Rng

SHARED = Path(__file__).resolve().parents[2] / "shared"
WORDS = (
    "the a an of to in is was returns object file name value list string error if not when this that with for "
    "good bad fine poor great awful happy sad cat dog sat ran on mat road fast slow red blue one two three"
).split()
COMMAND = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from fslora.cli import main; main()"
FSLORA = [sys.executable, "-c", COMMAND]
"""The command, as a process. What a shell starts in the background ignores SIGINT, and so would its children."""
ARCHITECTURES = ("bert", "roberta", "distilbert", "llama", "gpt2")
LABELS = ("no", "yes", "maybe")


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {token: index for index, token in enumerate(specials + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def tiny_model(architecture: str):
    import transformers as tf

    common = {"vocab_size": 64, "pad_token_id": 0, "initializer_range": 0.2}
    encoder = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
    }
    if architecture == "bert":
        return tf.BertModel(tf.BertConfig(**common, **encoder))
    if architecture == "roberta":
        return tf.RobertaForMaskedLM(tf.RobertaConfig(**common, **encoder))
    if architecture == "distilbert":
        config = tf.DistilBertConfig(**common, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=40)
        return tf.DistilBertModel(config)
    if architecture == "llama":
        return tf.LlamaForCausalLM(tf.LlamaConfig(**common, **encoder, num_key_value_heads=2))
    if architecture == "gpt2":
        config = tf.GPT2Config(
            bos_token_id=2,
            eos_token_id=3,
            vocab_size=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=40,
            pad_token_id=0,
            initializer_range=0.2,
        )
        return tf.GPT2LMHeadModel(config)
    raise ValueError(architecture)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Callable[[str], Path]:
    """Architecture name → folder with model and tokenizer."""
    folders: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in folders:
            folder = tmp_path_factory.mktemp(architecture)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                tiny_model(architecture).save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
            folders[architecture] = folder
        return folders[architecture]

    return make


@pytest.fixture(scope="session")
def tiny_base(tiny_folder) -> Callable[..., Base]:
    """Architecture name (and targets) → a loaded base with a fresh three-class head."""

    def make(architecture: str, targets="all-linear") -> Base:
        model = ModelConfig(name=str(tiny_folder(architecture)), max_length=32)
        return load_base(model, AdapterConfig(rank=8, targets=targets), Classes(LABELS), Rng(0))

    return make


@pytest.fixture
def pageless(monkeypatch) -> None:
    """Runs of this process draw no page, which takes longer than training a tiny model does."""
    monkeypatch.setattr(runner, "write_report", lambda folder: folder.path)


@pytest.fixture(scope="session")
def shared() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip("../shared/data is not beside this checkout")
    return SHARED


GOOD, BAD = ("good", "fine", "great", "happy"), ("bad", "poor", "awful", "sad")


@pytest.fixture(scope="session")
def sentiment_file(tmp_path_factory) -> Path:
    """240 rows that a tiny model can learn: a sentence is good or bad by one word; three sites."""
    import csv

    import numpy as np

    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("table") / "sentiment.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "site"])
        for row in range(240):
            good = row % 2
            words = list(draw.choice(WORDS[:20], draw.integers(3, 9)))
            for word in draw.choice(GOOD if good else BAD, 2):
                words.insert(int(draw.integers(0, len(words))), str(word))
            writer.writerow([f"{' '.join(words)} {row}", "good" if good else "bad", f"site-{row % 3}"])
    return path


@pytest.fixture
def tiny_settings(tiny_folder, sentiment_file) -> list[str]:
    """``--set`` items of an experiment that runs in seconds."""
    return [
        f"model.name={tiny_folder('bert')}",
        "model.max_length=32",
        "data.task=table",
        f"data.source={sentiment_file}",
        "data.max_validation=0",
        "partition.kind=dirichlet",
        "fleet.clients=6",
        "fleet.cohort=4",
        "adapter.rank=8",
        "adapter.alpha=8",
        "run.rounds=4",
        "run.eval_every=2",
        "local.steps=2",
        "local.lr=0.005",
    ]
