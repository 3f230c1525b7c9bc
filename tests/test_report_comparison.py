"""The report of a comparison, on synthetic folders: statistics, files, page, and everything that may be missing."""

from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from fslora.errors import ArtifactError
from fslora.report import comparison_table, write_comparison
from fslora.report.comparison import Budget, read_comparison
from fslora.report.comparison_curves import mean_curve, rank_figure, rounds_figure, traffic_figure
from fslora.report.comparison_figures import NAMES as FIGURES
from fslora.report.comparison_figures import draw_comparison
from fslora.report.comparison_files import latex_text
from fslora.report.comparison_headline import comparison_headline
from fslora.report.comparison_looks import focus, method_looks, spaced
from fslora.report.comparison_maps import pareto_figure, spectra_figure
from fslora.report.comparison_results import (
    MethodResult,
    Spread,
    leaders,
    paired,
    ranked,
    results,
    undominated,
    worst_tenth,
)
from fslora.report.comparison_rows import by_rank_figure, difference_figure, fairness_figure
from fslora.report.comparison_tables import assignments, results_table

ROUNDS = 30
RANKS = (4, 8, 16, 24)
CLIENTS = 20
NAMES = {
    # label: (final test accuracy, bytes relative to fedit, effective rank at the end)
    "fedit": (0.781, 1.0, 9.0),
    "fslora": (0.802, 0.41, 12.0),
    "ffa-lora": (0.752, 0.5, 6.0),
    "hetlora": (0.788, 0.41, 7.5),
    "flora": (0.765, 6.8, 16.0),
    "flexlora": (0.799, 0.72, 13.0),
    "fedex-lora": (0.804, 3.1, 14.0),
    "fedsa-lora": (0.741, 0.5, 8.0),
    "rolora": (0.773, 0.5, 9.5),
    "lora-fair": (0.786, 1.0, 10.0),
    "raflora": (0.797, 0.41, 15.0),
    "florist": (0.779, 1.9, 11.0),
    "fed-plora": (0.793, 0.43, 12.5),
    "replication-padding": (0.768, 0.41, 5.0),
    "rac-lora": (0.776, 0.3, 13.5),
    "flame": (0.784, 0.41, 9.2),
    "lola-deft": (0.503, 0.05, 1.2),
    "mole_top2": (0.771, 1.4, 10.5),
    "ce-lora 50%": (0.762, 0.08, 6.6),
    "fedit-smallest": (0.738, 0.17, 3.4),
    "fedit-largest": (0.811, 1.0, 17.0),
    "pooled": (0.846, 0.0, 19.0),
}
BASELINES = ("fedit-smallest", "fedit-largest", "pooled")
PERSONAL = ("fedsa-lora", "mole_top2")
LAYER_BYTES = 12 * 384 * 2 * 4


@dataclass(frozen=True)
class Made:
    """What a synthetic comparison is made of."""

    labels: tuple[str, ...] = tuple(NAMES)
    seeds: tuple[int, ...] = (0, 1, 2)
    reference: str = "fedit"
    name: str = "all methods"
    failed: dict[tuple[str, int], str] = field(default_factory=dict)
    waiting: tuple[tuple[str, int], ...] = ()
    grid: tuple[float, ...] = ()
    hopeless: tuple[str, ...] = ()
    accuracies: dict[tuple[str, int], float] = field(default_factory=dict)
    rounds: int = ROUNDS
    lengths: dict[tuple[str, int], int] = field(default_factory=dict)
    """Rounds of single runs, as a budget other than rounds has them."""
    budget: tuple[str, float] = ("rounds", ROUNDS)
    extras: bool = True
    """Whether the rows hold operations, memory, times and spectra."""
    noise: float = 0.004


def accuracy_of(made: Made, label: str, seed: int) -> float:
    """Seeds differ for all methods alike, and a little for each."""
    if (label, seed) in made.accuracies:
        return made.accuracies[label, seed]
    place = list(NAMES).index(label)
    shared = 0.012 * float(np.random.default_rng(seed + 77).normal())
    own = made.noise * float(np.random.default_rng([seed, place]).normal())
    return NAMES[label][0] + (0.0 if label == "lola-deft" else shared) + own


def write_comparison_folder(path: Path, made: Made = Made()) -> Path:
    """A folder as `fslora compare` leaves it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "experiment.toml").write_text('[run]\nrounds = 30\n\n[compare]\nseeds = 3\nreference = "fedit"\n')
    (path / "environment.json").write_text(json.dumps({"fslora": "0.1.0", "python": "3.11.9", "cpu": "x86_64"}))
    methods, cells = {}, []
    for label in made.labels:
        points = [{"local.lr": lr} for lr in made.grid] or [{}]
        hopeless = label in made.hopeless
        entries = [
            {
                "point": point,
                "validation": None if hopeless else {"accuracy": 0.78 - 0.02 * place, "loss": 0.5 + 0.04 * place},
                "error": "no client sent a usable update (its loss was not finite)" if hopeless else None,
            }
            for place, point in enumerate(points)
        ]
        methods[label] = {
            "method": label.split("-", maxsplit=1)[0],
            "paper": "arXiv:2501.19389",
            "baseline": label in BASELINES,
            "changes": {"method.keep_best": 2} if "_" in label else {},
            "chosen": None if hopeless else points[0],
            "points": entries,
        }
        for place in range(1 if hopeless else 0, len(points)):
            cells.append(cell_of(made, label, place, made.seeds[0], chosen=False, failed=hopeless))
        if not hopeless:
            cells = [cell for cell in cells if (cell["label"], cell["point"]) != (label, 0)]
            cells += [cell_of(made, label, 0, seed, chosen=True) for seed in made.seeds]
    record = {
        "format": 1,
        "name": made.name,
        "reference": made.reference,
        "seeds": list(made.seeds),
        "budget": {"kind": made.budget[0], "amount": made.budget[1]},
        "labels": list(made.labels),
        "methods": methods,
        "cells": cells,
    }
    (path / "comparison.json").write_text(json.dumps(record, indent=1))
    for cell in cells:
        if cell["status"] == "finished" and cell["chosen"]:
            write_cell(path / cell["folder"], made, cell["label"], cell["seed"])
    return path


def cell_of(made: Made, label: str, point: int, seed: int, *, chosen: bool, failed: bool = False) -> dict[str, Any]:
    error = made.failed.get((label, seed)) if chosen else None
    error = "its loss was not finite" if failed else error
    status = "failed" if error else "waiting" if chosen and (label, seed) in made.waiting else "finished"
    folder = f"cells/{label}/point-{point}/seed-{seed}"
    cell = {"label": label, "point": point, "seed": seed, "folder": folder}
    return cell | {"status": status, "error": error, "chosen": chosen}


def fleet_of() -> list[dict[str, int]]:
    return [{"id": i, "rank": RANKS[i % len(RANKS)], "examples": 60 + 7 * i} for i in range(CLIENTS)]


def write_cell(folder: Path, made: Made, label: str, seed: int) -> None:
    """A finished run of one method with one seed."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, list(NAMES).index(label), 5])
    rows = rows_of(made, label, seed, rng)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"name": "word order", "examples": {"train": 3000, "validation": 500, "test": 1000}, "fleet": fleet_of()}
    (folder / "data.json").write_text(json.dumps(data))
    (folder / "summary.json").write_text(json.dumps(summary_of(made, label, seed, rows, rng)))


def rows_of(made: Made, label: str, seed: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    final, share, rank = accuracy_of(made, label, seed), NAMES[label][1], NAMES[label][2]
    total, rows = 0, []
    last = made.lengths.get((label, seed), made.rounds)
    for number in range(last + 1):
        sent = 0 if number == 0 else int(share * 10 * 13 * LAYER_BYTES)
        total += 2 * sent
        row: dict[str, Any] = {"round": number, "bytes_down": sent, "bytes_up": sent, "bytes_total": total}
        if number % 3 == 0 or number == last:
            reached = (
                final - (final - 0.51) * float(np.exp(-number / (4 + 3 * share**0.3))) + float(rng.normal(0, 0.004))
            )
            row["validation"] = {"accuracy": reached if number else 0.51, "loss": 1.3 - reached}
            if made.extras:
                row |= spectrum_of(1.5 + (rank - 1.5) * min(1.0, number / 12)) if number else {"spectrum": None}
        if made.extras and number:
            row |= {
                "client_flops": {"0": 1.1e12, "1": 2.2e12},
                "flops_total": 3.3e12 * number,
                "client_memory": {"0": 4_000_000, "1": 9_000_000},
                "simulated_seconds": 11.0 * share + 2,
                "time_total": (11.0 * share + 2) * number,
                "server_seconds": 0.02,
                "server_bytes": 3_000_000,
            }
        rows.append(row)
    return rows


def spectrum_of(rank: float, size: int = 32) -> dict[str, Any]:
    energy = np.exp(-np.arange(size) * 2 / rank)
    return {"spectrum": (energy / energy.sum()).tolist(), "effective_rank": rank}


def summary_of(
    made: Made, label: str, seed: int, rows: list[dict[str, Any]], rng: np.random.Generator
) -> dict[str, Any]:
    final = accuracy_of(made, label, seed)
    clients = []
    for client in fleet_of():
        lift = 0.1 if label in PERSONAL else 0.0
        gap = 0.0 if label in ("fslora", "pooled") else 0.0025 * (client["rank"] - 13)
        after = min(1.0, max(0.0, final + lift + gap + float(rng.normal(0, 0.05))))
        # One client holds nothing out.
        scores = {"after": {"accuracy": after, "loss": 0.5}} if client["id"] else {"after": None}
        clients.append(client | {"before": {"accuracy": 0.5, "loss": 0.7}} | scores)
    extras = {
        "personal": label in PERSONAL,
        "flops": 3.3e12 * made.rounds * (1.4 if "flora" in label else 1.0),
        "simulated_seconds": rows[-1].get("time_total"),
        "server_seconds": 0.6,
        "client_memory_bytes": 9_000_000 + 100_000 * len(label),
        "server_bytes": 3_000_000,
    }
    sent = sum(row["bytes_down"] for row in rows)
    return {
        "method": label.split("-", maxsplit=1)[0],
        "rounds": rows[-1]["round"],
        "finished": True,
        "test": {"before": {"accuracy": 0.51, "loss": 0.69}, "after": {"accuracy": final, "loss": 0.44}},
        "clients": clients,
        "bytes_down": sent,
        "bytes_up": sent,
        "train_seconds": 94.0 + len(label),
        "peak_memory_bytes": 1_200_000_000,
    } | (extras if made.extras else {})


class Page(HTMLParser):
    """What a page holds; insists on balanced tags and on nothing from outside."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.figures: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object", "base")
        fields = dict(attrs)
        assert not any(key.startswith("on") for key in fields)
        assert (fields.get("src") or "data:image/").startswith("data:image/")
        assert not fields.keys() & {"href", "srcset", "action"}
        if tag == "figure":
            self.figures.append((fields["id"] or "").removeprefix("figure-"))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "img", "br"):
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


def entries_of(path: Path) -> dict[str, MethodResult]:
    return {entry.label: entry for entry in results(read_comparison(path))}


def printed(path: Path, width: int) -> str:
    file = io.StringIO()
    Console(width=width, file=file, color_system=None).print(comparison_table(path).rich())
    return file.getvalue()


WHOLE = Made(
    failed={("rac-lora", 1): "round 7: no client sent a usable update (100 % of 3_clients)"},
    waiting=(("flame", 2),),
    grid=(5e-4, 1.5e-3),
    hopeless=("florist",),
)
SMALL = Made(labels=("fedit", "fslora", "fedsa-lora", "pooled"), rounds=6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_comparison_folder(tmp_path_factory.mktemp("comparison") / "whole", WHOLE)
    assert write_comparison(path) == path / "report.html"
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison_folder(tmp_path_factory.mktemp("comparison") / "small", SMALL)


# Statistics


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(3)
    ours, theirs = rng.normal(0.8, 0.01, 5), rng.normal(0.78, 0.01, 5)
    got = paired(Spread(dict(enumerate(ours))), Spread(dict(enumerate(theirs))))
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert got is not None
    assert got.mean == pytest.approx(np.mean(ours - theirs), rel=1e-12)
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    by_hand = stats.t.ppf(0.975, 4) * np.std(ours - theirs, ddof=1) / np.sqrt(5)
    assert got.high is not None
    assert got.high - got.mean == pytest.approx(by_hand, rel=1e-9)


def test_pairs_are_of_common_seeds_only() -> None:
    ours, theirs = Spread({0: 0.8, 2: 0.7, 5: 0.9}), Spread({0: 0.75, 1: 0.1, 2: 0.71})
    got = paired(ours, theirs)
    assert got is not None
    assert got.by_seed == pytest.approx({0: 0.05, 2: -0.01})
    assert (got.n, got.sign) == (2, 0)
    one = paired(Spread({3: 0.8}), Spread({3: 0.7, 4: 0.2}))
    assert one is not None
    assert (one.n, one.low, one.high, one.sign) == (1, None, None, 0)
    assert one.mean == pytest.approx(0.1)
    assert paired(Spread({0: 1.0}), Spread({1: 1.0})) is None
    assert paired(Spread({}), Spread({0: 1.0})) is None


def test_the_sign_says_whether_the_interval_excludes_zero() -> None:
    zero = Spread({0: 0.0, 1: 0.0, 2: 0.0})
    for values, sign in (((0.1, 0.11, 0.12), 1), ((-0.1, -0.11, -0.12), -1), ((0.1, -0.1, 0.1), 0), ((0, 0, 0), 0)):
        got = paired(Spread(dict(enumerate(values))), zero)
        assert got is not None
        assert got.sign == sign


def test_a_spread_is_mean_and_sample_deviation() -> None:
    spread = Spread({0: 0.7, 1: 0.8, 4: 0.75})
    assert (spread.mean, spread.sd) == pytest.approx((0.75, np.std([0.7, 0.8, 0.75], ddof=1)))
    assert (Spread({0: 0.7}).sd, Spread({}).mean, Spread({}).n) == (None, None, 0)


def test_the_worst_tenth_is_rounded_up_to_whole_clients() -> None:
    values = [0.9, 0.1, 0.5, 0.3]
    assert worst_tenth(values) == 0.1
    assert worst_tenth([place / 100 for place in range(20)]) == pytest.approx(0.005)
    assert worst_tenth([place / 100 for place in range(21)]) == pytest.approx(0.01)
    assert worst_tenth([]) is None


def test_results_are_those_of_the_cells(whole: Path) -> None:
    entries = entries_of(whole)
    fslora, rac = entries["fslora"], entries["rac-lora"]
    summaries = [json.loads((whole / f"cells/fslora/point-0/seed-{s}/summary.json").read_text()) for s in (0, 1, 2)]
    accuracies = [summary["test"]["after"]["accuracy"] for summary in summaries]
    assert list(fslora.test.by_seed.values()) == accuracies
    own = [[c["after"]["accuracy"] for c in summary["clients"] if c["after"]] for summary in summaries]
    assert len(own[0]) == CLIENTS - 1
    assert fslora.own.mean == pytest.approx(np.mean([np.mean(values) for values in own]))
    assert fslora.worst.mean == pytest.approx(np.mean([np.mean(sorted(values)[:2]) for values in own]))
    assert fslora.costs["bytes_up"].mean == summaries[0]["bytes_up"]
    reference = np.array(list(entries["fedit"].test.by_seed.values()))
    expected = stats.ttest_rel(accuracies, reference).confidence_interval()
    assert fslora.difference is not None
    assert (fslora.difference.low, fslora.difference.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert (rac.test.n, rac.failed, rac.waiting, rac.seeds) == (2, 1, 0, 3)
    assert rac.difference is not None
    assert set(rac.difference.by_seed) == {0, 2}
    assert (entries["flame"].waiting, entries["flame"].failed) == (1, 0)
    assert entries["fedit"].difference is None
    assert entries["fedsa-lora"].personal


def test_the_best_is_of_those_with_the_most_seeds(whole: Path) -> None:
    entries = list(entries_of(whole).values())
    assert leaders(entries)[0].label in ("fslora", "fedex-lora")
    assert "pooled" not in [entry.label for entry in leaders(entries, 99)]
    assert "flame" not in [entry.label for entry in leaders(entries, 99)]
    order = [entry.label for entry in ranked(entries)]
    assert order[-3:] == ["pooled", "fedit-largest", "fedit-smallest"]
    assert order[-4] == "florist"


def test_nobody_beats_the_front_in_both(whole: Path) -> None:
    entries = list(entries_of(whole).values())
    front = undominated(entries)
    placed = [e for e in entries if e.test.n and not e.entry.baseline]
    for entry in placed:
        better = [
            other.label
            for other in placed
            if (other.traffic.mean, -other.test.mean) != (entry.traffic.mean, -entry.test.mean)
            and other.traffic.mean <= entry.traffic.mean
            and other.test.mean >= entry.test.mean
        ]
        assert (entry in front) == (not better), entry.label
    assert [entry.traffic.mean for entry in front] == sorted(entry.traffic.mean for entry in front)


# Files


def test_csv_has_every_label_in_full_precision(whole: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((whole / "results.csv").read_text())))
    entries = entries_of(whole)
    assert [row["label"] for row in rows] == list(NAMES)
    for row in rows:
        entry = entries[row["label"]]
        assert row["test_accuracy_mean"] == ("" if entry.test.mean is None else repr(entry.test.mean))
        assert int(row["seeds_finished"]) == len(entry.runs)
    row = next(row for row in rows if row["label"] == "rac-lora")
    assert float(row["difference_low"]) == entries["rac-lora"].difference.low
    assert (row["difference_n"], row["seeds_failed"], row["seeds_all"]) == ("2", "1", "3")
    assert row["failure"] == WHOLE.failed["rac-lora", 1]
    assert json.loads(row["chosen"]) == {"local.lr": 5e-4}


def test_json_has_the_same_rows_and_every_cell(whole: Path) -> None:
    content = json.loads((whole / "results.json").read_text())
    record = json.loads((whole / "comparison.json").read_text())
    assert [row["label"] for row in content["rows"]] == record["labels"]
    assert [(c["folder"], c["status"], c["error"]) for c in content["cells"]] == [
        (c["folder"], c["status"], c["error"]) for c in record["cells"]
    ]
    cell = next(c for c in content["cells"] if c["folder"] == "cells/fslora/point-0/seed-1")
    row = next(row for row in content["rows"] if row["label"] == "fslora")
    assert row["test_accuracy"]["by_seed"]["1"] == cell["result"]["test_accuracy"]
    assert len(cell["result"]["own_accuracy"]) == CLIENTS - 1
    florist = next(row for row in content["rows"] if row["label"] == "florist")
    assert florist["test_accuracy"] is None
    assert "not finite" in florist["failure"]
    table = comparison_table(whole).dicts()
    assert sorted(table, key=lambda row: row["label"]) == sorted(content["rows"], key=lambda row: row["label"])


def test_markdown_says_what_its_numbers_are(whole: Path) -> None:
    text = (whole / "results.md").read_text()
    for words in ("3 seeds", "standard deviation", "30 rounds", "to fedit", "95 % t interval", "† serves one model"):
        assert words in text.splitlines()[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert len(lines) == 2 + len(NAMES) + 1
    assert "| fedit (reference) |" in text
    assert "- rac-lora: 1 of 3 seeds failed: round 7" in text
    assert "Seeds still to come: flame (1)." in text


def test_latex_is_escaped_and_balanced(whole: Path) -> None:
    text = (whole / "results.tex").read_text()
    assert re.findall(r"\\(begin|end)\{(\S+?)\}", text) == [
        ("begin", "table*"), ("begin", "tabular"), ("end", "tabular"), ("end", "table*"),
    ]  # fmt: skip
    body = text.split("\n", 1)[1]
    assert not re.search(r"(?<!\\)[%#_]", body)
    bare = re.sub(r"\\[{}]", "", body)
    assert bare.count("{") == bare.count("}")
    assert len(re.findall(r"(?<!\\)\$", body)) % 2 == 0
    assert "mole\\_top2 $\\dagger$ &" in text
    assert "ce-lora 50\\% &" in text
    columns = len(re.search(r"\{tabular\}\{(\w+)\}", text).group(1))
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 1 + len(NAMES)
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {columns - 1}
    best = leaders(list(entries_of(whole).values()))[0]
    assert f"{best.label} & \\textbf{{{100 * best.test.mean:.1f}}} $\\pm$" in text
    assert "pooled & 8" in text
    assert text.count(r"\midrule") == 2
    assert r"\label{tab:all-methods}" in text


def test_latex_text_escapes_every_special_character() -> None:
    assert latex_text("a_b%c&d#e$f{g}") == r"a\_b\%c\&d\#e\$f\{g\}"
    assert latex_text("\\~^−±") == r"\textbackslash{}\textasciitilde{}\textasciicircum{}$-$$\pm$"


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_table_fits_the_terminal(whole: Path, width: int) -> None:
    text = printed(whole, width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "fedit (reference)" in text
    assert "baselines" in text
    assert "rac-lora: 1 of 3 seeds failed" in " ".join(text.split())
    assert ("peak" in text) == (width == 200)
    if width >= 80:
        assert re.search(r"rac-lora +\d\d\.\d ± \d\.\d .* 2/3", text)
        assert re.search(r"florist +– .* 0/3", text)


# Page


def test_the_page_stands_alone_and_shows_everything(whole: Path) -> None:
    page = Page(whole / "report.html")
    assert page.figures == list(FIGURES)
    for name in FIGURES:
        ET.fromstring((whole / "figures" / f"{name}.svg").read_bytes())
        assert (whole / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    rows = {row[0]: row for row in reversed(page.rows) if row}
    assert rows["rac-lora"][-2:] != []
    failed = [row for row in page.rows if len(row) == 5 and row[4].startswith("cells/")]
    assert ["rac-lora", "1", "result", WHOLE.failed["rac-lora", 1], "cells/rac-lora/point-0/seed-1"] in failed
    assert [row[0] for row in failed] == ["florist", "rac-lora"]
    points = [row for row in page.rows if row[0] == "fslora" and "chosen" in row]
    assert points == [["fslora", "lr\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}0.0005", "78.0 %", "0.5000", "chosen", "–"]]
    assert "fslora compare experiment.toml --out NEW" in page.text
    assert "not finished" in page.text
    assert "61 of 66" in page.text
    assert 'reference = "fedit"' in page.text


def test_the_same_folder_gives_the_same_bytes(small: Path) -> None:
    def content() -> dict[str, bytes]:
        write_comparison(small)
        names = ("report.html", "results.csv", "results.json", "results.md", "results.tex", "figures/*")
        return {str(file): file.read_bytes() for name in names for file in sorted(small.glob(name))}

    first = content()
    assert len(first) == 5 + 2 * len(FIGURES)
    assert content() == first
    assert not list(small.rglob("*.tmp"))


def result_of(path: Path) -> str:
    record = read_comparison(path)
    return comparison_headline(record, results(record)).result


def exact(path: Path, values: dict[str, tuple[float, ...]], **changes: Any) -> Path:
    """A comparison with these test accuracies."""
    accuracies = {(label, seed): value for label, row in values.items() for seed, value in enumerate(row)}
    seeds = tuple(range(len(next(iter(values.values())))))
    made = Made(labels=tuple(values), seeds=seeds, accuracies=accuracies, rounds=2, extras=False)
    return write_comparison_folder(path, replace(made, **changes))


def test_a_clear_difference_is_called_one(tmp_path: Path) -> None:
    text = result_of(exact(tmp_path, {"fedit": (0.70, 0.71, 0.72), "fslora": (0.80, 0.811, 0.819)}))
    assert text.startswith("fslora has the highest test accuracy: 81.0 % (± 1.0 over 3 seeds).")
    assert "10.0 points above the reference, fedit (71.0 % ± 1.0)" in text
    assert "over 3 paired seeds, +9.8 to +10.2, excludes zero." in text
    assert "overlap" not in text


def test_an_unclear_difference_is_called_one(tmp_path: Path) -> None:
    text = result_of(exact(tmp_path, {"fedit": (0.70, 0.73, 0.72), "fslora": (0.72, 0.71, 0.75)}))
    assert "does not exclude zero" in text
    assert "fslora cannot be told from fedit: the results overlap." in text


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    path = exact(tmp_path, {"fedit": (0.70,), "fslora": (0.72,)})
    assert "2.0 points above the reference, fedit (70.0 %), with one seed" in result_of(path)
    row = comparison_table(path).cells()[0]
    assert row[:3] == ["fslora", "72.0", "+2.0"]
    assert "One seed: no spread and no interval." in printed(path, 100)
    write_comparison(path)
    assert "±" not in (path / "results.tex").read_text()


def test_the_reference_itself_may_be_best(tmp_path: Path) -> None:
    text = result_of(exact(tmp_path, {"fedit": (0.80, 0.81), "fslora": (0.72, 0.73)}))
    assert text.startswith("fedit has the highest test accuracy: 80.5 %")
    assert "That is the reference itself." in text


def test_a_reference_that_failed_everywhere_is_said(tmp_path: Path) -> None:
    made = replace(SMALL, failed={("fedit", seed): "out of memory" for seed in SMALL.seeds})
    path = write_comparison_folder(tmp_path / "c", made)
    write_comparison(path)
    page = Page(path / "report.html")
    assert "The reference, fedit, has no result, so no difference to it is known." in page.text
    assert "fedit: 3 of 3 seeds failed: out of memory." in page.text
    assert set(FIGURES) - set(page.figures) == {"difference"}
    assert "difference" not in [column.key for column in comparison_table(path).columns]


def test_nothing_finished_is_a_report_too(tmp_path: Path) -> None:
    made = replace(SMALL, waiting=tuple((label, seed) for label in SMALL.labels for seed in SMALL.seeds))
    path = write_comparison_folder(tmp_path / "c", made)
    (path / "figures").mkdir()
    (path / "figures" / "pareto.png").write_bytes(b"old")
    write_comparison(path)
    page = Page(path / "report.html")
    assert "There is no result yet" in page.text
    assert page.figures == []
    assert list((path / "figures").iterdir()) == []
    assert "0/3" in printed(path, 80)
    (path / "environment.json").unlink()
    (path / "experiment.toml").unlink()
    write_comparison(path)


def test_a_finished_cell_that_cannot_be_read_counts_as_failed(tmp_path: Path) -> None:
    path = write_comparison_folder(tmp_path / "c", SMALL)
    (path / "cells/fslora/point-0/seed-1/summary.json").write_text('{"method": "fs')
    (path / "cells/fslora/point-0/seed-2/summary.json").unlink()
    entry = entries_of(path)["fslora"]
    assert (len(entry.runs), entry.failed) == (1, 2)
    assert "summary.json is damaged" in entry.problems[0]
    assert "no summary.json" in entry.problems[1]


def test_hostile_names_are_shown_and_never_run(tmp_path: Path) -> None:
    path = write_comparison_folder(tmp_path / "c", replace(SMALL, name="<script>alert(1)</script> $x_1$ & 50%"))
    text = (path / "comparison.json").read_text().replace('"fedsa-lora"', '"<b>$x_{1}$"')
    (path / "comparison.json").write_text(text)
    write_comparison(path)
    assert "<b>$x_{1}$ †" in Page(path / "report.html").text
    assert "<script>" not in (path / "report.html").read_text()
    assert r"\textless{}b\textgreater{}\$x\_\{1\}\$" in (path / "results.tex").read_text()
    assert r"\label{tab:script-alert-1-script-x-1-50}" in (path / "results.tex").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: {**record, "format": 7}, "has format 7; this fslora reads format 1"),
        (lambda record: {**record, "seeds": "many"}, r"comparison\.json is damaged: seeds is 'many'"),
        (lambda record: {**record, "labels": ["fedit", "new"]}, "methods has no entry for new"),
    ],
)
def test_damage_is_named(small: Path, tmp_path: Path, change: Any, message: str) -> None:
    record = change(json.loads((small / "comparison.json").read_text()))
    (tmp_path / "comparison.json").write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match=message):
        comparison_table(tmp_path)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is no comparison folder .* give the one that `fslora compare` wrote"):
        write_comparison(tmp_path)


# Figures


def figures_of(path: Path) -> set[str]:
    record = read_comparison(path)
    return {drawn.name for drawn in draw_comparison(record, results(record))}


def test_a_figure_is_there_exactly_when_its_data_is(small: Path, tmp_path: Path) -> None:
    assert figures_of(small) == set(FIGURES)
    plain = write_comparison_folder(tmp_path / "plain", replace(SMALL, extras=False))
    assert figures_of(plain) == set(FIGURES) - {"spectra", "effective-rank"}
    for cell in plain.glob("cells/*/*/*"):
        summary = json.loads((cell / "summary.json").read_text())
        (cell / "summary.json").write_text(json.dumps({**summary, "clients": []}))
        (cell / "metrics.jsonl").unlink()
    assert figures_of(plain) == {"difference", "pareto"}


def test_every_method_has_one_look_and_those_in_front_their_own_colour(whole: Path) -> None:
    entries = list(entries_of(whole).values())
    looks = method_looks(entries)
    assert len({(look.style.colour, str(look.style.line), look.style.marker) for look in looks.values()}) == len(NAMES)
    strong = [label for label, look in looks.items() if look.strong]
    assert len(strong) == 1 + 3 + len(BASELINES)
    assert len({looks[label].style.colour for label in strong}) == len(strong)
    assert {label for label, look in looks.items() if look.hollow} == set(PERSONAL)
    few = method_looks(entries[:4])
    assert all(look.strong for look in few.values())


def test_curves_are_means_over_seeds(whole: Path) -> None:
    entry = entries_of(whole)["fedit"]
    curve = mean_curve(
        list(entry.runs.values()),
        lambda row: row.validation["accuracy"] if row.validation else None,
        lambda row: float(row.bytes_total),
    )
    assert curve is not None
    rows = [[row for row in run.rounds if row.validation] for run in entry.runs.values()]
    values = np.array([[row.validation["accuracy"] for row in run] for run in rows])
    np.testing.assert_allclose(curve.mean, values.mean(0))
    np.testing.assert_allclose(curve.low, values.min(0))
    np.testing.assert_allclose(curve.high, values.max(0))
    np.testing.assert_allclose(curve.x, [row.bytes_total for row in rows[0]])


def test_runs_that_a_budget_ends_in_different_rounds(tmp_path: Path) -> None:
    lengths = {("fedit", 0): 4, ("fedit", 1): 5, ("fedit", 2): 5} | {("fslora", seed): 15 for seed in (0, 1, 2)}
    labels = ("fedit", "fslora")
    made = replace(SMALL, labels=labels, lengths=lengths, budget=("bytes", 5e7))
    path = write_comparison_folder(tmp_path / "c", made)
    entries = results(read_comparison(path))
    curve = mean_curve(
        list(entries[0].runs.values()),
        lambda row: row.validation["accuracy"] if row.validation else None,
        lambda row: float(row.round),
    )
    assert curve is not None
    assert curve.x == pytest.approx([0, 3, 14 / 3])
    figure = rounds_figure(entries, method_looks(entries))
    assert figure is not None
    assert len(figure.axes) == 1
    assert "Budget of every method: 50.0 MB sent." in printed(path, 100)
    assert comparison_table(path).dicts()[1]["rounds"] == pytest.approx(14 / 3)


def test_labels_do_not_overlap(whole: Path) -> None:
    entries = list(entries_of(whole).values())
    looks = method_looks(entries)
    for draw in (rounds_figure, traffic_figure, rank_figure, pareto_figure):
        figure = draw(entries, looks)
        assert figure is not None
        figure.draw_without_rendering()
        names = {look.name for look in looks.values()}
        texts = [t for axes in figure.axes for t in axes.texts if t.get_text().split(",")[0].split(" (")[0] in names]
        assert len(texts) >= len(NAMES) - 2, draw.__name__
        boxes = [text.get_window_extent() for text in texts]
        for place, box in enumerate(boxes):
            assert not any(box.shrunk(0.98, 0.7).overlaps(other.shrunk(0.98, 0.7)) for other in boxes[:place])
            assert box.x0 >= 0
            assert box.x1 <= figure.bbox.x1


def test_far_outliers_leave_the_panel_and_are_marked(whole: Path) -> None:
    entries = list(entries_of(whole).values())
    looks = method_looks(entries)
    figure = pareto_figure(entries, looks)
    assert figure is not None
    low, high = figure.axes[0].get_ylim()
    assert low > 0.6
    assert high < 0.9
    assert any(text.get_text() == "lola-deft, 50.3 % ↓" for text in figure.axes[0].texts)
    figure = difference_figure(entries, looks)
    assert figure is not None
    assert figure.axes[0].get_xlim()[0] > -0.15


def test_a_method_that_sends_nothing_is_a_level_even_beyond_the_panel(tmp_path: Path) -> None:
    labels = (*tuple(NAMES)[:6], "pooled")
    made = Made(labels=labels, seeds=(0,), rounds=3, accuracies={("pooled", 0): 0.31})
    entries = results(read_comparison(write_comparison_folder(tmp_path / "c", made)))
    figure = pareto_figure(entries, method_looks(entries))
    assert figure is not None
    axes = figure.axes[0]
    assert axes.get_ylim()[0] > 0.6
    assert "pooled (sends nothing), 31.0 % ↓" in [text.get_text() for text in axes.texts]
    assert any(list(line.get_ydata()) == [axes.get_ylim()[0]] * 2 for line in axes.lines)


def test_focus_keeps_the_bulk() -> None:
    values = [0.80, 0.81, 0.82, 0.83]
    low, high = focus([(value, value - 0.01, value + 0.01) for value in values])
    assert (low < 0.79, high > 0.84) == (True, True)
    outlier = focus([(value, value - 0.01, value + 0.01) for value in [*values, 0.5]])
    assert outlier[0] > 0.7
    low, high = focus([(0.5, None, None)])
    assert low < 0.5 < high


def test_spaced_keeps_order_and_gaps() -> None:
    assert spaced([0.1, 0.5, 0.9], 0.05) == pytest.approx([0.1, 0.5, 0.9])
    assert spaced([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert spaced([0.0, 0.0], 0.2) == pytest.approx([0.0, 0.2])
    assert spaced([-3.0, 1.0, 1.0], 0.1) == pytest.approx([0.0, 0.9, 1.0])
    rng = np.random.default_rng(0)
    for _ in range(50):
        places = spaced(sorted(rng.uniform(-0.2, 1.2, 18)), 0.05)
        assert min(np.diff(places)) >= 0.05 - 1e-9
        assert -1e-9 <= places[0] <= places[-1] <= 1 + 1e-9


def test_rows_show_ranks_and_clients(small: Path) -> None:
    entries = results(read_comparison(small))
    looks = method_looks(entries)
    figure = by_rank_figure(entries, looks)
    assert figure is not None
    dots = figure.axes[0].collections[1].get_offsets()
    entry = max((e for e in entries if not e.entry.baseline), key=lambda e: e.own.mean)
    ranks = [c.value for c in entry.clients if c.rank == 24]
    assert dots[-1][0] == pytest.approx(np.mean(ranks))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"rank {rank}" for rank in RANKS]
    figure = fairness_figure(entries, looks)
    assert figure is not None
    assert len(figure.axes[0].collections[0].get_offsets()) == 3 * (CLIENTS - 1)


def test_spectra_are_means_at_the_end(small: Path) -> None:
    entries = results(read_comparison(small))
    figure = spectra_figure(entries, method_looks(entries))
    assert figure is not None
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == 4
    own = {axes.get_title(loc="left"): axes.lines[-1].get_ydata() for axes in shown}
    last = [run.rounds[-1].spectrum for run in entries[1].runs.values()]
    np.testing.assert_allclose(own["fslora"], np.mean(last, 0))


# Text


def test_budgets_and_settings_are_readable(small: Path) -> None:
    amounts = {"rounds": 30, "bytes": 1.5e9, "flops": 2.5e15, "seconds": 7260, "other": 4}
    assert [Budget(kind, amount).text() for kind, amount in amounts.items()] == [
        "30 rounds",
        "1.50 GB sent",
        "2.5 PFLOP at the clients",
        "2 h 01 min of simulated time",
        "4 other",
    ]
    shown = assignments({"local.lr": 0.0015, "method.mu": 0.01}).replace("\N{NO-BREAK SPACE}", " ")
    assert shown == "lr = 0.0015, mu = 0.01"
    assert "method.rank" in assignments({"method.rank": 2, "adapter.rank": 4})
    assert assignments({}) == "as configured"
    record = read_comparison(small)
    table = results_table(record, results(record))
    assert table.title == "all methods: 3 methods and 1 baseline, 3 seeds"
    assert table.groups == {3: "baselines"}
    assert "bind" not in table.note
    thrifty = replace(record, budget=Budget("bytes", 1e6))
    assert "does not bind baselines" in results_table(thrifty, results(record)).note
