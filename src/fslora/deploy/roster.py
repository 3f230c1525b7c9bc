"""Who is in a run: what sites state of their clients, and which of it the run has come to rely on.

A site may state other ranks than the experiment draws, until the first round: methods prepare for the ranks of the
whole fleet. Where the data are at sites alone, it states numbers of examples too, whenever it joins. What a run knows
of a client stays, over restarts too (data.json): a site that comes back with something else is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

import fslora
from fslora.data.private import counted
from fslora.deploy.letters import Hello, Member
from fslora.errors import ConfigError
from fslora.fleet import Fleet
from fslora.prepare import Federation
from fslora.types import Client


class Roster:
    """The clients of one run.

    Args:
        federation: As the experiment has it: ranks as drawn, and examples where they are known without the sites.
        experiment: Digest of the experiment.
        before: data.json of a run that has begun; None before its first round.
    """

    def __init__(self, federation: Federation, experiment: str, before: Mapping[str, Any] | None = None) -> None:
        self.federation = federation
        self._experiment = experiment
        self._private = federation.experiment.partition.kind == "sites"
        self.begun = before is not None
        """Whether ranks are final."""
        if before is not None:
            held = before["partition"]["holdout"]
            self._note(Client(entry["id"], entry["rank"], entry["examples"]) for entry in before["fleet"])
            self._hold(dict(enumerate(held)))

    def check(self, hello: Hello) -> None:
        """Raises ConfigError where a site cannot take part, naming what differs and the remedy."""
        site = f"site {hello.site!r}"
        if hello.version != fslora.__version__:
            raise ConfigError(f"{site} has fslora {hello.version}, the server {fslora.__version__}; install the same")
        if hello.experiment != self._experiment:
            raise ConfigError(
                f"{site} was told another experiment (digest {hello.experiment}, here {self._experiment})"
            )
        digest = self.federation.sites.partition.digest
        if hello.data != digest:
            raise ConfigError(
                f"{site} has other data, or divides them otherwise (digest {hello.data}, here {digest}); check "
                "data.source there"
            )
        for member in hello.members:
            self._check(site, member)

    def _check(self, site: str, member: Member) -> None:
        fleet, most = self.federation.sites.fleet, self.federation.experiment.adapter.rank
        said = f"{site} says that client {member.id} has"
        if member.id >= len(fleet):
            raise ConfigError(f"{site} has client {member.id}; the experiment has clients 0 to {len(fleet) - 1}")
        if member.rank > most:
            raise ConfigError(f"{said} rank {member.rank}, and adapter.rank is {most}; state at most that there")
        known, held = fleet[member.id], int(self.federation.sites.partition.holdout.sizes[member.id])
        if self.begun and member.rank != known.rank:
            raise ConfigError(
                f"{said} rank {member.rank}, and the run knows it with rank {known.rank}; state that rank there (or "
                "none, if it never stated one), or start a new run: ranks are settled before the first round"
            )
        cap = self.federation.experiment.partition.max_examples
        if self._private and member.examples + member.held_out > cap:
            raise ConfigError(
                f"{said} {member.examples + member.held_out} examples, and partition.max_examples is {cap}; leave some "
                "out there, or agree on a higher number with all sites: it bounds what one client can count for"
            )
        counts, there = (member.examples, member.held_out), (known.examples, held)
        if known.examples and counts != there:
            raise ConfigError(
                f"{said} {counts[0]} examples to train on and {counts[1]} held out, and the run knows {there[0]} and "
                f"{there[1]}; give it the same data as before, or start a new run"
            )

    def admit(self, sites: Mapping[str, Hello]) -> bool:
        """Takes over what sites that were checked state; returns whether any of it is new."""
        members = [member for hello in sites.values() for member in hello.members]
        fleet = self.federation.sites.fleet
        new = [m for m in members if fleet[m.id] != Client(m.id, m.rank, m.examples)]
        if new:
            self._note(Client(m.id, m.rank, m.examples) for m in new)
            self._hold({m.id: m.held_out for m in new})
        return bool(new)

    def _note(self, clients: Iterable[Client]) -> None:
        fleet = self.federation.sites.fleet
        ranks, examples = fleet.ranks.copy(), fleet.examples.copy()
        for client in clients:
            ranks[client.id], examples[client.id] = client.rank, client.examples
        sites = replace(self.federation.sites, fleet=Fleet(ranks, examples))
        self.federation = replace(self.federation, sites=sites)

    def _hold(self, held: Mapping[int, int]) -> None:
        if not self._private:
            return
        sites = self.federation.sites
        sizes = sites.partition.holdout.sizes.copy()
        sizes[np.array(list(held), dtype=np.int64)] = list(held.values())
        parts = counted(self.federation.experiment, sites.fleet.examples, sizes)
        self.federation = replace(self.federation, sites=replace(sites, partition=parts))
