"""What one step on instructions costs: only what is needed, against what scripts usually compute, alternated.

    python benchmarks/causal.py [--clients 4] [--batch 4] [--repeats 7] [--data FILE.jsonl.gz]

A Llama-architecture model from config (random weights, 29 M parameters, a vocabulary of 32,000), FSLoRA clients of rank
16, float32, one local step per client, all of them in one chunk. Lengths of prompts and responses are those of the
rows of ``--data`` (columns instruction and output, counted in words), or a fixed draw of such lengths without one.

    ours       logits where a response is predicted; padded to the longest of the step
    all        logits at every position (the loss ignores prompts), padded to the longest of the step
    maximum    as `all`, padded to a fixed 256 tokens

Wall time is what a user waits; processor time is steadier on a shared machine. Peak memory is that of a fresh process.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from alternate import alternate, peak, peak_of
from fslora.config import AdapterConfig, DataConfig, LocalConfig
from fslora.data.batches import IGNORED, Encoded, local_batches
from fslora.engine.cohort import CohortEngine
from fslora.models.base import Base
from fslora.objectives import Causal
from fslora.rng import Rng
from fslora.runner import environment
from fslora.types import Adapter, LocalProblem, LoRA, Start

VOCABULARY, MAXIMUM, RANK = 32_000, 256, 16


class Everywhere(Causal):
    """Logits at every position, as a model's own loss computes them."""

    def losses(self, base, batch):
        logits, labels = base.logits(batch), batch["token_labels"].to(base.device)
        each = functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
        wanted = labels != IGNORED
        return each[wanted], wanted.nonzero()[:, 0]


def lengths(path: Path | None) -> list[tuple[int, int]]:
    """Words of prompts and responses."""
    if path is None:
        draw = Rng(0).numpy()
        return [(int(p), int(r)) for p, r in zip(draw.integers(10, 120, 2000), draw.integers(3, 60, 2000), strict=True)]
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    return [(len(row["instruction"].split()), len(row["output"].split())) for row in rows]


def make(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Peer name → one round of work."""
    import transformers as tf

    shape = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**shape, vocab_size=VOCABULARY, num_key_value_heads=2))
    model.config.use_cache = False
    data = DataConfig(task="instruct", source="x.jsonl")
    base = Base(model, None, Causal(data), (), "all-linear", "random")
    every = Everywhere(data)
    draw = Rng(0).numpy()
    sequences = [(p, min(r, MAXIMUM - p)) for p, r in lengths(args.data) if p < MAXIMUM - 1]
    ids = [draw.integers(10, VOCABULARY, p + r).tolist() for p, r in sequences]
    labels = [[IGNORED] * p + row[p:] for row, (p, _) in zip(ids, sequences, strict=True)]
    split = Encoded({"input_ids": ids, "token_labels": labels}, np.zeros(len(ids), dtype=np.int64), 0, 0)
    template = base.template(AdapterConfig(rank=RANK))
    stream = Rng(1).torch()
    layers = {
        name: LoRA(torch.randn(RANK, i, generator=stream) / i**0.5, torch.zeros(RANK, o), 1.0)
        for name, (i, o) in template.layers.items()
    }
    shares = np.array_split(draw.permutation(len(split)), args.clients)
    problems, padded = [], []
    for client, share in enumerate(shares):
        (index, *_) = local_batches(split.lengths, share, args.batch, 4, None, Rng(client))[1:]
        batch = split.batch(index)
        start = Start(Adapter(layers))
        problems.append(LocalProblem(client, start, [batch], Rng(client)))
        wide = {
            name: functional.pad(part, (0, MAXIMUM - part.shape[1]), value=IGNORED if name == "token_labels" else 0)
            for name, part in batch.items()
            if part.dim() == 2
        }
        padded.append(LocalProblem(client, start, [{**wide, "labels": batch["labels"]}], Rng(client)))
    engine = CohortEngine(base, LocalConfig(), 0.0, args.clients)

    def work(objective: Causal, given: list[LocalProblem]) -> Callable[[], object]:
        def run() -> object:
            base.objective = objective
            return list(engine.train(given, 1e-3))

        return run

    peers = {"ours": work(base.objective, problems), "all": work(every, problems), "maximum": work(every, padded)}
    return peers if args.only is None else {args.only: peers[args.only]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", choices=("ours", "all", "maximum"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    times = alternate(make(args), args.repeats)
    if args.only:
        print(peak())
        return
    same = [
        "--clients",
        args.clients,
        "--batch",
        args.batch,
        "--repeats",
        1,
        *(["--data", args.data] if args.data else []),
    ]
    print("| peer | wall, s | × ours | processor, s | × ours | peak memory, MiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    rows = {}
    for name, found in times.items():
        wall, cpu = statistics.median(found.wall), statistics.median(found.cpu)
        ratios = [statistics.median(found.ratios(times["ours"], kind)) for kind in ("wall", "cpu")]
        memory = peak_of(__file__, ["--only", name, *same])
        rows[name] = {"wall": wall, "cpu": cpu, "ratios": ratios, "peak": memory}
        print(f"| {name} | {wall:.3f} | {ratios[0]:.2f} | {cpu:.3f} | {ratios[1]:.2f} | {memory / 2**20:.0f} |")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "environment": environment()}, indent=2))


if __name__ == "__main__":
    main()
