"""`fslora plan` tells what a run will cost: bytes and operations exactly, memory nearly, without weights or data."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fslora import config, runner
from fslora.cli import app
from fslora.console import Silent
from fslora.data.batches import Encoded
from fslora.data.types import Examples
from fslora.engine import cohort
from fslora.engine.cohort import concatenated, tokens_of
from fslora.errors import ModelError
from fslora.footprint import StorageTracker, fused_attention, loading_bytes, local_step
from fslora.methods import METHODS
from fslora.methods.base import initial_adapter
from fslora.models.load import load_base, outline_base
from fslora.objectives import Classes, Images, Tags, Value
from fslora.planning import plan
from fslora.prepare import Workshop
from fslora.pretrain import PretrainConfig, pretrain
from fslora.rng import Rng
from fslora.runfolder import RunFolder
from fslora.simulate import Simulation
from fslora.types import Start
from fslora.workload import Shapes, Workload, outlined
from test_run import Quiet

ROOT = Path(__file__).resolve().parents[1]
LABELS = ("no", "yes", "maybe")


def rows_of(experiment: config.Experiment, folder: Path) -> list[dict]:
    Simulation(Workshop().federation(experiment), RunFolder.create(folder), Silent()).run()
    return RunFolder(folder).metrics()[1:]


@pytest.mark.parametrize("name", ["fslora", "fedit", "hetlora", "flora", "flexlora", "rolora", "fedsa-lora"])
def test_bytes_and_operations_are_those_of_the_run(tiny_settings, tmp_path, name):
    """Round 1 by client; where nothing depends on what training finds, the whole run too."""
    assert name in METHODS
    experiment = config.load(None, [*tiny_settings, f"method.name={name}", "run.rounds=3", "variants={}"])
    result, rows = plan(experiment), rows_of(experiment, tmp_path / "run")
    by_rank = {entry["rank"]: entry for entry in result["traffic"]["by_rank"]}
    fleet = Workshop().sites(experiment).fleet
    for client, down in rows[0]["client_bytes_down"].items():
        entry = by_rank[fleet[int(client)].rank]
        assert down == entry["bytes_down"], client
        assert rows[0]["client_bytes_up"][client] == entry["bytes_up"], client
        assert rows[0]["client_memory"][client] == entry["client_memory_bytes"], client
    assert result["traffic"]["first_round_down"] == rows[0]["bytes_down"]
    assert result["compute"]["first_round_operations"] == sum(rows[0]["client_flops"].values())
    if name == "hetlora":  # prunes by what it has learnt
        return
    assert result["traffic"]["total_up"] == sum(row["bytes_up"] for row in rows)
    assert result["compute"]["operations"] == pytest.approx(rows[-1]["flops_total"], rel=1e-9)
    assert result["traffic"]["total_down"] == pytest.approx(sum(row["bytes_down"] for row in rows), rel=0.02)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "llama", "gpt2"])
@pytest.mark.parametrize("objective", [Classes(LABELS), Value(), Tags(LABELS)])
def test_the_outline_is_the_base_without_weights(tiny_folder, architecture, objective):
    model = config.ModelConfig(name=str(tiny_folder(architecture)), max_length=32)
    adapter = config.AdapterConfig(rank=8)
    outline, base = outline_base(model, adapter, objective), load_base(model, adapter, objective, Rng(0))
    assert all(parameter.is_meta for parameter in outline.base.model.parameters())
    assert outline.checkpoint
    assert (outline.base.head, outline.base.targets) == (base.head, base.targets)
    assert outline.base.parameters == base.parameters
    assert outline.base.linear_parameters == base.linear_parameters
    mine, true = outline.base.template(adapter), base.template(adapter)
    assert mine.layers == true.layers
    assert {n: t.shape for n, t in mine.dense.items()} == {n: t.shape for n, t in true.dense.items()}


def allocated(base, start, batch) -> int:
    tracked = local_step(base, [start] * 2, [batch] * 2, config.LocalConfig(), 0.0)
    return tracked.trained + tracked.activations


@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}, {"attention": "eager"}, {"dtype": "bfloat16"}])
def test_a_step_on_the_meta_device_takes_what_a_real_one_takes(tiny_folder, architecture, more):
    """The same tracker follows real tensors; padding masks are really padded there."""
    model = config.ModelConfig(name=str(tiny_folder(architecture)), max_length=32, **more)
    adapter, objective = config.AdapterConfig(rank=4), Classes(LABELS)
    outline, base = outline_base(model, adapter, objective).base, load_base(model, adapter, objective, Rng(0))
    mask = torch.ones(4, 24, dtype=torch.int64)
    mask[1, 12:] = 0
    labels = torch.zeros(4, dtype=torch.int64)
    batch = {"input_ids": torch.ones(4, 24, dtype=torch.int64) * 5, "attention_mask": mask, "labels": labels}
    start = Start(initial_adapter(base.template(adapter), 4, Rng(0)))
    meta, real = allocated(outline, start, batch), allocated(base, start, batch)
    assert meta == pytest.approx(real, rel=0.06)


def test_the_tracker_counts_what_lives():
    with StorageTracker() as tracker:
        x = torch.zeros(1000)
        y = x + 1
        view = y[10:]
        del y
        assert tracker.live["cpu"] == 8000
        del view
        assert tracker.live["cpu"] == 4000
        saved = (torch.ones(1000, requires_grad=True) * x).exp()
        del x
        assert tracker.live["cpu"] >= 12000  # the graph holds what it needs
        del saved
    assert tracker.live["cpu"] == 0
    assert tracker.peak["cpu"] >= 16000


def test_fused_attention_is_taken_back():
    own = torch.nn.functional.scaled_dot_product_attention
    with pytest.raises(ValueError, match="stop"), fused_attention():
        raise ValueError("stop")
    assert torch.nn.functional.scaled_dot_product_attention is own


def test_loading_counts_the_files_pages():
    assert loading_bytes(10, stored=4, loaded=4, kept=4) == 40
    assert loading_bytes(10, stored=4, loaded=4, kept=2) == 60
    assert loading_bytes(10, stored=2, loaded=4, kept=2) == 60
    assert loading_bytes(10, stored=2, loaded=2, kept=2) == 20


def config_only(tmp_path: Path) -> Path:
    import transformers

    folder = tmp_path / "outline"
    transformers.LlamaConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quantize", ["none", "4bit"])
def test_a_config_alone_can_be_planned(tmp_path, quantize):
    folder = config_only(tmp_path)
    items = ["data.task=instruct", "data.source=nowhere.jsonl", f"model.name={folder}", f"model.quantize={quantize}"]
    method = {"none": "flora", "4bit": "hetlora"}[quantize]  # what adds to the base needs it unquantised
    more = ["model.max_length=128", "partition.kind=iid", f"method.name={method}", "fleet.cohort=4", "run.rounds=5"]
    args = [part for item in [*items, *more, "variants={}"] for part in ("--set", item)]
    result = CliRunner().invoke(app, ["plan", *args, "--no-data", "--teraflops", "100", "--json"])
    assert result.exit_code == 0, result.output
    planned = json.loads(result.stdout)
    assert planned["tokens"]["certainty"] == "assumed"
    assert planned["tokens"]["per_round"] == 4 * 6 * 8 * 128 == planned["tokens"]["predicted_per_round"]
    assert planned["compute"]["teraflops"] == 100
    assert planned["model"]["adapted_layers"] == 7 * 3
    assert (planned["traffic"]["change_of_base_bytes"] > 0) == (quantize == "none")
    assert planned["memory"]["activations"] > 4 * 8 * 128 * 500 * 4  # the logits
    assert any("weights" in note for note in planned["notes"])


def test_epochs_over_unknown_data_leave_totals_out(tmp_path):
    items = [f"model.name={config_only(tmp_path)}", "local.epochs=2", "variants={}"]
    result = plan(config.load(None, items), with_data=False, teraflops=1)
    assert result["tokens"]["total"] is result["compute"]["training_seconds"] is None
    assert any("local.epochs" in note for note in result["notes"])


def test_without_a_tokenizer_tokens_are_estimated(tiny_settings, tiny_folder, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(tiny_folder("bert") / "config.json", folder)
    result = plan(config.load(None, [*tiny_settings, f"model.name={folder}"]), teraflops=1)
    assert result["tokens"]["certainty"] == "estimated"
    assert any("4 characters" in note for note in result["notes"])


def test_images_are_planned_unopened():
    import transformers as tf

    from fslora.footprint import evaluation_step
    from fslora.workload import _images

    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    shape = tf.ViTConfig(**settings, image_size=32, patch_size=8)
    from fslora.models.base import Base

    with torch.device("meta"):
        model = tf.ViTForImageClassification(shape)
    base = Base(model, None, Images(LABELS), ("classifier",), "all-linear", "x")
    data = _images(Examples(("a.png",) * 4, torch.zeros(4, dtype=torch.int64).numpy()), base)
    assert data.lengths.tolist() == [17] * 4
    adapter = initial_adapter(base.template(config.AdapterConfig(rank=4)), 4, Rng(0))
    assert evaluation_step(base, adapter, data.batch([0, 1])).activations > 0


def test_nothing_to_plan_from_is_an_error_that_says_what_to_do(tmp_path):
    experiment = config.load(None, [f"model.name={tmp_path}"])
    with pytest.raises(ModelError, match=r"config\.json"):
        plan(experiment, with_data=False)


def test_the_table_and_the_warning(tiny_settings, monkeypatch):
    monkeypatch.setattr("fslora.planning.machine_memory", lambda: {"host": 1000})
    args = [part for item in tiny_settings for part in ("--set", item)]
    result = CliRunner().invoke(app, ["plan", *args], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    for words in ("frozen parameters", "rank 4, a round", "padded tokens", "peak", "checkpoint", "variants"):
        assert words in result.output, words
    assert "warning: the plan needs" in result.output
    quiet = CliRunner().invoke(app, ["plan", *args, "--quiet"])
    assert "note:" not in quiet.output


def test_worker_processes_are_planned_for(tiny_settings):
    """Each has a base and trains a chunk; this process evaluates and averages."""
    items = [*tiny_settings, "variants={}", "engine.chunk=2"]
    one, two = (plan(config.load(None, [*items, f"engine.workers={n}"]))["memory"] for n in (1, 2))
    assert (one["workers"], one["worker"]) == (0, None)
    assert two["workers"] == 2
    assert two["worker"] > two["process"] + two["weights"] + two["trained"] + two["activations"]
    assert two["peak"] - 2 * two["worker"] == pytest.approx(one["peak"], rel=0.1)
    args = [part for item in [*items, "engine.workers=2"] for part in ("--set", item)]
    result = CliRunner().invoke(app, ["plan", *args], env={"COLUMNS": "120"})
    assert "2 of them beside this one" in result.output


@pytest.mark.parametrize("where", ["server", "clients"])
def test_shapes_that_are_planned_are_those_of_the_run(tiny_settings, tmp_path, monkeypatch, pageless, where):
    """Every one makes the processor's library keep kernels."""
    trained, scored = set(), {"baseline": set(), "rounds": set(), "ends": set()}
    phase = "baseline"

    def joined(own, *args):
        batch = concatenated(own, *args)
        trained.add((len(batch["labels"]), len(own), tokens_of(batch)))
        return batch

    def evaluated(data, *args):
        for index, batch in own_batches(data, *args):
            scored[phase].add((len(index), tokens_of(batch)))
            yield index, batch

    def within(name, function):
        def run(*args, **kwargs):
            nonlocal phase
            before, phase = phase, name
            try:
                return function(*args, **kwargs)
            finally:
                phase = before

        return run

    own_batches = Encoded.evaluated
    monkeypatch.setattr(cohort, "concatenated", joined)
    monkeypatch.setattr(Encoded, "evaluated", evaluated)
    monkeypatch.setattr(Simulation, "run", within("rounds", Simulation.run))
    monkeypatch.setattr(runner, "_finish", within("ends", runner._finish))
    monkeypatch.setattr(runner.Untrained, "of", within("ends", runner.Untrained.of))
    experiment = config.load(None, [*tiny_settings, "variants={}", f"run.eval_on={where}"])
    runner.start(experiment, tmp_path / "run", Quiet())
    federation, _, _ = outlined(experiment, with_data=True)
    planned = Workload(federation).shapes(experiment.engine.together)
    rounds, ends = scored["rounds"], scored["ends"]
    assert min(map(len, (trained, rounds, ends))) > 0
    assert planned == Shapes(len(trained), len(rounds), len(ends - rounds), len(scored["baseline"] - rounds - ends))


def measured_and_planned(settings: list[str], folder: Path, *recipe: str) -> tuple[int, int]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [*recipe, *(part for item in settings for part in ("--set", item))]

    def fslora(*more: str) -> str:
        command = [sys.executable, "-c", "from fslora.cli import main; main()", *more]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    fslora("run", *words, "--out", str(folder), "--quiet")
    peak = json.loads((folder / "summary.json").read_text())["peak_memory_bytes"]
    return peak, json.loads(fslora("plan", *words, "--json"))["memory"]["peak"]


@pytest.mark.slow
def test_the_memory_of_a_tiny_run(tiny_settings, tmp_path):
    measured, planned = measured_and_planned([*tiny_settings, "run.rounds=1", "variants={}"], tmp_path / "run")
    assert planned == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
def test_the_memory_of_steps_of_many_lengths(tmp_path):
    """The gaps that they leave, and kernels for all of their shapes."""
    base = tmp_path / "base"
    pretrain(PretrainConfig(steps=2), base)
    settings = [f"model.name={base}", "run.rounds=15", "variants={}"]
    measured, planned = measured_and_planned(settings, tmp_path / "run", str(ROOT / "configs" / "tiny-causal.toml"))
    assert planned == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
def test_the_memory_of_a_run_over_two_workers(tiny_settings, tmp_path):
    settings = [*tiny_settings, "run.rounds=1", "variants={}", "engine.chunk=2", "engine.workers=2"]
    measured, planned = measured_and_planned(settings, tmp_path / "run")
    assert planned == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_of_a_run_of_minilm(tmp_path, dtype):
    settings = ["run.rounds=2", "variants={}", f"model.dtype={dtype}"]
    measured, planned = measured_and_planned(settings, tmp_path / "run")
    assert planned == pytest.approx(measured, rel=0.15)
