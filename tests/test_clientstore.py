"""What clients keep between rounds: on disk, of the checkpoint's own past and never of its future."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora import config
from fslora.clientstore import ClientStore
from fslora.errors import ArtifactError
from fslora.prepare import Workshop
from fslora.runfolder import RunFolder
from fslora.simulate import Simulation
from fslora.types import Adapter, ClientMemory, LoRA
from test_run import assert_same_run


def memory(number: float) -> ClientMemory:
    pair = LoRA(torch.full((2, 3), float(number)), torch.full((0, 4), 0.0), 0.1 + 0.2)
    return ClientMemory({"own": Adapter({"l": pair}, {"head": torch.tensor(number)})}, {"rounds": number})


def number_of(kept: ClientMemory) -> float:
    pair = kept.slots["own"].layers["l"]
    assert pair.scale == 0.1 + 0.2
    assert pair.Bt.shape == (0, 4)
    assert set(pair.A.flatten().tolist()) == {kept.scalars["rounds"]} == {kept.slots["own"].dense["head"].item()}
    return kept.scalars["rounds"]


def contents(store: ClientStore) -> dict[int, float]:
    return {client: number_of(kept) for client, kept in store.items()}


ROUNDS = st.lists(st.sets(st.integers(0, 4)), min_size=1, max_size=8)
"""Who wrote in rounds 1, 2, ..."""


@settings(deadline=None)
@given(ROUNDS, st.integers(1, 4), st.integers(0, 8))
def test_a_store_opened_at_a_checkpoint_is_what_it_was_then(tmp_path_factory, rounds, every, crash):
    """Whatever was written after the last checkpoint before a crash: the store opened there is that of then."""
    folder = tmp_path_factory.mktemp("clients")
    store, now = ClientStore(folder, 0), {}
    saved, then = 0, {}
    for done, clients in enumerate(rounds[:crash], start=1):
        for client in sorted(clients):
            store.put(client, memory(100 * client + done), done)
            now[client] = 100 * client + done
        assert contents(store) == now
        if done % every == 0:
            store.checkpointed(done)
            saved, then = done, dict(now)
    again = ClientStore(folder, saved)
    assert contents(again) == then
    assert list(again) == sorted(then)
    assert len(list(folder.iterdir())) <= 2 * len(now), "of a client at most the checkpoint's file and the newest"
    again.rewind()
    assert len(list(folder.iterdir())) == len(then)
    assert contents(ClientStore(folder, 99)) == then, "what was written after the checkpoint is gone"


def test_opening_a_store_changes_nothing(tmp_path):
    """`fslora export` looks at the checkpoint of a run that may be going on."""
    store = ClientStore(tmp_path, 0)
    store.put(7, memory(1.0), 1)
    store.checkpointed(1)
    store.put(7, memory(2.0), 2)
    before = sorted(tmp_path.iterdir())
    assert contents(ClientStore(tmp_path, 1)) == {7: 1.0}
    assert contents(ClientStore(tmp_path, 2)) == {7: 2.0}
    assert sorted(tmp_path.iterdir()) == before
    assert contents(ClientStore(tmp_path / "nowhere", 2)) == {}
    assert not (tmp_path / "nowhere").exists()


def test_a_damaged_or_unwritable_file_is_named(tmp_path):
    store = ClientStore(tmp_path / "clients", 0)
    store.put(3, memory(1), 1)
    (path,) = (tmp_path / "clients").iterdir()
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ArtifactError, match=r"0000003-000001\.safetensors, what client 3 keeps .* is damaged"):
        store[3]
    path.unlink()
    with pytest.raises(ArtifactError, match="client 3"):
        store[3]
    with pytest.raises(KeyError):
        store[4]
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="cannot be written"):
        ClientStore(tmp_path / "file", 0).put(1, memory(1), 1)


def test_an_older_checkpoint_is_read_where_no_client_kept_anything(tmp_path):
    import json

    from fslora.types import ServerState

    folder = RunFolder(tmp_path)
    folder.save_checkpoint(2, ServerState(memory(1).slots["own"]))
    path = tmp_path / "checkpoints/round-000002/state.json"
    old = {**json.loads(path.read_text()), "format": 2, "memories": {}}
    path.write_text(json.dumps(old))
    assert folder.load_checkpoint()[0] == 2
    path.write_text(json.dumps({**old, "memories": {"3": {}}}))
    with pytest.raises(ArtifactError, match="has format 2; this fslora reads format 3"):
        folder.load_checkpoint()


@pytest.mark.parametrize("name", ["local", "rolora", "fedsa-lora"])
def test_a_crash_in_the_middle_of_a_round_is_as_if_it_had_not_begun(tiny_settings, tmp_path, name):
    """With a checkpoint every second round: stopped within round 4, resumed, the same bits as never stopped."""
    settings = [*tiny_settings, f"method.name={name}", "run.rounds=5", "run.checkpoint_every=2", "fleet.cohort=3"]
    federation = Workshop().federation(config.load(None, [*settings, "engine.chunk=1", "variants={}"]))
    whole, folder = RunFolder.create(tmp_path / "whole"), RunFolder.create(tmp_path / "run")
    for each in (whole, folder):
        each.write_text("experiment.toml", "")
    Simulation(federation, whole, Interrupting(clients=99)).run()
    with pytest.raises(KeyboardInterrupt):
        Simulation(federation, folder, Interrupting(clients=11)).run()
    files = ClientStore(tmp_path / "run/checkpoints/clients", 99)
    assert folder.rounds_done == 2
    assert max(files._newest.values()) == 4, "the round that was cut short has left files of its own"
    Simulation(federation, folder, Interrupting(clients=99)).run()
    assert_same_run(tmp_path / "whole", tmp_path / "run")


class Interrupting:
    """Stops a run after so many clients."""

    def __init__(self, clients: int) -> None:
        self.left = clients

    def round_started(self, number, clients) -> None: ...

    def client_done(self, loss) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def round_done(self, row) -> None: ...


def test_a_round_reads_and_writes_the_memories_of_its_cohort_alone(tiny_settings, tmp_path, monkeypatch):
    """Of six clients three take part: three files are read at most, three are written, by the checkpoint none."""
    settings = [*tiny_settings, "method.name=local", "run.rounds=4", "run.eval_every=9", "fleet.cohort=3"]
    federation = Workshop().federation(config.load(None, [*settings, "variants={}"]))
    calls = []
    real_put, real_get = ClientStore.put, ClientStore.__getitem__
    monkeypatch.setattr(
        ClientStore, "put", lambda self, c, m, r: (calls.append(("put", r, c)), real_put(self, c, m, r))
    )
    monkeypatch.setattr(ClientStore, "__getitem__", lambda self, c: (calls.append(("get", c)), real_get(self, c))[1])
    simulation = Simulation(federation, RunFolder.create(tmp_path / "run"), Interrupting(99))
    state = simulation.initial_state()
    for number in range(3):
        before = set(simulation.memories)
        calls.clear()
        state, tally = simulation.round(state, number)
        cohort = set(tally.bytes_up)
        assert {call[-1] for call in calls if call[0] == "put"} == cohort
        assert {call[-1] for call in calls if call[0] == "get"} <= cohort
        assert set(simulation.memories) == before | cohort
    calls.clear()
    simulation.folder.save_checkpoint(3, state)
    simulation.memories.checkpointed(3)
    assert not calls
