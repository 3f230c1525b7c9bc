"""Where a site's letters arrive: which run, which clients, which storage. The base is kept for as long as the process.

Flower starts a process for each message to a site, so all clients of a site come in one letter; where the process lives
on (in a simulation, or in tests) the same worker answers the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fslora.deploy.letters import sealed
from fslora.deploy.records import Record
from fslora.deploy.settings import RunSettings, SiteSettings
from fslora.deploy.site import SiteWorker, introduction
from fslora.errors import ConfigError
from fslora.prepare import Sites, Workshop

WORKSHOP = Workshop()
WORKERS: dict[str, SiteWorker] = {}
"""The newest worker of this process, by all that it depends on."""


def hello(run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> Record:
    """Returns how a site introduces itself: its clients' ids, ranks and numbers of examples. No model is loaded."""
    run, site = RunSettings.of(run_config), SiteSettings.of(node_config)
    sites = WORKSHOP.sites(site.applied(run.parsed()))
    return sealed(introduction(site.site, sites, _checked(site, sites), run.digest))


def train(letter: Record, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> Record:
    """Returns a site's answer to a task."""
    return worker(RunSettings.of(run_config), SiteSettings.of(node_config)).train(letter)


def evaluate(letter: Record, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> Record:
    """Returns a site's answer to an examination."""
    return worker(RunSettings.of(run_config), SiteSettings.of(node_config)).evaluate(letter)


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
