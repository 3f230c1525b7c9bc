"""Comparisons: who takes part, what is held fixed, what is chosen how, and what survives a stop or a failure."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import FSLORA
from fslora import cli, compare, config
from fslora.compare import crew, execute, worker
from fslora.compare.ledger import Ledger, Outcome
from fslora.compare.plan import BASELINES, ROUNDS_CEILING, make_plan
from fslora.console import Silent
from fslora.errors import ConfigError
from fslora.methods import METHODS
from fslora.metrics import METRICS
from fslora.processes import threads_each
from fslora.runfolder import RunFolder

SMALL = {"methods": ["fedit", "fslora"], "seeds": 2}


class Stage:
    """Keeps what it is told, and can stop a comparison after so many cells."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.ended_cells: list[str] = []
        self.stop_after = stop_after

    def note(self, text):
        pass

    @contextmanager
    def cells(self, done, total):
        self.total = total
        yield self

    def started(self, name, done, rounds, metric):
        stage = self

        class Stopping(Silent):
            def round_started(self, number, clients):
                if len(stage.ended_cells) == stage.stop_after and number == 2:
                    raise KeyboardInterrupt

        return Stopping()

    def ended(self, name, text, total):
        self.ended_cells.append(name)
        self.total = total


def experiment_of(settings: list[str], **section) -> config.Experiment:
    return compare.with_options(config.load(None, [*settings, "run.rounds=2"]), {"compare": {**SMALL, **section}})


def contents(path: Path) -> dict[str, object]:
    return json.loads((path / "comparison.json").read_text())


def rows_of(folder: Path) -> list[dict]:
    """The rows of a run, without what a clock measured."""
    return [
        {key: value for key, value in row.items() if key not in ("seconds", "server_seconds")}
        for row in RunFolder.open(folder).metrics()
    ]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


GRIDS = {"fslora": {"local.lr": [1e-6, 0.005]}}


@pytest.fixture
def small(tiny_settings) -> config.Experiment:
    return experiment_of(tiny_settings, grids=GRIDS)


@pytest.fixture(scope="session")
def kept() -> dict[str, Path]:
    return {}


@pytest.fixture
def finished(small, kept, tmp_path_factory) -> Path:
    """A finished comparison of two methods and the baselines over two seeds; not to be changed."""
    if not kept:
        path = tmp_path_factory.mktemp("compare") / "finished"
        assert compare.start(small, path, 1, Stage()).failures() == []
        kept["path"] = path
    return kept["path"]


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture
def pages(monkeypatch) -> list[Path]:
    """The comparisons whose pages were asked for; drawing them is tested elsewhere and takes seconds."""
    asked: list[Path] = []
    monkeypatch.setattr(execute, "write_report", asked.append)
    return asked


# Who takes part.


def labels(**section) -> list[str]:
    experiment = config.build({"compare": section}, "")
    return [contestant.label for contestant in make_plan(experiment).contestants]


def test_everything_registered_and_every_entry_takes_part_by_default():
    entry = {"fedit-low": {"method": {"name": "fedit", "rank": "smallest"}}}
    everything = [*(name for name in METHODS if name not in BASELINES), "fedit-low", *BASELINES]
    assert labels(entries=entry) == everything
    assert labels(methods=["all"], entries=entry) == everything


def test_baselines_are_part_of_every_comparison_and_come_last():
    assert labels(methods=["local", "fslora", "fedit", "fslora"]) == ["fslora", "fedit", "local", "centralized"]


def test_a_contestant_is_a_method_an_entry_or_a_baseline():
    experiment = config.build(
        {
            "method": {"name": "fedit", "rank": "server"},
            "compare": {
                "methods": ["fslora", "fedit", "quick", "plain"],
                "entries": {"quick": {"local": {"lr": 0.1}, "method": {"name": "fslora"}}, "plain": {}},
            },
        },
        "",
    )
    cells = {cell.label: cell.experiment for cell in make_plan(experiment).cells if cell.seed == 0}
    assert cells["fslora"].method.name == "fslora"
    assert cells["fedit"].method.rank == "server"  # the experiment's own method keeps its fields
    assert (cells["quick"].method.name, cells["quick"].local.lr) == ("fslora", 0.1)
    assert cells["plain"].method == experiment.method
    assert cells["local"].method.name == "local"
    assert cells["centralized"].fleet.pooled
    assert not any(cells[label].fleet.pooled for label in cells if label != "centralized")


def test_an_entry_may_configure_a_registered_method_under_its_name():
    experiment = config.build(
        {"compare": {"methods": ["fedit"], "entries": {"fedit": {"method": {"name": "fedit", "rank": "server"}}}}}, ""
    )
    assert make_plan(experiment).cells[0].experiment.method.rank == "server"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"methods": ["fslroa"]}, r"compare.methods names 'fslroa'; did you mean 'fslora'\? Known are .*centralized"),
        ({"grids": {"fedti": {"local.lr": [1]}}}, r"compare.grids names 'fedti'; did you mean 'fedit'"),
        ({"methods": ["fslora"], "reference": "fedit"}, r"compare.reference is 'fedit', which is not compared"),
        ({"entries": {"a/b": {}}}, r"compare.entries has 'a/b', which is no name for an entry"),
        ({"entries": {"local": {}}}, r"compare.entries has 'local', which is no name"),
        ({"entries": {"all": {}}}, r"compare.entries has 'all', which is no name"),
        (
            {"methods": ["x"], "entries": {"x": {"data": {"max_train": 9}}}},
            r"compare.entries.x changes \[data\], which is the same",
        ),
        (
            {"methods": ["x"], "entries": {"x": {"local": {"lrr": 1}}}},
            r"contestant 'x': local.lrr: unknown key .*did you mean 'lr'",
        ),
        ({"grid": {"run.seed": [1, 2]}}, r"compare.grid: run.seed changes \[run\], which is the same"),
        ({"grid": {"local.lr": []}}, r"compare.grid: local.lr has no values"),
        ({"grid": {"local.lrr": [1.0]}}, r"contestant 'fedit' with local.lrr=1.0: local.lrr: unknown key"),
        ({"grid": {"local.lr": [0.1, -1.0]}}, r"contestant 'fedit' with local.lr=-1.0: local.lr is -1.0"),
        ({"grid": {"method.rank": ["server"]}}, r"contestant 'fslora' with method.rank.*\[compare.grids.fslora\]"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(section, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        make_plan(config.build({"compare": {"methods": ["fedit", "fslora"], **section}}, ""))


def test_a_reference_that_nobody_named_gives_way():
    experiment = config.build({"compare": {"methods": ["fslora"]}}, "")
    assert make_plan(experiment).experiment.compare.reference == "fslora"
    written = config.build({"compare": {"reference": "fedit"}}, "")
    options = {"methods": ["fslora"]}
    assert make_plan(compare.with_options(written, {"compare": options})).experiment.compare.reference == "fslora"
    with pytest.raises(ConfigError, match=r"compare.reference is 'fedit'"):
        make_plan(compare.with_options(written, {"compare": {**options, "reference": "fedit"}}))


def test_every_cell_is_built_up_front_and_ordered_by_seed():
    experiment = config.build(
        {"run": {"seed": 5}, "compare": {**SMALL, "grid": {"local.lr": [0.1, 0.2], "local.steps": [1, 2]}}}, ""
    )
    plan = make_plan(experiment)
    assert plan.seeds == (5, 6)
    assert [cell.seed for cell in plan.cells] == [5] * 16 + [6] * 16
    assert [cell.label for cell in plan.cells[:8]] == ["fedit"] * 4 + ["fslora"] * 4
    assert [(c.experiment.local.lr, c.experiment.local.steps) for c in plan.cells[:4]] == [
        (0.1, 1),
        (0.1, 2),
        (0.2, 1),
        (0.2, 2),
    ]
    assert all(cell.experiment.run.seed == cell.seed for cell in plan.cells)
    assert plan.cells[5].folder == "cells/fslora/point-1/seed-5"


def test_a_plan_is_the_same_when_it_is_read_back(small, tmp_path):
    plan = make_plan(small)
    (tmp_path / "experiment.toml").write_text(config.to_toml(plan.experiment))
    assert make_plan(config.load(tmp_path / "experiment.toml")) == plan


# What the command line adds.


def test_a_budget_replaces_any_other():
    keys = {"max_bytes": None, "max_flops": None, "max_seconds": None}
    assert compare.parse_budget("rounds=40") == {**keys, "rounds": 40}
    assert compare.parse_budget("bytes=50e6") == {**keys, "max_bytes": 50e6}
    assert compare.parse_budget(" flops = 1e13 ") == {**keys, "max_flops": 1e13}
    assert compare.parse_budget("seconds=600") == {**keys, "max_seconds": 600.0}


@pytest.mark.parametrize("text", ["40", "hours=3", "rounds=2.5", "rounds=inf", "bytes=much", "bytes="])
def test_a_budget_that_says_nothing_is_refused(text):
    with pytest.raises(ConfigError, match="--budget"):
        compare.parse_budget(text)


@pytest.mark.parametrize(("budget", "ends"), [("flops=1e9", ("max_flops", 1e9)), ("bytes=1e6", None)])
def test_another_budget_ends_before_the_rounds_do(budget, ends):
    options = {"run": compare.parse_budget(budget), "compare": SMALL}
    plan = make_plan(compare.with_options(config.build({"run": {"rounds": 7}}, ""), options))
    runs = {cell.label: cell.experiment.run for cell in plan.cells}
    assert plan.budget == (budget.partition("=")[0], float(budget.partition("=")[2]))
    assert runs["fslora"].rounds == ROUNDS_CEILING
    assert runs["local"].budget == ends  # what a baseline sends counts for nothing
    assert runs["local"].rounds == (ROUNDS_CEILING if ends else 7)


def test_grid_values_are_read_as_toml_or_as_text():
    assert compare.parse_grid(
        ["local.lr=5e-4,0.1", "local.optimizer=adamw,sgd", "adapter.targets=['a'],['b', 'c']"]
    ) == {
        "local.lr": (5e-4, 0.1),
        "local.optimizer": ("adamw", "sgd"),
        "adapter.targets": (["a"], ["b", "c"]),
    }
    for item in ("local.lr", "=1", "local.=1"):
        with pytest.raises(ConfigError, match="KEY=V1,V2"):
            compare.parse_grid([item])


def test_options_lie_over_the_section_and_wrong_ones_are_named():
    base = config.build({"compare": {"seeds": 5, "methods": ["fslora"]}}, "")
    assert compare.with_options(base, {"compare": {"seeds": 2}}).compare == config.CompareConfig(
        seeds=2, methods=("fslora",)
    )
    assert "reference" not in compare.with_options(base, {"compare": {}}).compare.model_fields_set
    with pytest.raises(ConfigError, match=r"the command line: compare.seeds is 0"):
        compare.with_options(base, {"compare": {"seeds": 0}})


# What a comparison leaves behind.


def test_a_comparison_leaves_everything(finished):
    told = contents(finished)
    assert told["format"] == 1
    assert told["labels"] == ["fedit", "fslora", "local", "centralized"]
    assert (told["reference"], told["seeds"], told["budget"]) == ("fedit", [0, 1], {"kind": "rounds", "amount": 2})
    assert [(cell["label"], cell["point"], cell["seed"], cell["chosen"]) for cell in told["cells"]] == [
        ("fedit", 0, 0, True),
        ("fslora", 0, 0, False),
        ("fslora", 1, 0, True),
        ("local", 0, 0, True),
        ("centralized", 0, 0, True),
        ("fedit", 0, 1, True),
        ("fslora", 1, 1, True),
        ("local", 0, 1, True),
        ("centralized", 0, 1, True),
    ]
    for cell in told["cells"]:
        assert (cell["status"], cell["error"]) == ("finished", None)
        folder = RunFolder.open(finished / cell["folder"])
        assert folder.finished
        assert len(folder.metrics()) == 3
        assert config.load(folder.path / "experiment.toml").run.seed == cell["seed"]
    assert told["methods"]["fslora"]["chosen"] == {"local.lr": 0.005}
    assert [point["point"] for point in told["methods"]["fslora"]["points"]] == [
        {"local.lr": 1e-6},
        {"local.lr": 0.005},
    ]
    assert told["methods"]["centralized"]["changes"] == {
        "fleet.pooled": True,
        "method.name": "fedit",
        "method.rank": "server",
    }
    assert [label for label, method in told["methods"].items() if method["baseline"]] == list(BASELINES)
    for name in ("report.html", "environment.json", "experiment.toml", "results.csv", "results.json"):
        assert (finished / name).is_file(), name


def test_cells_of_one_seed_differ_by_the_method_alone(finished):
    """Same examples at the same clients of the same ranks, same cohorts, same start; another seed has others."""
    chosen = [cell for cell in contents(finished)["cells"] if cell["chosen"]]
    digests, fleets, cohorts, starts = {}, {}, {}, {}
    for cell in chosen:
        data = json.loads((finished / cell["folder"] / "data.json").read_text())
        rows = rows_of(finished / cell["folder"])
        digests.setdefault(cell["seed"], set()).add(data["partition"]["digest"])
        fleets.setdefault(cell["seed"], set()).add(json.dumps(data["fleet"]))
        if cell["label"] != "centralized":
            cohorts.setdefault(cell["seed"], set()).add(json.dumps([row.get("clients") for row in rows]))
        start = rows[0]["validation"]  # one model per client is scored in other batches: equal to rounding
        starts.setdefault(cell["seed"], set()).add((start["accuracy"], round(start["loss"], 4)))
    for drawn in (digests, fleets, cohorts, starts):
        assert [len(values) for values in drawn.values()] == [1, 1]
    assert digests[0] != digests[1]
    assert cohorts[0] != cohorts[1]


# Which point is chosen.


def outcomes_of(small, tmp_path, *ends: Outcome) -> tuple[Ledger, object]:
    plan = make_plan(small)
    entry = next(contestant for contestant in plan.contestants if contestant.label == "fslora")
    book = Ledger(plan, tmp_path, {("fslora", point, 0): end for point, end in enumerate(ends)})
    return book, entry


def scores(accuracy: float, loss: float) -> Outcome:
    return Outcome(validation={"accuracy": accuracy, "loss": loss})


@pytest.mark.parametrize(
    ("first", "second", "chosen"),
    [
        (scores(0.5, 1.0), scores(0.6, 2.0), 1),
        (scores(0.5, 1.0), scores(0.5, 0.9), 1),
        (scores(0.5, 1.0), scores(0.5, 1.0), 0),
        (scores(0.5, float("nan")), scores(0.5, 3.0), 1),
        (Outcome("it diverged"), scores(0.1, 9.0), 1),
        (scores(0.1, 9.0), Outcome("it diverged"), 0),
        (Outcome("it diverged"), Outcome("it diverged"), None),
    ],
)
def test_the_choice_is_accuracy_then_loss_then_order_and_a_failure_is_worst(small, tmp_path, first, second, chosen):
    book, entry = outcomes_of(small, tmp_path, first, second)
    assert book.choice(entry) == chosen


@pytest.mark.parametrize(
    ("name", "first", "second", "chosen"),
    [
        ("perplexity", 24.0, 23.0, 1),
        ("perplexity", 23.0, 24.0, 0),
        ("perplexity", float("inf"), 1e9, 1),
        ("perplexity", None, 1e9, 1),
        ("matthews", 0.3, 0.2, 0),
        ("matthews", -0.3, 0.2, 1),
    ],
)
def test_the_choice_is_by_the_metric_in_its_direction(small, tmp_path, name, first, second, chosen):
    """Whatever else the scores hold (accuracy says the opposite here); where the metric is equal, the loss decides."""
    points = []
    for value, accuracy in ((first, 0.1 + chosen), (second, 1.1 - chosen)):
        folder = RunFolder(tmp_path / f"point-{len(points)}")
        folder.path.mkdir()
        folder.write_json("data.json", {"metric": METRICS[name].as_dict()})
        folder.append_metrics({"round": 1, "validation": {"loss": 1.0, "accuracy": accuracy, name: value}})
        points.append(Outcome.of(folder))
    book, entry = outcomes_of(small, tmp_path, *points)
    assert book.choice(entry) == chosen
    equal = [Outcome(validation={name: 0.5, "loss": loss}, metric=METRICS[name]) for loss in (2.0, 1.0)]
    book, entry = outcomes_of(small, tmp_path, *equal)
    assert book.choice(entry) == 1


def test_the_choice_waits_for_every_point(small, tmp_path):
    book, entry = outcomes_of(small, tmp_path, scores(0.9, 0.1))
    assert book.choice(entry) is None
    assert all(cell.seed == 0 for cell in book.needed() if cell.label == "fslora")
    assert book.total == len(book.needed()) + 1


def test_a_contestant_fails_when_all_its_points_do_and_not_before(small, tmp_path):
    book, _ = outcomes_of(small, tmp_path, Outcome("it diverged"), scores(0.1, 9.0))
    assert book.failures() == []
    book, _ = outcomes_of(small, tmp_path, Outcome("it diverged"), Outcome("it diverged too"))
    assert [error for _, error in book.failures()] == ["it diverged", "it diverged too"]
    assert {cell.seed for cell in book.needed() if cell.label == "fslora"} == {0}


def test_the_test_split_has_no_say_in_the_choice(copy, small):
    def choice() -> int | None:
        book = Ledger.of(make_plan(small), copy)
        return book.choice(next(c for c in book.plan.contestants if c.label == "fslora"))

    loser = copy / "cells/fslora/point-0/seed-0"
    summary = json.loads((loser / "summary.json").read_text())
    summary["test"]["after"] = {"accuracy": 1.0, "loss": 0.0}
    (loser / "summary.json").write_text(json.dumps(summary))
    assert choice() == 1
    rows = RunFolder.open(loser).metrics()
    rows[-1]["validation"] = {"accuracy": 1.0, "loss": 0.0}
    (loser / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert choice() == 0


# Stopping and going on.


@pytest.mark.parametrize("stop_after", [0, 3])
def test_a_stopped_comparison_goes_on_and_repeats_nothing(small, finished, tmp_path, pages, stop_after):
    path = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        compare.start(small, path, 1, Stage(stop_after))
    told = contents(path)
    done = [cell["folder"] for cell in told["cells"] if cell["status"] == "finished"]
    assert len(done) == stop_after
    assert pages == [path]
    before = {folder: snapshot(path / folder) for folder in done}
    stage = Stage()
    assert compare.resume(path, 1, stage).failures() == []
    assert len(stage.ended_cells) == 9 - stop_after == stage.total - stop_after
    assert {folder: snapshot(path / folder) for folder in done} == before
    assert contents(path) == {**contents(finished), "name": "stopped"}
    for cell in contents(path)["cells"]:
        assert rows_of(path / cell["folder"]) == rows_of(finished / cell["folder"])


def test_a_finished_comparison_runs_nothing_again(copy, pages):
    before = snapshot(copy / "cells")
    stage = Stage()
    compare.resume(copy, 1, stage)
    assert stage.ended_cells == []
    assert snapshot(copy / "cells") == before


# What goes wrong in a cell is the cell's.


def test_a_cell_that_fails_costs_no_other_and_is_tried_again(tiny_settings, tmp_path, pages):
    absurd = {"method": {"name": "fedit"}, "local": {"lr": 1e30, "optimizer": "sgd", "clip_norm": 0.0}}
    experiment = experiment_of(tiny_settings, methods=["fedit", "absurd"], seeds=1, entries={"absurd": absurd})
    path = tmp_path / "run"
    book = compare.start(experiment, path, 1, Stage())
    (cell, error) = book.failures()[0]
    assert cell.label == "absurd"
    assert "no client sent a usable update" in error
    assert json.loads((path / cell.folder / "failed.json").read_text()) == {"error": error}
    assert [(entry["label"], entry["status"]) for entry in contents(path)["cells"]] == [
        ("fedit", "finished"),
        ("absurd", "failed"),
        ("local", "finished"),
        ("centralized", "finished"),
    ]
    assert pages == [path]
    stage = Stage()
    assert len(compare.resume(path, 1, stage).failures()) == 1
    assert stage.ended_cells == ["absurd seed 0"]


def test_a_folder_that_cannot_be_written_fails_its_cell(tiny_settings, tmp_path, monkeypatch, pages):
    path = tmp_path / "run"
    real = execute.carry_out

    def obstructed(*arguments):
        (path / "cells").mkdir()
        (path / "cells/fslora").touch()
        monkeypatch.setattr(execute, "carry_out", real)
        real(*arguments)

    monkeypatch.setattr(execute, "carry_out", obstructed)
    failures = compare.start(experiment_of(tiny_settings, seeds=1), path, 1, Stage()).failures()
    assert [(cell.label, "cannot be written" in error) for cell, error in failures] == [("fslora", True)]
    (path / "cells/fslora").unlink()
    stage = Stage()
    assert compare.resume(path, 1, stage).failures() == []
    assert stage.ended_cells == ["fslora seed 0"]


def test_a_fault_in_one_method_fails_its_cell_and_leaves_its_trace(tiny_settings, tmp_path, monkeypatch, pages):
    real = worker.run_cell

    def faulty(experiment, *arguments):
        if experiment.method.name == "fslora":
            raise RuntimeError("a fault")
        return real(experiment, *arguments)

    monkeypatch.setattr(worker, "run_cell", faulty)
    book = compare.start(experiment_of(tiny_settings, seeds=1), tmp_path / "run", 1, Stage())
    ((cell, error),) = book.failures()
    assert error == f"RuntimeError: a fault; see {tmp_path}/run/{cell.folder}/traceback.txt"
    assert "in faulty" in (tmp_path / "run" / cell.folder / "traceback.txt").read_text()


# Side by side.


def test_workers_leave_the_same_numbers(small, finished, tmp_path, capfd, pages):
    path = tmp_path / "two"
    stage = Stage()
    assert compare.start(small, path, 2, stage).failures() == []
    assert len(stage.ended_cells) == 9
    assert contents(path) == {**contents(finished), "name": "two"}
    for cell in contents(path)["cells"]:
        assert rows_of(path / cell["folder"]) == rows_of(finished / cell["folder"])
        summaries = [json.loads((root / cell["folder"] / "summary.json").read_text()) for root in (path, finished)]
        assert summaries[0]["test"] == summaries[1]["test"]
    assert json.loads((path / "environment.json").read_text())["jobs"] == 2
    assert capfd.readouterr() == ("", "")


def test_a_worker_that_is_killed_costs_its_cell_and_no_other(tiny_settings, tmp_path, monkeypatch, pages):
    real = crew.Worker.ask

    def doomed(self, cell, folder):
        real(self, cell, folder)
        if cell.label == "local":
            self.process.kill()

    monkeypatch.setattr(crew.Worker, "ask", doomed)
    path = tmp_path / "run"
    book = compare.start(experiment_of(tiny_settings, methods=["fedit"], seeds=1), path, 2, Stage())
    ((cell, error),) = book.failures()
    assert cell.label == "local"
    assert error.startswith("its worker process died (SIGKILL, which is how a system out of memory ends a process")
    monkeypatch.setattr(crew.Worker, "ask", real)
    assert compare.resume(path, 1, Stage()).failures() == []


def test_threads_are_shared_out(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert [threads_each(jobs) for jobs in (1, 2, 4, 9)] == [6, 3, 1, 1]
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads_each(10_000) == 1


def test_a_follower_tells_of_whole_new_rows_only(tmp_path):
    rows: list[int] = []

    class Told(Silent):
        def round_done(self, row):
            rows.append(row["round"])

    follower = execute.Follower(tmp_path / "metrics.jsonl", Told())
    follower.look()
    for text in ('{"round": 0}\n{"round": 1}\n{"rou', 'nd": 2}', "", "\n", '{"round": 3}\n'):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(text)
        follower.look()
    assert rows == [1, 2, 3]


# The commands, as a user runs them.


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs a command in this process: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fslora", *arguments])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


def test_compare_resume_and_report(command, tiny_settings, tmp_path, monkeypatch):
    (tmp_path / "tiny.toml").write_text(config.to_toml(config.load(None, [*tiny_settings, "variants={}"])))
    asked = ["--methods", "fslora", "--seeds", "1", "--budget", "rounds=1", "--grid", "local.lr=0.001,0.005"]
    code, out, err = command("compare", "tiny.toml", *asked, "--out", "c", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result.keys() == {"comparison", "page", "rows"}
    assert len(result["rows"]) == 3
    assert "fslora local.lr=0.005 seed 0: " in err
    monkeypatch.setattr(execute, "write_report", lambda path: path)  # seconds; `report` below draws it again
    code, out, err = command("resume", "c", "--jobs", "2", "--quiet")
    assert (code, err) == (0, "")
    assert out.endswith("c\n")
    (tmp_path / "c/report.html").unlink()
    code, out, _ = command("report", "c")
    assert code == 0
    assert "results  c/results.csv" in out
    assert (tmp_path / "c/report.html").is_file()
    shown = contents(tmp_path / "c")
    assert (shown["name"], shown["reference"]) == ("c", "fslora")
    assert len(shown["methods"]["local"]["points"]) == 2


def test_a_file_without_options_is_compared_as_it_stands(command, tiny_settings, tmp_path, monkeypatch):
    """No option of [compare] on the command line leaves the file's methods, seeds and grid alone."""
    section = "compare={methods=['slow'],seeds=2,grid={'local.lr'=[0.001]},entries={slow={local={steps=1}}}}"
    chosen = config.load(None, [*tiny_settings, "variants={}", "run.rounds=1", section])
    (tmp_path / "tiny.toml").write_text(config.to_toml(chosen))
    monkeypatch.setattr(execute, "carry_out", lambda ledger, *rest: ledger.write())
    monkeypatch.setattr(cli, "_print_comparison", lambda *rest: None)
    assert command("compare", "tiny.toml", "--out", "c", "--quiet")[0] == 0
    shown = contents(tmp_path / "c")
    assert shown["labels"] == ["slow", "local", "centralized"]
    assert shown["seeds"] == [0, 1]
    assert shown["methods"]["slow"]["points"][0]["point"] == {"local.lr": 0.001}


def test_a_failed_cell_is_named_and_the_table_is_there_all_the_same(command, tiny_settings, tmp_path):
    absurd = "compare.entries.absurd={local={lr=1e30,optimizer='sgd',clip_norm=0.0,warmup_rounds=0}}"
    settings = [part for item in [*tiny_settings, "run.rounds=1", absurd] for part in ("--set", item)]
    code, out, err = command("compare", *settings, "--methods", "absurd", "--seeds", "1", "--out", "c", "--quiet")
    assert code == 1
    assert err.startswith("fslora: cells/absurd/point-0/seed-0 failed: round 1: no client sent a usable update")
    assert "centralized" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--methods", "fslroa"], "did you mean 'fslora'"),
        (["compare", "--budget", "hours=3"], "--budget 'hours=3'"),
        (["compare", "--grid", "local.lr"], "KEY=V1,V2"),
        (["compare", "--seeds", "0"], "compare.seeds is 0"),
        (["resume", "nowhere", "--jobs", "2"], "nowhere is no comparison"),
    ],
)
def test_wrong_input_is_refused(command, tmp_path, arguments, message):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "runs").exists()


def test_methods_lists_what_is_registered(command):
    code, out, _ = command("methods", "--json")
    assert code == 0
    listed = json.loads(out)
    assert [row["name"] for row in listed] == list(METHODS)
    assert all(row["paper"] and row["differs"] and row["travels"] for row in listed)
    assert command("methods", "--quiet")[1].split() == list(METHODS)
    assert "fslora" in command("methods")[1]


def test_ctrl_c_stops_all_workers_at_once(tiny_settings, tmp_path):
    settings = [part for item in [*tiny_settings, "run.rounds=3000"] for part in ("--set", item)]
    process = subprocess.Popen(
        [*FSLORA, "compare", *settings, "--methods", "fedit", "--seeds", "1", "--jobs", "2", "--out", "c"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    running = [tmp_path / f"c/cells/{label}/point-0/seed-0/metrics.jsonl" for label in ("fedit", "local")]
    deadline = time.monotonic() + 120
    while not all(path.is_file() and path.read_bytes().count(b"\n") > 2 for path in running):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "fslora resume c" in errors
    assert "Traceback" not in errors
    sizes = [path.stat().st_size for path in running]
    time.sleep(0.3)
    assert [path.stat().st_size for path in running] == sizes  # nobody writes any more
    assert {cell["status"] for cell in contents(tmp_path / "c")["cells"]} == {"waiting"}
