"""From a row of a table to the prompt that a model answers. Pure text; nothing here knows a tokenizer.

A template is 'headings', 'chat', or a text with ``{column}`` in it, where ``{{`` and ``}}`` stand for braces. With
'chat' the prompt is what the user says; the tokenizer's own chat template is laid around it when it is encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter
from typing import Any

from fslora.errors import ConfigError

HEADINGS, CHAT = "headings", "chat"
INSTRUCTION, INPUT = "instruction", "input"
"""The columns that 'headings' and 'chat' read; the second one may be empty, or missing from the table."""


def render(template: str, row: Mapping[str, Any]) -> str:
    """Returns the prompt of one row. White space stays as it is, and braces within a cell mean nothing.

    Raises:
        ConfigError: The template cannot be read (see ``columns_of``).
    """
    if template == CHAT:
        return user_message(row)
    if template == HEADINGS:
        return _under_headings(row)
    return "".join(literal if column is None else f"{literal}{row[column]}" for literal, column in _pieces(template))


def user_message(row: Mapping[str, Any]) -> str:
    """Returns what the user says in a chat: the instruction, and below it the input if there is one."""
    given = _input(row)
    return f"{row[INSTRUCTION]}\n\n{given}" if given else str(row[INSTRUCTION])


def columns_of(template: str) -> set[str]:
    """Returns the columns that a row must have for this template.

    Raises:
        ConfigError: Braces do not match, or hold something other than a column's name; or there is no column at all.
    """
    if template in (HEADINGS, CHAT):
        return {INSTRUCTION}
    columns = {column for _, column in _pieces(template) if column is not None}
    if not columns:
        raise _bad(template, "it names no column, so every prompt would be the same")
    return columns


def optional_columns(template: str) -> set[str]:
    """Returns the columns that this template shows where a row has them."""
    return {INPUT} if template in (HEADINGS, CHAT) else set()


def _under_headings(row: Mapping[str, Any]) -> str:
    """The prompt ends below the last heading, where the response begins."""
    given = _input(row)
    parts = [("Instruction", row[INSTRUCTION]), *([("Input", given)] if given else [])]
    return "".join(f"### {heading}:\n{text}\n\n" for heading, text in parts) + "### Response:\n"


def _input(row: Mapping[str, Any]) -> str:
    """The input as it is, or '' where it is missing or blank."""
    value = row.get(INPUT)
    return "" if value is None or not str(value).strip() else str(value)


def _pieces(template: str) -> list[tuple[str, str | None]]:
    """The template as (literal text, the column after it or None)."""
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise _bad(template, f"its braces do not match ({error})") from None
    for _, column, form, conversion in pieces:
        if column is None:
            continue
        if not column.strip() or column.isdecimal():
            raise _bad(template, f"{{{column}}} has no column's name in it")
        if form or conversion or any(sign in column for sign in ".[]"):
            shown = f"{{{column}{'!' + conversion if conversion else ''}{':' + form if form else ''}}}"
            raise _bad(template, f"{shown} is more than a column's name")
    return [(literal, column) for literal, column, _, _ in pieces]


def _bad(template: str, fault: str) -> ConfigError:
    return ConfigError(
        f"data.prompt is {template!r:.200}: {fault}. Write 'headings', 'chat', or a text with names of columns in "
        "braces, e.g. 'Question: {question} Answer: '; a brace itself is written {{ or }}"
    )
