"""What the command line of ``fslora compare`` says, as keys of the experiment."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from fslora.config import BUDGETS, CompareConfig, Experiment, build, merged
from fslora.errors import ConfigError

KINDS = ("rounds", *(key.removeprefix("max_") for key in BUDGETS))
"""Of budgets: rounds, or one of the keys of [run] that end a run before its last round."""


def with_options(experiment: Experiment, options: Mapping[str, Any]) -> Experiment:
    """Returns the experiment with the command line's tables laid over it."""
    fields = experiment.model_dump(exclude_unset=True)
    if experiment.compare.reference == CompareConfig.model_fields["reference"].default:
        # `fslora init` writes every default down; one that nobody chose must give way when it is not compared.
        fields.get("compare", {}).pop("reference", None)
    return build(merged(fields, options), source="the command line")


def parse_budget(text: str) -> dict[str, Any]:
    """Returns the keys of [run] for a budget such as ``rounds=40`` or ``bytes=50e6``; it replaces any other."""
    kind, _, amount = (part.strip() for part in text.partition("="))
    if kind not in KINDS:
        raise ConfigError(f"--budget {text!r}: give one of {', '.join(f'{name}=AMOUNT' for name in KINDS)}")
    try:
        number = float(amount)
    except ValueError:
        raise ConfigError(f"--budget {text!r}: {amount!r} is no number, e.g. --budget {kind}=40") from None
    cleared = dict.fromkeys(BUDGETS)
    if kind != "rounds":
        return {**cleared, f"max_{kind}": number}
    if not number.is_integer():
        raise ConfigError(f"--budget {text!r}: rounds are whole, e.g. --budget rounds=40")
    return {**cleared, "rounds": int(number)}


def parse_grid(items: Iterable[str]) -> dict[str, tuple[Any, ...]]:
    """Returns the grid of items such as ``local.lr=5e-4,1.5e-3``; a value is read as TOML, else as plain text."""
    grid = {}
    for item in items:
        key, found, text = item.partition("=")
        if not found or not all(key.strip().split(".")):
            raise ConfigError(f"--grid {item!r} is not of the form KEY=V1,V2, e.g. --grid local.lr=5e-4,1.5e-3")
        grid[key.strip()] = _values(text)
    return grid


def _values(text: str) -> tuple[Any, ...]:
    try:
        return tuple(tomllib.loads(f"value = [{text}]")["value"])
    except tomllib.TOMLDecodeError:
        return tuple(part.strip() for part in text.split(","))
