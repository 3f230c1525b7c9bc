"""The registry: one visible line per method."""

from __future__ import annotations

import difflib

from fslora.errors import ConfigError
from fslora.methods.base import Method
from fslora.methods.fedit import FedIT
from fslora.methods.fslora import FSLoRA

METHODS: dict[str, type[Method]] = {
    "fedit": FedIT,
    "fslora": FSLoRA,
}


def method_class(name: str) -> type[Method]:
    """Returns the method of this name, or raises ConfigError that lists the known ones."""
    if not isinstance(name, str) or name not in METHODS:
        near = difflib.get_close_matches(str(name).lower(), METHODS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"method.name is {name!r}; {hint}Known methods: {', '.join(sorted(METHODS))}")
    return METHODS[name]


__all__ = ["METHODS", "Method", "method_class"]
