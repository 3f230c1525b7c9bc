"""Does a balanced draw lower the variance of the aggregate? Measured on a trained adapter and real local steps.

    python benchmarks/sketch_variance.py RUN [--draws 40]

RUN is a finished run folder of the embedded default. From its last state, one round with a fixed cohort and
fixed batches is repeated with fresh sketches; what varies is the sketch alone. Reported, for each kind of draw
and each rule of averaging, relative to the independent draw:

    parts    variance of the mean sketch, E || (1/M) Σ S_i − I ||² (no training involved)
    update   variance of the aggregate update of A and B, E || Δ − E Δ ||²
    missed   share of rank-one parts that nobody in the cohort held
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from fslora.algebra.adapters import sub
from fslora.algebra.rows import holders
from fslora.algebra.sketch import draw_rows
from fslora.config import load
from fslora.console import Silent
from fslora.fleet import sample_cohort
from fslora.methods.fslora import FSLoRA
from fslora.prepare import Workshop
from fslora.rng import Rng
from fslora.runfolder import RunFolder
from fslora.simulate import Simulation
from fslora.types import Client, Round, ServerState, Site

KINDS, RULES = ("independent", "balanced", "nested"), ("cohort", "holders")


def sketch_variance(kind: str, rank: int, ranks: list[int], draws: int) -> float:
    """Mean of || (1/M) Σ S_i − I ||² over draws; S_i is diagonal."""
    ids, total = list(range(len(ranks))), 0.0
    for draw in range(draws):
        mean = torch.zeros(rank)
        for position, k in enumerate(ranks):
            mean[draw_rows(kind, rank, ranks, position, ids, Rng(draw)).long()] += rank / k / len(ranks)
        total += (mean - 1).square().sum().item()
    return total / draws


def updates(simulation: Simulation, state: ServerState, cohort: Sequence[Client], method: FSLoRA, draws: int):
    """Yields (aggregate update as one vector, share of parts nobody held) of repeated rounds."""
    template = simulation.template
    for draw in range(draws):
        plan = Round(0, tuple(cohort), Rng(0).child("fixed"), template)
        sketches = Round(0, tuple(cohort), Rng(draw).child("draws"), template)
        sites = [Site(client, template) for client in cohort]
        broadcasts = [method.broadcast(state, client, sketches) for client in cohort]
        starts = [method.start(broadcast, site) for broadcast, site in zip(broadcasts, sites, strict=True)]
        given = zip(cohort, starts, strict=True)
        problems = [simulation.clients.problem(client, start, plan.rng) for client, start in given]
        trained = simulation.engine.train(problems, simulation.experiment.local.lr)
        steps = zip(broadcasts, starts, trained, sites, strict=True)
        delta = sub(
            method.aggregate(state, (method.client_update(*step) for step in steps), sketches).adapter, state.adapter
        )
        held = sum(holders(broadcast.rows, template.rank) for broadcast in broadcasts)
        pairs = [tensor.flatten() for pair in delta.layers.values() for tensor in (pair.A, pair.Bt)]
        yield torch.cat(pairs), (held == 0).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    experiment = load(args.run / "experiment.toml")
    federation = Workshop().federation(experiment)
    _, state, _ = RunFolder.open(args.run).load_checkpoint()
    simulation = Simulation(federation, RunFolder(args.run), Silent())
    cohort = sample_cohort(federation.sites.fleet, experiment.fleet.cohort, Rng(0))
    ranks = [client.rank for client in cohort]
    print(f"cohort ranks {ranks} of {experiment.adapter.rank}, {args.draws} draws")
    print("| draw | mean over | variance of sketch | variance of update | parts nobody held |")
    print("| --- | --- | ---: | ---: | ---: |")
    first, results = {}, []
    for rule in RULES:
        for kind in KINDS:
            method = FSLoRA(sketch=kind, average=rule)
            rows = list(updates(simulation, state, cohort, method, args.draws))
            stacked = torch.stack([vector for vector, _ in rows])
            update = stacked.var(dim=0).sum().item()
            parts = sketch_variance(kind, experiment.adapter.rank, ranks, 2000)
            missed = sum(share for _, share in rows) / len(rows)
            base = first.setdefault(rule, (parts, update))
            print(f"| {kind} | {rule} | {parts / base[0]:.2f} | {update / base[1]:.2f} | {missed:.1%} |", flush=True)
            results.append({"draw": kind, "rule": rule, "sketch": parts, "update": update, "missed": missed})
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
