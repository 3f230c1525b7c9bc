"""Where a site's letters arrive: which run, which clients, which storage. The base is kept for as long as the process.

All clients of a site come in one letter. Where the process lives on (`fslora.deploy.worker`, a simulation, a test) the
same worker answers the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fslora.deploy.envelope import Record
from fslora.deploy.letters import sealed
from fslora.deploy.settings import RunSettings, SiteSettings
from fslora.deploy.site import SiteWorker, introduction
from fslora.errors import ConfigError, WireError
from fslora.prepare import Sites, Workshop

WORKSHOP = Workshop()
WORKERS: dict[str, SiteWorker] = {}
"""The newest worker of this process, by all that it depends on."""


def answer(kind: str, letter: Record | None, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> Record:
    """Returns a site's answer to a letter of one of the kinds there are; to 'hello' there is none."""
    if kind == "hello":
        return hello(run_config, node_config)
    answers = {"train": train}
    if letter is None or kind not in answers:
        raise WireError(f"there is no letter of the kind {kind[:40]!r}; there are hello, {', '.join(answers)}")
    return answers[kind](letter, run_config, node_config)


def hello(run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> Record:
    """Returns how a site introduces itself: its clients' ids, ranks and numbers of examples. No model is loaded."""
    run, site = RunSettings.of(run_config), SiteSettings.of(node_config)
    sites = WORKSHOP.sites(site.applied(run.parsed()))
    return sealed(introduction(site.site, sites, _checked(site, sites), run.digest))


def train(letter: Record, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> Record:
    """Returns a site's answer to a task."""
    return worker(RunSettings.of(run_config), SiteSettings.of(node_config)).train(letter)


def worker(run: RunSettings, site: SiteSettings) -> SiteWorker:
    """Returns who answers the letters of a run at a site; the same as before where nothing has changed."""
    key = f"{run.digest} {site!r}"
    if key not in WORKERS:
        experiment = site.applied(run.parsed())
        _checked(site, WORKSHOP.sites(experiment))
        WORKERS.clear()
        WORKERS[key] = SiteWorker(site.site, WORKSHOP.federation(experiment), site.members, Path(site.storage))
    return WORKERS[key]


def _checked(site: SiteSettings, sites: Sites) -> frozenset[int]:
    strange = sorted(client for client in site.members if not 0 <= client < len(sites.fleet))
    if strange:
        raise ConfigError(
            f"site {site.site} is to hold client {strange[0]}; the experiment has clients 0 to {len(sites.fleet) - 1}"
        )
    return site.members
