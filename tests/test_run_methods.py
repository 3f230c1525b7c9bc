"""Whole runs of every registered method on a tiny real model: resume, export, budgets, pooled data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fslora import config, memory, runner
from fslora.errors import ArtifactError, ConfigError
from fslora.evaluation import evaluate_run, export_run
from fslora.export import import_peft
from fslora.methods import METHODS
from fslora.prepare import Workshop
from fslora.runfolder import RunFolder
from test_run import Quiet, assert_same_run

# Float32 forward passes through differently ordered products; merged layers round W0 + Δ once.
LOGITS = 2e-5


@pytest.fixture
def settings(tiny_settings) -> list[str]:
    return [*tiny_settings, "run.rounds=3", "variants={}"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_resumes_and_loads_in_peft(pageless, settings, tiny_folder, tmp_path, name):
    """Stopped after round 2 and resumed: the same bits. What is exported gives PEFT the logits that we served."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    experiment = config.load(None, [*settings, f"method.name={name}"])
    runner.start(experiment, tmp_path / "whole", Quiet())
    with pytest.raises(KeyboardInterrupt):
        runner.start(experiment, tmp_path / "run", Quiet(2))
    runner.resume(tmp_path / "run", Quiet())
    assert_same_run(tmp_path / "whole", tmp_path / "run")

    personal = METHODS[name].personal
    exported = export_run(tmp_path / "run", tmp_path / "peft", None, None, False, 1 if personal else None, Quiet())
    assert exported["energy"] == 1.0
    federation = Workshop().federation(experiment)
    batch = federation.test.batch(range(8))
    ours = logits(federation, import_peft(tmp_path / "peft"), batch)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_folder("bert"), num_labels=2)
    peft = PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    with torch.no_grad():
        theirs = peft(**{k: v for k, v in batch.items() if k != "labels"}).logits
    torch.testing.assert_close(ours, theirs, atol=LOGITS, rtol=LOGITS)

    summary = RunFolder.open(tmp_path / "run").read_json("summary.json")
    assert summary["personal"] == personal
    again = evaluate_run(tmp_path / "run", Quiet())
    assert again["test"]["after"]["loss"] == pytest.approx(summary["test"]["after"]["loss"], abs=LOGITS)
    folders = sorted(path.name for path in (tmp_path / "run" / "adapter").glob("client-*"))
    assert folders == ([f"client-{i:04d}" for i in range(6)] if personal else [])


def logits(federation, adapter, batch):
    with torch.no_grad(), federation.base.using(adapter):
        return federation.base.logits(batch)


def test_a_personal_method_exports_by_client(pageless, settings, tmp_path):
    """Without a client, or with one that does not exist, export says whose there are; others refuse a client."""
    personal = next(name for name, kind in METHODS.items() if kind.personal)
    runner.start(config.load(None, [*settings, f"method.name={personal}"]), tmp_path / "own", Quiet())
    for client in (None, 6):
        with pytest.raises(ConfigError, match=r"one model per client.*0 to 5"):
            export_run(tmp_path / "own", tmp_path / "to", None, None, False, client, Quiet())
    runner.start(config.load(None, settings), tmp_path / "shared", Quiet())
    with pytest.raises(ConfigError, match="serves one model to all"):
        export_run(tmp_path / "shared", tmp_path / "to", None, None, False, 2, Quiet())


@pytest.mark.parametrize(
    ("key", "total"), [("max_bytes", "bytes_total"), ("max_flops", "flops_total"), ("max_seconds", "time_total")]
)
def test_a_run_ends_with_its_budget(pageless, settings, tmp_path, key, total):
    """The first round that reaches the amount is the last; the rate falls over the amount; resuming adds nothing."""
    runner.start(config.load(None, settings), tmp_path / "whole", Quiet())
    whole = RunFolder.open(tmp_path / "whole")
    rows = whole.metrics()
    amount = (rows[1][total] + rows[2][total]) / 2
    more = [f"run.{key}={amount}", "run.rounds=50", "local.warmup_rounds=0"]
    experiment = config.load(None, [*settings, *more])
    runner.start(experiment, tmp_path / "limited", Quiet())
    limited = RunFolder.open(tmp_path / "limited")
    assert [row["round"] for row in limited.metrics()] == [0, 1, 2]
    assert limited.finished
    assert limited.metrics()[-1]["validation"]
    spent = rows[1][total] / amount
    assert [row["lr"] for row in limited.metrics()[1:]] == pytest.approx([0.005, 0.005 * (1 - spent)])
    runner.resume(tmp_path / "limited", Quiet())
    assert len(limited.metrics()) == 3


def test_costs_are_counted_from_what_there_is(pageless, settings, tmp_path):
    """By hand for one client: bytes of trained values, gradients and AdamW's moments; operations per token; time."""
    experiment = config.load(None, [*settings, "run.rounds=1"])
    runner.start(experiment, tmp_path / "run", Quiet())
    federation = Workshop().federation(experiment)
    row = RunFolder.open(tmp_path / "run").metrics()[1]
    client = federation.sites.fleet[row["clients"][0]]
    template, key = federation.template, str(client.id)
    pairs = sum(client.rank * (d_in + d_out) for d_in, d_out in template.layers.values())
    head = sum(tensor.numel() for tensor in template.dense.values())
    assert row["client_memory"][key] == 4 * 4 * (pairs + head)
    fleet = experiment.fleet
    speed = client.rank / max(member.rank for member in federation.sites.fleet)
    sent = row["client_bytes_down"][key] + row["client_bytes_up"][key]
    slowest = max(
        (
            (row["client_bytes_down"][c] + row["client_bytes_up"][c]) * 8 / fleet.megabits / 1e6
            + f / fleet.gigaflops / 1e9
        )
        / (federation.sites.fleet[int(c)].rank / max(m.rank for m in federation.sites.fleet))
        for c, f in row["client_flops"].items()
    )
    assert row["simulated_seconds"] == pytest.approx(slowest)
    assert row["simulated_seconds"] >= sent * 8 / fleet.megabits / 1e6 / speed
    assert row["flops_total"] == pytest.approx(sum(row["client_flops"].values()))
    linear = sum(d_in * d_out for d_in, d_out in template.layers.values())
    tokens = (row["client_flops"][key] - 2 * 8 * 6 * head) / (4 * linear + 6 * pairs)
    # bert's pooler is a linear layer outside the head too; all of the tiny model's are adapted.
    assert tokens == pytest.approx(round(tokens))
    assert 0 < tokens <= 2 * 8 * 32


def test_pooled_data_is_one_client_with_everything(settings, tmp_path):
    """fleet.pooled: one trainer of the server's rank, all training examples, batches of a whole cohort."""
    experiment = config.load(None, [*settings, "fleet.pooled=true", "method.name=fedit", "method.rank=server"])
    federation = Workshop().federation(experiment)
    (trainer,) = federation.trainers
    assert (trainer.rank, trainer.examples) == (8, sum(client.examples for client in federation.sites.fleet))
    (share,) = federation.shares
    assert np.array_equal(np.sort(share), np.sort(np.concatenate(federation.sites.partition.train)))
    assert federation.batch_size == 4 * experiment.local.batch_size
    runner.start(experiment, tmp_path / "run", Quiet())
    rows = RunFolder.open(tmp_path / "run").metrics()
    assert [row["clients"] for row in rows[1:]] == [[0]] * 3
    assert rows[-1]["bytes_total"] == 0  # nothing travels where all is in one place
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["clients"]) == 6
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_spectrum_is_recorded_where_the_run_is_evaluated(pageless, settings, tmp_path):
    """Shares of energy sum to one and fall; the effective rank is 1 / Σ share²; nothing before training."""
    runner.start(config.load(None, settings), tmp_path / "run", Quiet())
    rows = RunFolder.open(tmp_path / "run").metrics()
    assert rows[0]["spectrum"] is None
    for row in rows[1:]:
        if row["validation"] is None:
            assert "spectrum" not in row
            continue
        shares = np.array(row["spectrum"])
        assert shares.sum() == pytest.approx(1.0)
        assert (np.diff(shares) <= 0).all()
        assert row["effective_rank"] == pytest.approx(1 / (shares**2).sum())


def test_a_comparison_is_not_taken_for_a_run(tmp_path):
    """eval and export name one of its runs instead."""
    cell = tmp_path / "cells" / "fedit" / "point-0" / "seed-0"
    cell.mkdir(parents=True)
    (cell / "summary.json").write_text("{}")
    for name in ("comparison.json", "experiment.toml"):
        (tmp_path / name).write_text("")
    for asked in (
        lambda: evaluate_run(tmp_path, Quiet()),
        lambda: export_run(tmp_path, tmp_path / "to", None, None, False, None, Quiet()),
    ):
        with pytest.raises(ArtifactError, match=r"is a comparison, not a run.*seed-0"):
            asked()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system cannot forget a peak")
def test_a_runs_peak_memory_is_its_own():
    """What a process held before is not charged to the next run."""
    held = torch.ones(2**26)  # 256 MiB
    before = memory.peak_memory()
    del held
    memory.forget_peak_memory()
    assert memory.peak_memory() < before - 2**27
