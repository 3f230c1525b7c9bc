"""Writes a run's report: one self-contained HTML page, its figures as files, and a Markdown summary."""

from __future__ import annotations

import json
import os
import shlex
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

from fslora.errors import ArtifactError
from fslora.report.figures import NAMES, Drawn, draw_all
from fslora.report.headline import Headline, changes, headline
from fslora.report.merit import direction, is_counted
from fslora.report.read import RunRecord, read_run
from fslora.report.sampled import remark_on, sampled
from fslora.report.style import save
from fslora.report.tables import (
    Column,
    Table,
    by_label_table,
    class_table,
    clients_table,
    closing_table,
    dropped_table,
    fact_text,
    flat,
    fleet_table,
    statistics_table,
)
from fslora.report.text import count, markdown_text, plain

_SVG_LIMIT = 300_000
"""Bytes above which a figure is embedded as PNG where that is smaller: a large fleet has many marks."""
_SHORT = 24
"""Characters up to which a column of text keeps to one line."""
_OPEN_ROWS = 12
"""Rows up to which a table is shown unfolded."""
Files = dict[str, dict[str, bytes]]
"""Figure → form (svg, png) → the file."""


def write_page(run_dir: str | Path) -> Path:
    """Returns the path of the report.html that it wrote, with figures/ and summary.md beside it.

    Raises:
        ArtifactError: The folder is no run folder, is damaged, or cannot be written.
    """
    record = read_run(run_dir)
    shown = sampled(record)
    drawn = draw_all(shown)
    files = put_figures(record.path / "figures", drawn, NAMES)
    top = headline(record)
    put(record.path / "summary.md", _markdown(record, top, drawn).encode())
    page = record.path / "report.html"
    put(page, _html(record, shown, top, drawn, files).encode())
    return page


def _html(record: RunRecord, shown: RunRecord, top: Headline, drawn: list[Drawn], files: Files) -> str:
    """The page. Everything that comes from the run folder passes through `escape`."""
    pictures = {entry.name: picture(entry, files[entry.name]) for entry in drawn}
    body = [
        *head(record.name, top, finished=record.finished),
        *section("Runs", _runs_part(record)),
        *section("Training", (pictures[name] for name in ("accuracy", "score", "loss") if name in pictures)),
        *section("Fleet", (pictures[name] for name in ("bytes", "coverage") if name in pictures)),
        *section("Clients", _clients_part(record, shown, pictures)),
        *section("Data", _data_part(record, shown, pictures)),
        *section("Refused updates", _dropped_part(record)),
        *section("Use it", _use_part(record)),
        *section("Settings", settings(record.config_text, record.environment)),
    ]
    return document(record.name, body, record.environment, "the run folder")


def document(name: str, body: Sequence[str], environment: Mapping[str, Any], source: str) -> str:
    """Returns a whole page that needs no other file.

    Args:
        name: What is reported on.
        body: The parts, as HTML.
        environment: What environment.json holds, for the version.
        source: What the page was written from.
    """
    version = plain(environment.get("fslora", ""))
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(plain(name))} · fslora report</title>\n"
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + f"\n<footer>Written by fslora {escape(version)} from {escape(source)} alone. "
        "Bytes are decimal: 1 MB is 1,000,000 bytes.</footer>\n</main>\n</body>\n</html>\n"
    )


def head(name: str, top: Headline, *, finished: bool) -> Iterator[str]:
    """Yields the top of a page: name and state, what was done, how it ended, and what to be wary of."""
    state = "finished" if finished else "not finished"
    badge = f'<span class="badge {"done" if finished else "open"}">{state}</span>'
    yield f"<header><h1>{escape(plain(name))} {badge}</h1>"
    yield f'<p class="what">{escape(top.what)}</p>\n<p class="result">{escape(top.result)}</p>'
    tiles = (
        f"<div><dt>{escape(tile.name)}</dt><dd>{escape(tile.value)}</dd><dd>{escape(tile.remark)}</dd></div>"
        for tile in top.tiles
    )
    yield '<dl class="tiles">' + "".join(tiles) + "</dl>"
    if top.notes:
        yield '<ul class="notes">' + "".join(f"<li>{escape(note)}</li>" for note in top.notes) + "</ul>"
    yield "</header>"


def section(title: str, parts: Iterable[str]) -> Iterator[str]:
    """Yields a section; nothing where there is nothing in it."""
    content = list(parts)
    if content:
        yield f"<section><h2>{escape(title)}</h2>"
        yield from content
        yield "</section>"


def _runs_part(record: RunRecord) -> Iterator[str]:
    yield drawn_table(closing_table(record.runs))
    yield remark(" ".join(_reading(record)))
    by_label = by_label_table(record.runs)
    if by_label.rows:
        yield titled_table(by_label)
    changed = changes(record)
    if changed and record.main:
        rows = tuple({"variant": name, "change": text} for name, text in changed.items())
        columns = (
            Column("variant", "variant", number=False),
            Column("change", "changes", lambda text: plain(text, 300), number=False),
        )
        yield titled_table(Table("What the variants change", columns, rows), folded=False)


def _reading(record: RunRecord) -> Iterator[str]:
    """How to read the closing table."""
    metric = record.metric
    examples = record.data.examples.get("test") if record.data else None
    yield f"Before and after: test {metric.label} without and with federated training."
    if record.data and record.data.eval_on == "clients":
        yield (
            "Validation and test are the clients' own held-out examples, scored where they are; the mean counts "
            "clients by their number of examples."
        )
    if not metric.higher_is_better:
        yield direction(metric)
    if is_counted(metric):
        sampled = f" of {count(examples)} test examples" if examples else ""
        yield f"± is the 95 % sampling error{sampled}; it does not hold what another seed would change."
    yield "Down and up: all clients together."


def _clients_part(record: RunRecord, shown: RunRecord, pictures: dict[str, str]) -> Iterator[str]:
    if note := remark_on(record, shown):
        yield remark(note)
    if "clients" in pictures:
        yield pictures["clients"]
    if record.fleet and record.rounds:
        yield titled_table(clients_table(shown))


def _data_part(record: RunRecord, shown: RunRecord, pictures: dict[str, str]) -> Iterator[str]:
    if "partition" in pictures:
        yield pictures["partition"]
    if record.data and shown.data:
        yield titled_table(statistics_table(record.data), folded=False)
        for table in (class_table(record.data), fleet_table(shown.data)):
            if table.rows:
                yield titled_table(table)


def _dropped_part(record: RunRecord) -> Iterator[str]:
    table = dropped_table(record.runs)
    if table.rows:
        yield remark("These clients trained, but what they sent could not be used.")
        yield titled_table(table)


def _use_part(record: RunRecord) -> Iterator[str]:
    started = {run.name for run in record.runs}
    if not all(run.finished for run in record.runs) or (record.main and not started >= changes(record).keys()):
        path = record.path if record.main else record.path.resolve().parent.parent
        yield "<p>Go on where it stopped:</p>" + code(f"fslora resume {shlex.quote(str(path))}")
    if not (record.path / "adapter").is_dir():
        yield "<p>There is no adapter folder yet; it is written when the run ends or is interrupted.</p>"
        return
    model = record.setting("model", "name")
    base = f"# base: the run's frozen base model, {plain(model)}\n" if model else ""
    adapter = json.dumps(str(record.path / "adapter"), ensure_ascii=False)
    state = "trained adapter" if record.finished else "adapter of the newest checkpoint"
    explained = (record.path / "adapter" / "README.md").is_file()
    how = "; its README.md shows the whole way to a label" if explained else ""
    yield f"<p>The {state} is in PEFT's format{how}:</p>"
    yield code(f"from peft import PeftModel\n\n{base}model = PeftModel.from_pretrained(base, {adapter})")


def settings(config_text: str, environment: Mapping[str, Any]) -> Iterator[str]:
    """Yields the experiment and the environment, folded."""
    if config_text:
        yield f"<details><summary>The resolved experiment</summary>{code(config_text)}</details>"
    if environment:
        rows = tuple({"key": key, "value": value} for key, value in flat(environment))
        columns = (Column("key", "", number=False), Column("value", "", fact_text, number=False))
        yield titled_table(Table("Environment", columns, rows), folded=True)


def picture(entry: Drawn, files: Mapping[str, bytes]) -> str:
    """Returns a figure with its title and how to read it; ``files`` are its forms."""
    vector = len(files["svg"]) <= max(_SVG_LIMIT, len(files["png"]))
    form, kind = ("svg", "svg+xml") if vector else ("png", "png")
    source = f"data:image/{kind};base64,{b64encode(files[form]).decode()}"
    title = escape(entry.title)
    return (
        f'<figure id="figure-{entry.name}"><h3>{title}</h3><img src="{source}" alt="{title}">'
        f"<figcaption>{escape(entry.reading)}</figcaption></figure>"
    )


def titled_table(table: Table, *, folded: bool | None = None) -> str:
    """Returns a table under its title, folded where it is long."""
    if folded if folded is not None else len(table.rows) > _OPEN_ROWS:
        size = f" ({len(table.rows)})" if folded is None else ""
        return f"<details><summary>{escape(table.title)}{size}</summary>{drawn_table(table)}</details>"
    return f"<h3>{escape(table.title)}</h3>{drawn_table(table)}"


def drawn_table(table: Table) -> str:
    """Returns a table without its title."""
    shown = table.cells()
    classes = [
        ' class="number"' if column.number else ' class="short"' if all(len(row[c]) <= _SHORT for row in shown) else ""
        for c, column in enumerate(table.columns)
    ]
    columns = zip(table.columns, classes, strict=True)
    titles = "".join(f'<th scope="col"{kind}>{escape(column.title)}</th>' for column, kind in columns)
    top = f"<thead><tr>{titles}</tr></thead>" if any(column.title for column in table.columns) else ""
    rows = "\n".join(_group(table, position) + _row(cells, classes) for position, cells in enumerate(shown))
    return f'<div class="scroll"><table>{top}<tbody>\n{rows}\n</tbody></table></div>'


def _group(table: Table, position: int) -> str:
    """The heading of the group that begins with a row, if one does."""
    if position not in table.groups:
        return ""
    return f'<tr class="group"><td colspan="{len(table.columns)}">{escape(table.groups[position])}</td></tr>\n'


def _row(cells: list[str], classes: list[str]) -> str:
    parts = (f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(cells, classes, strict=True))
    return "<tr>" + "".join(parts) + "</tr>"


def remark(text: str) -> str:
    """Returns a paragraph on how to read what is above it."""
    return f'<p class="remark">{escape(text)}</p>'


def code(text: str) -> str:
    """Returns text as it is typed."""
    return f"<pre><code>{escape(text)}</code></pre>"


def _markdown(record: RunRecord, top: Headline, drawn: list[Drawn]) -> str:
    parts = [
        f"# {markdown_text(plain(record.name))}",
        markdown_text(top.what),
        f"**{markdown_text(top.result)}**",
    ]
    parts += ["\n".join(f"- {markdown_text(note)}" for note in top.notes)] if top.notes else []
    parts += [closing_table(record.runs).markdown().rstrip()]
    for entry in drawn:
        parts += [f"## {entry.title}", f"![{entry.title}](figures/{entry.name}.png)", entry.reading]
    return "\n\n".join(parts) + "\n"


def put_figures(folder: Path, drawn: Sequence[Drawn], names: Sequence[str]) -> Files:
    """Writes figures and returns their files; of ``names``, those that are not drawn are removed."""
    files: Files = {entry.name: {form: save(entry.figure, form) for form in ("svg", "png")} for entry in drawn}
    for name in names:
        for form in ("svg", "png"):
            put(folder / f"{name}.{form}", files[name][form] if name in files else None)
    return files


def put(path: Path, content: bytes | None) -> None:
    """Replaces a file in one step; without content, removes what an earlier report left.

    Raises:
        ArtifactError: The file cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if content is None:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(exist_ok=True)
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise ArtifactError(
            f"{path} cannot be written: {error.strerror}; free the disk or make the folder writable, then report again"
        ) from None
