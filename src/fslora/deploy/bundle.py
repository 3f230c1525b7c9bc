"""What Flower is given to run: a project of one file, whose components point at the installed package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tomlkit

from fslora.deploy.settings import RunSettings
from fslora.errors import ConfigError

OFFLINE = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""What every process of Flower is told, so that none asks for anything outside."""
NAME = "fslora-run"


def require_flower() -> None:
    """Raises ConfigError where Flower is not installed."""
    if find_spec("flwr") is None:
        raise ConfigError("`fslora deploy` needs Flower, which is not installed: pip install 'fslora[flower]'")


def command(name: str) -> str:
    """Returns the path of one of Flower's commands: that beside this Python, or on the PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise ConfigError(f"there is no command {name}; install Flower with pip install 'fslora[flower]'")
    return found


def environment(home: Path | None) -> dict[str, str]:
    """Returns the environment of Flower's processes; ``home`` is where they keep their own files."""
    # The commands of this environment are found by those that start each other.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    own = {} if home is None else {"FLWR_HOME": str(home)}
    return {**os.environ, **OFFLINE, **own, "PATH": path, "PYTHONUNBUFFERED": "1"}


def write_bundle(folder: Path, settings: RunSettings) -> Path:
    """Writes the project of a run, and returns its folder."""
    project = folder / NAME
    project.mkdir(parents=True)
    document: dict[str, Any] = {
        "project": {
            "name": NAME,
            "version": "0.0.1",
            "description": "A run of fslora.",
            "license": "Apache-2.0",
            "dependencies": [],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "local",
                    "components": {
                        "serverapp": "fslora.deploy.server_app:app",
                        "clientapp": "fslora.deploy.client_app:app",
                    },
                    "config": settings.to_config(),
                }
            }
        },
    }
    (project / "pyproject.toml").write_text(tomlkit.dumps(document), encoding="utf-8")
    return project


def flwr(arguments: list[str], home: Path | None, timeout: float = 120.0) -> dict[str, Any]:
    """Returns what a ``flwr`` command answers with ``--format json``.

    Raises:
        ConfigError: It failed; its own words are in the text.
    """
    done = subprocess.run(
        [command("flwr"), *arguments, "--format", "json"],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    answer: Any = None
    start = done.stdout.find("{")
    if start >= 0:
        try:
            answer, _ = json.JSONDecoder().raw_decode(done.stdout[start:])
        except ValueError:
            answer = None
    if done.returncode or not isinstance(answer, dict) or answer.get("success") is False:
        said = " ".join((answer or {}).get("error-message", "").split()) if isinstance(answer, dict) else ""
        said = said or " ".join((done.stderr or done.stdout).split())[-500:]
        raise ConfigError(f"`flwr {' '.join(arguments[:2])}` failed: {said}")
    return answer


def submit(settings: RunSettings, connection: str, scratch: Path, home: Path | None) -> str:
    """Starts a run on a SuperLink, and returns Flower's number for it."""
    answer = flwr(["run", str(write_bundle(scratch, settings)), connection], home)
    return str(answer["run-id"])


def run_status(number: str, connection: str, home: Path | None) -> str:
    """Returns what Flower says of a run, e.g. 'running' or 'finished:completed'."""
    answer = flwr(["ls", connection, "--run-id", number], home)
    runs = answer.get("runs") or [{}]
    return str(runs[0].get("status", "unknown"))
