"""A method from another package: the one of docs/add-a-method.md, found through its entry point."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fslora.errors import ConfigError
from fslora.methods import METHODS, method_class, registered

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "add-a-method.md").read_text()


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL).group(1)


def installed(folder: Path, code: str, entry_points: dict[str, str]) -> Path:
    """A folder that, on sys.path, holds an installed package."""
    info = folder / "fslora_damped-0.1.dist-info"
    info.mkdir(parents=True)
    (folder / "fslora_damped.py").write_text(code)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fslora-damped\nVersion: 0.1\n")
    lines = [f"{name} = {target}" for name, target in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[fslora.methods]", *lines, ""]))
    return folder


def fslora(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from fslora.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)


def test_the_documented_method_runs_from_its_own_package(tmp_path, tiny_settings):
    """The page's file and entry point: listed, run with a field set, and refused with a wrong field."""
    declared = tomllib.loads(block("toml"))["project"]["entry-points"]["fslora.methods"]
    folder = installed(tmp_path / "site", block("python"), declared)
    listed = json.loads(fslora(folder, "methods", "--json").stdout)
    assert [row["name"] for row in listed] == [*METHODS, "damped"]
    settings = [part for item in [*tiny_settings, "run.rounds=1", "variants={}"] for part in ("--set", item)]
    run = ["run", *settings, "--set", "method.name=damped", "--quiet", "--out", str(tmp_path / "run")]
    done = fslora(folder, *run, "--set", "method.strength=0.25")
    assert done.returncode == 0, done.stderr
    assert 'name = "damped"' in (tmp_path / "run" / "experiment.toml").read_text()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["method"] == "damped"
    wrong = fslora(folder, *run, "--set", "method.strength=2")
    assert wrong.returncode == 2
    assert "method.strength is 2" in wrong.stderr


def test_without_the_package_its_name_is_unknown():
    with pytest.raises(ConfigError, match=r"method\.name is 'damped'"):
        method_class("damped")
    assert registered() == METHODS


@pytest.mark.parametrize(
    ("code", "target", "message"),
    [
        ("raise RuntimeError('broken')", "fslora_damped:Damped", "cannot be imported.*broken"),
        ("Damped = dict", "fslora_damped:Damped", "subclass of fslora.methods.Method of that name"),
        (block("python").replace('"damped"', '"other"'), "fslora_damped:Damped", "of that name"),
        ("", "fslora_damped:Missing", "cannot be imported"),
    ],
)
def test_what_is_no_method_is_refused_by_name(tmp_path, monkeypatch, code, target, message):
    """The error names the entry point and its package; what does not ask for it goes on working."""
    monkeypatch.syspath_prepend(str(installed(tmp_path, code, {"damped": target})))
    monkeypatch.delitem(sys.modules, "fslora_damped", raising=False)
    with pytest.raises(ConfigError, match=f"entry point 'damped' of fslora-damped.*{message}"):
        method_class("damped")
    assert method_class("fedit") is METHODS["fedit"]
    monkeypatch.delitem(sys.modules, "fslora_damped", raising=False)
