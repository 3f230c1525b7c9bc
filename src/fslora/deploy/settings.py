"""What a run tells its sites, and what a site says of itself: plain values, as Flower's configurations carry them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fslora import config
from fslora.config import Experiment
from fslora.deploy.letters import Name
from fslora.deploy.patience import Patience
from fslora.deploy.relay import IDLE
from fslora.errors import ConfigError

KEY = "settings"
"""The one key of a run's configuration: everything as one line of JSON, because Flower's values are scalars."""
OWN_DATA = "experiment"
"""A site's ``data``: the source that the experiment names, divided as it says."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunSettings(_Settings):
    """What a run's server and its sites are told."""

    run: Name
    experiment: str
    """TOML."""
    folder: str
    """The run folder, on the server's machine."""
    patience: Patience = Patience()

    def to_config(self) -> dict[str, str]:
        """Returns it as Flower's run configuration."""
        return {KEY: self.model_dump_json()}

    @classmethod
    def of(cls, run_config: Mapping[str, Any]) -> RunSettings:
        """Returns what a run configuration holds."""
        try:
            return cls.model_validate_json(str(run_config.get(KEY, "")))
        except ValidationError as error:
            raise ConfigError(
                f"the run's settings are damaged: {_first(error)}; start it with `fslora deploy`"
            ) from None

    def parsed(self) -> Experiment:
        """Returns the experiment, without variants: one run is deployed at a time."""
        return config.build(config.parse_toml(self.experiment), "the run's experiment")

    @property
    def digest(self) -> str:
        """Of the experiment, for server and sites to see that they mean the same."""
        return hashlib.sha256(self.experiment.encode()).hexdigest()[:16]


class SiteSettings(_Settings):
    """What a site's own configuration says; the server gets of it the name, and of its clients what `Member` holds."""

    site: Name
    """Its name, by which it is known whatever node it comes from."""
    clients: str
    """The ids of its clients, with commas."""
    storage: str
    """A folder for what its clients keep from round to round."""
    data: str
    """Its data source; 'experiment': what the experiment names, so that the server decides what is read here."""
    model: str = ""
    """A folder with the base model, where it lies elsewhere than the experiment says."""
    device: str = ""
    """Where it trains; by default as the experiment says."""
    rank: Annotated[int, Field(ge=0)] = 0
    """The rank of its clients, in the place of the one that the experiment gives them; 0: that one."""
    memory: str = ""
    """Or what training may take here, e.g. '2GB': its clients get the largest rank whose estimate fits."""
    idle: Annotated[float, Field(ge=0, le=604_800)] = IDLE
    """Seconds for which the base stays loaded after a letter; 0: only for one letter."""

    @field_validator("memory")
    @classmethod
    def _readable(cls, value: str) -> str:
        if value:
            bytes_of(value)
        return value

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.rank and self.memory:
            raise ValueError(f"rank is {self.rank} and memory is {self.memory!r}; give one of them")
        return self

    @property
    def budget(self) -> int | None:
        """Bytes that training may take; None: whatever it takes."""
        return bytes_of(self.memory) if self.memory else None

    @classmethod
    def of(cls, node_config: Mapping[str, Any]) -> SiteSettings:
        """Returns what a node's configuration holds; keys that Flower sets are left out."""
        known = {key: value for key, value in node_config.items() if key in cls.model_fields}
        try:
            return cls.model_validate({**known, "clients": str(known.get("clients", ""))})
        except ValidationError as error:
            raise ConfigError(
                f"this site's --node-config is not complete: {_first(error)}; `fslora deploy client-config` writes one"
            ) from None

    @property
    def members(self) -> frozenset[int]:
        """The ids of its clients."""
        try:
            return frozenset(int(number) for number in self.clients.split(","))
        except ValueError:
            raise ConfigError(f'clients is {self.clients!r}; write ids with commas, e.g. clients="0,3"') from None

    def to_node_config(self) -> str:
        """Returns it as ``flower-supernode --node-config`` takes it."""
        return " ".join(f"{key}={json.dumps(value)}" for key, value in self.model_dump(exclude_defaults=True).items())

    def applied(self, experiment: Experiment) -> Experiment:
        """Returns the experiment as it is carried out here."""
        changes: dict[str, dict[str, Any]] = {}
        if self.data != OWN_DATA:
            changes["data"] = {"source": self.data}
        model = {key: value for key, value in (("name", self.model), ("device", self.device)) if value}
        if model:
            changes["model"] = model
        return config.build(config.merged(experiment.model_dump(), changes), f"site {self.site}")


def bytes_of(text: str) -> int:
    """Returns an amount of memory in bytes: '2GB', '1.5 GiB', '800MB'.

    Raises:
        ValueError: It is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", text.strip())
    amount = float(found[1]) if found else 0.0
    if found is None or amount <= 0:
        raise ValueError(f"it is {text!r}; write an amount with its unit, e.g. '2GB' or '800MB'")
    return int(amount * (1024 if found[3] else 1000) ** (1 + "KMGT".index(found[2])))


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
