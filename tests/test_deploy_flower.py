"""Through Flower's own messages and apps, in this process: a simulation's bits, errors, restarts, hostile replies."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fslora[flower]'")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from hypothesis import given

from flowergrid import Grid
from fslora import config, runner
from fslora.deploy import desk, launch, serve
from fslora.deploy.client_app import app
from fslora.deploy.flower import FlowerTransport
from fslora.deploy.launch import local_sites, prepare, settings_of
from fslora.deploy.messages import from_flower, to_flower
from fslora.deploy.patience import Patience
from fslora.deploy.records import to_payload, to_record
from fslora.errors import ConfigError, TrainingError, WireError
from fslora.processes import Child
from fslora.runfolder import RunFolder
from fslora.wire import Payload
from kit import World, assert_same_world
from test_deploy_records import bits, names, tensors
from test_run import Quiet


@given(names, tensors())
def test_a_record_passes_through_flower_unchanged(name, tensor):
    record = to_record(Payload({name: tensor}, "{}"))
    back = from_flower(to_flower(record))
    assert back == record
    assert bits(to_payload(back).tensors[name]) == bits(tensor)


def content(arrays=None, **letter):
    """The content of a message, with something in it changed."""
    whole = to_flower(to_record(Payload({"a": torch.ones(2), "b": torch.zeros(1)}, "{}")))
    letter = {name: value for name, value in {**whole["letter"], **letter}.items() if value is not None}
    return RecordDict({"arrays": whole["arrays"] if arrays is None else arrays, "letter": ConfigRecord(letter)})


def array(name, stype, data):
    return ArrayRecord(array_dict={name: Array("uint8", (len(data),), stype, data)})


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (RecordDict(), "not arrays and letter"),
        (RecordDict({"arrays": ConfigRecord(), "letter": ConfigRecord()}), "another kind"),
        (content(header=None), "not header, index, version"),
        (content(more="x"), "not header, index, version"),
        (content(version=None), "install the same fslora"),
        (content(version=1), "install the same fslora"),
        (content(version="2"), "install the same fslora"),
        (content(arrays=ArrayRecord()), "its arrays are {}"),
        (content(arrays=array("a", "fslora.bytes", b"")), "not 'bytes'"),
        (content(arrays=array("bytes", "numpy.ndarray", b"")), "numpy.ndarray"),
        (content(arrays=array("bytes", "fslora.bytes", bytes(11))), "ends 1 bytes before"),
        (content(arrays=array("bytes", "fslora.bytes", bytes(13))), "1 bytes more"),
        (content(index="[[]]"), "does not tell"),
        (content(index="{}"), "does not tell"),
        (content(index='[["a", "float32", [2], -8]]'), "does not tell"),
        (content(index='[["a", ["float32"], [2], 8]]'), "does not tell"),
        (content(index="[" * 100_000), "no JSON"),
        (content(index=""), "no JSON"),
    ],
)
def test_other_records_are_refused(changed, reason):
    with pytest.raises(WireError, match=reason):
        from_flower(changed)


def test_a_record_is_few_objects():
    """Flower makes a request for each object of a message, at each of its stations."""

    def objects(whole):
        return 1 + sum(objects(part) for part in (whole.children or {}).values())

    tensors = {f"layer.{n}": torch.randn(4, 8) for n in range(200)}
    assert objects(to_flower(to_record(Payload(tensors, "{}")))) == 5


@pytest.fixture
def federation(tiny_settings, tmp_path, monkeypatch):
    """Options → a run with three sites at nodes 11 to 13, and the function that carries it out."""
    monkeypatch.setattr(runner, "write_report", lambda folder: folder.path)
    monkeypatch.setattr(serve, "Workshop", lambda: desk.WORKSHOP)  # one base for all: they are in one process

    def make(*more, name="run"):
        experiment = config.load(None, [*tiny_settings, "run.rounds=2", "engine.chunk=1", *more])
        folder = prepare(experiment, tmp_path / name)
        settings = settings_of(folder, PATIENCE)
        sites = local_sites(settings.parsed(), folder, 3)
        nodes = {10 + n: site.model_dump() for n, site in enumerate(sites.values(), start=1)}
        grid = Grid(app, settings.to_config(), nodes)

        def carry_out():
            serve.serve(settings, lambda check, note: FlowerTransport(grid, check, note))
            return folder

        return grid, folder, carry_out

    return make


PATIENCE = Patience(deadline=0.01, quorum=0.25, wait=0.6)


def simulated(folder: RunFolder, to) -> RunFolder:
    """The same experiment in one process."""
    runner.start(config.load(folder.path / "experiment.toml"), to, Quiet())
    return RunFolder.open(to)


def state_of(folder: RunFolder) -> World:
    return World(folder.load_checkpoint()[1])


@pytest.mark.parametrize("method", ["fslora", "flora"])
def test_a_run_through_flower_ends_with_the_bits_of_a_simulation(federation, tmp_path, method):
    grid, folder, carry_out = federation(f"method.name={method}")
    grid.arrival = lambda messages: messages[::-1]
    carry_out()
    other = simulated(folder, tmp_path / "simulated")
    assert_same_world(state_of(folder), state_of(other))
    left, right = folder.read_json("summary.json"), other.read_json("summary.json")
    for key in ("test", "bytes_down", "bytes_up", "flops", "finished"):
        assert left[key] == right[key], key
    for one, other in zip(left["clients"], right["clients"], strict=True):
        assert one["after"] == pytest.approx(other["after"], rel=1e-5)
    status = folder.read_json("deployment.json")
    assert status["state"] == "done"
    assert len(status["notes"]) == 3


def test_errors_late_and_strange_replies_cost_one_site_its_round(federation):
    """Node 11 fails in round 1 with an error that another node sends; node 12 is silent, and late; all go on."""
    grid, folder, carry_out = federation("fleet.cohort=all")
    late = []

    def change(node, asked, reply):
        if asked.metadata.message_type != "train" or asked.metadata.group_id != "1":
            return reply
        if node == 11:
            failed = Message(Error(code=5, reason="node unavailable"), reply_to=asked)
            failed.metadata._src_node_id = 1
            return failed
        if node == 12:
            late.append(reply)
            return None
        return reply

    grid.change = change
    carry_out()
    first, second = folder.metrics()[1:]
    assert {c: why for c, why in first["dropped"].items() if c in "03"} == dict.fromkeys(
        "03", "site site-1: node unavailable (Flower's error 5)"
    )
    assert {c: why for c, why in first["dropped"].items() if c in "14"} == dict.fromkeys(
        "14", "site site-2: no answer within 0.01 s"
    )
    assert second["dropped"] == {}
    assert len(late) == 1


def test_a_site_that_comes_back_at_another_node_is_the_same_site(federation):
    """Without keys a restarted node has a new number; the old one may be listed for a while."""
    grid, folder, carry_out = federation("fleet.cohort=all", "run.rounds=3")

    def change(node, asked, reply):
        if node == 11 and asked.metadata.group_id == "1" and asked.metadata.message_type == "train":
            grid.nodes[5] = grid.nodes[11]  # a smaller number than before
            return None
        assert node != 11 or asked.metadata.group_id in ("hello", "1", "2")
        return reply

    grid.change = change
    carry_out()
    dropped = [sorted(row["dropped"]) for row in folder.metrics()[1:]]
    assert dropped[0] == ["0", "3"]
    assert dropped[2] == []


def test_two_sites_with_one_client_are_not_both_let_in(federation):
    grid, folder, carry_out = federation("fleet.cohort=all")
    grid.nodes[14] = {**grid.nodes[11], "site": "thief"}
    carry_out()
    notes = folder.read_json("deployment.json")["notes"]
    assert any("'thief' says that it holds client 0, which is at site 'site-1'" in note for note in notes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"clients": "0,99"}, r"is to hold client 99; the experiment has clients 0 to 5"),
        ({"clients": "x"}, r"clients is 'x'; write ids with commas"),
        ({"storage": None}, r"--node-config is not complete: storage: .*`fslora deploy client-config` writes one"),
        ({"site": "../up"}, r"--node-config is not complete: site"),
    ],
)
def test_a_site_that_is_set_up_wrongly_is_told_why_and_the_others_go_on(federation, change, reason):
    grid, folder, carry_out = federation("fleet.cohort=all")
    grid.nodes[11] = {k: v for k, v in {**grid.nodes[11], **change}.items() if v is not None}
    carry_out()
    notes = folder.read_json("deployment.json")["notes"]
    assert any(note.startswith("a site cannot take part") and re.search(reason, note) for note in notes), notes
    assert folder.metrics()[1]["dropped"] == dict.fromkeys("03", "its site is not connected")


def test_without_sites_nothing_starts_and_the_reason_is_in_the_folder(federation):
    grid, folder, carry_out = federation()
    grid.nodes.clear()
    with pytest.raises(TrainingError, match=r"0 of 6 clients were there within 0\.6 s"):
        carry_out()
    assert folder.read_json("deployment.json")["state"] == "failed"


def test_what_cannot_be_deployed_is_refused_first(tiny_settings, tmp_path):
    for setting, message in (("fleet.pooled=true", "need no sites"), ("method.name=local", "a model of its own")):
        with pytest.raises(ConfigError, match=message):
            prepare(config.load(None, [*tiny_settings, setting]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nothing_but_adapters_and_counts_leaves_a_site(federation, sentiment_file):
    """Every byte of every reply: no text, label name or path of the data is in it, no array but those of updates."""
    with sentiment_file.open(newline="") as file:
        texts = [row["text"].encode() for row in csv.DictReader(file)]
    secrets = [*texts, str(sentiment_file.parent).encode(), b"sentiment", b"good", b"site-north"]
    grid, _, carry_out = federation("fleet.cohort=all")
    replies = []
    grid.change = lambda node, asked, reply: replies.append(reply) or reply
    carry_out()
    assert len(replies) == 3 + 2 * 3 + 2 * 3  # hellos, rounds, and the clients' scores before and after
    for reply in replies:
        record = from_flower(reply.content)
        whole = record.header.encode() + b"".join(entry.name.encode() + entry.data for entry in record.entries)
        assert not [secret for secret in secrets if secret in whole]
        assert all(entry.name.split("/")[1] in ("adapter", "extras") for entry in record.entries)


def test_a_run_that_nobody_begins_is_spoken_of_once(tiny_settings, tmp_path, monkeypatch):
    folder = prepare(config.load(None, tiny_settings), tmp_path / "run")
    folder.write_json(launch.STATUS, {"run": "run-1", "state": "submitted", "error": "", "notes": []})
    monkeypatch.setattr(launch, "BEGIN", 0.0)
    monkeypatch.setattr(launch, "LOOK", 0.01)
    monkeypatch.setattr(launch, "ASK", 0.2)
    notes = []

    class Stage(Quiet):
        def note(self, text):
            notes.append(text)

    def stop():
        raise TrainingError("enough")

    with pytest.raises(TrainingError, match="enough"):
        launch._follow(folder, settings_of(folder, Patience()), Stage(), stop)
    assert notes == [launch.NOT_BEGUN]


def test_a_keeper_ends_what_worked_in_a_folder_and_touches_nothing_else(tmp_path, monkeypatch):
    lab, other = tmp_path / "lab", tmp_path / "other"
    lab.mkdir()
    other.mkdir()
    monkeypatch.chdir(other)
    (other / "kept").touch()
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    homes = {home: subprocess.Popen(sleep, env={**os.environ, "FLWR_HOME": str(home)}) for home in (lab, other)}
    keeper = Child.start("fslora.deploy.keeper", 1, str(lab))
    try:
        keeper.requests.close()
        assert keeper.process.wait(30) == 0
        assert homes[lab].wait(30) == -signal.SIGKILL
        assert homes[other].poll() is None
        assert not lab.exists()
        assert (other / "kept").exists()
    finally:
        keeper.stop()
        for process in homes.values():
            process.kill()
            process.wait()
