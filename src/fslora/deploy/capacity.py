"""The ranks of a site's clients: as the experiment gives them, as the site states them, or the largest that fit.

STORAGE/RUN/rank.json       the rank that was chosen for a memory budget: once for a run, because estimates differ
                            from process to process, and a run relies on the rank that it was told
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from fslora.config import Experiment
from fslora.deploy.settings import SiteSettings
from fslora.errors import ArtifactError
from fslora.fleet import Fleet
from fslora.planning import largest_rank
from fslora.prepare import Sites


def with_own_rank(sites: Sites, site: SiteSettings, experiment: Experiment, run: str) -> Sites:
    """Returns the sites with the rank that this one has for its clients, where it has an opinion.

    Raises:
        ConfigError: Not even rank 1 fits its memory.
        ArtifactError: The choice cannot be kept.
    """
    rank = site.rank or (0 if site.budget is None else _fitting(site, site.budget, experiment, run))
    if not rank:
        return sites
    ranks = sites.fleet.ranks.copy()
    ranks[sorted(site.members)] = rank
    return replace(sites, fleet=Fleet(ranks, sites.fleet.examples))


def _fitting(site: SiteSettings, budget: int, experiment: Experiment, run: str) -> int:
    path = Path(site.storage) / run / "rank.json"
    try:
        if path.is_file():
            return int(json.loads(path.read_text(encoding="utf-8"))["rank"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged: {error!r}; restore it, or state the run's rank there") from None
    rank = largest_rank(experiment, site.members, budget)
    partial = path.with_name(".partial-rank.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"memory": site.memory, "rank": rank}) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error}; make room there, or choose another storage") from None
    return rank
