"""Evaluation at sites: the scores of a simulation, from models that are there alone; what cannot be is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fslora import config, runner
from fslora.deploy.inprocess import InProcess
from fslora.deploy.letters import Marks, opened
from fslora.deploy.server import Deployed, Patience
from fslora.deploy.site import SiteWorker
from fslora.errors import ConfigError
from fslora.export import import_peft
from fslora.prepare import Workshop
from fslora.runfolder import RunFolder
from kit import assert_same_adapter
from test_run import Quiet

SITES = {"north": {0, 3}, "east": {1, 4, 5}, "south": {2}}
AT_CLIENTS = ["run.eval_on=clients", "partition.holdout=0.25", "run.rounds=3", "engine.chunk=1", "variants={}"]
WORKSHOP = Workshop()


class Run:
    """A run at sites from its first round to its summary; workers are new with each, as after a restart."""

    def __init__(self, items, path, **options) -> None:
        self.path = path
        self.federation = WORKSHOP.federation(config.load(None, items))
        self.options, self.notes = options, []
        self.folder = RunFolder(path) if path.is_dir() else RunFolder.create(path)
        self.folder.write_text("experiment.toml", "")

    def make(self, federation, folder, watcher):
        workers = [
            SiteWorker(name, federation, frozenset(members), self.path / "sites" / name)
            for name, members in SITES.items()
        ]
        transport = InProcess(workers, **self.options)
        return Deployed(federation, folder, watcher, transport, "run-1", Patience(0, 0.25, 0), self.notes.append)

    def carry_out(self) -> RunFolder:
        runner.run_one(self.federation, self.folder, "x", None, Quiet(), self.make)
        return self.folder


def simulated(items, path) -> RunFolder:
    folder = RunFolder.create(path)
    runner.run_one(WORKSHOP.federation(config.load(None, items)), folder, "x", None, Quiet())
    return folder


def scores_of(folder: RunFolder) -> dict:
    """All that was scored, flat, for comparison up to rounding: batches are others."""
    summary = folder.read_json("summary.json")
    parts = {"test": summary["test"], "clients": {str(c["id"]): c for c in summary["clients"]}}
    for row in folder.metrics():
        parts[f"round {row['round']}"] = {k: row.get(k) for k in ("validation", "client_validation")}
    return flat(parts)


def flat(value, at="") -> dict:
    if isinstance(value, dict):
        return {k: v for key, entry in value.items() for k, v in flat(entry, f"{at}/{key}").items()}
    return {} if value is None else {at: value}


@pytest.mark.parametrize("name", ["fslora", "flora", "local", "fedsa-lora"])
def test_scores_at_sites_are_those_of_a_simulation(tiny_settings, tmp_path, name):
    items = [*tiny_settings, *AT_CLIENTS, f"method.name={name}"]
    run = Run(items, tmp_path / "sites", arrival=lambda names: names[::-1])
    left, right = run.carry_out(), simulated(items, tmp_path / "simulated")
    assert run.notes == []
    assert scores_of(left) == pytest.approx(scores_of(right), rel=1e-5)
    held = run.federation.sites.partition.holdout.sizes
    last = left.metrics()[-1]
    assert len(last["client_validation"]) == 6
    shares = [entry["accuracy"] * held[int(client)] for client, entry in last["client_validation"].items()]
    assert last["validation"]["accuracy"] == pytest.approx(sum(shares) / held.sum())
    assert left.read_json("summary.json")["test"]["after"] == last["validation"]


@pytest.mark.parametrize("name", ["local", "fedsa-lora"])
def test_a_client_s_own_model_stays_at_its_site_as_a_peft_folder(tiny_settings, tmp_path, name):
    items = [*tiny_settings, *AT_CLIENTS, f"method.name={name}"]
    folder = Run(items, tmp_path / "sites").carry_out()
    other = simulated(items, tmp_path / "simulated")
    assert not (folder.path / "adapter").exists()
    for site, members in SITES.items():
        for client in members:
            own = folder.path / "sites" / site / "run-1" / "adapters" / f"client-{client:04d}"
            assert_same_adapter(import_peft(own), import_peft(other.path / "adapter" / f"client-{client:04d}"))


def test_scores_of_a_global_model_on_the_server_s_test_and_the_sites_own(tiny_settings, tmp_path):
    """The clients' part of the summary comes from the sites, whatever the rest is scored on."""
    items = [*tiny_settings, *AT_CLIENTS[1:], "run.rounds=1"]
    left = Run(items, tmp_path / "sites").carry_out()
    assert scores_of(left) == pytest.approx(scores_of(simulated(items, tmp_path / "simulated")), rel=1e-5)
    assert all(entry["after"] for entry in left.read_json("summary.json")["clients"])


@pytest.mark.parametrize("name", ["local", "fedsa-lora"])
def test_personal_models_survive_restarts_of_sites_and_server(tiny_settings, tmp_path, name):
    """Stopped in round 3 after checkpoint 2, when sites had trained for it; all is new but the folders."""
    items = [*tiny_settings, *AT_CLIENTS, f"method.name={name}", "run.rounds=4", "run.checkpoint_every=2"]

    def stop(site, round, reply):
        if round == 2 and b'"results"' in reply.header.encode():
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        Run(items, tmp_path / "sites", on_the_way=stop).carry_out()
    again = Run(items, tmp_path / "sites").carry_out()
    assert scores_of(again) == scores_of(Run(items, tmp_path / "whole").carry_out())


def first(reply, **changes):
    head = opened(Marks, reply)[0]
    marks = (head.marks[0].model_copy(update=changes), *head.marks[1:])
    return replace(reply, header=head.model_copy(update={"marks": marks}).model_dump_json())


def scoring(**changes):
    return lambda r: first(r, scores={**opened(Marks, r)[0].marks[0].scores, **changes})


FAULTS = {
    "count": (lambda r: first(r, examples=10**15), {"1"}, "it says that it scored 1000000000000000 examples; it has"),
    "range": (scoring(accuracy=1.5), {"1"}, "its accuracy is 1.5; it can be 0 to 1"),
    "loss": (scoring(loss=-1.0), {"1"}, "its loss is -1; it can be 0 to inf"),
    "names": (scoring(secret=0.5), {"1"}, "'secret'"),
    "none": (lambda r: first(r, scores={}), {"1"}, "it says no score"),
    "nan": (lambda r: replace(r, header=r.header.replace('"loss":', '"loss":NaN,"x":')), set("145"), "head is damaged"),
    "twice": (lambda r: first(r, client=4), set("145"), "in it twice"),
    "round": (lambda r: replace(r, header=r.header.replace('"round":', '"round":7')), set("145"), "it is about the st"),
    "error": (lambda r: "the process was killed", set("145"), "the process was killed"),
    "silence": (lambda r: None, set("145"), "no answer within 0 s"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_answer_is_noted_and_left_out_of_the_mean(tiny_settings, tmp_path, fault):
    change, missing, reason = FAULTS[fault]

    def on_the_way(site, round, reply):
        return change(reply) if site == "east" and "marks" in json.loads(reply.header) else reply

    run = Run([*tiny_settings, *AT_CLIENTS, "run.rounds=1"], tmp_path / "run", on_the_way=on_the_way)
    row = run.carry_out().metrics()[-1]
    assert set("012345") - row["client_validation"].keys() == missing
    assert 0 <= row["validation"]["accuracy"] <= 1
    assert any(reason in note for note in run.notes), run.notes


def test_without_any_answer_the_run_still_ends(tiny_settings, tmp_path):
    def on_the_way(site, round, reply):
        return None if "marks" in json.loads(reply.header) else reply

    folder = Run([*tiny_settings, *AT_CLIENTS], tmp_path / "run", on_the_way=on_the_way).carry_out()
    assert folder.finished
    assert folder.metrics()[-1]["validation"] == {}
    runner.write_report(folder)


@pytest.mark.parametrize(
    ("items", "reason"),
    [
        (["partition.holdout=0.0"], "partition.holdout is 0, so that no client has a held-out example"),
        (['compare.grid={"local.lr"=[0.1, 0.2]}'], "chosen by the examples that are reported"),
    ],
)
def test_what_cannot_be_scored_at_clients_is_refused(tiny_settings, items, reason):
    with pytest.raises(ConfigError, match=reason):
        config.load(None, [*tiny_settings, "run.eval_on=clients", *items])
