"""Cohorts over worker processes: the bits of one process, however many there are, and no process left behind."""

from __future__ import annotations

import io
import json
import math
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from conftest import FSLORA
from fslora import compare, config
from fslora.clients import Answer
from fslora.console import Silent
from fslora.errors import ArtifactError, ConfigError, DataError, ModelError, TrainingError, WireError
from fslora.prepare import Workshop
from fslora.runfolder import RunFolder
from fslora.runner import workers_note
from fslora.simulate import Simulation, Simulations, Spread
from fslora.spread.frames import Frame, receive, send
from fslora.spread.letters import answers_letter, answers_of, error_letter, error_of
from fslora.spread.pool import Pool
from fslora.types import Adapter, ClientMemory, LoRA
from fslora.wire import Payload
from kit import World, assert_same_world

TIMES = {"seconds", "server_seconds"}
WORKSHOP = Workshop()
LOSSY = ("wire.up=int8", "wire.down=bfloat16", "wire.top_k=0.2")
PATIENCE = 60.0


@pytest.fixture
def settings(tiny_settings) -> list[str]:
    # Six clients, two at a time: three chunks a round.
    return [*tiny_settings, "run.rounds=3", "fleet.cohort=all", "engine.chunk=2", "variants={}"]


@pytest.fixture(scope="module")
def makers():
    """Number of workers → what makes simulations, with processes that all tests share."""
    kept: dict[int, Simulations] = {}
    yield lambda workers: kept.setdefault(workers, Simulations())
    for simulations in kept.values():
        simulations.close()


class Watching(Silent):
    """Counts clients, and does something once a round begins."""

    def __init__(self, at: int = 0, then=lambda: None) -> None:
        self.at, self.then, self.clients = at, then, 0

    def round_started(self, number, clients):
        if number == self.at:
            self.then()

    def client_done(self, loss):
        self.clients += 1


def federation(settings, *more: str):
    return WORKSHOP.federation(config.load(None, [*settings, *more]))


def world(run) -> World:
    return World(run.run(), dict(run.memories))


def rows(run) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in run.folder.metrics()]


def running(pids) -> list[int]:
    """Which of these processes have not ended."""
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        found += [pid] if state != "Z" else []
    return found


def pids_of(run: Spread) -> list[int]:
    return [worker.process.pid for worker in run.pool.workers]


def test_the_cores_are_the_workers_while_they_train(settings, makers, tmp_path):
    """Threads of both would wait for each other, and take the cores while they do."""
    seen = []

    class Threads(Silent):
        def client_done(self, loss):
            seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run = makers(2)(
            federation(settings, "engine.workers=2", "run.rounds=2"), RunFolder.create(tmp_path / "r"), Threads()
        )
        run.run()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1] * 12


@pytest.mark.parametrize(
    ("counts", "more"),
    [
        ((2, 3), ["method.name=fslora", "adapter.dropout=0.1", "local.epochs=1"]),
        ((2,), ["method.name=fslora", *LOSSY]),
        ((2,), ["method.name=flora"]),
        ((2,), ["method.name=fedsa-lora"]),
        ((2,), ["method.name=lora-fair", "fleet.cohort=5"]),
        ((2,), ["method.name=hetlora", "engine.name=sequential", "fleet.cohort=3"]),
    ],
    ids=["plain", "feedback", "changed-base", "memories", "five-of-six", "sequential"],
)
def test_workers_end_with_the_bits_of_one_process(settings, makers, tmp_path, counts, more):
    """State, memories, and everything that is recorded but times."""
    more = [*more, "run.rounds=2"]
    one = Simulation(federation(settings, *more), RunFolder.create(tmp_path / "1"), Silent())
    left = world(one)
    for workers in counts:
        watcher = Watching()
        chosen = federation(settings, *more, f"engine.workers={workers}")
        other = makers(workers)(chosen, RunFolder.create(tmp_path / str(workers)), watcher)
        assert isinstance(other, Spread)
        assert len(other.pool.workers) == workers
        assert_same_world(left, world(other))
        assert rows(one) == rows(other)
        assert watcher.clients == sum(len(row["client_loss"]) for row in rows(one)[1:])
        assert other.peak_memory() > 2 * other.pool.peak_memory / workers > 0


def interrupted(then, message: str | None, settings, tmp_path) -> tuple[Spread, RunFolder]:
    """Three rounds over two workers that end early in round 2."""
    with Simulations() as make:
        run = make(federation(settings, "engine.workers=2"), RunFolder.create(tmp_path / "stopped"), Watching())
        run.watcher = Watching(2, lambda: then(run))
        with pytest.raises(TrainingError if message else KeyboardInterrupt, match=message):
            run.run()
        assert running(pids_of(run)) == []
    assert run.folder.rounds_done == 1
    return run, run.folder


def stop(run: Spread) -> None:
    raise KeyboardInterrupt


def kill(run: Spread) -> None:
    run.pool.workers[1].process.kill()


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (stop, None),
        (
            kill,
            r"round 2: its worker process died \(SIGKILL, .* try fewer engine\.workers .*The rounds before are in .*",
        ),
    ],
    ids=["stopped", "killed"],
)
def test_a_run_that_ended_early_goes_on_with_any_number_of_workers(settings, makers, tmp_path, then, message):
    """From two workers to one process and to three: the bits of a run that never stopped."""
    settings = [*settings, "method.name=fedsa-lora"]
    whole = Simulation(federation(settings), RunFolder.create(tmp_path / "whole"), Silent())
    left = world(whole)
    _, folder = interrupted(then, message, settings, tmp_path)
    workers = 1 if message else 3
    again = makers(workers)(federation(settings, f"engine.workers={workers}"), folder, Silent())
    assert_same_world(left, world(again))
    assert rows(whole) == rows(again)


def test_what_goes_wrong_in_a_worker_arrives_with_its_kind_and_text(settings, tmp_path, sentiment_file):
    moved = tmp_path / "moved.csv"
    moved.write_bytes(sentiment_file.read_bytes())
    chosen = federation(settings, f"data.source={moved}", "engine.workers=['cpu']")
    with Simulations() as make:
        run = make(chosen, RunFolder.create(tmp_path / "a"), Silent())
        lines = moved.read_text().splitlines()
        moved.write_text("\n".join(lines[:-9]))
        with pytest.raises(DataError, match=r"round 1: a worker process reads other data than the run .*data\.source"):
            run.run()
        run = make(chosen, RunFolder.create(tmp_path / "b"), Silent())
        assert len(run.pool.workers) == 1
        moved.unlink()
        with pytest.raises(DataError, match=r"round 1: .*moved\.csv"):
            run.run()
        assert running(pids_of(run)) == []


def test_a_fault_in_a_worker_leaves_its_traceback(settings, tmp_path):
    """Not one of our own errors: the worker is asked about a client that there is not."""
    with Simulations() as make:
        run = make(federation(settings, "engine.workers=2"), RunFolder.create(tmp_path / "run"), Silent())
        real = run.pool.answers

        def strange(shared, chunks):
            asked = [{"client": 99, "header": "", "memory": None}]
            return real(shared, (Frame({"kind": "chunk", "requests": asked}) for _ in chunks))

        run.pool.answers = strange
        with pytest.raises(TrainingError, match=r"round 1: a worker process failed: IndexError: .*/traceback\.txt"):
            run.run()
    assert "requests_of" in (tmp_path / "run/traceback.txt").read_text()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(done, process=None) -> None:
    ends = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < ends
        assert process is None or process.poll() is None, process.stderr.read()
        time.sleep(0.05)


@pytest.mark.slow
def test_workers_do_not_outlive_a_run_that_is_killed(settings, tmp_path):
    """The command itself: SIGKILL gives it no chance to end anything; its workers notice."""
    items = [part for item in [*settings, "run.rounds=1000", "engine.workers=2"] for part in ("--set", item)]
    out = tmp_path / "run"
    command = [*FSLORA, "run", "--quiet", "--out", str(out), *items]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: len(RunFolder(out).metrics()) > 1, process)
            workers = children(process.pid)
            assert len(running(workers)) == 2
        finally:
            process.send_signal(signal.SIGKILL)
    wait_until(lambda: not running(workers))
    environment = json.loads((out / "environment.json").read_text())
    assert (environment["workers"], environment["worker_threads"]) == (2, 1)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("engine.workers=0", r"engine\.workers is 0: .*greater than or equal to 1"),
        ("engine.workers=[]", r"engine\.workers.*name one device per process"),
        ("engine.workers=['tpu']", r"engine\.workers.*'cpu', 'cuda' or 'cuda:N'"),
        ("engine.workers=['cpu', 'cuda:0']", r"engine\.workers.*devices of two kinds"),
    ],
)
def test_impossible_workers_are_refused(tiny_settings, item, message):
    with pytest.raises(ConfigError, match=message):
        config.load(None, [*tiny_settings, item])


def test_a_gpu_that_is_not_there_is_named(settings, tmp_path):
    chosen = federation(settings, "engine.workers=['cuda:98', 'cuda:99']")
    with Simulations() as make, pytest.raises(ModelError, match=r"engine\.workers is 'cuda:98', but \d+ GPUs"):
        make(chosen, RunFolder.create(tmp_path / "run"), Silent())


@pytest.mark.parametrize(
    ("more", "devices", "note"),
    [
        ([], (), ""),
        (["engine.workers=2"], ("", ""), "worker processes: 2, threads of each: 1"),
        (["engine.workers=3"], ("", "", ""), "worker processes: 3"),
        (["engine.workers=4"], ("", "", ""), "occupies 3; lower engine.chunk to 1 to occupy more"),
        (["engine.workers=4", "engine.name=sequential"], ("",) * 4, "worker processes: 4"),
        (["engine.workers=7", "engine.name=sequential"], ("",) * 6, "1 at a time, occupies 6"),
        (["engine.workers=2", "engine.chunk=6"], (), "occupies 1; lower engine.chunk to 3"),
        (["engine.workers=2", "fleet.pooled=true"], (), "a round of 1 clients"),
        (["engine.workers=['cpu']", "engine.chunk=6"], ("cpu",), "worker processes: 1"),
        (["engine.workers=['cpu', 'cpu']"], ("cpu", "cpu"), "worker processes: 2"),
    ],
)
def test_a_round_occupies_as_many_workers_as_it_has_chunks(settings, more, devices, note):
    experiment = config.load(None, [*settings, *more])
    assert experiment.engine.devices(1 if experiment.fleet.pooled else 6) == devices
    assert note in workers_note(experiment)
    assert bool(note) == bool(workers_note(experiment))
    assert config.build(config.parse_toml(config.to_toml(experiment)), "its own text") == experiment


def test_runs_side_by_side_start_no_workers_of_their_own(settings, tmp_path):
    experiment = config.load(None, [*settings, "engine.workers=2"])
    with pytest.raises(ConfigError, match=r"--jobs is 2, and engine\.workers would start 2 more processes for each"):
        compare.start(experiment, tmp_path / "run", 2, None)
    assert not (tmp_path / "run").exists()


def through_a_pipe(frame: Frame) -> Frame:
    stream = io.BytesIO()
    send(stream, frame)
    stream.seek(0)
    return receive(stream)


def test_frames_lose_nothing():
    tensors = {
        str(dtype): torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.int32, torch.int64, torch.bool)
    }
    tensors |= {
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
        "number": torch.tensor(3.5),
        "nothing": torch.empty(0, 7),
        "turned": torch.arange(6.0).reshape(2, 3).T,
    }
    found = through_a_pipe(Frame({"a": [1, 0.1, None]}, tensors))
    assert found.head == {"a": [1, 0.1, None]}
    assert list(found.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype, name
        assert torch.equal(found.tensors[name].nan_to_num(), tensor.nan_to_num()), name
    assert math.copysign(1, found.tensors["odd"][2]) == -1


def test_what_clients_share_goes_through_the_pipe_once():
    head, own = torch.ones(1000), torch.ones(1000)
    stream = io.BytesIO()
    send(stream, Frame({}, {"1/head": head, "2/head": head, "2/own": own}))
    assert len(stream.getvalue()) < 2.1 * head.nbytes
    stream.seek(0)
    found = receive(stream).tensors
    assert found["1/head"].data_ptr() == found["2/head"].data_ptr() != found["2/own"].data_ptr()


def test_a_frame_that_was_cut_is_the_end():
    stream = io.BytesIO()
    send(stream, Frame({}, {"a": torch.ones(10)}))
    for length in (0, 4, 12, len(stream.getvalue()) - 1):
        with pytest.raises(EOFError):
            receive(io.BytesIO(stream.getvalue()[:length]))


def test_answers_are_the_same_after_the_way():
    """Also those that the gate will refuse: losses that are not finite."""
    adapter = Adapter({"up": LoRA(torch.ones(2, 3), torch.zeros(0, 4), 0.1)}, {"head": torch.ones(2)})
    given = [
        Answer(3, Payload({"a": torch.ones(2)}, "header"), "", (0.1, float("nan")), 2, 1e300, 5),
        Answer(4, Payload({}, ""), "", (0.1,), keeps=ClientMemory({"slot": adapter}, {"count": 2})),
        Answer(7, refused="it refused"),
    ]
    found = list(answers_of(through_a_pipe(answers_letter(given, 9))))
    assert repr(found) == repr(given)


@pytest.mark.parametrize("kind", [ConfigError, DataError, ModelError, TrainingError, WireError, ArtifactError])
def test_errors_keep_their_kind(kind):
    error = error_of(through_a_pipe(error_letter(kind("rank is 3; lower it"), "trace")))
    assert type(error) is kind
    assert str(error) == "rank is 3; lower it"
    assert not hasattr(error, "__notes__")


def test_a_pool_that_nobody_waits_for_ends(settings):
    """Closed while its workers still prepare, as after an error before the first round."""
    chosen = federation(settings, "engine.workers=2")
    pool = Pool(("", ""))
    pool.use(chosen.experiment, chosen.sites.partition.digest)
    pool.stop()
    assert running(worker.process.pid for worker in pool.workers) == []
