"""The process of a site that outlives Flower's: the same answers, and it ends, or is replaced, whatever happens."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given

from fslora import config
from fslora.deploy import desk
from fslora.deploy.envelope import Entry, Record, receive, send
from fslora.deploy.launch import local_sites, prepare, settings_of
from fslora.deploy.letters import Hello, opened
from fslora.deploy.patience import Patience
from fslora.deploy.records import to_record
from fslora.errors import ConfigError, WireError
from fslora.wire import Payload
from test_deploy_records import names, tensors

BUSY = 120
"""Seconds after which something is wrong even on a machine that is shared."""

ASKER = """
import json, os, sys
from fslora.deploy.relay import ask
from fslora.errors import FsloraError
sys.argv[0] = "flwr-clientapp"
sys.executable = os.environ.get("WORKER_PYTHON", sys.executable)
try:
    print(ask(*json.load(sys.stdin)).header)
except FsloraError as error:
    print(json.dumps({type(error).__name__: str(error)}))
"""
"""What Flower's process for one message does, but for Flower."""
NODE = """
import json, subprocess, sys
words = json.load(sys.stdin)
subprocess.run([sys.executable, "-c", words["asker"]], input=json.dumps(words["question"]).encode(), check=True)
print("answered", flush=True)
sys.stdin = open(0)
import time
time.sleep(600)
"""
"""What starts such processes, and lives on."""


@given(names, tensors())
def test_a_record_passes_through_a_socket_unchanged(name, tensor):
    record = to_record(Payload({name: tensor}, "{}"))
    here, there = socket.socketpair()
    with here, there:
        sender = threading.Thread(target=send, args=(here, {"kind": name}, record))
        sender.start()
        assert receive(there) == ({"kind": name}, record)
        sender.join()


def test_a_large_record_passes_in_pieces_and_no_record_is_told_from_an_empty_one():
    here, there = socket.socketpair()
    with here, there:
        record = Record((Entry("a", "uint8", (3_000_001,), bytes(range(256)) * 11718 + bytes(2993)),), "x")
        sender = threading.Thread(target=lambda: [send(here, {}, each) for each in (record, None, Record((), ""))])
        sender.start()
        assert [receive(there)[1] for _ in range(3)] == [record, None, Record((), "")]
        sender.join()


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"", ConnectionError),
        (b"\0\0\0\4{}", ConnectionError),
        (b"\0\0\0\2{}", WireError),
        (b"\0\0\0\2[1", WireError),
        (b'\0\0\0\x46{"head": {}, "record": true, "version": 1, "header": "", "entries": [1]}', WireError),
    ],
)
def test_what_is_no_frame_is_refused(sent, error):
    here, there = socket.socketpair()
    with there:
        with here:
            here.sendall(sent)
        with pytest.raises(error):
            receive(there)


def test_the_process_that_flower_starts_imports_no_torch():
    pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fslora[flower]'")
    code = "import sys, fslora.deploy.client_app; assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def site(tiny_settings, tmp_path, monkeypatch):
    """A run's and a site's configuration; whatever is started for them is gone in the end."""
    monkeypatch.setenv("FSLORA_TEST", str(tmp_path))
    folder = prepare(config.load(None, [*tiny_settings, "engine.chunk=1"]), tmp_path / "run")
    settings = settings_of(folder, Patience())
    yield settings.to_config(), local_sites(settings.parsed(), folder, 3)["site-1"].model_dump()
    for worker in workers(tmp_path):
        worker.kill()


def workers(path: Path) -> list[psutil.Process]:
    """The workers that were started for a test."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("FSLORA_TEST") == str(path) and process.status() != psutil.STATUS_ZOMBIE
            if ours and "fslora.deploy.worker" in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


def gone(process: psutil.Process) -> bool:
    psutil.wait_procs([process], timeout=BUSY)
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def asked(site, storage: str | None = None) -> tuple[dict, str]:
    """What a process for one message is answered, and what it says beside."""
    run, node = site
    question = ["hello", None, run, {**node, **({"storage": storage} if storage else {})}]
    done = subprocess.run(
        [sys.executable, "-c", ASKER],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        timeout=BUSY,
        check=False,
    )
    return json.loads(done.stdout) if done.returncode == 0 else {}, done.stderr


def introduction(site) -> dict:
    return json.loads(desk.hello(*site).header)


def test_one_worker_answers_message_after_message_and_a_killed_one_is_replaced(site, tmp_path):
    expected = introduction(site)
    assert asked(site) == (expected, "")
    (first,) = workers(tmp_path)
    assert asked(site) == (expected, "")
    assert workers(tmp_path) == [first]
    folder = Path(site[1]["storage"]) / ".worker"
    assert folder.stat().st_mode & 0o777 == 0o700
    first.kill()
    assert asked(site) == (expected, "")
    (second,) = workers(tmp_path)
    assert second != first


@pytest.mark.slow
def test_a_worker_that_is_killed_while_it_works_is_replaced_for_the_same_letter(site, tmp_path):
    """Killed as soon as it is there, while it imports."""
    killed = []

    def kill():
        end = time.monotonic() + BUSY
        while not killed and time.monotonic() < end:
            for worker in workers(tmp_path):
                worker.kill()
                killed.append(worker)
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    answer, _ = asked(site)
    killer.join()
    assert answer == introduction(site)
    assert killed
    assert len(workers(tmp_path)) == 1


@pytest.mark.slow
def test_one_that_always_dies_is_given_up_with_the_place_of_its_last_words(site, monkeypatch):
    monkeypatch.setenv("WORKER_PYTHON", "/bin/false")
    answer, _ = asked(site)
    assert re.fullmatch(r".* ended 3 times before it had answered; .*/\.worker/log", answer["TrainingError"])


@pytest.mark.slow
def test_another_run_or_configuration_gets_another_worker_and_the_first_ends(site, tmp_path):
    run, node = site
    asked(site)
    (first,) = workers(tmp_path)
    settings = json.loads(run["settings"])
    answer, _ = asked(({"settings": json.dumps({**settings, "run": "run-other"})}, node))
    assert answer
    assert gone(first)
    (second,) = workers(tmp_path)
    assert second.pid != first.pid


@pytest.mark.slow
def test_it_ends_when_nothing_comes(site, tmp_path):
    run, node = site
    asked((run, {**node, "idle": 0.2}))
    log = Path(node["storage"]) / ".worker" / "log"
    end = time.monotonic() + BUSY
    while workers(tmp_path) and time.monotonic() < end:
        time.sleep(0.1)
    assert log.read_text().splitlines()[-1] == "ended: nothing came for 0.2 s"


def test_it_ends_with_the_process_that_starts_those_who_ask(site, tmp_path):
    """Killed, as a SuperNode can be: nobody is told."""
    words = {"asker": ASKER, "question": ["hello", None, *site]}
    with subprocess.Popen([sys.executable, "-c", NODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as node:
        node.stdin.write(json.dumps(words).encode())
        node.stdin.close()
        assert json.loads(node.stdout.readline())["site"] == "site-1"
        assert node.stdout.readline() == b"answered\n"
        (worker,) = workers(tmp_path)
        node.send_signal(signal.SIGKILL)
    assert gone(worker)
    assert "is gone" in (Path(site[1]["storage"]) / ".worker" / "log").read_text()


@pytest.mark.slow
def test_it_ends_when_nobody_waits_for_its_answer(site, tmp_path):
    """The process for the message is killed while the worker works: with it goes the work, as without a worker."""
    question = json.dumps(["hello", None, *site])
    asker = subprocess.Popen([sys.executable, "-c", ASKER], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    asker.stdin.write(question)
    asker.stdin.close()
    end = time.monotonic() + BUSY
    while not workers(tmp_path):
        assert time.monotonic() < end
        time.sleep(0.01)
    (worker,) = workers(tmp_path)
    asker.kill()
    asker.wait()
    assert gone(worker)


def test_what_goes_wrong_is_told_as_if_there_were_no_worker_and_ends_it(site, tmp_path):
    run, node = site
    strange = {**node, "clients": "0,99"}
    with pytest.raises(ConfigError, match="is to hold client 99; the experiment has clients 0 to 5") as here:
        desk.answer("hello", None, run, strange)
    assert asked((run, strange)) == ({"ConfigError": str(here.value)}, "")
    psutil.wait_procs(workers(tmp_path), timeout=BUSY)
    assert not workers(tmp_path)


@pytest.mark.slow
def test_long_paths_are_no_obstacle(site, tmp_path):
    storage = tmp_path / ("long" * 30) / "storage"
    answer, said = asked(site, str(storage))
    assert (answer, said) == (introduction(site), "")
    assert (storage / ".worker" / "socket").is_socket()
    assert len(workers(tmp_path)) == 1


@pytest.mark.slow
def test_where_there_can_be_no_worker_the_process_answers_itself_and_says_why(site, tmp_path):
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / ".worker").write_text("a file in the place of the folder")
    answer, said = asked(site, str(blocked))
    assert answer == introduction(site)
    assert "there can be no worker process" in said
    assert "loaded for this letter alone" in said
    assert not workers(tmp_path)


@pytest.mark.slow
def test_a_site_can_do_without(site, tmp_path):
    run, node = site
    answer, said = asked((run, {**node, "idle": 0}))
    assert (answer, said) == (introduction(site), "")
    assert not workers(tmp_path)


def test_a_strange_kind_of_letter_is_refused(site):
    with pytest.raises(WireError, match=r"no letter of the kind 'os\.system'; there are hello, train"):
        desk.answer("os.system", Record((), "{}"), *site)
    assert opened(Hello, desk.answer("hello", None, *site))[0].site == "site-1"
