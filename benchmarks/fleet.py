"""What do registered clients cost that do not take part? Start-up, rounds and memory with one cohort, fleet by fleet.

    python benchmarks/fleet.py [--clients 100 1000 10000 100000] [--cohort 100] [--rounds 5] [--method fslora local]

A tiny BERT (2 layers, width 32, random weights, saved to a temporary folder), synthetic examples (token ids drawn at
random: no tokenizer is in the way), eight for each client of the largest fleet in every fleet, so that the data are the
same everywhere; Dirichlet partition, one local step. Every cell is a fresh process. Columns:

    start     seconds of processor time for partition, fleet, data.json and the server's first state
    round     seconds of processor time per round with its checkpoint: median and range (the first one warms up)
    evaluation    of the 200 validation examples; with personal models each is scored by another client's
    memory    peak of the process; beside it what it held before the partition, base and examples included
    data.json its size; clients/: of the files of what clients keep

All with one thread. Processor time, because others use the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from fslora.config import PartitionConfig, load
from fslora.console import Silent
from fslora.data.batches import Encoded
from fslora.data.partition import partition
from fslora.data.types import Dataset, Examples
from fslora.fleet import build_fleet
from fslora.memory import peak_memory
from fslora.models.load import load_base
from fslora.objectives import Classes, metric_of
from fslora.prepare import Federation, Sites
from fslora.rng import Rng
from fslora.runfolder import RunFolder
from fslora.runner import environment
from fslora.simulate import Simulation

CLIENTS, CLASSES, TOKENS, EACH = (100, 1_000, 10_000, 100_000), 10, 16, 8


def tiny_model(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    words = models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="[PAD]").save_pretrained(folder)


def synthetic(count: int) -> tuple[Examples, Encoded]:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, CLASSES, count)
    # Token lists are shared between examples: the memory that is asked about is the fleet's, not the texts'.
    lists = draw.integers(2, 64, (1000, TOKENS)).tolist()
    ids = [lists[i % 1000] for i in range(count)]
    return Examples(("",) * count, labels), Encoded({"input_ids": ids}, labels, 0, 0)


def cell(args: argparse.Namespace) -> dict[str, object]:
    """One fleet in this process."""
    torch.set_num_threads(1)
    clients, method = args.clients[0], args.method[0]
    with tempfile.TemporaryDirectory() as temporary:
        tiny_model(Path(temporary) / "model")
        settings = [f"model.name={temporary}/model", "adapter.rank=8", "adapter.targets=all-linear", "local.steps=1"]
        settings += [f"method.name={method}", "fleet.distribution=uniform", "fleet.max_rank=8", "local.batch_size=4"]
        settings += [f"fleet.clients={clients}", f"fleet.cohort={args.cohort}", "engine.chunk=16"]
        experiment = load(None, settings)
        base = load_base(experiment.model, experiment.adapter, Classes(tuple(map(str, range(CLASSES)))), Rng(0))
        examples, encoded = synthetic(args.examples)
        held, tokens = synthetic(200)
        before, began = peak_memory(), time.process_time()
        rng = Rng(0)
        config = PartitionConfig(kind="dirichlet", alpha=0.5, min_examples=2, holdout=0.1)
        parts = partition(config, examples, clients, rng.child("partition"))
        sizes = [len(index) for index in parts.train]
        fleet = build_fleet(experiment.fleet, experiment.adapter.rank, sizes, rng.child("fleet"))
        dataset = Dataset("synthetic", tuple(map(str, range(CLASSES))), examples, held, held, {})
        sites = Sites(dataset, "dirichlet", parts, fleet, base.objective, metric_of(base.objective, experiment.data))
        federation = Federation(experiment, sites, base, encoded, tokens, tokens)
        folder = RunFolder.create(Path(temporary) / "run")
        folder.write_json("data.json", federation.describe())
        simulation = Simulation(federation, folder, Silent())
        state = simulation.initial_state()
        start = time.process_time() - began
        rounds, taken = [], 0
        while taken < args.rounds:
            began = time.process_time()
            state, tally = simulation.round(state, taken)
            simulation._row(
                taken, tally, {"round": taken, "bytes_total": 0, "flops_total": 0, "time_total": 0}, 0.0, state
            )
            taken += 1
            folder.save_checkpoint(taken, state)
            simulation.memories.checkpointed(taken)
            rounds.append(time.process_time() - began)
        simulation.evaluate(state)  # the first one imports
        began = time.process_time()
        simulation.evaluate(state)
        evaluation = time.process_time() - began
        kept = list((folder.path / "checkpoints" / "clients").glob("*"))
        return {
            "method": method,
            "clients": clients,
            "start_seconds": start,
            "round_seconds": rounds,
            "evaluation_seconds": evaluation,
            "held_before": before,
            "peak_memory_bytes": peak_memory(),
            "data_json_bytes": (folder.path / "data.json").stat().st_size,
            "kept_files": len(kept),
            "kept_bytes": sum(path.stat().st_size for path in kept),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--cohort", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--method", nargs="+", default=["fslora", "local"])
    parser.add_argument("--examples", type=int, default=EACH * max(CLIENTS))
    parser.add_argument("--cell", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(cell(args)))
        return
    results = []
    print(f"cohort {args.cohort}, {args.examples} examples, 1 thread; {environment()['cpu']}")
    print("| method | clients | start | round | evaluation | peak memory (before the fleet) | data.json | clients/ |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for method in args.method:
        for clients in args.clients:
            command = [sys.executable, __file__, "--cell", "--clients", clients, "--method", method]
            command += ["--cohort", args.cohort, "--rounds", args.rounds, "--examples", args.examples]
            done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
            r = json.loads(done.stdout.splitlines()[-1])
            results.append(r)
            warm = r["round_seconds"][1:]
            print(
                f"| {method} | {clients} | {r['start_seconds']:.1f} s "
                f"| {statistics.median(warm):.2f} s ({min(warm):.2f}-{max(warm):.2f}) "
                f"| {r['evaluation_seconds']:.1f} s "
                f"| {r['peak_memory_bytes'] / 2**20:.0f} MiB ({r['held_before'] / 2**20:.0f}) "
                f"| {r['data_json_bytes'] / 1e6:.1f} MB | {r['kept_files']} files, {r['kept_bytes'] / 1e6:.1f} MB |",
                flush=True,
            )
    if args.out:
        args.out.write_text(json.dumps({"environment": dict(environment()), "cells": results}, indent=1))


if __name__ == "__main__":
    main()
