"""Where a site's letters arrive: which run, which clients, which storage. The base is kept for as long as the process.

All clients of a site come in one letter. Where the process lives on (`fslora.deploy.worker`, a simulation, a test) the
same worker answers the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fslora.config import Experiment
from fslora.deploy.capacity import with_own_rank
from fslora.deploy.envelope import Record
from fslora.deploy.letters import sealed
from fslora.deploy.settings import RunSettings, SiteSettings
from fslora.deploy.site import SiteWorker, introduction
from fslora.errors import ConfigError, WireError
from fslora.prepare import Workshop

WORKSHOP = Workshop()
WORKERS: dict[str, SiteWorker] = {}
"""The newest worker of this process, by all that it depends on."""


def answer(kind: str, letter: Record | None, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> Record:
    """Returns a site's answer to a letter of one of the kinds there are; to 'hello' there is none."""
    if kind == "hello":
        return hello(run_config, node_config)
    answers = {"train": train, "evaluate": evaluate}
    if letter is None or kind not in answers:
        raise WireError(f"there is no letter of the kind {kind[:40]!r}; there are hello, {', '.join(answers)}")
    return answers[kind](letter, run_config, node_config)


def hello(run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> Record:
    """Returns how a site introduces itself: its clients' ids, ranks and numbers of examples. No model is loaded."""
    run, site = RunSettings.of(run_config), SiteSettings.of(node_config)
    experiment = site.applied(run.parsed())
    _check(site, experiment)
    sites = with_own_rank(WORKSHOP.sites(experiment, site.members), site, experiment, run.run)
    return sealed(introduction(site.site, sites, site.members, run.digest))


def train(letter: Record, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> Record:
    """Returns a site's answer to a task."""
    return worker(RunSettings.of(run_config), SiteSettings.of(node_config)).train(letter)


def evaluate(letter: Record, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> Record:
    """Returns a site's answer to an examination."""
    return worker(RunSettings.of(run_config), SiteSettings.of(node_config)).evaluate(letter)


def worker(run: RunSettings, site: SiteSettings) -> SiteWorker:
    """Returns who answers the letters of a run at a site; the same as before where nothing has changed."""
    key = f"{run.run} {run.digest} {site!r}"
    if key not in WORKERS:
        experiment = site.applied(run.parsed())
        _check(site, experiment)
        federation = WORKSHOP.federation(experiment, site.members)
        ranked = with_own_rank(federation.sites, site, experiment, run.run)
        WORKERS.clear()
        federation = replace(federation, sites=ranked)
        WORKERS[key] = SiteWorker(site.site, federation, site.members, Path(site.storage))
    return WORKERS[key]


def _check(site: SiteSettings, experiment: Experiment) -> None:
    clients = experiment.fleet.clients
    strange = sorted(client for client in site.members if not 0 <= client < clients)
    if strange:
        raise ConfigError(
            f"site {site.site} is to hold client {strange[0]}; the experiment has clients 0 to {clients - 1}"
        )
    if site.rank > experiment.adapter.rank:
        raise ConfigError(
            f"site {site.site} states rank {site.rank}, and adapter.rank is {experiment.adapter.rank}; state at most "
            "that with --rank"
        )
