"""Whole runs with a tiny real model: they learn, they resume bit for bit, and they fail clearly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import ARCHITECTURES, FSLORA
from fslora import config, runner
from fslora.cli import main
from fslora.console import Silent
from fslora.errors import ArtifactError, DataError, ModelError, TrainingError
from fslora.evaluate import predict
from fslora.evaluation import evaluate_run, export_run
from fslora.export import import_peft
from fslora.fleet import sample_cohort
from fslora.prepare import Workshop
from fslora.runfolder import RunFolder
from fslora.simulate import Simulation
from fslora.types import Adapter, LoRA, ServerState
from kit import World, parts_of


class Quiet:
    """A stage that keeps its notes, and can stop a run after a round."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.notes: list[str] = []
        self.stop_after = stop_after

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def rounds(self, name, done, total, metric):
        stage = self

        class Stopping(Silent):
            def round_started(self, number, clients):
                if stage.stop_after is not None and number > stage.stop_after:
                    raise KeyboardInterrupt

        yield Stopping()


def state_bits(folder: Path) -> dict[str, torch.Tensor]:
    _, state, memories = RunFolder.open(folder).load_checkpoint()
    return parts_of(World(state, memories))


def assert_same_run(left: Path, right: Path) -> None:
    a, b = state_bits(left), state_bits(right)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    rows = [
        [
            {k: v for k, v in row.items() if k not in ("seconds", "server_seconds")}
            for row in RunFolder.open(folder).metrics()
        ]
        for folder in (left, right)
    ]
    assert rows[0] == rows[1]


def test_a_run_learns_and_leaves_everything(tiny_settings, tmp_path):
    more = ["run.rounds=10", "local.steps=8", "local.lr=0.01"]
    experiment = config.load(None, tiny_settings + more)
    experiment = experiment.model_copy(update={"variants": {"low": {"method": {"name": "fedit"}}}})
    path = tmp_path / "run"
    runner.start(experiment, path, Quiet())
    summary = json.loads((path / "summary.json").read_text())
    assert summary["finished"]
    assert summary["test"]["after"]["accuracy"] > 0.85 > summary["test"]["before"]["accuracy"]
    assert len(summary["clients"]) == 6
    rows = RunFolder.open(path).metrics()
    assert [row["round"] for row in rows] == list(range(11))
    assert rows[-1]["bytes_total"] == summary["bytes_down"] + summary["bytes_up"] > 0
    for name in ("report.html", "environment.json", "data.json", "baseline.json", "adapter/adapter_model.safetensors"):
        assert (path / name).is_file(), name
    assert (path / "variants/low/adapter/adapter_model.safetensors").is_file()
    assert config.load(path / "experiment.toml") == experiment


@pytest.mark.parametrize(
    "extra", [[], ["method.server.optimizer=adamw", "method.server.lr=0.01", "adapter.dropout=0.1"]]
)
@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_resumed_equals_never_stopped(pageless, tiny_settings, tmp_path, stop_after, extra):
    experiment = config.load(None, tiny_settings + extra).model_copy(update={"variants": {}})
    runner.start(experiment, tmp_path / "whole", Quiet())
    with pytest.raises(KeyboardInterrupt):
        runner.start(experiment, tmp_path / "stopped", Quiet(stop_after))
    stopped = tmp_path / "stopped"
    assert (stopped / "adapter").is_dir() == (stop_after > 0)
    runner.resume(stopped, Quiet())
    assert_same_run(tmp_path / "whole", stopped)


def test_a_stop_between_checkpoints_repeats_the_lost_rounds(pageless, tiny_settings, tmp_path):
    experiment = config.load(None, [*tiny_settings, "run.checkpoint_every=2"]).model_copy(update={"variants": {}})
    runner.start(experiment, tmp_path / "whole", Quiet())
    with pytest.raises(KeyboardInterrupt):
        runner.start(experiment, tmp_path / "stopped", Quiet(3))
    assert len(RunFolder.open(tmp_path / "stopped").metrics()) == 4
    runner.resume(tmp_path / "stopped", Quiet())
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_engines_and_chunks_agree_over_a_whole_run(tiny_settings, tmp_path):
    accuracies = []
    for number, engine in enumerate((["engine.chunk=1"], ["engine.chunk=3"], ["engine.name=sequential"])):
        experiment = config.load(None, tiny_settings + engine + ["local.optimizer=sgd", "local.lr=0.05"])
        federation = Workshop().federation(experiment)
        state = Simulation(federation, RunFolder.create(tmp_path / str(number)), Silent()).run()
        accuracies.append(predict(federation.base, state.adapter, federation.test).losses)
    assert accuracies[0] == pytest.approx(accuracies[1], abs=1e-4)
    assert accuracies[0] == pytest.approx(accuracies[2], abs=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_runs_and_exports(pageless, tiny_settings, tiny_folder, tmp_path, architecture):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    settings = [*tiny_settings, f"model.name={tiny_folder(architecture)}", "run.rounds=1"]
    experiment = config.load(None, settings).model_copy(update={"variants": {}})
    runner.start(experiment, tmp_path / "run", Quiet())
    federation = Workshop().federation(experiment)
    adapter = import_peft(tmp_path / "run/adapter")
    batch = federation.test.batch(range(8))
    with torch.no_grad(), federation.base.using(adapter):
        ours = federation.base.logits(batch)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_folder(architecture), num_labels=2)
    model.config.pad_token_id = federation.base.tokenizer.pad_token_id
    peft = PeftModel.from_pretrained(model, tmp_path / "run/adapter").eval()
    with torch.no_grad():
        theirs = peft(**{k: v for k, v in batch.items() if k != "labels"}).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def poisoned(adapter: Adapter) -> Adapter:
    nan = {n: LoRA(p.A, torch.full_like(p.Bt, float("nan")), p.scale) for n, p in adapter.layers.items()}
    return Adapter(nan, adapter.dense)


@pytest.mark.parametrize("step", ["broadcast", "client_update"])
def test_a_client_whose_message_is_not_finite_is_dropped_and_named(tiny_settings, tmp_path, step):
    federation = Workshop().federation(config.load(None, tiny_settings))
    simulation = Simulation(federation, RunFolder.create(tmp_path / "run"), Silent())
    kind = type(simulation.method)

    class Poisoned(kind):
        def broadcast(self, state, client, round):
            sent = kind.broadcast(self, state, client, round)
            first = step == "broadcast" and client.id == min(member.id for member in round.cohort)
            return replace(sent, adapter=poisoned(sent.adapter)) if first else sent

        def client_update(self, broadcast, start, trained, site):
            sent = kind.client_update(self, broadcast, start, trained, site)
            first = step == "client_update" and site.client.id == min(client.id for client in cohort)
            return replace(sent, adapter=poisoned(sent.adapter)) if first else sent

    simulation.method = Poisoned()
    cohort = sample_cohort(simulation.trainers, 4, federation.rng.child("round", 0).child("cohort"))
    state, tally = simulation.round(simulation.initial_state(), 0)
    (dropped,) = tally.dropped.items()
    assert dropped[0] == cohort[0].id
    refused = {"broadcast": "it refused its broadcast", "client_update": "its update was refused"}[step]
    assert dropped[1].startswith(f"{refused}: ")
    assert dropped[1].endswith(":Bt: it is not finite")
    assert tally.bytes_down.keys() == {client.id for client in cohort}
    assert all(torch.isfinite(tensor).all() for tensor in state.adapter.tensors().values())
    assert isinstance(state, ServerState)
    row = simulation._row(0, tally, {"round": 0, "bytes_total": 0, "flops_total": 0, "time_total": 0}, 1.0, state)
    assert row["simulated_seconds"] > 0


def test_divergence_of_every_client_is_an_error_that_keeps_the_run(tiny_settings, tmp_path):
    settings = [*tiny_settings, "local.optimizer=sgd", "local.lr=1e30", "local.clip_norm=0", "local.warmup_rounds=0"]
    experiment = config.load(None, settings).model_copy(update={"variants": {}})
    with pytest.raises(TrainingError, match=r"no client sent a usable update .*smaller local\.lr"):
        runner.start(experiment, tmp_path / "run", Quiet())
    assert (tmp_path / "run/report.html").is_file()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (["adapter.targets=['nope']"], ModelError, r"'nope'.*there are: .*query"),
        (["model.name=/no/such/folder"], ModelError, r"model.name '/no/such/folder' cannot be loaded"),
        (["model.max_length=400"], ModelError, r"model.max_length is 400.*40 positions"),
        (["model.device=cuda:7"], ModelError, r"model.device is 'cuda:7'"),
        (["data.label=wrong"], DataError, r"wrong"),
        (["data.text=wrong"], DataError, r"wrong"),
        (["fleet.clients=200"], DataError, r"(?s).*"),
    ],
)
def test_bad_input_is_refused_before_training(tiny_settings, tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        runner.start(config.load(None, tiny_settings + settings), tmp_path / "run", Quiet())
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_model_without_tokenizer_is_refused(tiny_settings, tiny_folder, tmp_path):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder("bert"), bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    with pytest.raises(ModelError, match="tokenizer"):
        runner.start(config.load(None, [*tiny_settings, f"model.name={bare}"]), tmp_path / "run", Quiet())


def test_an_occupied_or_unwritable_folder_is_refused(tiny_settings, tmp_path):
    experiment = config.load(None, tiny_settings)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    with pytest.raises(ArtifactError, match="is not empty"):
        runner.start(experiment, tmp_path / "taken", Quiet())
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="cannot be written"):
        runner.start(experiment, tmp_path / "file/run", Quiet())


def test_a_full_disk_keeps_the_last_checkpoint(pageless, tiny_settings, tmp_path, monkeypatch):
    experiment = config.load(None, tiny_settings).model_copy(update={"variants": {}})
    import fslora.runfolder as module

    real, calls = module.save_file, []

    def failing(tensors, path, **kwargs):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(tensors, path, **kwargs)

    monkeypatch.setattr(module, "save_file", failing)
    with pytest.raises(ArtifactError, match="No space left"):
        runner.start(experiment, tmp_path / "run", Quiet())
    monkeypatch.setattr(module, "save_file", real)
    assert RunFolder.open(tmp_path / "run").load_checkpoint()[0] == 2
    runner.resume(tmp_path / "run", Quiet())
    runner.start(experiment, tmp_path / "whole", Quiet())
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_eval_and_export_of_a_run(pageless, tiny_settings, tmp_path):
    experiment = config.load(None, tiny_settings).model_copy(update={"variants": {}})
    path = tmp_path / "run"
    runner.start(experiment, path, Quiet())
    result = evaluate_run(path, Quiet())
    summary = json.loads((path / "summary.json").read_text())
    assert result["test"] == {k: pytest.approx(v) for k, v in summary["test"].items()}
    assert [client["id"] for client in result["clients"]] == [client["id"] for client in summary["clients"]]
    whole = export_run(path, tmp_path / "whole", None, None, False, None, Quiet())
    assert whole["rank"] == 8
    small = export_run(path, tmp_path / "small", 2, None, False, None, Quiet())
    assert small["rank"] == 2
    assert 0 < small["energy"] < 1
    assert import_peft(tmp_path / "small").layers[next(iter(import_peft(tmp_path / "small").layers))].rank == 2
    by_energy = export_run(path, tmp_path / "energy", None, small["energy"], False, None, Quiet())
    assert by_energy["rank"] == 2
    export_run(path, tmp_path / "merged", None, None, True, None, Quiet())
    assert (tmp_path / "merged/model.safetensors").is_file()
    with pytest.raises(ArtifactError, match="exists already"):
        export_run(path, tmp_path / "whole", None, None, False, None, Quiet())


# The command itself, as a user runs it.


def fslora(*arguments: str, cwd: Path, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*FSLORA, *arguments], capture_output=True, text=True, cwd=cwd, timeout=200, check=False, **kwargs
    )


def as_arguments(settings: list[str]) -> list[str]:
    return [part for item in settings for part in ("--set", item)]


def test_command_line_end_to_end(tiny_settings, tmp_path):
    toml = tmp_path / "tiny.toml"
    toml.write_text(config.to_toml(config.load(None, tiny_settings).model_copy(update={"variants": {}})))
    shown = fslora("data", "tiny.toml", "--json", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["fleet"][0].keys() == {"id", "rank", "examples"}
    assert (tmp_path / "partition.png").read_bytes().startswith(b"\x89PNG")
    result = fslora("run", "tiny.toml", "--out", "run", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["runs"][0]["method"] == "fslora"
    assert "6 clients" in result.stderr
    evaluated = fslora("eval", "run", "--json", cwd=tmp_path)
    assert set(json.loads(evaluated.stdout)["test"]) == {"before", "after"}
    exported = fslora("export", "run", "--to", "small", "--rank", "2", cwd=tmp_path)
    assert "rank 2 of 8" in exported.stdout
    assert fslora("report", "run", "--quiet", cwd=tmp_path).stderr == ""
    assert fslora("resume", "run", "--quiet", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "--set", "local.lrr=1"], 2, "did you mean 'lr'"),
        (["run", "--set", "nonsense"], 2, "section.key=value"),
        (["run", "missing.toml"], 2, "there is no file missing.toml"),
        (["resume", "nowhere"], 1, "is no run folder"),
        (["export", "nowhere", "--to", "x"], 1, "is no run folder"),
        (["eval", "nowhere"], 1, "is no run folder"),
    ],
)
def test_command_line_refusals(tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fslora", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert message in capsys.readouterr().err


def test_ctrl_c_leaves_a_run_that_resumes(tiny_settings, tmp_path):
    settings = [*tiny_settings, "run.rounds=2000"]
    process = subprocess.Popen(
        [*FSLORA, "run", "--out", "run", *as_arguments(settings)], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 4):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "fslora resume run" in errors
    assert "Traceback" not in errors
    assert (tmp_path / "run/adapter/adapter_config.json").is_file()
    assert (tmp_path / "run/report.html").is_file()


def test_init_writes_a_file_that_runs(tmp_path):
    assert json.loads(fslora("init", "--json", cwd=tmp_path).stdout) == {"file": "experiment.toml"}
    assert config.load(tmp_path / "experiment.toml") == config.load(None)
    again = fslora("init", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_doctor_finds_this_machine_fit(tmp_path):
    result = fslora("doctor", "--json", cwd=tmp_path)
    findings = {entry["what"]: entry for entry in json.loads(result.stdout)["findings"]}
    assert findings["torch"]["found"] == torch.__version__
    if not torch.cuda.is_available():
        assert "'auto' takes" in findings["attention in bfloat16"]["found"]
    assert result.returncode == (0 if all(f["state"] != "broken" for f in findings.values()) else 1)


def test_nothing_reaches_for_the_network(tmp_path):
    """The embedded default (shortened), where every socket is refused: not one attempt is made."""
    guard = (
        "import socket\n"
        "def refuse(*a, **k): raise SystemExit('a socket was opened')\n"
        "socket.socket.connect = refuse\nsocket.create_connection = refuse\nsocket.getaddrinfo = refuse\n"
        "from fslora.cli import main; main()\n"
    )
    short = ["run.rounds=1", "local.steps=1", "local.batch_size=2", "fleet.cohort=2", "variants={}"]
    short += ["data.max_train=200", "data.max_validation=20", "data.max_test=20", "partition.kind=iid"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    result = subprocess.run(
        [sys.executable, "-c", guard, "run", "--out", "run", "--quiet", *as_arguments(short)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=280,
        check=False,
        env={**environment, "HF_HOME": str(tmp_path / "hf")},
    )
    if "its weights are not installed" in result.stderr:
        pytest.skip("the extra fslora[minilm] is not installed")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


def test_variants_share_base_and_tokens(tiny_settings):
    """Two variants that share data and base share them in memory; a different target reloads the base."""
    workshop = Workshop()
    experiment = config.load(None, tiny_settings)
    first = workshop.federation(experiment)
    second = workshop.federation(experiment.model_copy(update={"method": config.build({}, "").method}))
    assert second.base is first.base
    assert second.train is first.train
    other = config.load(None, [*tiny_settings, "adapter.targets=['query']"])
    third = workshop.federation(other)
    assert third.base is not first.base
    assert third.train is first.train


def test_clients_with_one_class_or_one_example_train_by_epochs(tiny_settings, tmp_path):
    """Extreme skew: sizes from 1 up, clients of one class, steps that differ by client."""
    skewed = ["partition.alpha=0.01", "partition.min_examples=1", "fleet.cohort=all", "local.epochs=1"]
    experiment = config.load(None, [*tiny_settings, *skewed, "run.rounds=1"])
    federation = Workshop().federation(experiment)
    classes = [len(set(federation.train.labels[index])) for index in federation.sites.partition.train]
    sizes = [client.examples for client in federation.sites.fleet]
    assert min(classes) == 1
    assert min(sizes) == 1
    state, tally = Simulation(federation, RunFolder.create(tmp_path / "run"), Silent()).round(
        Simulation(federation, RunFolder(tmp_path / "run"), Silent()).initial_state(), 0
    )
    assert sorted(tally.losses) == list(range(6))
    assert all(torch.isfinite(tensor).all() for tensor in state.adapter.tensors().values())


def test_long_texts_are_cut_counted_and_reported(tiny_settings, tmp_path):
    stage = Quiet()
    experiment = config.load(None, [*tiny_settings, "model.max_length=6", "run.rounds=1"])
    runner.start(experiment.model_copy(update={"variants": {}}), tmp_path / "run", stage)
    cut = json.loads((tmp_path / "run/data.json").read_text())["truncated"]
    assert cut > 0
    assert any(f"texts cut at 6 tokens (model.max_length): {cut}" in note for note in stage.notes)
