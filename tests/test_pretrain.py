"""A small base from nothing: the split of the library, the tokenizer, the training, the folder, the errors."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import fields, replace
from math import exp, log
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fslora import cli, pretrain
from fslora.data.stdlib import pretraining_share, read_sources
from fslora.errors import ArtifactError, ConfigError, DataError, TrainingError
from fslora.pretrain import PretrainConfig, build_model, mean_loss, schedule, train
from fslora.pretrain_text import encoded, hold_out, in_rows, read_texts, train_tokenizer
from fslora.rng import Rng

TINY = PretrainConfig(vocabulary=400, hidden=32, layers=2, positions=64, sequence=32, batch=8, steps=30, lr=1e-2)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Real text: a few files of the pretraining half."""
    return [text[:3000] for _, text in read_sources(pretraining=True)[:30]]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts, 600)


@pytest.fixture
def own_text(tmp_path: Path, texts) -> Path:
    path = tmp_path / "own.txt"
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


@pytest.fixture
def config(own_text: Path) -> PretrainConfig:
    return replace(TINY, source=str(own_text))


# --- the split of the standard library ---


def test_the_halves_share_no_package_and_are_the_whole():
    halves = {side: {name for name, _ in read_sources(side)} for side in (True, False)}
    assert not halves[True] & halves[False]
    assert all(pretraining_share(name) == side for side, names in halves.items() for name in names)
    for name in ("argparse", "json", "email", "unittest", "os"):
        assert name in halves[True] | halves[False]


def test_the_sides_never_change():
    """Bases in use were trained on one half: a package that changed sides would be in their text."""
    names = ("asyncio", "email", "inspect", "json", "os", "re", "argparse", "datetime", "pickle", "tkinter", "xml")
    assert [pretraining_share(name) for name in names] == [True] * 6 + [False] * 5
    for twin, name in {"_pydecimal": "decimal", "_pyio": "io", "_py_abc": "abc", "_strptime": "strptime"}.items():
        assert pretraining_share(twin) == pretraining_share(name)


def test_the_fine_tuning_half_has_groups_enough():
    sizes: dict[str, int] = {}
    for name, text in read_sources(pretraining=False):
        sizes[name] = sizes.get(name, 0) + len(text)
    assert sum(size > 8000 for size in sizes.values()) >= 40
    pretraining = sum(len(text) for _, text in read_sources(pretraining=True))
    assert 0.6 < sum(sizes.values()) / pretraining < 1.7


def test_sources_leave_out_tests_tables_and_what_is_no_text(tmp_path):
    side = pretraining_share("json")
    for name, content in {
        "json/__init__.py": b"'''Kept.'''\r\n",
        "json/decoder.py": "x = 'é'\n".encode(),
        "json/tests/test_it.py": b"dropped = 1\n",
        "json/latin.py": b"name = '\xe9'\n",
        "json/empty.py": b" \n",
        "encodings/cp1.py": b"table = 1\n",
        "html/entities.py": b"table = 1\n",
        "json/notes.txt": b"no source\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert read_sources(side, tmp_path) == [("json", "'''Kept.'''\n"), ("json", "x = 'é'\n")]
    assert read_sources(not side, tmp_path) == []
    with pytest.raises(DataError, match=r"no \.py files under .* Give a text file or folder"):
        read_sources(side, tmp_path / "nowhere")


# --- tokenizer ---


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_special_tokens_are_three_and_come_first(tokenizer):
    numbers = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert numbers == [0, 1, 2]
    assert tokenizer.encode("def")[0] == tokenizer.bos_token_id
    assert tokenizer.encode("def", add_special_tokens=False)[0] != tokenizer.bos_token_id
    assert len(tokenizer) == 600


def test_a_short_text_gives_fewer_tokens_than_asked_for():
    assert 259 < len(train_tokenizer(["a text of few words, of few words"], 4096)) < 300


# --- packing and holding out ---


def test_every_token_but_the_first_is_predicted_once(tokenizer, texts):
    tokens = encoded(texts[:2], tokenizer)
    assert (tokens == tokenizer.bos_token_id).sum() == (tokens == tokenizer.eos_token_id).sum() == 2
    rows = in_rows(tokens, 32)
    assert rows.shape == ((len(tokens) - 1) // 32, 33)
    assert torch.equal(rows[:, 1:].flatten(), tokens[1 : 1 + 32 * len(rows)])
    assert torch.equal(rows[1:, 0], rows[:-1, -1])
    assert in_rows(tokens[:32], 32).shape == (0, 33)


def test_whole_texts_are_held_out(texts):
    training, held_out = hold_out(texts, 0.1, Rng(0))
    assert sorted(training + held_out) == sorted(texts)
    assert 0.1 <= sum(map(len, held_out)) / sum(map(len, texts)) < 0.2
    assert hold_out(texts, 0.1, Rng(0)) == (training, held_out)
    assert hold_out(texts, 0.1, Rng(1)) != (training, held_out)


def test_a_file_that_is_most_of_the_text_is_cut(texts):
    long = "".join(f"line {number}\n" for number in range(20_000))
    training, held_out = hold_out([*texts, long], 0.05, Rng(0))
    assert len("".join(held_out)) < 0.15 * len("".join(training))
    assert all(piece in texts or piece.endswith("\n") for piece in training + held_out)


@given(text=st.text(), share=st.floats(0.01, 0.5))
def test_one_text_is_cut_before_it_is_held_out(text, share):
    training, held_out = hold_out([text], share, Rng(0))
    assert sorted("".join(training + held_out)) == sorted(text)
    assert training or not text
    if len(text) > 100:
        assert held_out


# --- training ---


def test_the_learning_rate_rises_and_falls():
    assert schedule(0, 0.1) == 0
    assert schedule(0.05, 0.1) == pytest.approx(0.5)
    assert schedule(0.1, 0.1) == schedule(0, 0) == pytest.approx(1)
    assert schedule(0.55, 0.1) == pytest.approx(0.5)
    assert schedule(1, 0.1) == pytest.approx(0)


def test_the_loss_falls_and_the_mean_is_over_all_tokens(tokenizer, texts):
    config = replace(TINY, vocabulary=600)
    model = build_model(config, tokenizer)
    rows = in_rows(encoded(texts, tokenizer), 32)
    fresh = mean_loss(model, rows[:40])
    assert fresh == pytest.approx(log(600), rel=0.02)
    by_hand = model(input_ids=rows[:40], labels=rows[:40]).loss.item()
    assert fresh == pytest.approx(by_hand, rel=1e-5)
    seen: list[tuple[int, float]] = []
    losses = train(model, rows, config, lambda number, loss: seen.append((number, loss)))
    assert seen == list(enumerate(losses, 1))
    assert len(losses) == config.steps
    assert losses[0] == pytest.approx(fresh, rel=0.05)
    assert mean_loss(model, rows[:40]) < fresh - 0.7


def test_a_time_limit_ends_the_training(tokenizer, texts):
    rows = in_rows(encoded(texts, tokenizer), 32)
    losses = train(build_model(TINY, tokenizer), rows, replace(TINY, minutes=0.01, steps=1), lambda *_: None)
    assert 1 < len(losses) < 1000


def test_a_loss_that_is_not_finite_is_an_error(tokenizer, texts):
    model = build_model(TINY, tokenizer)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(TrainingError, match=r"the loss of step 1 is .*; lower lr, which is 0\.01"):
        train(model, in_rows(encoded(texts, tokenizer), 32), TINY, lambda *_: None)


# --- the folder ---


def test_the_folder_is_an_ordinary_one_and_repeatable(config, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = pretrain.pretrain(config, tmp_path / "a" / "first")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    pretrain.pretrain(config, tmp_path / "second")
    pretrain.pretrain(replace(config, seed=1), tmp_path / "other")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a/first", "second", "other")]
    assert weights[0] == weights[1] != weights[2]

    folder = tmp_path / "a" / "first"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == first.parameters
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == first.vocabulary == 400
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.decode(tokenizer.encode("ä [x]  .\n"), skip_special_tokens=True) == "ä [x]  .\n"
    batch = tokenizer(["import os", "def"], padding=True, padding_side="left", return_tensors="pt")
    written = model.generate(**{name: batch[name] for name in ("input_ids", "attention_mask")}, max_new_tokens=5)
    assert written.shape[1] > batch["input_ids"].shape[1]
    assert first.perplexity < exp(log(400) - 0.7)
    assert 1 < first.bits_per_byte < 8
    assert first.tokens_seen == 30 * 8 * 32
    assert not list(tmp_path.rglob(".partial-*"))


def test_the_card_tells_figures_and_source_but_no_text_and_no_path(config, tmp_path):
    result = pretrain.pretrain(config, tmp_path / "base")
    card = (tmp_path / "base" / "README.md").read_text()
    assert f"{result.perplexity:.2f}" in card
    assert f"{result.parameters:,}" in card
    assert "1 text file(s) from own.txt" in card
    assert "--source own.txt" in card
    assert "--steps 30" in card
    assert str(tmp_path) not in card


def test_the_card_of_the_library_names_its_packages(tmp_path):
    described = read_texts("stdlib")[1]
    assert "asyncio" in described
    assert "tkinter" not in described
    assert "pretraining_share" in described


def test_nothing_is_left_when_stopped(config, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(config, tmp_path / "base", stopped)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.txt"]
    monkeypatch.setattr(pretrain, "train", stopped)
    result = CliRunner().invoke(cli.app, ["pretrain-tiny", "--to", str(tmp_path / "base"), "--source", config.source])
    assert result.exit_code == 130
    assert f"stopped; nothing was written to {tmp_path / 'base'}" in result.stderr


# --- the command ---


def test_the_command_prints_figures(own_text, tmp_path):
    sizes = ["--hidden", "32", "--layers", "1", "--vocabulary", "300", "--steps", "2", "--source", str(own_text)]
    result = CliRunner().invoke(cli.app, ["pretrain-tiny", "--to", str(tmp_path / "base"), *sizes])
    assert result.exit_code == 0, result.output
    assert re.search(r"perplexity \d+\.\d+ per token, \d\.\d+ bits per byte", result.stdout)
    assert "loss" in result.stderr
    result = CliRunner().invoke(cli.app, ["pretrain-tiny", "--to", str(tmp_path / "c"), *sizes, "--json", "--quiet"])
    figures = json.loads(result.stdout)
    assert figures["folder"] == str(tmp_path / "c")
    assert figures["tokens_seen"] == 2 * PretrainConfig().batch * PretrainConfig().sequence
    assert not result.stderr


def test_the_command_s_defaults_are_the_configuration_s():
    options = {name: value.default for name, value in inspect.signature(cli.pretrain_tiny).parameters.items()}
    for field in fields(PretrainConfig):
        if field.name in pretrain.OPTIONS:
            assert options[field.name] == field.default, field.name
    assert set(pretrain.OPTIONS) <= set(options)
    help_text = CliRunner().invoke(cli.app, ["pretrain-tiny", "--help"]).stdout
    assert f"{PretrainConfig().batch * PretrainConfig().sequence:,} tokens" in help_text


# --- errors ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 250}, r"hidden is 250 and heads is 4: .* e\.g\. hidden 248"),
        ({"hidden": 4}, r"even multiple of heads .* e\.g\. hidden 8"),
        ({"heads": 4, "kv_heads": 3}, r"kv_heads is 3: heads must be a multiple"),
        (
            {"vocabulary": 259},
            r"vocabulary is 259, but every byte and three special tokens come first; give more than 259",
        ),
        ({"sequence": 600}, r"sequence is 600; give 2 to 512"),
        ({"layers": 0}, r"layers is 0; give at least 1"),
        ({"steps": -1}, r"steps is -1"),
        ({"minutes": 0.0}, r"minutes is 0\.0; give more than 0"),
        ({"lr": float("nan")}, r"lr is nan"),
        ({"warmup": 1.0}, r"warmup is 1\.0; give 0 to 0\.9"),
    ],
)
def test_sizes_that_make_no_sense_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        PretrainConfig(**changes)


def test_sources_and_targets_that_cannot_be_used_are_named(tmp_path, config):
    def attempt(source: Path, target: str = "base"):
        pretrain.pretrain(replace(config, source=str(source)), tmp_path / target)

    short = tmp_path / "short.txt"
    short.write_text("Too few words to learn from.\n" * 20, encoding="utf-8")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"--source is '.*nowhere', but there is no such file"):
        attempt(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"--source '.*empty' holds no usable text"):
        attempt(empty)
    with pytest.raises(DataError, match=r"too little text: \d+ bytes to train on, .* 100 kB are a start"):
        attempt(short)
    with pytest.raises(ArtifactError, match=r"empty exists already; name a new folder"):
        attempt(short, "empty")
    with pytest.raises(ArtifactError, match=r"cannot be written"):
        attempt(short, "short.txt/base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "own.txt", "short.txt"]
