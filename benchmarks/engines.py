"""Cohort engine against one-client-at-a-time, and against the published style, alternated in one process.

    python benchmarks/engines.py [--clients 8] [--batch 4] [--tokens 64] [--repeats 5] [--targets qv|all]

Peers, all on MiniLM, float32, AdamW, one local step per client, ranks 8/16/32/48 of a server rank of 64:

    cohort      every client in one forward and backward over one base (ours)
    sequential  one client after the other over one base, at its own rank (our oracle)
    published   a deep copy of the model per client, PEFT at full rank 64 with the gradient masked, in sequence
                (what the paper's public code does, with its masking put right)

Wall time is what a user waits; processor time is steadier on a shared machine. Peak memory is that of a
fresh process per peer.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fslora.algebra.sketch import draw_rows
from fslora.config import AdapterConfig, LocalConfig, ModelConfig
from fslora.engine.cohort import CohortEngine
from fslora.engine.sequential import SequentialEngine
from fslora.memory import peak_memory
from fslora.models.load import load_base
from fslora.objectives import Classes
from fslora.rng import Rng
from fslora.runner import environment
from fslora.types import Adapter, LocalProblem, LoRA, Start

SERVER_RANK, RANKS, LABELS = 64, (8, 16, 32, 48), ("no", "yes")
TARGETS = {"qv": ("query", "value"), "all": "all-linear"}


def make(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Peer name → one round of work."""
    adapter = AdapterConfig(rank=SERVER_RANK, alpha=SERVER_RANK, targets=TARGETS[args.targets])
    base = load_base(ModelConfig(), adapter, Classes(LABELS), Rng(0))
    template = base.template(adapter)
    draw = Rng(0).child("benchmark").torch()
    batches, problems = [], []
    for client in range(args.clients):
        ids = torch.randint(1000, 30000, (args.batch, args.tokens), generator=draw)
        labels = torch.randint(0, 2, (args.batch,), generator=draw)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
        rank = RANKS[client % len(RANKS)]
        layers = {
            name: LoRA(torch.randn(rank, i, generator=draw) / i**0.5, torch.zeros(rank, o), SERVER_RANK / rank)
            for name, (i, o) in template.layers.items()
        }
        problems.append(LocalProblem(client, Start(Adapter(layers, template.dense)), [batches[-1]], Rng(client)))
    local = LocalConfig()
    cohort = CohortEngine(base, local, 0.0, args.clients)
    sequential = SequentialEngine(base, local, 0.0)
    peers: dict[str, Callable[[], object]] = {
        "cohort": lambda: list(cohort.train(problems, 1e-3)),
        "sequential": lambda: list(sequential.train(problems, 1e-3)),
    }
    if args.only in (None, "published"):
        peers["published"] = published(base, batches)
    return peers if args.only is None else {args.only: peers[args.only]}


def published(base, batches) -> Callable[[], object]:
    """A deep copy per client, full rank, gradients masked to the client's sketch."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    from fslora.models.load import minilm_folder

    plain = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=2)
    config = LoraConfig(
        r=SERVER_RANK, lora_alpha=SERVER_RANK, target_modules=list(base.targets), task_type=TaskType.SEQ_CLS
    )
    server = get_peft_model(plain, config).eval()

    def one(client: int, batch) -> object:
        model = copy.deepcopy(server)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        model(**batch).loss.backward()
        rank = RANKS[client % len(RANKS)]
        held = draw_rows("independent", SERVER_RANK, [rank], 0, [client], Rng(0)).long()
        mask = torch.zeros(SERVER_RANK).index_fill(0, held, SERVER_RANK / rank)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and "lora_" in name:
                parameter.grad.mul_(mask[:, None] if "lora_A" in name else mask)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    return lambda: [one(client, batch) for client, batch in enumerate(batches)]


def measure(peers: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Times the peers in turn, after one unmeasured round of each."""
    times = {name: {"wall": [], "cpu": []} for name in peers}
    for repeat in range(repeats + 1):
        for name, work in peers.items():
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            if repeat:
                times[name]["wall"].append(time.perf_counter() - wall)
                times[name]["cpu"].append(time.process_time() - cpu)
    return times


def memory_of(args: argparse.Namespace, peer: str) -> int:
    """Bytes, of a fresh process that runs two rounds of one peer."""
    command = [sys.executable, __file__, "--only", peer, "--clients", args.clients, "--batch", args.batch]
    command += ["--tokens", args.tokens, "--targets", args.targets, "--repeats", 1]
    return int(subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--targets", choices=TARGETS, default="qv")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    args = parser.parse_args()
    peers = make(args)
    if args.only:
        measure(peers, args.repeats)
        print(peak_memory())
        return
    times = measure(peers, args.repeats)
    steps = args.clients
    result = {
        "settings": {k: v for k, v in vars(args).items() if k not in ("only", "out")},
        "environment": dict(environment()),
    }
    size = f"{args.clients} clients x batch {args.batch} x {args.tokens} tokens"
    print(f"{size}, {args.targets}, {torch.get_num_threads()} threads")
    print("| peer | client-steps/s (wall) | cohort is faster by, wall | by, processor time | peak memory |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, taken in times.items():
        ratios = {
            kind: [other / ours for other, ours in zip(taken[kind], times["cohort"][kind], strict=True)]
            for kind in ("wall", "cpu")
        }
        memory = memory_of(args, name)
        shown = {kind: f"{statistics.median(r):.2f} ({min(r):.2f}-{max(r):.2f})" for kind, r in ratios.items()}
        rate = steps / statistics.median(taken["wall"])
        print(f"| {name} | {rate:.1f} | {shown['wall']} | {shown['cpu']} | {memory / 2**20:.0f} MiB |")
        result[name] = {"seconds": taken, "ratio_to_cohort": ratios, "peak_memory_bytes": memory}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
