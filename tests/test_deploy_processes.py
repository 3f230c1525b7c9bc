"""Real processes on loopback: a SuperLink, SuperNodes, and what happens to them. Each test takes a minute or two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fslora[flower]'")

from fslora import config, runner
from fslora.deploy import launch
from fslora.deploy.bundle import submit
from fslora.deploy.lab import CONNECTION, Lab, command, family
from fslora.deploy.patience import Patience
from fslora.deploy.settings import SiteSettings
from fslora.errors import TrainingError
from fslora.runfolder import RunFolder
from kit import World, assert_same_world
from test_deploy_worker import gone, workers
from test_run import FSLORA, Quiet

pytestmark = pytest.mark.slow
BUSY = 240
"""Seconds after which something is wrong even on a machine that is shared."""


@pytest.fixture
def settings(tiny_settings) -> list[str]:
    return [*tiny_settings, "run.rounds=3", "engine.chunk=1", "fleet.clients=4", "fleet.cohort=all", "variants={}"]


@pytest.fixture
def nothing_left(tmp_path):
    """No process that was started for this test outlives it."""
    yield
    assert not processes(tmp_path)


def processes(path: Path) -> list[str]:
    """Command lines of processes that work in a lab or for this run; those that we wait for are gone."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            around = (folder / "environ").read_bytes()
        except OSError:
            continue
        if b"FSLORA_TEST=" + os.fsencode(path) in around and int(folder.name) != os.getpid():
            found.append(line)
    return found


@pytest.fixture(autouse=True)
def marked(monkeypatch, tmp_path):
    monkeypatch.setenv("FSLORA_TEST", str(tmp_path))


def worker_of(run: Run, site: str, path: Path) -> psutil.Process:
    """The process of a site that keeps its base; it ends with the SuperNode whose number it was told."""
    node = run.lab.processes[site].pid
    (worker,) = (each for each in workers(path) if any(word.startswith(f"{node}:") for word in each.cmdline()))
    return worker


def simulated(folder: RunFolder, to: Path) -> RunFolder:
    runner.start(config.load(folder.path / "experiment.toml"), to, Quiet())
    return RunFolder.open(to)


def same_state(left: RunFolder, right: RunFolder) -> None:
    assert_same_world(World(left.load_checkpoint()[1]), World(right.load_checkpoint()[1]))


class Run:
    """A run in a lab of two sites, step by step."""

    def __init__(self, settings: list[str], path: Path, patience: Patience) -> None:
        self.folder = launch.prepare(config.load(None, settings), path)
        self.settings = launch.settings_of(self.folder, patience)
        sites = launch.local_sites(self.settings.parsed(), self.folder, 2)
        self.lab = Lab(sites, self.folder.path / "logs", secure=False)
        self.scratch = path.parent / "scratch"

    def submit(self) -> None:
        self.folder.write_json("deployment.json", {"run": self.settings.run, "state": "submitted", "notes": []})
        submit(self.settings, CONNECTION, self.scratch, self.lab.home)

    def until(self, happened) -> None:
        """Waits for something that has to happen."""
        end = time.monotonic() + BUSY
        while not happened():
            assert time.monotonic() < end, (self.rows(), self.status())
            assert self.status()["state"] != "failed", self.status()
            time.sleep(0.1)

    def status(self) -> dict:
        return self.folder.read_json("deployment.json")

    def rows(self) -> list[dict]:
        return self.folder.metrics()[1:] if (self.folder.path / "metrics.jsonl").is_file() else []


def test_one_command_brings_all_up_with_tls_and_keys_and_takes_it_down(settings, tmp_path, nothing_left):
    """Three sites; the same bits, metrics and summary as a simulation."""
    items = [word for item in [*settings, "run.rounds=2"] for word in ("--set", item)]
    path = tmp_path / "run"
    done = subprocess.run(
        [*FSLORA, "deploy", "local", *items, "--sites", "3", "--out", str(path), "--json"],
        capture_output=True,
        text=True,
        timeout=BUSY,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == str(path)
    assert (path / "report.html").is_file()
    other = simulated(RunFolder.open(path), tmp_path / "simulated")
    same_state(RunFolder.open(path), other)
    assert RunFolder.open(path).read_json("summary.json")["test"] == other.read_json("summary.json")["test"]


def test_a_site_killed_in_a_round_is_left_out_and_comes_back(settings, tmp_path, nothing_left):
    run = Run([*settings, "run.rounds=8"], tmp_path / "run", Patience(deadline=45, quorum=0.25))
    with run.lab:
        run.submit()
        run.until(lambda: len(run.rows()) >= 1)
        one, other = (worker_of(run, name, tmp_path) for name in ("site-1", "site-2"))
        run.lab.stop("site-2", signal.SIGKILL)
        assert gone(other)
        run.until(lambda: any(row["dropped"] for row in run.rows()))
        assert worker_of(run, "site-1", tmp_path) == one  # the base is loaded once, not in each round
        run.lab.start_site("site-2")
        missed = len(run.rows())
        run.until(lambda: any(not row["dropped"] for row in run.rows()[missed:]) or run.status()["state"] == "done")
        run.until(lambda: run.status()["state"] == "done")
    dropped = [sorted(row["dropped"]) for row in run.rows()]
    assert dropped[0] == []
    assert ["1", "3"] in dropped
    assert all(each in ([], ["1", "3"]) for each in dropped)
    assert run.status()["notes"]


def test_with_over_selection_nobody_waits_for_a_site_that_hangs(settings, tmp_path, nothing_left):
    """All four clients are asked, and two are enough; a site is held up long before the deadline."""
    patience = Patience(deadline=BUSY, over_select=2.0)
    run = Run([*settings, "fleet.cohort=2"], tmp_path / "run", patience)
    with run.lab:
        run.submit()
        run.until(lambda: len(run.rows()) >= 1)
        for process in [*family(run.lab.processes["site-2"].pid), worker_of(run, "site-2", tmp_path)]:
            process.suspend()
        run.until(lambda: run.status()["state"] == "done")
    last = run.rows()[-1]
    assert last["clients"] == [0, 1, 2, 3]
    assert last["client_loss"].keys() == {"0", "2"}
    assert last["dropped"] == dict.fromkeys("13", "site site-2: late: 2 clients were faster")
    assert last["seconds"] < patience.deadline


def test_a_killed_superlink_loses_nothing(settings, tmp_path, nothing_left):
    """Resumed from the last checkpoint, with the sites' own storage, it ends with the bits of a simulation."""
    run = Run([*settings, "method.name=flora"], tmp_path / "run", Patience())
    with run.lab:
        run.submit()
        run.until(lambda: len(run.rows()) >= 1)
        run.lab.stop("superlink", signal.SIGKILL)
    assert not run.folder.finished
    launch.local(run.folder, 2, False, Patience(), Quiet())
    assert run.status()["run"] == run.settings.run
    same_state(run.folder, simulated(run.folder, tmp_path / "simulated"))


def test_a_killed_command_leaves_no_process(settings, tmp_path):
    items = [word for item in settings for word in ("--set", item)]
    path = tmp_path / "run"
    words = [*FSLORA, "deploy", "local", *items, "--sites", "2", "--out", str(path), "--quiet"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as command:
        end = time.monotonic() + BUSY
        while not (path / "metrics.jsonl").is_file():
            assert time.monotonic() < end
            assert command.poll() is None
            time.sleep(0.1)
        assert len(processes(tmp_path)) > 4
        command.kill()
    end = time.monotonic() + 20
    while left := processes(tmp_path):
        assert time.monotonic() < end, left
        time.sleep(0.1)


def test_answers_that_come_again_change_nothing(settings, tmp_path, nothing_left, monkeypatch):
    """Both sites send each answer twice, and once more after their next one."""
    repeated = tmp_path / "repeated"
    program = tmp_path / "supernode"
    program.write_text(f"#!{sys.executable}\n" + Path(__file__).with_name("supernode_twice.py").read_text())
    program.chmod(0o755)
    monkeypatch.setenv("FSLORA_REPEATED", str(repeated))
    monkeypatch.setattr(
        "fslora.deploy.lab.command", lambda name: str(program) if name == "flower-supernode" else command(name)
    )
    run = Run(settings, tmp_path / "run", Patience())
    with run.lab:
        run.submit()
        run.until(lambda: run.status()["state"] == "done")
    assert [row["dropped"] for row in run.rows()] == [{}] * 3
    same_state(run.folder, simulated(run.folder, tmp_path / "simulated"))
    kinds = Counter(line.split()[0] for line in repeated.read_text().splitlines())
    assert kinds["again"] >= 2 * 3
    assert kinds["late"] >= 2 * 2


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_ends_everything_and_says_how_to_go_on(settings, tmp_path, nothing_left, how):
    items = [word for item in [*settings, "run.rounds=50"] for word in ("--set", item)]
    path = tmp_path / "run"
    args = [*FSLORA, "deploy", "local", *items, "--sites", "2", "--no-secure", "--out", str(path)]
    process = subprocess.Popen(args, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + BUSY
    while not (path / "metrics.jsonl").is_file() or len(RunFolder(path).metrics()) < 2:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"fslora deploy local --resume {path}" in said.replace("\n", "")


def test_a_failure_at_the_server_is_told_by_the_command(settings, tmp_path, nothing_left):
    """No site can write what its clients keep: the command says so, and ends everything."""
    folder = launch.prepare(config.load(None, [*settings, "wire.up=int8"]), tmp_path / "run")
    (folder.path / "sites").write_text("a file in the place of a folder")
    with pytest.raises(TrainingError, match=r"the run has failed: round 1: no client .* cannot be written"):
        launch.local(folder, 2, False, Patience(), Quiet())


def test_data_of_their_own_and_models_of_their_own_in_real_processes(settings, tmp_path, nothing_left, sentiment_file):
    """No example is at the server; each site has one file, and one states its rank. Their models stay with them."""
    bare = [item for item in settings if not item.startswith(("data.source", "partition"))]
    own = ["partition.kind=sites", "data.labels=['bad', 'good']", "run.eval_on=clients", "method.name=fedsa-lora"]
    experiment = config.load(None, [*bare, *own, "run.rounds=1", "fleet.clients=2", "local.steps=1"])
    folder = launch.prepare(experiment, tmp_path / "run")
    lines = sentiment_file.read_text().splitlines(keepends=True)
    sites = {}
    for client, name in enumerate(("north", "south")):
        (tmp_path / f"{name}.csv").write_text("".join([lines[0], *lines[1 + client :: 3]]))
        values = {"site": name, "clients": str(client), "data": str(tmp_path / f"{name}.csv"), "rank": 3 * client}
        sites[name] = SiteSettings.of({**values, "storage": str(tmp_path / "storage" / name)})
    told = launch.settings_of(folder, Patience())
    with Lab(sites, folder.path / "logs", secure=False) as lab:
        launch._run(folder, told, CONNECTION, lab.home, Quiet(), lab.check)
    assert folder.finished
    last = folder.metrics()[-1]
    assert last["client_ranks"]["1"] == 3
    assert set(last["client_validation"]) == {"0", "1"}
    assert (folder.path / "report.html").is_file()
    for client, name in enumerate(sites):
        kept = tmp_path / "storage" / name / told.run / "adapters" / f"client-{client:04d}"
        assert (kept / "adapter_model.safetensors").is_file()
