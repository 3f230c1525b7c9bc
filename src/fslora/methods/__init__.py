"""The registry: one visible line per method."""

from __future__ import annotations

import difflib
from importlib.metadata import EntryPoint, entry_points

from fslora.errors import ConfigError
from fslora.methods.base import Method
from fslora.methods.fed_plora import FedPLoRA
from fslora.methods.fedex_lora import FedExLoRA
from fslora.methods.fedit import FedIT
from fslora.methods.fedsa_lora import FedSALoRA
from fslora.methods.ffa_lora import FFALoRA
from fslora.methods.flexlora import FlexLoRA
from fslora.methods.flora import FLoRA
from fslora.methods.flora_na import FLoRANA
from fslora.methods.florist import FLoRIST
from fslora.methods.fslora import FSLoRA
from fslora.methods.hafl_lora import HAFLLoRA
from fslora.methods.hetlora import HetLoRA
from fslora.methods.local import Local
from fslora.methods.lora_fair import LoRAFAIR
from fslora.methods.rac_lora import RACLoRA
from fslora.methods.raflora import RaFLoRA
from fslora.methods.replication import Replication
from fslora.methods.rolora import RoLoRA
from fslora.methods.zero_padding import ZeroPadding

METHODS: dict[str, type[Method]] = {
    "fed-plora": FedPLoRA,
    "fedex-lora": FedExLoRA,
    "fedit": FedIT,
    "fedsa-lora": FedSALoRA,
    "ffa-lora": FFALoRA,
    "flexlora": FlexLoRA,
    "flora": FLoRA,
    "flora-na": FLoRANA,
    "florist": FLoRIST,
    "fslora": FSLoRA,
    "hafl-lora": HAFLLoRA,
    "hetlora": HetLoRA,
    "local": Local,
    "lora-fair": LoRAFAIR,
    "rac-lora": RACLoRA,
    "raflora": RaFLoRA,
    "replication": Replication,
    "rolora": RoLoRA,
    "zero-padding": ZeroPadding,
}


GROUP = "fslora.methods"
"""The entry-point group in which an installed package registers methods of its own: name → class."""


def method_class(name: str) -> type[Method]:
    """Returns the method of this name: ours, or one that an installed package registers.

    Raises:
        ConfigError: There is none of this name (the known ones are listed), or what was registered is no method.
    """
    if isinstance(name, str):
        if name in METHODS:
            return METHODS[name]
        for entry in entry_points(group=GROUP, name=name):
            return _loaded(entry)
    known = sorted({*METHODS, *(entry.name for entry in entry_points(group=GROUP))})
    near = difflib.get_close_matches(str(name).lower(), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"method.name is {name!r}; {hint}Known methods: {', '.join(known)}")


def registered() -> dict[str, type[Method]]:
    """Returns every method by name: ours in the order of the registry, then those of installed packages.

    Raises:
        ConfigError: What a package registers is no method.
    """
    others = {entry.name: _loaded(entry) for entry in entry_points(group=GROUP) if entry.name not in METHODS}
    return {**METHODS, **dict(sorted(others.items()))}


def _loaded(entry: EntryPoint) -> type[Method]:
    source = f"the entry point {entry.name!r} of {entry.dist.name if entry.dist else entry.value}"
    try:
        kind = entry.load()
    except Exception as error:  # whatever a foreign package raises on import
        raise ConfigError(f"{source} cannot be imported: {error!r}; repair or uninstall that package") from None
    if not (isinstance(kind, type) and issubclass(kind, Method)) or getattr(kind, "name", None) != entry.name:
        raise ConfigError(f"{source} is {kind!r}; it has to be a subclass of fslora.methods.Method of that name")
    return kind


__all__ = ["METHODS", "Method", "method_class", "registered"]
