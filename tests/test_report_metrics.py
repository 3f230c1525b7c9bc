"""Reports by other metrics than accuracy: order, signs, words, units, and what may be missing.

Most of it is compared with the same folder in accuracies, by a map that turns better into lower.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fslora.console import score_fact
from fslora.evaluation import tables
from fslora.metrics import METRICS
from fslora.report import comparison_table, headline, parse_data, partition_figure, read_run, write_comparison
from fslora.report.comparison import read_comparison
from fslora.report.comparison_figures import draw_comparison
from fslora.report.comparison_headline import comparison_headline, tally
from fslora.report.comparison_looks import method_looks
from fslora.report.comparison_maps import pareto_figure
from fslora.report.comparison_results import leaders, level_of, ranked, results, undominated, worst_tenth
from fslora.report.comparison_rows import difference_figure, fairness_figure
from fslora.report.figures import draw_all
from fslora.report.merit import change_text, distance_text, number_text, outcome_text, spread_text, value_text, wide
from fslora.report.tables import by_label_table, class_table, clients_table, closing_table, fleet_table
from test_report import Made as Run
from test_report import page_of, write_run, write_with_variants
from test_report_comparison import NAMES, Made, Page, exact, write_comparison_folder

ACCURACY, PERPLEXITY, MATTHEWS, LOSS = (METRICS[name] for name in ("accuracy", "perplexity", "matthews", "loss"))
Scores = dict[str, Any]


def lowered(scores: Scores) -> Scores:
    """Perplexities of which lower ones are those of higher accuracies."""
    return {"loss": scores["loss"], "perplexity": 100 * (1 - scores["accuracy"])}


def rewritten(value: Any, turn: Callable[[Scores], Scores]) -> Any:
    """A JSON value with all its scores turned."""
    if isinstance(value, dict):
        return turn(value) if "accuracy" in value else {key: rewritten(part, turn) for key, part in value.items()}
    return [rewritten(part, turn) for part in value] if isinstance(value, list) else value


def turned(path: Path, name: str = "perplexity", turn: Callable[[Scores], Scores] = lowered) -> Path:
    """A folder whose scores, wherever they are in it, are turned into those of another metric."""
    for file in path.rglob("*.json"):
        value = rewritten(json.loads(file.read_text()), turn)
        if file.name == "data.json":
            value["metric"] = METRICS[name].as_dict()
        file.write_text(json.dumps(value))
    for file in path.rglob("metrics.jsonl"):
        rows = [json.dumps(rewritten(json.loads(line), turn)) for line in file.read_text().splitlines()]
        file.write_text("\n".join(rows) + "\n")
    return path


def changed(path: Path, change: Callable[[Any], Any]) -> None:
    """Replaces a JSON file by what ``change`` makes of it."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


LABELS = (*tuple(NAMES)[:9], "mole_top2", "pooled")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same comparison in accuracies and in perplexities."""
    made = Made(labels=LABELS, rounds=6, grid=(5e-4, 1.5e-3))
    folder = tmp_path_factory.mktemp("metrics")
    high = write_comparison_folder(folder / "high", made)
    low = turned(write_comparison_folder(folder / "low", made))
    write_comparison(low)
    return high, low


# Comparisons


def test_the_order_is_that_of_what_is_better(both: tuple[Path, Path]) -> None:
    high, low = (results(read_comparison(path)) for path in both)
    assert {entry.metric for entry in low} == {PERPLEXITY}
    for order in (ranked, undominated, lambda entries: leaders(entries, 5)):
        assert [entry.label for entry in order(low)] == [entry.label for entry in order(high)]
    assert len(undominated(low)) > 1
    assert level_of(low) == pytest.approx(100 * (1 - level_of(high)))


def test_differences_are_ours_minus_theirs_whichever_is_better(both: tuple[Path, Path]) -> None:
    high, low = (results(read_comparison(path)) for path in both)
    compared = 0
    for ours, theirs in zip(high, low, strict=True):
        if ours.difference and theirs.difference:
            ends = (theirs.difference.mean, theirs.difference.low, theirs.difference.high)
            mirrored = (ours.difference.mean, ours.difference.high, ours.difference.low)
            assert ends == pytest.approx([-100 * end for end in mirrored])
            assert theirs.difference.sign == -ours.difference.sign
            compared += 1
    assert compared == len(LABELS) - 1


def test_the_worst_tenth_is_the_highest_where_lower_is_better(both: tuple[Path, Path]) -> None:
    high, low = (results(read_comparison(path)) for path in both)
    for ours, theirs in zip(high, low, strict=True):
        assert theirs.worst.mean == pytest.approx(100 * (1 - ours.worst.mean))
        assert theirs.worst.mean > theirs.own.mean
    assert worst_tenth([3.0, 9.0, 5.0], PERPLEXITY) == 9.0
    assert worst_tenth([0.3, 0.9, 0.5], MATTHEWS) == 0.3


def test_the_words_of_a_comparison_know_the_direction(both: tuple[Path, Path]) -> None:
    record = read_comparison(both[1])
    entries = results(record)
    best = leaders(entries)[0]
    top = comparison_headline(record, entries)
    assert top.result.startswith(f"{best.label} has the lowest test perplexity: {best.test.mean:.2f} (± ")
    assert f"That is {-best.difference.mean:.2f} below the reference, fedit" in top.result
    assert "point" not in top.result
    tiles = {tile.name: tile for tile in top.tiles}
    assert tiles["Lowest test perplexity"].value == f"{best.test.mean:.2f}"
    fair = [entry.worst.mean for entry in entries if not entry.entry.baseline]
    assert tiles["Best for the worst tenth"].value == f"{min(fair):.2f}"
    signs = [e.difference.sign for e in entries if e.difference and not e.entry.baseline]
    told = f"puts {signs.count(-1)} below fedit and {signs.count(1)} above it"
    assert told in tally(record, entries)
    text = Page(both[1] / "report.html").text
    for words in (
        "Perplexity by round", "Perplexity by traffic", "What perplexity costs", "Down and left is better",
        "Left of the line is better", "further left leaves fewer behind", "Perplexity: lower is better.",
        "mean over the highest tenth", "validation perplexity", "the perplexity on own examples",
    ):  # fmt: skip
        assert words in text, words
    assert "accuracy" not in text
    assert "%" not in " ".join(row[1] for row in Page(both[1] / "report.html").rows if row[0] in LABELS)


def test_the_files_of_a_comparison_name_the_metric(both: tuple[Path, Path]) -> None:
    path = both[1]
    entries = {entry.label: entry for entry in results(read_comparison(path))}
    for row in csv.DictReader(io.StringIO((path / "results.csv").read_text())):
        assert float(row["test_perplexity_mean"]) == entries[row["label"]].test.mean
        assert row["own_perplexity_n"] == "3"
        assert not any("accuracy" in key for key in row)
    content = json.loads((path / "results.json").read_text())
    cell = next(cell for cell in content["cells"] if cell["result"])
    assert cell["validation_perplexity"] == pytest.approx(22)
    assert cell["result"]["own_perplexity"][0].keys() == {"rank", "perplexity"}
    assert "accuracy" not in json.dumps(content)
    best = leaders(list(entries.values()))[0]
    latex = (path / "results.tex").read_text()
    assert r"Method & Test perplexity & $\Delta$ & Own & Worst 10\% &" in latex
    assert f"{best.label} & \\textbf{{{best.test.mean:.2f}}} $\\pm$" in latex
    assert "Bold: the lowest perplexity of the column" in latex
    assert latex.count(r"\textbf") == 3
    table = comparison_table(path)
    assert [column.title for column in table.columns[:3]] == ["method", "test perplexity", "difference to fedit"]
    assert "| test perplexity | difference to fedit | own examples | worst tenth |" in (path / "results.md").read_text()


def test_the_figures_of_a_comparison_have_the_metric_s_axes(both: tuple[Path, Path]) -> None:
    record = read_comparison(both[1])
    entries = results(record)
    looks = method_looks(entries)
    front = pareto_figure(entries, looks).axes[0]
    assert front.get_ylabel() == "test perplexity"
    assert not any("%" in label.get_text() for label in front.get_yticklabels())
    stairs = next(line for line in front.lines if line.get_drawstyle() == "steps-post")
    assert list(stairs.get_ydata()) == sorted(stairs.get_ydata(), reverse=True)
    rows = difference_figure(entries, looks).axes[0]
    assert rows.get_xlabel() == "test perplexity minus that of fedit, same seed"
    names = [label.get_text() for label in rows.get_yticklabels()]
    order = sorted((e for e in entries if e.difference and not e.entry.baseline), key=lambda e: e.difference.mean)
    assert [name.removesuffix(" †") for name in names[: len(order)]] == [entry.label for entry in order]
    assert fairness_figure(entries, looks).axes[0].get_xlabel() == "perplexity on a client's own examples"
    assert {drawn.name for drawn in draw_comparison(record, entries)} >= {"difference", "rounds", "pareto", "fairness"}


def test_seeds_without_a_finite_score_are_told(tmp_path: Path) -> None:
    path = turned(exact(tmp_path, {"fedit": (0.7, 0.71), "fslora": (0.8, 0.81), "flora": (0.6, 0.6)}))
    for label, value in (("fslora", None), ("flora", inf)):
        for seed in (0, 1):
            summary = path / f"cells/{label}/point-0/seed-{seed}/summary.json"
            changed(summary, lambda old, value=value: old | {"test": {"after": {"loss": 3.0, "perplexity": value}}})
    record = read_comparison(path)
    entries = results(record)
    top = comparison_headline(record, entries)
    assert top.result.startswith("fedit has the lowest test perplexity: 29.50")
    assert "flora: 2 of 2 seeds finished without a finite test perplexity." in top.notes
    assert ranked(entries)[0].label == "fedit"
    write_comparison(path)


def test_a_comparison_that_has_just_begun_knows_its_metric(tmp_path: Path) -> None:
    made = Made(labels=("fedit", "fslora"), seeds=(0,), waiting=(("fedit", 0), ("fslora", 0)), grid=(1e-3, 2e-3))
    path = turned(write_comparison_folder(tmp_path / "c", made))
    assert read_comparison(path).metric == ACCURACY
    for name, content in (("fedit", "{"), ("fslora", json.dumps({"metric": PERPLEXITY.as_dict()}))):
        cell = path / f"cells/{name}/point-1/seed-0"
        cell.mkdir(parents=True)
        (cell / "data.json").write_text(content)
    assert read_comparison(path).metric == PERPLEXITY
    write_comparison(path)
    assert ["fedit", "22.00"] in [[row[0], row[2]] for row in Page(path / "report.html").rows if len(row) > 2]


def test_a_correlation_is_in_points_and_has_no_sampling_error(tmp_path: Path) -> None:
    path = exact(tmp_path / "c", {"fedit": (0.70, 0.71), "fslora": (0.80, 0.811)})
    path = turned(path, "matthews", lambda scores: scores | {"matthews": scores["accuracy"] - 0.5})
    record = read_comparison(path)
    text = comparison_headline(record, results(record)).result
    assert text.startswith("fslora has the highest test Matthews correlation: 30.6 % (± 0.8 over 2 seeds).")
    assert "10.1 points above the reference, fedit (20.5 % ± 0.7)" in text
    run = turned(write_run(tmp_path / "run", Run(rounds=2)), "matthews", lambda s: s | {"matthews": 0.123})
    row = closing_table(read_run(run).runs).dicts()[0]
    assert (row["test_after"], row["margin"]) == (0.123, None)
    assert closing_table(read_run(run).runs).note == "Scores: Matthews correlation."


def test_loss_itself_may_be_the_metric(tmp_path: Path) -> None:
    made = Made(labels=("fedit", "fslora"), seeds=(0, 1), rounds=3, grid=(1e-3, 2e-3))
    path = turned(
        write_comparison_folder(tmp_path / "c", made), "loss", lambda scores: {"loss": 1 - scores["accuracy"]}
    )
    write_comparison(path)
    page = Page(path / "report.html")
    assert "fslora has the lowest test loss" in page.text
    assert ["method", "point", "validation loss", ""] in page.rows


# Runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as those of causal models are: perplexities, no classes, no baseline, a test by task."""
    path = write_with_variants(tmp_path_factory.mktemp("metrics") / "run", rounds=12)
    turned(path)
    changed(path / "baseline.json", lambda old: {"name": old["name"], "validation": None, "test": None})
    for data in path.rglob("data.json"):
        changed(data, one_class)
    for place, summary in enumerate([path / "summary.json", *sorted(path.glob("variants/*/summary.json"))]):
        scores = {"boolq": (40 + place, 20 + place), "arc_easy": (60 + place, 30 + place)}
        by_label = {
            name: {part: {"perplexity": value} for part, value in zip(("before", "after"), values, strict=True)}
            for name, values in scores.items()
        }
        changed(summary, lambda old, by_label=by_label: old | {"by_label": by_label})
    return path


def one_class(data: dict[str, Any]) -> dict[str, Any]:
    """The same data without classes."""
    counts = [[sum(row)] for row in data["partition"]["label_counts"]]
    return data | {"label_names": ["all"], "partition": data["partition"] | {"label_counts": counts}}


def test_a_run_s_page_speaks_of_its_metric(run: Path) -> None:
    page = page_of(run)
    assert page.figures == {"score", "loss", "bytes", "coverage", "clients", "partition"}
    assert "Test perplexity went from 49.00 to 18.00." in page.words
    for words in ("Validation perplexity", "Perplexity: lower is better.", "before 49.00; lower is better"):
        assert words in page.text, words
    for words in ("accuracy", "sampling error", "points", "classes", "linear head"):
        assert words not in page.text, words
    rows = {row[0]: row for row in reversed(page.rows) if row}
    assert rows["fslora"][4:6] == ["49.00", "18.00"]
    assert rows["mean over 2"] == ["mean over 2", "50.00", "25.00", "27.00", "26.00"]
    assert rows["boolq"] == ["boolq", "40.00", "20.00", "22.00", "21.00"]
    titles = next(row for row in page.rows if row[1:2] == ["before"])
    assert titles == ["", "before", "after, fslora", "after, fedit-low", "after, fedit-full"]
    drawn = {entry.name: entry for entry in draw_all(read_run(run))}
    assert drawn["score"].reading.startswith("Lower is better. Left,")
    assert drawn["score"].figure.axes[0].get_ylabel() == "validation perplexity"
    assert drawn["clients"].figure.axes[0].get_ylabel() == "perplexity on own test"


def test_what_clients_gain_is_a_plain_change(run: Path) -> None:
    table = clients_table(read_run(run))
    assert [column.title for column in table.columns][-3:] == ["own test before", "own test after", "change"]
    row = table.dicts()[0]
    assert row["gain"] == pytest.approx(row["after"] - row["before"])
    assert table.cells()[0][-1].startswith("−")


def test_one_class_is_plain_bars(run: Path) -> None:
    data = read_run(run).data
    assert data is not None
    figure = partition_figure(data)
    assert figure.legends == []
    assert len(figure.axes[1].patches) == len(data.fleet)
    assert class_table(data).rows == ()
    assert [column.key for column in fleet_table(data).columns] == ["client", "rank", "examples", "holdout"]


def test_groups_are_no_classes(run: Path) -> None:
    fields = json.loads((run / "data.json").read_text())
    counts = [[1, 2, 3] for _ in fields["fleet"]]
    fields |= {"label_names": ["low", "middle"], "partition": fields["partition"] | {"label_counts": counts}}
    assert class_table(parse_data(fields)).title == "Groups"
    assert class_table(parse_data(fields)).dicts()[2]["class"] == "group 2"


def test_scores_by_label_need_two_labels_and_their_mean_all_of_them(run: Path, tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "run", Run(rounds=1)))
    assert by_label_table(record.runs).rows == ()
    path = tmp_path / "run" / "summary.json"
    after = {"one": {"after": {"accuracy": 0.5}}, "two": {"before": None, "after": {"accuracy": nan}}}
    changed(path, lambda old: old | {"by_label": {"one": after["one"]}})
    assert by_label_table(read_run(tmp_path / "run").runs).rows == ()
    changed(path, lambda old: old | {"by_label": after})
    table = by_label_table(read_run(tmp_path / "run").runs)
    assert table.cells() == [["one", "50.0 %"], ["two", "–"], ["mean over 2", "–"]]


def test_a_reference_is_above_or_below_and_better_or_worse(tmp_path: Path) -> None:
    path = turned(write_run(tmp_path / "run", Run(rounds=2)))
    assert headline(read_run(path)).result.endswith(
        "reaches 41.80. Federated fine-tuning is 23.80 below it, which is better."
    )
    changed(path / "baseline.json", lambda old: old | {"test": {"perplexity": 10.0}})
    assert headline(read_run(path)).result.endswith("Federated fine-tuning is 8.00 above it, which is worse.")
    assert headline(read_run(path)).tiles[1].remark == "this run: +8.00"


@pytest.mark.parametrize("value", [None, nan, inf])
def test_a_score_may_be_missing(tmp_path: Path, value: float | None) -> None:
    path = turned(write_run(tmp_path / "run", Run(rounds=6)), turn=lambda scores: {"loss": 9.0, "perplexity": value})
    record = read_run(path)
    assert headline(record).result == "The test gave no finite perplexity."
    assert closing_table(record.runs).dicts()[0]["test_after"] is None
    assert {entry.name for entry in draw_all(record)} == {"loss", "bytes", "coverage", "partition"}
    page_of(path)


# Texts


def test_numbers_are_in_the_metric_s_unit() -> None:
    assert [value_text(PERPLEXITY, value) for value in (None, inf, 3.14159, 24.534, 812.34, 12345.6)] == [
        "–", "–", "3.142", "24.53", "812.3", "12346",
    ]  # fmt: skip
    assert (value_text(ACCURACY, 0.8213), value_text(MATTHEWS, -0.031)) == ("82.1 %", "-3.1 %")
    assert spread_text(PERPLEXITY, 24.534, 0.3127) == "24.53 ± 0.31"
    assert (spread_text(ACCURACY, 0.8, 0.01), spread_text(ACCURACY, 0.8, None)) == ("80.0 ± 1.0", "80.0")
    assert number_text(LOSS, 0.25, 12.0) == "0.25"
    assert [change_text(PERPLEXITY, value, 20.0) for value in (-0.421, 0.421, -0.001, None)] == [
        "−0.42", "+0.42", "0.00", "–",
    ]  # fmt: skip
    assert (distance_text(PERPLEXITY, -0.421, 20.0), distance_text(ACCURACY, -0.031)) == ("0.42", "3.1 points")
    assert outcome_text(METRICS["exact_match"], 0.5) == "50.0 % right"
    assert outcome_text(PERPLEXITY, 24.5) == "perplexity 24.50"
    assert (wide(PERPLEXITY, [10, 90]), wide(PERPLEXITY, [10, 20]), wide(PERPLEXITY, [])) == (True, False, False)
    assert not wide(ACCURACY, [0.01, 0.9])


def test_the_bar_shows_the_metric_that_is_judged_by() -> None:
    classes = {"loss": 0.5, "matthews": 0.3, "accuracy": 0.9}
    assert score_fact(classes, None) == {"score": "acc 90.0 %"}
    assert score_fact(classes, "matthews") == {"score": "Matthews corr 30.0 %"}
    assert score_fact({"loss": 3.2, "perplexity": 24.53}, None) == {"score": "perplexity 24.53"}
    assert score_fact({"loss": 3.2, "spearman": 0.4, "pearson": None}, None) == {"score": "Pearson corr –"}
    assert score_fact({}, "f1") == {}


def test_an_evaluation_is_shown_by_its_metric() -> None:
    scores = {"before": {"loss": 4.0, "perplexity": 54.6}, "after": {"loss": 3.0, "perplexity": 20.1}}
    result = {
        "metric": PERPLEXITY.as_dict(),
        "test": scores,
        "by_label": {"[b]": scores, "two": {"before": None, "after": {"perplexity": 30.1}}},
        "clients": [{"id": 0, "rank": 4, "examples": 7, "before": None, "after": scores["after"]}],
    }
    file = io.StringIO()
    for table in tables(result):
        Console(width=80, file=file, color_system=None).print(table)
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in file.getvalue().splitlines()]
    for row in (
        ["perplexity", "54.60", "20.10"], ["loss", "4.0000", "3.0000"], ["[b]", "54.60", "20.10"],
        ["mean over 2", "–", "25.10"], ["0", "4", "7", "–", "20.10"],
    ):  # fmt: skip
        assert row in lines, row
    assert len(tables({"test": {"before": {}, "after": {"accuracy": 0.5}}, "clients": []})) == 1
