"""Data that only sites have, and ranks that they state: the bits of a simulation that knows all of it beforehand."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable

import pytest

import fslora
from fslora import config, runner
from fslora.deploy import desk, serve
from fslora.deploy.launch import local_sites, prepare, settings_of
from fslora.deploy.letters import Hello, Member, opened
from fslora.deploy.patience import Patience
from fslora.deploy.roster import Roster
from fslora.deploy.settings import RunSettings, SiteSettings, bytes_of
from fslora.errors import ConfigError, DataError, FsloraError
from fslora.footprint import resident
from fslora.planning import largest_rank
from fslora.prepare import SERVER, Workshop
from fslora.runfolder import RunFolder
from kit import World, assert_same_world
from test_run import Quiet

SITES = {"north": (0, 3), "east": (1, 4, 5), "south": (2,)}
TIMES = {"seconds", "server_seconds"}
WAITS = Patience(deadline=0.01, quorum=0.25, wait=0)
SIX = ["run.rounds=3", "engine.chunk=1", "variants={}", "partition.holdout=0.2", "partition.min_examples=4"]
LABELS = "data.labels=['bad', 'good']"


@pytest.fixture
def dealt(sentiment_file, tmp_path):
    """A folder of six files of unequal size, and two files for the server."""
    with sentiment_file.open(newline="") as file:
        rows = list(csv.reader(file))
    head, rows = rows[0], rows[1:]
    cuts = [0, 20, 50, 66, 100, 130, 160, 200, 240]
    (tmp_path / "all").mkdir()
    names = [*(tmp_path / "all" / f"hospital-{n}.csv" for n in range(6)), tmp_path / "val.csv", tmp_path / "test.csv"]
    for name, start, stop in zip(names, cuts, cuts[1:], strict=False):
        with name.open("w", newline="") as file:
            csv.writer(file).writerows([head, *rows[start:stop]])
    return tmp_path


@pytest.fixture
def settings(tiny_settings, dealt) -> list[str]:
    """What simulation and sites have in common."""
    server = [f"data.validation={dealt / 'val.csv'}", f"data.test={dealt / 'test.csv'}"]
    return [*(item for item in tiny_settings if not item.startswith(("data.source", "partition"))), *SIX, *server]


class Direct:
    """A transport that hands letters to the desks of sites in this process, by what their node configs say."""

    def __init__(self, settings, sites, check, note) -> None:
        self.settings, self.nodes, self.check, self.note = settings, sites, check, note
        self.hellos: dict[str, Hello | None] = {}
        self.absent: Callable[[], set] = set
        self.replies: list = []

    def sites(self):
        for site in self.nodes:
            if site.site not in self.hellos and site.site not in self.absent():
                try:
                    hello, _ = opened(Hello, desk.hello(self.settings.to_config(), site.model_dump()))
                    self.check(hello)
                except FsloraError as error:
                    self.note(str(error))
                    hello = None
                self.hellos[site.site] = hello
        return {name: hello for name, hello in self.hellos.items() if hello and name not in self.absent()}

    def wait(self, clients, seconds):
        return sum(len(hello.members) for hello in self.sites().values())

    def send(self, letters, round, kind="train"):
        answer = {"train": desk.train, "evaluate": desk.evaluate}[kind]
        nodes = {site.site: site.model_dump() for site in self.nodes}
        self.replies = [(name, answer(letters[name], self.settings.to_config(), nodes[name])) for name in letters]

    def poll(self):
        replies, self.replies = self.replies, []
        return replies


@pytest.fixture
def at_sites(dealt, monkeypatch, pageless):
    """(settings, client → file, changes by site) → the folder of a run whose sites have these files alone."""
    monkeypatch.setattr(serve, "Workshop", lambda: desk.WORKSHOP)  # one base for all: they are in one process

    def make(items, files=None, folder="sites", absent=None, **changes):
        path = dealt / folder
        run = RunFolder.open(path) if path.is_dir() else prepare(config.load(None, items), path)
        sites = []
        for name, members in SITES.items():
            data = "experiment"
            if files:
                here = dealt / f"{folder}-{name}"
                here.mkdir(exist_ok=True)
                for client in members:
                    shutil.copy(files[client], here / f"client-{client}.csv")
                data = str(here if len(members) > 1 else here / f"client-{members[0]}.csv")
            own = {"site": name, "clients": ",".join(map(str, members)), "data": data, "storage": str(path / name)}
            sites.append(SiteSettings(**{**own, **changes.get(name, {})}))
        told = RunSettings(**settings_of(run, WAITS).model_dump())

        def connect(check, note):
            transport = Direct(told, sites, check, note)
            transport.absent = absent(run) if absent else transport.absent
            return transport

        serve.serve(told, connect)
        return run

    return make


def simulated(items, path) -> RunFolder:
    runner.start(config.load(None, items), path, Quiet())
    return RunFolder.open(path)


def files_of(folder, items, dealt) -> dict:
    """Client → the file that it has in a simulation."""
    sites = desk.WORKSHOP.sites(config.load(None, items))
    groups = sites.dataset.train.groups
    return {c: dealt / "all" / f"{groups[sites.partition.train[c][0]]}.csv" for c in range(6)}


def assert_same_run(left: RunFolder, right: RunFolder) -> None:
    assert_same_world(World(left.load_checkpoint()[1]), World(right.load_checkpoint()[1]))
    for one, other in zip(left.metrics(), right.metrics(), strict=True):
        drop = TIMES | {"validation", "client_validation"}
        assert {k: v for k, v in one.items() if k not in drop} == {k: v for k, v in other.items() if k not in drop}
        if other["validation"]:
            assert one["validation"] == pytest.approx(other["validation"], rel=1e-5)
    one, other = left.read_json("summary.json"), right.read_json("summary.json")
    assert one["test"]["after"] == pytest.approx(other["test"]["after"], rel=1e-5)
    for mine, theirs in zip(one["clients"], other["clients"], strict=True):
        assert (mine["id"], mine["rank"], mine["examples"]) == (theirs["id"], theirs["rank"], theirs["examples"])
        assert mine["after"] == pytest.approx(theirs["after"], rel=1e-5)


@pytest.mark.parametrize("method", ["fslora", "flora"])
def test_sites_with_files_of_their_own_end_with_the_bits_of_a_simulation_over_all(settings, dealt, at_sites, method):
    items = [*settings, f"method.name={method}"]
    known = [*items, "partition.kind=natural", f"data.source={dealt / 'all'}"]
    other = simulated(known, dealt / "simulated")
    files = files_of(other, known, dealt)
    run = at_sites([*items, "partition.kind=sites", LABELS], files)
    assert_same_run(run, other)
    assert run.read_json("deployment.json")["notes"] == []
    data, all_data = run.read_json("data.json"), other.read_json("data.json")
    assert data["fleet"] == all_data["fleet"]
    assert data["partition"]["holdout"] == all_data["partition"]["holdout"]
    from fslora.report import write_page

    assert write_page(run.path).is_file()


def test_a_server_without_any_example_judges_by_what_clients_hold_out(settings, dealt, at_sites):
    known = [*settings, "run.eval_on=clients", "partition.kind=natural", f"data.source={dealt / 'all'}"]
    other = simulated(known, dealt / "simulated")
    bare = [item for item in settings if not item.startswith(("data.validation", "data.test"))]
    run = at_sites(
        [*bare, "run.eval_on=clients", "partition.kind=sites", LABELS], files_of(other, known, dealt), "bare"
    )
    assert_same_run(run, other)


def private(settings, dealt):
    files = {c: dealt / "all" / f"hospital-{c}.csv" for c in range(6)}
    return [*settings, "partition.kind=sites", LABELS, "fleet.cohort=4", "run.rounds=6"], files


def test_clients_that_never_came_cannot_be_sampled_until_they_do(settings, dealt, at_sites):
    def absent(run):
        return lambda: {"east"} if run.rounds_done < 3 else set()

    items, files = private(settings, dealt)
    run = at_sites(items, files, absent=absent)
    asked = [set(row["clients"]) for row in run.metrics()[1:]]
    assert all(clients == {0, 2, 3} for clients in asked[:3])
    assert set().union(*asked[3:]) & {1, 4, 5}
    fleet = run.read_json("data.json")["fleet"]
    assert [client["examples"] > 0 for client in fleet] == [True] * 6


def test_a_site_that_comes_back_with_other_data_or_rank_is_refused(settings, dealt, at_sites, monkeypatch):
    """Stopped after three rounds; north has one row less, and east another rank; south goes on alone."""

    def stop(run):
        def absent():
            if run.rounds_done == 3:
                raise KeyboardInterrupt
            return set()

        return absent

    items, files = private(settings, dealt)
    with pytest.raises(KeyboardInterrupt):
        at_sites([*items, "fleet.cohort=all"], files, absent=stop)
    lines = files[0].read_text().splitlines(keepends=True)
    files[0].write_text("".join(lines[:-1]))
    run = RunFolder.open(dealt / "sites")
    monkeypatch.setattr(desk, "WORKSHOP", Workshop())  # sites that have restarted
    with pytest.raises(FsloraError, match="1 of 6 clients were there"):
        at_sites(items, files, east={"rank": 1})
    notes = run.read_json("deployment.json")["notes"]
    assert any(
        "client 0 has 16 examples to train on and 3 held out, and the run knows 16 and 4" in note for note in notes
    )
    assert any("'east' says that client" in note and "settled before the first round" in note for note in notes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda files: files[0].write_text("text,label,site\n" + "a dog,awful,x\n" * 20),
            "the class 'awful', which is",
        ),
        (lambda files: files[0].write_text("text,label,site\n" + "a dog,good,x\n" * 3), "client 0 has 3 usable"),
        (lambda files: files[0].write_text("words,label,site\n" + "a dog,good,x\n" * 9), "no column 'text'"),
    ],
)
def test_a_site_whose_data_do_not_fit_says_so_at_hello(settings, dealt, at_sites, change, reason):
    items, files = private(settings, dealt)
    change(files)
    run = at_sites([*items, "run.rounds=1"], files)
    assert any(reason in note for note in run.read_json("deployment.json")["notes"])
    assert not {0, 3} & set(run.metrics()[1]["clients"])


def test_a_client_counts_for_no_more_examples_than_were_agreed_on(settings, dealt, at_sites):
    items, files = private(settings, dealt)
    items += ["run.rounds=1", "partition.max_examples=34"]
    files[5].write_text(files[5].read_text() + "a dog,good,x\n" * 5)
    run = at_sites(items, files)
    assert any("client 5 has 35 usable" in note for note in run.read_json("deployment.json")["notes"])
    assert set(run.metrics()[1]["clients"]) == {0, 2, 3}


def test_a_site_that_states_more_examples_than_were_agreed_on_is_refused_by_the_server(settings, dealt):
    items, _ = private(settings, dealt)
    experiment = config.load(None, [*items, "partition.max_examples=34"])
    roster = Roster(desk.WORKSHOP.federation(experiment, SERVER), "digest")
    data = roster.federation.sites.partition.digest

    def hello(examples):
        member = Member(id=5, rank=1, examples=examples, held_out=6)
        return Hello(site="east", version=fslora.__version__, experiment="digest", data=data, members=(member,))

    roster.check(hello(28))
    with pytest.raises(ConfigError, match=r"client 5 has 35 examples, and partition\.max_examples is 34"):
        roster.check(hello(29))


def test_files_and_clients_must_be_as_many(settings, dealt):
    items, _ = private(settings, dealt)
    experiment = config.load(None, [*items, f"data.source={dealt / 'all'}"])
    with pytest.raises(DataError, match=r"with 6 files to tell clients apart, and it has 2 clients \(0, 3\)"):
        desk.WORKSHOP.sites(experiment, frozenset({0, 3}))


def test_data_at_sites_cannot_be_simulated_and_need_what_all_agree_on(settings, dealt):
    items, _ = private(settings, dealt)
    with pytest.raises(ConfigError, match="Carry it out with `fslora deploy run`"):
        runner.start(config.load(None, items), dealt / "run", Quiet())
    assert not (dealt / "run").exists()
    folder = prepare(config.load(None, items), dealt / "deployed")
    with pytest.raises(ConfigError, match="`fslora deploy local` cannot say which"):
        local_sites(config.load(None, items), folder, 3)
    for lacking, reason in (
        ("data.labels", "list them, so that all"),
        ("data.test", "data.test names no file of the server's"),
    ):
        with pytest.raises(ConfigError, match=reason):
            config.load(None, [item for item in items if not item.startswith(lacking)])


def test_ranks_that_sites_state_give_the_bits_of_a_simulation_with_those_ranks(tiny_settings, dealt, at_sites):
    items = [*tiny_settings, *SIX]
    ranks = [8, 3, 1, 8, 3, 3]
    run = at_sites(items, north={"rank": 8}, east={"rank": 3}, south={"rank": 1})
    assert_same_run(run, simulated([*items, f"fleet.ranks={ranks}"], dealt / "simulated"))
    assert [client["rank"] for client in run.read_json("data.json")["fleet"]] == ranks


def test_a_rank_beyond_the_server_s_is_refused(tiny_settings, at_sites):
    run = at_sites([*tiny_settings, *SIX, "run.rounds=1"], south={"rank": 9})
    assert any("states rank 9, and adapter.rank is 8" in note for note in run.read_json("deployment.json")["notes"])


def test_a_memory_budget_gives_the_largest_rank_that_fits_once_for_a_run(tiny_settings, dealt, at_sites):
    items = [*tiny_settings, *SIX, "run.rounds=1", "adapter.rank=4096", "fleet.cohort=all", "fleet.ranks=[1,1,1,1,1,1]"]
    experiment = config.load(None, items)
    members = frozenset({2})
    assert largest_rank(experiment, members, 2**40) == 4096
    with pytest.raises(ConfigError, match="memory is 10"):
        largest_rank(experiment, members, 10_000_000)
    chosen = [largest_rank(experiment, members, resident() + extra * 2**20) for extra in (80, 120)]
    assert 1 < chosen[0] < chosen[1] < 4096
    assert bytes_of("1.5 GiB") == 3 * 2**29
    assert bytes_of("800MB") == 800_000_000
    run = at_sites([*items, "adapter.rank=8"], south={"memory": "100GB"})
    assert run.read_json("data.json")["fleet"][2]["rank"] == 8
    assert (run.path / "south" / settings_of(run, WAITS).run / "rank.json").is_file()


@pytest.mark.parametrize(("memory", "rank"), [("2", 0), ("0GB", 0), ("much", 0), ("2GB", 4)])
def test_a_budget_that_is_none_is_refused(memory, rank):
    with pytest.raises(ConfigError, match="memory"):
        SiteSettings.of({"site": "a", "clients": "0", "storage": "x", "data": "y", "memory": memory, "rank": rank})
