"""`fslora eval --harness`: lm-eval's own tasks on base and adapter, checked against our own evaluation; no network."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from conftest import WORDS, tiny_tokenizer
from fslora import config, harness
from fslora.cli import app
from fslora.config import ModelConfig
from fslora.data.types import Examples
from fslora.errors import ArtifactError, ConfigError, DataError
from fslora.evaluate import predict
from fslora.export import export_peft
from fslora.harness import Harness, evaluate_harness
from fslora.models.load import load_base
from fslora.objectives import Causal
from fslora.rng import Rng
from fslora.types import Adapter
from test_engines import random_adapter
from test_objectives import SMALL

ANSWERS = ("good", "bad dog", "poor road ran")
"""Of different lengths, so that a score per token would choose differently."""
END = "[SEP]"


class Notes:
    """A stage that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    def rounds(self, *_):
        raise AssertionError("nothing is trained here")


@pytest.fixture(scope="module")
def _lm_eval():
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra: pip install 'fslora[harness]'")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A causal model whose tokenizer starts a text and never ends it, as most of their kind."""
    import transformers as tf
    from tokenizers import processors

    folder = tmp_path_factory.mktemp("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    start = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    tokenizer.backend_tokenizer.post_processor = start
    tokenizer.add_special_tokens({"bos_token": "[CLS]", "eos_token": END})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def experiment(model_folder):
    return config.load(
        None,
        [
            f"model.name={model_folder}",
            "model.max_length=48",
            "data.task=instruct",
            "data.source=nowhere.jsonl",
            "data.prompt={question}",
            "data.evaluate=choice",
            "data.answer=answer",
            f"data.choices={json.dumps(ANSWERS)}",
            "partition.kind=iid",
            "variants={}",
        ],
    )


@pytest.fixture(scope="module")
def base(experiment):
    return load_base(experiment.model, experiment.adapter, Causal(experiment.data), Rng(0))


@pytest.fixture(scope="module")
def adapter(base):
    return random_adapter(base, 4, Rng(5))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, experiment, base, adapter):
    """What a finished run leaves; its data are nowhere to be found."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    (folder / "experiment.toml").write_text(config.to_toml(experiment))
    export_peft(adapter, base.head, base.name, folder / "adapter", task="CAUSAL_LM")
    return folder


@pytest.fixture(scope="module")
def questions():
    draw = np.random.default_rng(3)
    return [(" ".join(draw.choice(WORDS, draw.integers(2, 12))), int(draw.integers(3))) for _ in range(40)]


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory, questions):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": text, "right": right} for text, right in questions]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    choices = [f"{answer} {END}" for answer in ANSWERS]  # ours end with the end token
    (folder / "mine.yaml").write_text(f"""
task: mine
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{folder}/rows.jsonl"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: {json.dumps(choices)}
doc_to_target: "{{{{right}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
    return folder


def ours(base, adapter: Adapter, questions) -> float:
    """Accuracy of our own choice evaluation on the same candidates."""
    columns = {
        "target": tuple(ANSWERS[right] for _, right in questions),
        "choices": (ANSWERS,) * len(questions),
    }
    texts = tuple(text for text, _ in questions)
    examples = Examples(texts, np.zeros(len(texts), dtype=np.int64), columns=columns)
    data = base.objective.encode(examples, base.tokenizer, ModelConfig(max_length=48))
    return predict(base, adapter, data).scores()["accuracy"]


@pytest.mark.usefixtures("_lm_eval")
def test_accuracies_are_those_of_our_own_evaluation(run_folder, task_folder, base, adapter, questions):
    stage = Notes()
    result = evaluate_harness(run_folder, Harness(("mine",), task_folder), stage)
    rows = {row["metric"]: row for row in result["rows"]}
    assert set(rows) == {"acc", "acc_norm"}
    assert rows["acc"]["before"] == pytest.approx(ours(base, Adapter({}), questions))
    assert rows["acc"]["after"] == pytest.approx(ours(base, adapter, questions))
    assert rows["acc"]["before"] != rows["acc"]["after"], "the adapter changes nothing"
    assert rows["acc"]["after"] != rows["acc_norm"]["after"], "length plays no part: the test tells nothing"
    assert rows["acc"]["examples"] == len(questions)
    assert rows["acc"]["higher_is_better"] is True
    assert 0 < rows["acc"]["after_stderr"] < 0.1
    assert len(stage.lines) == 4


@pytest.mark.usefixtures("_lm_eval")
def test_the_command(run_folder, task_folder, capfd):
    """Nothing but the result on standard output, nothing but notes on standard error."""
    asked = ["eval", str(run_folder), "--harness", "mine", "--harness-path", str(task_folder), "--harness-limit", "7"]
    found = CliRunner().invoke(app, [*asked, "--json"], catch_exceptions=False)
    rows = json.loads(found.stdout)["rows"]
    assert [row["examples"] for row in rows] == [7, 7]
    assert found.stderr == ""
    found = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert "mine" in found.stdout
    assert "acc ↑" in found.stdout
    assert {line.split()[0] for line in found.stderr.splitlines()} == {"Loading", "Evaluating"}
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("_lm_eval")
def test_written_answers_are_scored_too(run_folder, tmp_path, base, adapter, questions):
    """Greedy decoding with the adapter attached: right where the reference is what our own generation writes."""
    texts = [text for text, _ in questions[:6]]
    with torch.no_grad(), base.using(adapter):
        written = base.generate(base.tokenizer(texts)["input_ids"], 4)
    rows = [
        {"q": text, "a": answer if place % 3 else "else"}
        for place, (text, answer) in enumerate(zip(texts, written, strict=True))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "writes.yaml").write_text(f"""
task: writes
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{tmp_path}/rows.jsonl"}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: ["[SEP]"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""")
    (row,) = evaluate_harness(run_folder, Harness(("writes",), tmp_path), Notes())["rows"]
    assert row["metric"] == "exact_match"
    assert row["before"] < row["after"] == pytest.approx(4 / 6)


@pytest.mark.usefixtures("_lm_eval")
def test_an_unknown_task_is_answered_with_those_near_it(run_folder, task_folder, monkeypatch):
    from lm_eval import tasks

    class Few(tasks.TaskManager):  # the real one reads 14,000 files
        def __init__(self, include_path=None, include_defaults=True):
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", Few)
    with pytest.raises(ConfigError, match=r"--harness names 'mein', which is no task .*; near it there are mine"):
        evaluate_harness(run_folder, Harness(("mine", "mein"), task_folder), Notes())


@pytest.mark.usefixtures("_lm_eval")
def test_data_that_cannot_be_fetched(run_folder, tmp_path):
    (tmp_path / "far.yaml").write_text(
        "task: far\ndataset_path: somebody/something\ntest_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{q}}'\ndoc_to_choice: [a, b]\ndoc_to_target: '{{r}}'\n"
    )
    with pytest.raises(DataError, match=r"--harness far cannot be loaded: .* Without a network, .* --harness-path"):
        evaluate_harness(run_folder, Harness(("far",), tmp_path), Notes())


@pytest.mark.usefixtures("_lm_eval")
def test_programs_are_not_run(run_folder, task_folder, tmp_path):
    (tmp_path / "code.yaml").write_text(f"include: {task_folder}/mine.yaml\ntask: code\nunsafe_code: true\n")
    with pytest.raises(ConfigError, match="--harness code runs what the model writes as a program"):
        evaluate_harness(run_folder, Harness(("code",), tmp_path), Notes())


def test_what_is_said_before_anything_is_loaded(run_folder, tmp_path, monkeypatch, experiment):
    monkeypatch.setattr(harness, "load_base", None)
    with pytest.raises(ArtifactError, match="is no run folder"):
        evaluate_harness(tmp_path, Harness(("mine",)), Notes())
    (tmp_path / "experiment.toml").write_text(config.to_toml(config.load(None)))
    with pytest.raises(ConfigError, match=r"needs a causal language model, and this run's data\.task is 'word-order'"):
        evaluate_harness(tmp_path, Harness(("mine",)), Notes())
    find = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a))
        with pytest.raises(ConfigError, match=r"not installed; run `pip install 'fslora\[harness\]'`"):
            evaluate_harness(run_folder, Harness(("mine",)), Notes())
    monkeypatch.setattr(importlib.util, "find_spec", lambda *a: object())
    with pytest.raises(ConfigError, match="names no task"):
        evaluate_harness(run_folder, Harness(()), Notes())
    with pytest.raises(ConfigError, match="is no folder"):
        evaluate_harness(run_folder, Harness(("mine",), tmp_path / "nowhere"), Notes())
    with pytest.raises(ConfigError, match="--client is 1, but fslora serves one model to all"):
        evaluate_harness(run_folder, Harness(("mine",), client=1), Notes())


def test_options_without_their_main_one():
    found = CliRunner().invoke(app, ["eval", "runs/x", "--harness-limit", "3"])
    assert isinstance(found.exception, ConfigError)
    assert "belong to --harness" in str(found.exception)
