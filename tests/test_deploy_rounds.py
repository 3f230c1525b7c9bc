"""Rounds at sites end with the bits of a simulation, for every method, through the whole of the letters' encoding."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest
import torch

from fslora import config
from fslora.clientstore import ClientStore
from fslora.console import Silent
from fslora.deploy.envelope import Entry, Record
from fslora.deploy.inprocess import InProcess
from fslora.deploy.letters import Results, opened
from fslora.deploy.patience import Patience
from fslora.deploy.server import Deployed
from fslora.deploy.site import SiteWorker
from fslora.errors import TrainingError
from fslora.methods import METHODS
from fslora.prepare import Workshop
from fslora.runfolder import RunFolder
from fslora.simulate import Simulation
from kit import World, assert_same_world

SITES = {"north": {0, 3}, "east": {1, 4, 5}, "south": {2}}
TIMES = {"seconds", "server_seconds", "validation", "spectrum", "effective_rank"}
WORKSHOP = Workshop()
NOW = Patience(deadline=0, quorum=0.25, poll=0)


class Unscored:
    """Nothing is evaluated: the rounds alone are compared."""

    def evaluate(self, state):
        return {}

    def _spectrum(self, state):
        return {}


class Simulated(Unscored, Simulation): ...


class AtSites(Unscored, Deployed): ...


@pytest.fixture
def settings(tiny_settings) -> list[str]:
    # One client at a time: sums over a batch round otherwise than sums over another one.
    return [*tiny_settings, "run.rounds=3", "engine.chunk=1", "variants={}"]


@pytest.fixture
def world(settings, tmp_path):
    """Options → a run at sites, and what it takes to carry it out again."""

    def make(*more: str, folder="sites", storage="storage", patience=NOW, **options):
        federation = WORKSHOP.federation(config.load(None, [*settings, *more]))
        workers = [
            SiteWorker(name, federation, frozenset(members), tmp_path / storage / name)
            for name, members in SITES.items()
        ]
        path = tmp_path / folder
        opened_folder = RunFolder(path) if path.is_dir() else RunFolder.create(path)
        opened_folder.write_text("experiment.toml", "")
        return AtSites(federation, opened_folder, Silent(), InProcess(workers, **options), "run-1", patience)

    return make


def simulated(settings, tmp_path, *more: str) -> Simulated:
    federation = WORKSHOP.federation(config.load(None, [*settings, *more]))
    return Simulated(federation, RunFolder.create(tmp_path / "simulated"), Silent())


def memories_at_sites(run: Deployed, tmp_path, storage="storage") -> dict:
    """What clients keep according to what the server knows was used."""
    kept = {}
    for site, members in SITES.items():
        for client in members:
            store = ClientStore(tmp_path / storage / site / "run-1" / "memories", run.known.get(client, 0))
            if client in store:
                kept[client] = store[client]
    return kept


def rows(run) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in run.folder.metrics()]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_ends_with_the_bits_of_a_simulation(settings, world, tmp_path, name):
    """State, memories at the sites, bytes and losses; the sites answer in reversed order."""
    one = simulated(settings, tmp_path, f"method.name={name}")
    other = world(f"method.name={name}", arrival=lambda names: names[::-1])
    left = World(one.run(), dict(one.memories))
    right = World(other.run(), memories_at_sites(other, tmp_path))
    assert_same_world(left, right)
    assert rows(one) == rows(other)


def test_a_lossy_wire_with_feedback_too(settings, world, tmp_path):
    lossy = ["wire.up=int8", "wire.down=bfloat16", "wire.top_k=0.2", "wire.error_feedback=true"]
    one, other = simulated(settings, tmp_path, *lossy), world(*lossy)
    left = World(one.run(), dict(one.memories))
    assert_same_world(left, World(other.run(), memories_at_sites(other, tmp_path)))


@pytest.mark.parametrize("name", ["flora", "fedsa-lora", "rac-lora"])
def test_a_server_that_falls_back_to_its_checkpoint_finds_the_sites_as_they_were(settings, world, name):
    """Stopped in round 3 after checkpoint 2, when sites had trained for it already; resumed: the same bits."""
    more = [f"method.name={name}", "run.rounds=4", "run.checkpoint_every=2"]
    whole = world(*more, folder="whole", storage="a")
    left = whole.run()

    def stop(site, round, reply):
        if round == 2:
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        world(*more, storage="b", on_the_way=stop).run()
    again = world(*more, storage="b")
    assert_same_world(World(left), World(again.run()))
    assert rows(whole) == rows(again)


def damaged(reply: Record, change) -> Record:
    first = reply.entries[0]
    return replace(reply, entries=(change(first), *reply.entries[1:]))


def relabelled(reply: Record, **changes) -> Record:
    head = opened(Results, reply)[0]
    return replace(reply, header=head.model_copy(update=changes).model_dump_json())


NAN = torch.full((10_000,), float("nan")).numpy().tobytes()
FAULTS = {
    "cut": (lambda r: damaged(r, lambda e: replace(e, data=e.data[:-1])), "bytes"),
    "shape": (lambda r: damaged(r, lambda e: replace(e, shape=(1, *e.shape))), "not torch.float32"),
    "nan": (lambda r: damaged(r, lambda e: replace(e, data=NAN[: len(e.data)])), "not finite"),
    "type": (lambda r: damaged(r, lambda e: replace(e, dtype="int32")), "int32"),
    "more": (lambda r: replace(r, entries=(*r.entries, Entry("1/adapter/x", "int8", (1,), b"1"))), "not in its header"),
    "stranger": (lambda r: replace(r, entries=(*r.entries, Entry("0/a", "int8", (1,), b"1"))), "no place in it"),
    "nobody": (lambda r: replace(r, entries=(*r.entries, Entry("a", "int8", (1,), b"1"))), "which client"),
    "version": (lambda r: replace(r, version=99), "install the same fslora"),
    "text": (lambda r: replace(r, header="{"), "its head is damaged"),
    "round": (lambda r: relabelled(r, round=7), "it is about round 8"),
    "run": (lambda r: relabelled(r, run="other"), "of run other"),
    "examples": (
        lambda r: relabelled(
            r,
            results=tuple(
                x.model_copy(update={"header": x.header.replace('"examples":', '"examples":1000000')})
                for x in opened(Results, r)[0].results
            ),
        ),
        "the client has",
    ),
    "losses": (lambda r: replace(r, header=r.header.replace('"losses":[', '"losses":[NaN,')), "its head is damaged"),
    "error": (lambda r: "the process was killed", "the process was killed"),
    "silence": (lambda r: None, "no answer within 0 s"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_answer_is_recorded_with_its_reason_and_the_round_goes_on(world, fault):
    change, reason = FAULTS[fault]
    run = world(
        "run.rounds=1", "fleet.cohort=all", on_the_way=lambda site, _, reply: change(reply) if site == "east" else reply
    )
    state = run.run()
    (row,) = run.folder.metrics()[1:]
    assert row["dropped"].keys() <= {"1", "4", "5"}
    assert row["dropped"]
    assert all(re.search(reason, why) for why in row["dropped"].values()), row["dropped"]
    assert row["client_loss"].keys() >= {"0", "2", "3"}
    assert all(torch.isfinite(tensor).all() for tensor in state.adapter.tensors().values())


def test_without_a_quorum_the_run_stops_and_says_who_is_silent(world):
    run = world(on_the_way=lambda site, round, reply: None, patience=Patience(deadline=0, poll=0))
    with pytest.raises(TrainingError, match=r"round 1: 0 of 4 clients answered within 0 s, .* silent: east"):
        run.run()


def test_with_over_selection_a_round_goes_on_with_the_answers_that_come_first(settings, world, tmp_path):
    """A silent site holds nobody up; the cohort without spares is the one of a simulation; means are of what came."""
    patience = Patience(deadline=60, over_select=1.3, poll=0)
    plain = simulated(settings, tmp_path, "fleet.cohort=3")
    plain.run()
    for name in ("fslora", "flora"):
        run = world(
            "fleet.cohort=3",
            f"method.name={name}",
            folder=name,
            storage=name,
            patience=patience,
            on_the_way=lambda site, round, reply: None if site == "south" else reply,
        )
        began = time.monotonic()
        state = run.run()
        assert time.monotonic() - began < patience.deadline
        assert all(torch.isfinite(tensor).all() for tensor in state.adapter.tensors().values())
        dropped = 0
        for one, row in zip(plain.folder.metrics()[1:], run.folder.metrics()[1:], strict=True):
            assert set(one["clients"]) < set(row["clients"])
            assert len(row["clients"]) == 4  # 1.3 times 3, and up
            assert row["client_loss"].keys() | row["dropped"].keys() == set(map(str, row["clients"]))
            assert len(row["client_loss"]) >= 3
            assert all(re.fullmatch(r"site \w+: late: \d clients were faster", why) for why in row["dropped"].values())
            dropped += len(row["dropped"])
        assert dropped
        assert not any("2" in row["client_loss"] for row in run.folder.metrics()[1:])


def test_a_letter_that_comes_when_the_cohort_is_full_is_not_used(settings, world):
    """All sites answer at once, south last: what is averaged is what came before it, and nothing else."""
    patience = Patience(deadline=60, over_select=2.0, poll=0)
    options = {"patience": patience, "arrival": lambda names: sorted(names, key=lambda name: name == "south")}
    more = ["fleet.cohort=3", "run.rounds=1"]
    run = world(*more, folder="all", storage="all", **options)
    state = run.run()
    (row,) = run.folder.metrics()[1:]
    assert row["dropped"] == {"2": "site south: late: 5 clients were faster"}
    silent = world(*more, on_the_way=lambda site, _, reply: None if site == "south" else reply, **options)
    assert_same_world(World(state), World(silent.run()))


def test_more_than_the_fleet_cannot_be_asked(world):
    run = world("fleet.cohort=4", "run.rounds=1", patience=Patience(deadline=60, over_select=3.0, poll=0))
    run.run()
    assert run.folder.metrics()[1]["clients"] == list(range(6))


@pytest.mark.parametrize(("factor", "cohort", "spares"), [(1.0, 5, 0), (1.3, 5, 2), (1.1, 10, 1), (2.0, 3, 3)])
def test_spares_are_rounded_up(factor, cohort, spares):
    assert Patience(over_select=factor).spares(cohort) == spares


def test_an_answer_that_was_lost_leaves_no_trace(settings, world, tmp_path):
    """A client whose answer did not arrive goes on as if it had not been asked, memory and base included."""
    for name in ("fedsa-lora", "flora"):
        more = [f"method.name={name}", "fleet.cohort=all"]

        def lost(site, round, reply):
            return None if (site, round) == ("east", 1) else reply

        answered = world(*more, folder=f"{name}-a", storage=f"{name}-a", on_the_way=lost)
        offline = world(*more, folder=f"{name}-b", storage=f"{name}-b")
        everybody = offline.transport.sites()
        numbers = iter(range(99))

        def connected(everybody=everybody, numbers=numbers):
            return {k: v for k, v in everybody.items() if k != "east"} if next(numbers) == 1 else everybody

        offline.transport.sites = connected
        left = World(answered.run(), memories_at_sites(answered, tmp_path, f"{name}-a"))
        right = World(offline.run(), memories_at_sites(offline, tmp_path, f"{name}-b"))
        assert_same_world(left, right)
