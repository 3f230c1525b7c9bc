"""The top of a comparison's report: which method is best, how sure that is, and what is missing."""

from __future__ import annotations

from collections.abc import Sequence

from fslora.report.comparison import ComparisonRecord
from fslora.report.comparison_results import MethodResult, leaders, paired
from fslora.report.comparison_tables import problems, size_text
from fslora.report.headline import Headline, Tile
from fslora.report.merit import (
    best_word,
    better,
    capital,
    change_text,
    distance_text,
    goodness,
    number_text,
    value_text,
    worse,
)
from fslora.report.read import DataRecord
from fslora.report.text import count, counted, plain, span


def comparison_headline(comparison: ComparisonRecord, entries: Sequence[MethodResult]) -> Headline:
    """Returns the top of the report."""
    return Headline(
        _what(comparison, entries),
        " ".join(_result(comparison, entries)),
        tuple(_tiles(comparison, entries)),
        tuple(_notes(comparison, entries)),
    )


def _what(comparison: ComparisonRecord, entries: Sequence[MethodResult]) -> str:
    data = next((run.data for entry in entries for run in entry.runs.values() if run.data), None)
    fleet = ""
    if data and data.fleet:
        fleet = f" Fleet: {len(data.fleet)} clients of rank {span([client.rank for client in data.fleet])}."
    return (
        f"{size_text(entries)} on the same data and clients with {counted(len(comparison.seeds), 'seed')}; the budget "
        f"of every method is {comparison.budget.text()}, the reference {plain(comparison.reference)}."
        f"{f' Data: {_data_text(data)}.' if data else ''}{fleet}"
    )


def _data_text(data: DataRecord) -> str:
    source = data.statistics.get("source")
    return f"{plain(data.name)} ({plain(source)})" if source else plain(data.name)


def _result(comparison: ComparisonRecord, entries: Sequence[MethodResult]) -> list[str]:
    best = next(iter(leaders(entries)), None)
    if best is None or best.test.mean is None:
        return ["There is no result yet: no method has finished with any seed."]
    so_far = " so far" if any(entry.waiting for entry in entries) else ""
    tail = ", the mean over the clients' own models" if best.personal else ""
    metric = best.metric
    lead = f"{_name(best)} has the {best_word(metric)} test {metric.label}{so_far}: {_seeds(best)}{tail}."
    others = [entry for entry in entries if entry is not best and not entry.entry.baseline and entry.test.n]
    if not others:
        return [lead, "No other method has a result to compare it with."]
    return [lead, _against_reference(comparison, best, entries), *_rivals(best, others)]


def _against_reference(comparison: ComparisonRecord, best: MethodResult, entries: Sequence[MethodResult]) -> str:
    """How the best method stands to the reference."""
    name = plain(comparison.reference)
    reference = next((entry for entry in entries if entry.reference), None)
    if reference is None or not reference.test.n:
        return f"The reference, {name}, has no result, so no difference to it is known."
    if best.reference:
        return "That is the reference itself."
    difference = best.difference
    if difference is None:
        return f"It has no seed in common with the reference, {name}, which reaches {_short(reference)}."
    gap = f"That is {_distance(best, difference.mean)} the reference, {name} ({_short(reference)})"
    if difference.low is None or difference.high is None:
        return f"{gap}, with one seed: whether another seed would agree is not known."
    verdict = "excludes" if difference.sign else "does not exclude"
    low, high = (change_text(best.metric, end, best.test.mean) for end in (difference.low, difference.high))
    return f"{gap}; the 95 % interval over {difference.n} paired seeds, {low} to {high}, {verdict} zero."


def tally(comparison: ComparisonRecord, entries: Sequence[MethodResult]) -> str:
    """Returns how many methods an interval tells from the reference; nothing where there is no interval."""
    judged = [entry.difference for entry in entries if entry.difference and not entry.entry.baseline]
    signs = [difference.sign for difference in judged if difference.low is not None]
    if not signs:
        return ""
    name, metric = plain(comparison.reference), comparison.metric
    ahead = round(goodness(metric, 1))
    return (
        f"Of the {counted(len(signs), 'other method')}, the interval puts {signs.count(ahead)} {better(metric)} {name} "
        f"and {signs.count(-ahead)} {worse(metric)} it; {signs.count(0)} cannot be told from it. The intervals are not "
        f"corrected for how many there are: of {len(signs)} methods equal to {name}, {len(signs) / 20:.1f} would be "
        "expected to exclude zero by chance."
    )


def _rivals(best: MethodResult, others: Sequence[MethodResult]) -> list[str]:
    """Which methods the best one cannot be told from, by the same paired interval."""
    found = [(entry, paired(best.test, entry.test)) for entry in others]
    near = [entry for entry, gap in found if gap and gap.low is not None and gap.sign == 0]
    if not near:
        return []
    shown = sorted(near, key=lambda entry: -(entry.merit or 0.0))[:4]
    names = ", ".join(_name(entry) for entry in shown)
    rest = f" and {len(near) - len(shown)} more" if len(near) > len(shown) else ""
    return [f"With these seeds, {_name(best)} cannot be told from {names}{rest}: the results overlap."]


def _tiles(comparison: ComparisonRecord, entries: Sequence[MethodResult]) -> list[Tile]:
    best = next(iter(leaders(entries)), None)
    reference = next((entry for entry in entries if entry.reference), None)
    metric = comparison.metric
    tiles: list[Tile] = []
    if best:
        name = f"{capital(best_word(metric))} test {metric.label}"
        tiles.append(Tile(name, value_text(metric, best.test.mean), _with_spread(best)))
    if reference and reference.test.n:
        tiles.append(Tile("Reference", value_text(metric, reference.test.mean), _with_spread(reference)))
    fair = [entry for entry in entries if entry.worst.mean is not None and not entry.entry.baseline]
    if fair:
        fairest = max(fair, key=lambda entry: goodness(metric, entry.worst.mean or 0.0))
        tiles.append(Tile("Best for the worst tenth", value_text(metric, fairest.worst.mean), _name(fairest)))
    done, all_of_them = sum(len(entry.runs) for entry in entries), sum(entry.seeds for entry in entries)
    failed, waiting = sum(entry.failed for entry in entries), sum(entry.waiting for entry in entries)
    missing = [f"{count(number)} {state}" for number, state in ((failed, "failed"), (waiting, "waiting")) if number]
    tiles.append(Tile("Results", f"{count(done)} of {count(all_of_them)}", ", ".join(missing) or "all finished"))
    tuned = sum(len(method.points) for method in comparison.methods.values() if len(method.points) > 1)
    tried = f"after {counted(tuned, 'grid point')} in all" if tuned else ""
    tiles.append(Tile("Budget of every method", comparison.budget.text(), tried))
    tiles.append(Tile("Seeds", count(len(comparison.seeds)), ", ".join(map(str, comparison.seeds[:12]))))
    return tiles


def _notes(comparison: ComparisonRecord, entries: Sequence[MethodResult]) -> list[str]:
    notes, metric = problems(entries), comparison.metric
    tests = [(entry.test.n, _name(entry)) for entry in entries if entry.test.n and not entry.entry.baseline]
    most = max((n for n, _ in tests), default=0)
    fewer = [name for n, name in tests if n < most]
    if fewer:
        notes.append(
            f"With fewer seeds than others, and so not considered for the {best_word(metric)} {metric.label}: "
            f"{', '.join(fewer)}."
        )
    personal = [plain(entry.label) for entry in entries if entry.personal]
    if personal:
        notes.append(
            f"† {', '.join(personal)}: one model per client. The test {metric.label} is the mean over these models on "
            f"data of all clients, which they were not made for; compare the {metric.label} on own examples."
        )
    return notes


def _name(entry: MethodResult) -> str:
    return plain(entry.title, 40)


def _seeds(entry: MethodResult) -> str:
    """Mean and spread, such as ``82.1 % (± 0.4 over 3 seeds)``."""
    spread = f" ({_deviation(entry)} over {entry.test.n} seeds)" if entry.test.n > 1 else ""
    return f"{value_text(entry.metric, entry.test.mean)}{spread}"


def _short(entry: MethodResult) -> str:
    """The same without the seeds."""
    return " ".join(filter(None, (value_text(entry.metric, entry.test.mean), _deviation(entry))))


def _with_spread(entry: MethodResult) -> str:
    return ", ".join(filter(None, (_name(entry), _deviation(entry))))


def _deviation(entry: MethodResult) -> str:
    """The standard deviation over seeds, such as ``± 0.4``; nothing of one seed."""
    sd = entry.test.sd
    return "" if sd is None else f"± {number_text(entry.metric, sd, entry.test.mean)}"


def _distance(entry: MethodResult, difference: float) -> str:
    return f"{distance_text(entry.metric, difference, entry.test.mean)} {'above' if difference >= 0 else 'below'}"
