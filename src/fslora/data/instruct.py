"""The task of answering instructions: each row of a table is a prompt and the response to it.

A response may hold an answer: a word of a few choices ('the correct answer is true'), a number at the end of a
solution, or all of it. Rows without a prompt, a response or a usable answer are dropped and counted; where no row is
left, the error shows one of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fslora.config import DataConfig
from fslora.data.answers import choices_in, last_number, listed_choices
from fslora.data.causal import (
    Part,
    assemble,
    dropped_for,
    group_column,
    stratum_column,
    text_columns,
    usable,
)
from fslora.data.partition import stratified_shares
from fslora.data.prompts import columns_of, optional_columns, render
from fslora.data.sources import read_rows, where
from fslora.data.types import Dataset, Examples
from fslora.errors import ConfigError, DataError
from fslora.rng import Rng

ANSWER_FORMAT = "answer-format"
"""The value of data.choices that has them read from the prompt."""


@dataclass
class Dropped:
    """What was dropped, and an example of each reason that needs one."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, example: str) -> None:
        """Counts a row; the first example of a reason is kept."""
        self.counts[reason] += 1
        self.examples.setdefault(reason, example)


def load_instruct(config: DataConfig, rng: Rng) -> Dataset:
    """Returns prompts, and as their ``target`` the responses; ``answer`` is the response where there is no data.answer.

    With data.choices each example has its ``options`` (the answers to choose from) and its ``choices`` (the responses
    that give them, in the same order). Sides without a file or split of their own are shares of train, stratified by
    data.label where the table has that column. Groups are those of data.group, or else the files of a folder.

    Raises:
        ConfigError: data.prompt cannot be read, or gives the response away.
        DataError: A side cannot be read, lacks a column, or has no usable row.
    """
    _check_prompt(config)
    dropped = Dropped()
    train = _side(config, "train", dropped)
    sides: dict[str, Part] = {}
    shares: dict[str, float] = {}
    for side, share in (("test", config.test_share), ("validation", config.validation_share)):
        if getattr(config, side) is None:
            shares[side] = share
        else:
            sides[side] = _side(config, side, dropped)
    *held, rest = stratified_shares(train.numbers(), list(shares.values()), rng.child("sides"))
    sides |= {side: train.take(index) for side, index in zip(shares, held, strict=True)}
    sides["train"] = train.take(rest)
    remedy = f"Train gives {len(train.examples)} rows; give more, or give data.validation and data.test their own"
    for side, part in sides.items():
        usable(side, part, dropped.counts, remedy)
    return assemble("instruct", sides, {"source": config.source, "prompt": config.prompt, **dropped.counts})


def options_of(response: str, answer: str, choices: Sequence[str]) -> tuple[str, ...] | None:
    """Returns the response with its answer replaced by each choice, in order; None where the answer is not in it.

    What is replaced is the last place that holds the answer as whole words.
    """
    places = list(re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", response))
    if not places:
        return None
    start, end = places[-1].span()
    return tuple(f"{response[:start]}{choice}{response[end:]}" for choice in choices)


def _check_prompt(config: DataConfig) -> None:
    hidden = {"data.response": config.response}
    if config.answer is not None and config.evaluate != "loss":
        hidden["data.answer"] = config.answer
    shown = columns_of(config.prompt) | optional_columns(config.prompt)
    for key, column in hidden.items():
        if column in shown:
            raise ConfigError(
                f"data.prompt is {config.prompt!r:.200} and shows the column {column!r}, which {key} names as what "
                f"the model has to find. Leave it out of data.prompt, or set {key} to another column"
            )


def _side(config: DataConfig, side: str, dropped: Dropped) -> Part:
    """One side's usable rows, in their order."""
    table = read_rows(config, side)
    keys = _columns(config, side, table.column_names)
    texts = text_columns(table, where(config, side), keys)
    needed = {column: cells for column, cells in texts.items() if column not in optional_columns(config.prompt)}
    shown = {column: texts[column] for column in _shown(config, table.column_names)}
    offered = _offered(config, table)
    rows: list[int] = []
    prompts: list[str] = []
    columns: list[dict[str, Any]] = []
    for row in range(len(table)):
        if dropped_for(needed, row, side, dropped.counts):
            continue
        prompt = render(config.prompt, {column: cells[row] for column, cells in shown.items()})
        response = texts[config.response][row]
        answer = (response if config.answer is None else texts[config.answer][row]).strip()
        try:
            columns.append(_columns_of_row(config, response, answer, offered(prompt, row)))
        except UnusableError as fault:
            dropped.add(f"{side} rows dropped: {fault.reason}", f"row {row + 1} of {side}: {fault}")
            continue
        rows.append(row)
        prompts.append(prompt)
    if not rows and dropped.examples:
        raise DataError(f"{side} has no usable row; {'; '.join(dropped.examples.values())}")
    group, stratum = group_column(config, side, table.column_names), stratum_column(config, table.column_names)
    examples = Examples(
        texts=tuple(prompts),
        labels=np.zeros(len(rows), dtype=np.int64),
        groups=None if group is None else tuple(texts[group][row] for row in rows),
        columns={name: tuple(entry[name] for entry in columns) for name in (columns[0] if columns else ("target",))},
    )
    return Part(examples, None if stratum is None else tuple(texts[stratum][row] for row in rows))


def _columns(config: DataConfig, side: str, present: Sequence[str]) -> dict[str, str]:
    """The columns of texts that are read, each with the key that asks for it."""
    wanted = {
        "data.response": config.response,
        "data.answer": config.answer,
        "data.group": group_column(config, side, present),
        "data.label": stratum_column(config, present),
    }
    keys = {column: key for key, column in wanted.items() if column is not None}
    return dict.fromkeys(_shown(config, present), "data.prompt") | keys


def _shown(config: DataConfig, present: Sequence[str]) -> list[str]:
    """The columns that the prompt shows."""
    return sorted(columns_of(config.prompt) | (optional_columns(config.prompt) & set(present)))


class UnusableError(Exception):
    """A row cannot be used: why in general, and what is the matter with this one."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def _columns_of_row(
    config: DataConfig, response: str, answer: str, offered: tuple[str, ...] | None
) -> dict[str, str | tuple[str, ...]]:
    """The columns of one example, or UnusableError."""
    if config.evaluate == "generate" and config.extract == "number" and last_number(answer) is None:
        raise UnusableError("no number in the answer", f"data.extract is 'number', but the answer is {answer!r:.200}")
    found: dict[str, str | tuple[str, ...]] = {"target": response, "answer": answer}
    if offered is None:
        return found
    if len(offered) < 2:
        raise UnusableError(
            "fewer than two choices",
            f"data.choices {config.choices!r:.200} gives {list(offered)}; two at least are needed",
        )
    if answer not in offered:
        raise UnusableError(
            "the answer is none of the choices",
            f"the answer {answer!r:.200} is none of the choices {list(offered)}; set data.answer (now "
            f"{config.answer!r}) to the column that holds one of them, or data.choices to what there is to choose",
        )
    candidates = options_of(response, answer, offered)
    if candidates is None:
        raise UnusableError(
            "the answer is not in the response",
            f"the answer {answer!r:.200} is not in the response {response!r:.200}; check data.answer and data.response",
        )
    return found | {"options": offered, "choices": candidates}


Offered = Callable[[str, int], tuple[str, ...] | None]


def _offered(config: DataConfig, table: Any) -> Offered:
    """The function (prompt, row) → what there is to choose from, each choice once; None without data.choices."""
    choices = config.choices
    if choices is None:
        return lambda prompt, row: None
    if isinstance(choices, tuple):
        return lambda prompt, row: _once(choices)
    if choices == ANSWER_FORMAT:
        return lambda prompt, row: _once(choices_in(prompt))
    if choices not in table.column_names:
        raise DataError(
            f"{config.source} has no column {choices!r}; it has {', '.join(map(repr, table.column_names))}. Set "
            "data.choices to the column that lists the choices, to a list, or to 'answer-format'"
        )
    lists = [_listed_in(value, choices) for value in table.select_columns([choices])[:][choices]]
    return lambda prompt, row: lists[row]


def _listed_in(value: Any, column: str) -> tuple[str, ...]:
    """A cell's choices: a list, or a text such as 'a/b/c'."""
    if value is None:
        return ()
    if isinstance(value, str):
        return _once(listed_choices(value))
    if not isinstance(value, list) or not all(isinstance(entry, (str, int, float)) for entry in value):
        raise DataError(
            f"column {column!r} (data.choices) holds {value!r:.80}; it has to hold a list of texts, or a text such "
            "as 'yes/no', in every row"
        )
    return _once(map(str, value))


def _once(choices: Iterable[str]) -> tuple[str, ...]:
    return tuple(choice for choice in dict.fromkeys(map(str.strip, choices)) if choice)
