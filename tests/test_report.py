"""The report layer on run folders of every state: whole, cut short, large, damaged, hostile."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from rich.console import Console

from fslora.errors import ArtifactError
from fslora.report import (
    Table,
    class_table,
    clients_table,
    closing_table,
    coverage_figure,
    draw_all,
    dropped_table,
    fleet_table,
    headline,
    loss_figure,
    parse_data,
    partition_figure,
    read_run,
    save,
    score_figure,
    statistics_table,
    write_page,
)
from fslora.report.sampled import remark_on, sampled
from fslora.report.tables import trained_ranks
from fslora.report.text import byte_text, duration, margin95, markdown_text, plain, points

LAYERS = 12
FIGURES = {"accuracy", "loss", "bytes", "coverage", "clients", "partition"}
HOSTILE = (
    "<script>alert(1)</script>",
    "_under $x$ $\\frac{",
    "中文 🙂",
    'a|b *c* "q"',
    "x\x1b[31m\ny" + "z" * 300,
)
VOID = {"meta", "img", "br", "link", "input", "hr"}


@dataclass(frozen=True)
class Made:
    """What a synthetic run folder is made of."""

    clients: int = 20
    classes: tuple[str, ...] = ("as written", "swapped")
    rounds: int = 30
    planned: int = 30
    cohort: int = 10
    rank: int = 32
    ranks: tuple[int, ...] = (4, 8, 16, 24)
    method: str = "fslora"
    eval_every: int | None = 5
    finished: bool = True
    coverage: bool = True
    start: float = 0.51
    top: float = 0.82
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    seed: int = 0


def fleet_of(made: Made) -> list[dict[str, int]]:
    rng = np.random.default_rng(made.seed)
    examples = rng.integers(60, 400, made.clients)
    order = rng.permutation(made.clients)
    ranks = [made.ranks[int(place) % len(made.ranks)] for place in order]
    return [{"id": i, "rank": ranks[i], "examples": int(examples[i])} for i in range(made.clients)]


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_toml(path: Path, made: Made) -> None:
    lines = ["[run]", "seed = 0", f"rounds = {made.planned}", f"eval_every = {made.eval_every or 1000}"]
    lines += [
        "[model]",
        'name = "minilm"',
        "max_length = 64",
        "[data]",
        'task = "word-order"',
        'source = "stdlib"',
    ]
    lines += ["[fleet]", f"clients = {made.clients}", f"cohort = {made.cohort}"]
    lines += [
        "[adapter]",
        f"rank = {made.rank}",
        "alpha = 64.0",
        "[method]",
        f"name = {json.dumps(made.method)}",
    ]
    for name, changes in made.variants.items():
        lines += [f"[variants.{json.dumps(name)}.method]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in changes.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_data(folder: Path, made: Made, alpha: float = 0.5) -> None:
    rng = np.random.default_rng(made.seed + 1)
    fleet = fleet_of(made)
    shares = rng.dirichlet([alpha] * len(made.classes), size=made.clients)
    counts = [rng.multinomial(client["examples"], share).tolist() for client, share in zip(fleet, shares, strict=True)]
    data = {
        "name": "word order in the standard library's docstrings",
        "label_names": list(made.classes),
        "statistics": {
            "tokens": {"mean": 18.4, "longest": 64},
            "source": "Python 3.11",
            "duplicates_removed": 812,
        },
        "examples": {"train": sum(client["examples"] for client in fleet), "validation": 500, "test": 1000},
        "truncated": 37,
        "partition": {
            "kind": "dirichlet",
            "digest": "b1946ac92492d234",
            "notes": {"alpha": alpha, "redrawn": 0},
            "label_counts": counts,
            "holdout": [max(1, client["examples"] // 10) for client in fleet],
        },
        "fleet": fleet,
    }
    write_json(folder / "data.json", data)
    baseline = {"accuracy": 0.588, "loss": 0.671}
    write_json(
        folder / "baseline.json",
        {
            "name": "frozen base + linear head",
            "validation": baseline,
            "test": {"accuracy": 0.582, "loss": 0.675},
        },
    )


def metric_rows(made: Made) -> list[dict[str, Any]]:
    rng = np.random.default_rng(made.seed + 2)
    fleet, total, rows = fleet_of(made), 0, []

    def scores(number: int) -> dict[str, float] | None:
        if made.eval_every is None or (number % made.eval_every and number != made.planned):
            return None
        accuracy = made.top - (made.top - made.start) * float(np.exp(-number / 9)) + float(rng.normal(0, 0.008))
        return {"accuracy": round(accuracy, 4), "loss": round(1.35 - accuracy, 4)}

    if made.eval_every is not None:
        rows.append({"round": 0, "clients": [], "bytes_total": 0, "coverage": None, "validation": scores(0)})
    for number in range(1, made.rounds + 1):
        cohort = sorted(int(i) for i in rng.choice(made.clients, min(made.cohort, made.clients), replace=False))
        down = {str(i): fleet[i]["rank"] * LAYERS * 384 * 2 * 4 + 128 for i in cohort}
        coverage = np.zeros(made.rank, dtype=int)
        for i in cohort:
            for _ in range(LAYERS):
                coverage[rng.choice(made.rank, fleet[i]["rank"], replace=False)] += 1
        loss = 0.35 + 0.35 * float(np.exp(-number / 9)) + float(rng.normal(0, 0.02))
        total += 2 * sum(down.values())
        rows.append(
            {
                "round": number,
                "loss": loss,
                "lr": 2e-3 * (1 - number / made.planned),
                "clients": cohort,
                "bytes_down": sum(down.values()),
                "bytes_up": sum(down.values()),
                "bytes_total": total,
                "client_bytes_down": down,
                "client_bytes_up": down,
                "client_loss": {str(i): loss + float(rng.normal(0, 0.05)) for i in cohort},
                "seconds": 3.1,
                "coverage": coverage.tolist() if made.coverage else None,
                "layers": LAYERS,
                "dropped": {},
                "validation": scores(number),
            }
        )
    return rows


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_summary(folder: Path, made: Made, rows: list[dict[str, Any]]) -> None:
    rng = np.random.default_rng(made.seed + 3)
    clients = []
    for client in fleet_of(made):
        before, after = made.start + float(rng.normal(0, 0.05)), made.top + float(rng.normal(0, 0.05))
        clients.append(
            client | {"before": {"accuracy": before, "loss": 0.7}, "after": {"accuracy": after, "loss": 0.4}}
        )
    summary = {
        "method": made.method,
        "rounds": made.rounds,
        "finished": made.finished,
        "test": {
            "before": {"accuracy": made.start, "loss": 0.694},
            "after": {"accuracy": made.top, "loss": 0.4},
        },
        "clients": clients,
        "bytes_down": sum(row.get("bytes_down", 0) for row in rows),
        "bytes_up": sum(row.get("bytes_up", 0) for row in rows),
        "seconds": 131.4,
        "train_seconds": 96.0,
        "peak_memory_bytes": 1_210_000_000,
        "adapter_parameters": made.rank * LAYERS * 384 * 2 + 770,
        "base_parameters": 22_713_216,
    }
    write_json(folder / "summary.json", summary)


def write_run(folder: Path, made: Made, *, data: bool = True) -> Path:
    """A run folder as `fslora run` leaves it; an unfinished one has no summary."""
    folder.mkdir(parents=True)
    write_toml(folder / "experiment.toml", made)
    write_json(
        folder / "environment.json",
        {
            "fslora": "0.1.0",
            "python": "3.11.9",
            "torch": "2.6.0",
            "threads": 2,
            "git": "6d602bc",
            "cpu": "x86_64",
        },
    )
    if data:
        write_data(folder, made)
    rows = metric_rows(made)
    write_rows(folder, rows)
    if made.finished:
        write_summary(folder, made, rows)
        (folder / "adapter").mkdir()
    return folder


VARIANTS = {
    "fedit-low": {"name": "fedit", "rank": "smallest"},
    "fedit-full": {"name": "fedit", "rank": "server"},
}


def write_with_variants(folder: Path, **changes: Any) -> Path:
    run = write_run(folder, Made(variants=VARIANTS, **changes))
    low = Made(method="fedit", rank=4, ranks=(4,), top=0.74, **changes)
    full = Made(method="fedit", rank=32, ranks=(32,), top=0.835, **changes)
    write_run(folder / "variants" / "fedit-low", low, data=False)
    write_run(folder / "variants" / "fedit-full", full, data=False)
    return run


class Page(HTMLParser):
    """Collects what a page holds and insists on balanced tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: set[str] = set()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids |= {value or "" for key, value in attrs if key == "id"}
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "action")]
        assert not any(key.startswith("on") for key, _ in attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] == "style":
            assert "url(" not in data
            assert "@import" not in data
            return
        self.words.append(data)
        if self.stack and self.stack[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(self.words)

    @property
    def figures(self) -> set[str]:
        return {name.removeprefix("figure-") for name in self.ids if name.startswith("figure-")}


def page_of(run: Path) -> Page:
    """The parsed report of a run, which must stand alone and agree with the files beside it."""
    path = write_page(run)
    assert path == run / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.tags & {"script", "link", "iframe", "object", "base"}
    assert all(link.startswith("data:image/") for link in page.links)
    assert len(page.links) == len(page.figures)
    written = {entry.stem for entry in (run / "figures").glob("*")} if (run / "figures").exists() else set()
    assert written == page.figures
    for name in page.figures:
        assert (run / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        ET.fromstring((run / "figures" / f"{name}.svg").read_bytes())
    assert not list(run.rglob("*.tmp"))
    return page


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    run = write_with_variants(tmp_path_factory.mktemp("report") / "whole")
    return run, page_of(run)


def figures_of(run: Path) -> set[str]:
    return {entry.name for entry in draw_all(read_run(run))}


def test_a_whole_run_has_every_figure_and_the_numbers_of_its_files(whole: tuple[Path, Page]) -> None:
    run, page = whole
    assert page.figures == FIGURES
    summary = json.loads((run / "summary.json").read_text())
    rows = {row[0]: row for row in reversed(page.rows) if row}
    assert rows["fslora"][:4] == ["fslora", "fslora", "4–24", "30"]
    assert rows["fslora"][7] == byte_text(summary["bytes_down"])
    assert rows["fslora"][4:6] == ["51.0 %", "82.0 %"]
    assert rows["fedit-low"][1:3] == ["fedit", "4"]
    assert rows["fedit-full"][1:3] == ["fedit", "32"]
    assert rows["frozen base + linear head"][5] == "58.2 %"
    assert "Federated fine-tuning is 23.8 points above it." in page.text
    assert f'PeftModel.from_pretrained(base, "{run}/adapter")' in page.text
    assert "finished" in page.words
    assert 'method.name = "fedit", method.rank = "smallest"' in page.text
    assert "fslora resume" not in page.text


def test_the_markdown_summary_holds_the_closing_table(whole: tuple[Path, Page]) -> None:
    run, _ = whole
    text = (run / "summary.md").read_text(encoding="utf-8")
    assert closing_table(read_run(run).runs).markdown() in text
    for name in FIGURES:
        assert f"(figures/{name}.png)" in text


def test_the_closing_table_has_the_same_rows_in_every_form(whole: tuple[Path, Page]) -> None:
    record = read_run(whole[0])
    table = closing_table(record.runs)
    assert [row["run"] for row in table.dicts()] == [
        "fslora",
        "fedit-low",
        "fedit-full",
        "frozen base + linear head",
    ]
    assert json.loads(json.dumps(table.dicts(), allow_nan=False)) == table.dicts()
    summary = json.loads((whole[0] / "variants" / "fedit-low" / "summary.json").read_text())
    low = table.dicts()[1]
    for key in ("bytes_down", "bytes_up", "train_seconds", "adapter_parameters"):
        assert low[key] == summary[key]
    assert low["test_after"] == summary["test"]["after"]["accuracy"]
    drawn = printed(table, 200)
    for line, cells in zip(table.markdown().splitlines()[2:], table.cells(), strict=True):
        assert line == "| " + " | ".join(markdown_text(cell) for cell in cells) + " |"
        assert all(cell in drawn for cell in cells)


def printed(table: Table, width: int) -> str:
    file = io.StringIO()
    Console(width=width, file=file, color_system=None).print(table.rich())
    return file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_the_closing_table_fits_the_terminal(whole: tuple[Path, Page], width: int) -> None:
    text = printed(closing_table(read_run(whole[0]).runs), width)
    for cell in ("fedit-full", "4–24", "82.0 %", "58.2 %", "44.3 MB   44.3 MB"):
        assert cell in text
    assert "…" not in text
    assert ("295,682" in text) == (width >= 120)


def test_cells_are_no_markup(tmp_path: Path) -> None:
    data = parse_data(
        {"label_names": ["[red]x[/red]", "y"], "fleet": [{"id": 0, "rank": 1, "examples": 2}]}
        | {"partition": {"label_counts": [[2, 0]]}}
    )
    assert "[red]x[/red] 100 %" in printed(fleet_table(data), 120)
    assert "\\[red\\]x" in fleet_table(data).markdown()


def test_client_tables_add_up_to_the_rounds(whole: tuple[Path, Page]) -> None:
    record = read_run(whole[0])
    rows = clients_table(record).dicts()
    assert [row["client"] for row in rows] == list(range(20))
    assert sum(row["bytes_down"] for row in rows) == sum(row.bytes_down for row in record.rounds)
    assert sum(row["rounds"] for row in rows) == 30 * 10
    assert record.data is not None
    classes = class_table(record.data).dicts()
    assert sum(row["examples"] for row in classes) == sum(client.examples for client in record.fleet)
    held = fleet_table(record.data).dicts()
    assert held[0]["top"][0]["share"] >= 0.5
    facts = statistics_table(replace(record.data, statistics={"test examples": 1000, "a": {"b": 18.4}})).dicts()
    assert {"fact": "a: b", "value": 18.4} in facts
    assert [row["fact"] for row in facts].count("test examples") == 1


def test_curves_are_the_recorded_values(whole: tuple[Path, Page]) -> None:
    record = read_run(whole[0])
    figure = score_figure(record.runs)
    assert figure is not None
    evaluated = [row for row in record.rounds if row.validation]
    rounds, traffic = (axes.lines[0] for axes in figure.axes)
    np.testing.assert_array_equal(rounds.get_xdata(), [row.round for row in evaluated])
    accuracies = [row.validation["accuracy"] for row in evaluated if row.validation]
    np.testing.assert_array_equal(rounds.get_ydata(), accuracies)
    np.testing.assert_allclose(traffic.get_xdata(), [row.bytes_total / 1e6 for row in evaluated])
    dashed = figure.axes[0].lines[-1]
    assert set(np.asarray(dashed.get_ydata()).tolist()) == {0.588}
    assert "frozen base + linear head, 58.8 %" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_runs_keep_their_colours_and_leave_no_setting_behind(whole: tuple[Path, Page]) -> None:
    before = dict(matplotlib.rcParams)
    record = read_run(whole[0])
    drawn = [score_figure(record.runs), loss_figure(record.runs)]
    colours = [[line.get_color() for line in figure.axes[1].lines[:3]] for figure in drawn if figure]
    assert colours[0] == colours[1]
    assert len(set(colours[0])) == 3
    assert drawn[0] is not None
    assert save(drawn[0], "svg") == save(drawn[0], "svg")
    assert dict(matplotlib.rcParams) == before


def test_an_interrupted_run_is_reported_as_far_as_it_came(tmp_path: Path) -> None:
    made = Made(rounds=3, finished=False, eval_every=1, variants=VARIANTS)
    run = write_run(tmp_path / "my run", made)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 4, "loss": 0.4, "cli')
    page = page_of(run)
    assert page.figures == FIGURES - {"clients"}
    assert "The run is not finished: 3 of 30 rounds are done." in page.words
    assert "Variants that have not started: fedit-low, fedit-full." in page.words
    assert f"fslora resume '{run}'" in page.words
    assert "PeftModel" not in page.text
    row = closing_table(read_run(run).runs).dicts()[0]
    assert row["rounds"] == "3 of 30"
    assert row["bytes_down"] == sum(entry["bytes_down"] for entry in metric_rows(made) if entry["round"])
    assert row["test_after"] is None
    assert row["validation"] == metric_rows(made)[-1]["validation"]["accuracy"]


def test_a_run_without_evaluation_has_no_score_figure(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Made(rounds=2, eval_every=None, finished=False, clients=4, cohort=4))
    (run / "baseline.json").unlink()
    assert "Nothing has been evaluated yet." in page_of(run).words
    assert figures_of(run) == {"loss", "bytes", "coverage", "partition"}
    figure = loss_figure(read_run(run).runs)
    assert figure is not None
    assert len(figure.axes) == 1


def test_many_classes_and_clients(tmp_path: Path) -> None:
    classes = tuple(f"intent {number}" for number in range(150))
    made = Made(clients=100, cohort=40, classes=classes, ranks=tuple(range(1, 65)), rank=64, rounds=2, finished=False)
    run = write_run(tmp_path / "run", made)
    data = read_run(run).data
    assert data is not None
    figure = partition_figure(data)
    assert figure is not None
    names = [tick.get_text() for tick in figure.axes[1].get_yticklabels()]
    assert names == list(classes)
    page = page_of(run)
    assert len([row for row in page.rows if row and row[0].startswith("intent ")]) == 150
    assert (run / "report.html").stat().st_size < 2_000_000


@pytest.mark.parametrize(("clients", "classes"), [(3, 2), (1, 1), (200, 8), (60, 9), (3, 400)])
def test_partitions_of_other_sizes_are_drawn(tmp_path: Path, clients: int, classes: int) -> None:
    write_data(tmp_path, Made(clients=clients, cohort=1, classes=tuple(map(str, range(classes)))))
    figure = partition_figure(parse_data(json.loads((tmp_path / "data.json").read_text())))
    assert figure is not None
    assert save(figure, "png").startswith(b"\x89PNG")
    assert len(figure.axes[0].patches) == clients


def test_of_a_large_fleet_some_who_took_part_are_shown(tmp_path: Path) -> None:
    """Of 1,500 clients up to 1,200 take part: 1,000 of those are drawn, and what is not by client is of all."""
    made = Made(clients=1500, cohort=600, rounds=3)
    record = read_run(write_run(tmp_path / "run", made))
    shown, seen = sampled(record), {client for row in record.rounds for client in row.clients}
    assert len(seen) > 1000
    assert len(shown.fleet) == len(shown.data.partition.label_counts) == len(shown.data.partition.holdout) == 1000
    assert {client.id for client in shown.fleet} == {entry.id for entry in shown.summary.clients} < seen
    position = {client.id: place for place, client in enumerate(record.fleet)}
    for client, counts in zip(shown.fleet, shown.data.partition.label_counts, strict=True):
        assert record.fleet[position[client.id]] == client
        assert record.data.partition.label_counts[position[client.id]] == counts
    share = {rank: sum(c.rank == rank for c in record.fleet if c.id in seen) / len(seen) for rank in made.ranks}
    for rank in made.ranks:
        assert sum(client.rank == rank for client in shown.fleet) == pytest.approx(1000 * share[rank], abs=1.01)
    assert shown.rounds == record.rounds
    assert "1,000 of 1,500 clients" in remark_on(record, shown)
    small = read_run(write_run(tmp_path / "small", Made(clients=30, rounds=1)))
    assert sampled(small) is small
    assert remark_on(small, small) is None


def test_the_page_of_a_large_fleet_says_what_it_shows(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Made(clients=1200, cohort=20, rounds=3))
    page = write_page(run).read_text(encoding="utf-8")
    assert "of 1,200 clients, of those that took part, evenly by rank" in page
    assert page.count("1,200") >= 2, "the fleet's size is that of all"


def test_hostile_text_is_shown_and_never_run(tmp_path: Path) -> None:
    made = Made(clients=6, cohort=3, classes=HOSTILE, rounds=12, variants={HOSTILE[0]: {"name": "fedit"}})
    run = write_run(tmp_path / "<b>run $a$ _x_", made)
    write_run(run / "variants" / "_$v$", replace(made, method="<i>", variants={}), data=False)
    rows = metric_rows(made)
    rows[3]["dropped"] = {"2": "not finite: <img src=x onerror=alert(1)>"}
    rows[5]["loss"] = float("nan")
    rows[6]["loss"] = float("inf")
    write_rows(run, rows)
    page = page_of(run)
    raw = (run / "report.html").read_text(encoding="utf-8")
    assert HOSTILE[0] in page.text
    assert HOSTILE[0] not in raw
    assert "<img src=x" not in raw
    assert "not finite: <img src=x onerror=alert(1)>" in page.text
    assert any("not finite in 2 rounds, first in round 5" in word for word in page.words)
    assert any("refused 1 update;" in word for word in page.words)
    assert not {"b", "i"} & page.tags
    assert "\x1b" not in raw
    assert "<b>" not in (run / "summary.md").read_text(encoding="utf-8").replace("\\<b\\>", "")
    assert dropped_table(read_run(run).runs).dicts()[0]["round"] == 3


REMOVALS: dict[str, tuple[str, set[str]]] = {
    "no data": ("data.json", {"bytes", "clients", "partition"}),
    "no rounds": ("metrics.jsonl", {"accuracy", "loss", "bytes", "coverage"}),
    "no summary": ("summary.json", {"clients"}),
    "no baseline": ("baseline.json", set()),
    "no config": ("experiment.toml", set()),
    "no environment": ("environment.json", set()),
}


@pytest.mark.parametrize("name", REMOVALS)
def test_a_figure_is_there_exactly_when_its_data_is(tmp_path: Path, name: str) -> None:
    part, gone = REMOVALS[name]
    run = write_run(tmp_path / "run", Made(clients=4, cohort=2, rounds=5))
    (run / part).unlink()
    assert figures_of(run) == FIGURES - gone
    assert closing_table(read_run(run).runs).dicts()[0]["run"] == "fslora"
    assert headline(read_run(run)).what


def test_a_later_report_removes_figures_that_lost_their_data(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Made(clients=3, cohort=2, rounds=2))
    (run / "figures").mkdir()
    (run / "figures" / "coverage.png").write_bytes(b"old")
    (run / "metrics.jsonl").unlink()
    assert page_of(run).figures == {"clients", "partition"}


def test_a_figure_too_heavy_as_svg_is_embedded_as_png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path, Made(clients=200, classes=("a", "b", "c")))
    monkeypatch.setattr("fslora.report.page._SVG_LIMIT", 0)
    assert [link[:15] for link in page_of(tmp_path).links] == ["data:image/png;"]


def test_the_least_run_folder_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text("{}")
    page = page_of(tmp_path)
    assert page.figures == set()
    assert "Nothing has been evaluated yet." in page.words


def test_a_round_written_twice_counts_once_and_the_newest_holds(tmp_path: Path) -> None:
    rows = metric_rows(Made(rounds=4))
    run = write_run(tmp_path / "run", Made(rounds=4))
    write_rows(run, [*rows, rows[-1] | {"loss": 9.0}])
    record = read_run(run)
    assert [row.round for row in record.rounds] == [0, 1, 2, 3, 4]
    assert record.rounds[-1].loss == 9.0


def test_a_variant_can_be_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_with_variants(tmp_path / "run", rounds=2)
    monkeypatch.chdir(run / "variants" / "fedit-low")
    record = read_run(".")
    assert not record.main
    assert record.name == "fedit-low"
    assert record.data == read_run(run).data
    assert record.baseline is not None
    write_data(Path(), Made(ranks=(2,)))
    assert {client.rank for client in read_run(run).variants[0].fleet} == {2}
    assert {client.rank for client in read_run(run).fleet} == {4, 8, 16, 24}


def test_coverage_shows_the_share_of_parts_that_nobody_held(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Made(rounds=2))
    rows = [row | {"coverage": [LAYERS * 3, LAYERS, 0, 6], "unheld": 18} for row in metric_rows(Made(rounds=2))[1:]]
    write_rows(run, rows)
    figure = coverage_figure(read_run(run).runs)
    assert figure is not None
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), 18 / (4 * LAYERS))
    assert figure.axes[1].get_ylabel() == "share of parts"
    write_rows(run, [{key: value for key, value in row.items() if key != "unheld"} for row in rows])
    figure = coverage_figure(read_run(run).runs)
    assert figure is not None
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), (12 + 6) / (4 * LAYERS))
    assert figure.axes[1].get_ylabel().endswith("at least")


def test_ranks_are_those_that_were_trained(tmp_path: Path) -> None:
    run = write_with_variants(tmp_path / "run", rounds=2)
    _, low, full = read_run(run).runs
    assert (trained_ranks(low), trained_ranks(full)) == ([4], [32])
    for variant, rank in ((low, 4), (full, 32)):
        blind = replace(variant, rounds=tuple(replace(row, coverage=None) for row in variant.rounds))
        told = {"smallest": {"rank": "smallest"}, "server": {"rank": "server"}}["smallest" if rank == 4 else "server"]
        config = {"method": told, "adapter": {"rank": 32}}
        assert trained_ranks(replace(blind, config=config)) == [rank]
        recorded = tuple(replace(row, client_ranks={0: 7}) for row in variant.rounds)
        assert trained_ranks(replace(variant, rounds=recorded)) == [7]


def _damage(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda run: (run / name).write_bytes(content) and None


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut json": (_damage("summary.json", b'{"method": "fs'), r"summary\.json is damaged.*restore the file"),
    "a list": (_damage("data.json", b"[1, 2]"), r"data\.json is damaged: it holds no JSON object"),
    "wrong type": (
        _damage("summary.json", b'{"rounds": "many"}'),
        r"summary\.json is damaged: rounds is 'many'",
    ),
    "inner type": (_damage("data.json", b'{"fleet": [{"id": 0}]}'), r"data\.json is damaged: fleet\.0\.rank"),
    "not json inside": (
        _damage("metrics.jsonl", b'{"rou\n{"round": 1}\n'),
        r"metrics\.jsonl, line 1, is damaged",
    ),
    "no round": (_damage("metrics.jsonl", b'{"loss": 1}\n'), r"metrics\.jsonl, line 1 is damaged: round"),
    "not an object": (_damage("metrics.jsonl", b"12\n"), r"metrics\.jsonl, line 1 is damaged"),
    "not toml": (_damage("experiment.toml", b"[run"), r"experiment\.toml is not valid TOML"),
    "not text": (_damage("experiment.toml", b"\xff\xfe"), r"experiment\.toml is not UTF-8"),
    "two fleets": (
        _damage("data.json", b'{"partition": {"holdout": [1, 2]}, "fleet": [{"id": 0, "rank": 1, "examples": 1}]}'),
        r"partition\.holdout has 2 entries but fleet has 1 clients",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_with_its_file_and_a_remedy(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run", Made(rounds=1))
    harm, message = DAMAGE[name]
    harm(run)
    with pytest.raises(ArtifactError, match=message):
        read_run(run)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is no run folder.*give the folder that `fslora run` wrote"):
        read_run(tmp_path)
    with pytest.raises(ArtifactError, match=r"absent is not a folder"):
        write_page(tmp_path / "absent")


def test_a_report_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text("{}")
    (tmp_path / "summary.md").mkdir()
    with pytest.raises(ArtifactError, match=r"summary\.md cannot be written: .*; free the disk"):
        write_page(tmp_path)
    (tmp_path / "figures").write_text("in the way")
    with pytest.raises(ArtifactError, match=r"figures.* cannot be written"):
        write_page(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["environment.json", "figures", "summary.md"]


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (0.82, "23.8 points above"),
        (0.4, "18.2 points below"),
        (0.59, "is within the sampling error of 1,000 test"),
    ],
)
def test_the_verdict_respects_the_sampling_error(tmp_path: Path, after: float, words: str) -> None:
    run = write_run(tmp_path / "run", Made(rounds=1, top=after))
    assert words in headline(read_run(run)).result


def test_text_is_readable() -> None:
    assert [byte_text(number) for number in (None, 0, 999, 1000, 12_345_678, 4.2e9)] == [
        "–", "0 B", "999 B", "1.00 kB", "12.3 MB", "4.20 GB",
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (4.25, 59, 131.4, 3599.7, 7260)] == [
        "4.2 s", "59 s", "2 min 11 s", "1 h 00 min", "2 h 01 min",
    ]  # fmt: skip
    assert [points(share) for share in (-0.0123, 0.0, -0.0001, 0.2)] == ["−1.2", "0.0", "0.0", "+20.0"]
    assert plain("a\n b\x00" + "c" * 90, 10) == "a b�ccccc…"
    # Wilson's interval for 50 of 100 is 0.404 to 0.596.
    assert margin95(0.5, 100) == pytest.approx(0.0962, abs=5e-5)
    assert margin95(1.0, 50) == pytest.approx(0.0357, abs=5e-5)
