"""No recipe can rot: each is run, shortened, on a small random model of its architecture and on files of its form."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from conftest import WORDS
from fslora.compare import with_options
from fslora.compare.plan import make_plan
from fslora.config import load
from fslora.console import Terminal
from fslora.runner import start
from test_objectives import causal_folder  # noqa: F401  (a fixture)

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "configs").glob("*.toml"))
SHORT = (
    "run.rounds=2",
    "run.eval_every=1",
    "fleet.clients=4",
    "fleet.cohort=2",
    "local.steps=1",
    "local.batch_size=2",
    "model.max_length=32",
    "partition.min_examples=2",
    "data.max_train=60",
    "data.max_test=20",
    "data.max_validation=20",
    "data.validation_share=0.1",
    "data.test_share=0.1",
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path):
    """The file itself, and as a comparison."""
    experiment = load(path)
    assert make_plan(with_options(experiment, {})).contestants


def sentences(count: int, seed: int, longest: int = 10) -> list[str]:
    draw = np.random.default_rng(seed)
    return [f"{' '.join(draw.choice(WORDS, draw.integers(2, longest)))} {row}" for row in range(count)]


def write_rows(path: Path, **columns: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(recipe: str, tmp_path: Path, *overrides: str) -> dict:
    folder = start(load(ROOT / "configs" / recipe, [*SHORT, *overrides]), tmp_path / "run", Terminal(quiet=True))
    summary = folder.read_json("summary.json")
    assert summary["finished"]
    assert all(np.isfinite(value) for value in summary["test"]["after"].values())
    assert (folder.path / "report.html").stat().st_size > 1000
    return summary


def glue_tasks() -> list[list[str]]:
    """The main task and the others, as the recipe's own comment gives them."""
    text = (ROOT / "configs" / "paper-glue-roberta.toml").read_text()
    lines = re.findall(r"^#   (--set data\.subset=.*)$", text, flags=re.MULTILINE)
    return [[], *[[part for part in shlex.split(line) if part != "--set"] for line in lines]]


@pytest.mark.parametrize("overrides", glue_tasks(), ids=lambda items: items[0].rpartition("=")[2] if items else "sst2")
def test_glue(tiny_folder, tmp_path, overrides):
    assert len(glue_tasks()) == 8
    config = load(ROOT / "configs" / "paper-glue-roberta.toml", overrides).data
    draw = np.random.default_rng(0)
    numbers = draw.uniform(0, 5, 100).round(2).tolist()
    columns = {config.text: sentences(100, 0), **({config.text_pair: sentences(100, 1)} if config.text_pair else {})}
    labels = (
        numbers
        if config.task == "regression"
        else draw.choice(["yes", "no", "maybe"][: 2 + (config.text_pair == "hypothesis")], 100).tolist()
    )
    train = write_rows(tmp_path / "train.jsonl", **columns, **{config.label: labels})
    test = write_rows(tmp_path / "test.jsonl", **columns, **{config.label: labels})
    local = [f"model.name={tiny_folder('roberta')}", f"data.source={train}", f"data.test={test}"]
    summary = run("paper-glue-roberta.toml", tmp_path, *overrides, *local)
    assert summary["metric"] == (config.metric or "accuracy")
    assert summary["metric"] in summary["test"]["after"]


def test_commonsense(causal_folder, tmp_path):  # noqa: F811
    """Folders of tasks as LLM-Adapters has them: JSON lists, choices in the prompt, one score per task."""
    draw = np.random.default_rng(0)
    for task, choices in (("boolq", ("true", "false")), ("piqa", ("solution1", "solution2"))):
        for split, count in (("train", 50), ("test", 10)):
            answers = draw.choice(choices, count).tolist()
            rows = [
                {
                    "instruction": f"{text}\n\nAnswer format: {'/'.join(choices)}",
                    "input": "",
                    "output": f"the correct answer is {answer}",
                    "answer": answer,
                }
                for text, answer in zip(sentences(count, 3, 5), answers, strict=True)
            ]
            path = tmp_path / "commonsense" / task / f"{split}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rows))
    local = [
        f"model.name={causal_folder('llama')}",
        "model.quantize=none",
        f"data.source={tmp_path}/commonsense/*/train.json",
        f"data.test={tmp_path}/commonsense/*/test.json",
    ]
    for evaluation in (["data.evaluate=choice"], ["data.evaluate=generate", "data.extract=choice"]):
        more = [*evaluation, "data.max_new_tokens=4", f"run.seed={len(evaluation)}"]
        summary = run("paper-commonsense-llama32-3b.toml", tmp_path / str(len(evaluation)), *local, *more)
        assert set(summary["by_label"]) == {"boolq", "piqa"}
        assert summary["metric"] == ("accuracy" if len(evaluation) == 1 else "exact_match")


@pytest.mark.parametrize("sites", [False, True], ids=["a table", "a file per site"])
def test_instruct(causal_folder, tmp_path, sites):  # noqa: F811
    folder = causal_folder("llama")
    from test_objectives import causal_tokenizer

    tokenizer = causal_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }} : "
    tokenizer.save_pretrained(tmp_path / "model")
    for file in folder.iterdir():
        if not (tmp_path / "model" / file.name).exists():
            (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    for site in ("a", "b", "c"):
        columns = {"instruction": sentences(40, ord(site)), "input": [""] * 40, "output": sentences(40, 9)}
        write_rows(tmp_path / "sites" / f"{site}.jsonl", **columns)
    local = [f"model.name={tmp_path / 'model'}", "model.gradient_checkpointing=true", "local.batch_size=3"]
    if sites:
        local += [f"data.source={tmp_path}/sites/", "partition.kind=natural", "fleet.clients=3", "fleet.cohort=all"]
    else:
        local += [f"data.source={tmp_path}/sites/a.jsonl"]
    summary = run("llama-1b-instruct.toml", tmp_path, *local)
    assert summary["metric"] == "perplexity"
    assert summary["test"]["after"]["perplexity"] == pytest.approx(np.exp(summary["test"]["after"]["loss"]))


def test_gsm8k(causal_folder, tmp_path):  # noqa: F811
    answers = [f"{text} #### {place}" for place, text in enumerate(sentences(60, 4, 6))]
    rows = {"question": sentences(60, 5, 6), "answer": answers}
    train, test = write_rows(tmp_path / "train.jsonl", **rows), write_rows(tmp_path / "test.jsonl", **rows)
    local = [f"model.name={causal_folder('qwen2, tied')}", f"data.source={train}", f"data.test={test}"]
    summary = run("qwen-0.5b-gsm8k.toml", tmp_path, *local, "data.max_new_tokens=8")
    assert summary["metric"] == "exact_match"


def test_tiny_causal(tmp_path):
    """From the first command to the last: a base, then the recipe on it, with its variants."""
    from fslora.pretrain import PretrainConfig, pretrain

    folder = tmp_path / "base"
    pretrain(PretrainConfig(steps=2, hidden=32, layers=1, vocabulary=400, sequence=32, batch=2), folder)
    summary = run("tiny-causal.toml", tmp_path, f"model.name={folder}")
    assert summary["metric"] == "perplexity"
    assert (tmp_path / "run" / "variants" / "centralized" / "summary.json").exists()
