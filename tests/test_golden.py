"""A tiny fixed run keeps its numbers.

A change that should not alter numbers leaves tests/golden/tiny_run.json as it is. One that should regenerates it
with `FSLORA_REGENERATE_GOLDEN=1 pytest tests/test_golden.py` and says in its commit which numbers, and why.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fslora import config
from fslora.console import Silent
from fslora.prepare import Workshop
from fslora.runfolder import RunFolder
from fslora.simulate import Simulation

GOLDEN = Path(__file__).parent / "golden" / "tiny_run.json"
VARIANTS = {
    "fslora": [],
    "fslora cohort mean, balanced, sgd": [
        "method.average=cohort",
        "method.sketch=balanced",
        "local.optimizer=sgd",
        "local.lr=0.1",
    ],
    "fedit": ["method.name=fedit", "method.rank=smallest"],
}
# Losses differ in the last digits between processors and numbers of threads; bytes and clients do not.
TOLERANCE = 2e-3


def measured(settings: list[str], folder: Path) -> list[dict]:
    federation = Workshop().federation(config.load(None, settings))
    Simulation(federation, RunFolder.create(folder), Silent()).run()
    kept = ("round", "loss", "validation", "bytes_total", "clients", "client_ranks")
    return [{key: row.get(key) for key in kept} for row in RunFolder(folder).metrics()]


def test_the_tiny_run_keeps_its_numbers(tiny_settings, tmp_path):
    now = {name: measured(tiny_settings + more, tmp_path / str(i)) for i, (name, more) in enumerate(VARIANTS.items())}
    if os.environ.get("FSLORA_REGENERATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(now, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert now.keys() == golden.keys()
    for name, rows in golden.items():
        for then, row in zip(rows, now[name], strict=True):
            exact = ("round", "bytes_total", "clients", "client_ranks")
            assert {key: row[key] for key in exact} == {key: then[key] for key in exact}, name
            assert row["loss"] == pytest.approx(then["loss"], abs=TOLERANCE), name
            if then["validation"]:
                assert row["validation"]["loss"] == pytest.approx(then["validation"]["loss"], abs=TOLERANCE), name
