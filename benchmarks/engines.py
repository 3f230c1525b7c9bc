"""The cohort engine against what else trains a cohort, and against the frozen model's own limit.

    python benchmarks/engines.py [--model minilm] [--dtype bfloat16] [--clients 16] [--batch 4] [--tokens 64]
                                 [--steps 1] [--targets qv|all] [--data FILE --pad 128] [--repeats 5] [--out FILE.json]

Peers, all on the same model and batches, AdamW, ranks 4/8/16/32 (``--ranks``) of a server rank of 64:

    cohort       every client in one forward and backward over one base (ours)
    floor        the frozen model's forward pass and input gradient on the same batches, without any LoRA
    central      plain PEFT LoRA of the mean rank, one model, all clients' batches as one batch
    swapped      PEFT adapters swapped into one model, one client after the other
    processes    two processes of one thread each, every one with half of the clients, as `swapped`
    published    a deep copy of the model per client, PEFT at full rank with the gradient masked, one after the other,
                 float32, torch's fused attention: what the paper's public code does, with its masking put right

Equal lengths by default. With ``--data`` the batches are real texts (a .jsonl.gz with a column text, or instruction and
output): everyone pads to the longest text that is computed together, `published` to a fixed ``--pad`` as the published
scripts do.

Models: minilm (real weights), or random Llama-like ones of 25 M, 125 M, 1 B and 3 B parameters. Peak memory is that of
a fresh process per peer.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional

from alternate import alternate, peak, peak_of, spread, table
from fslora.algebra.sketch import draw_rows
from fslora.config import AdapterConfig, LocalConfig, ModelConfig
from fslora.data.batches import encode, length_order, local_batches, padding
from fslora.data.types import Examples
from fslora.engine.cohort import CohortEngine, concatenated
from fslora.models.base import Base
from fslora.models.load import load_base, minilm_folder
from fslora.objectives import Classes
from fslora.rng import Rng
from fslora.runner import environment
from fslora.types import Adapter, Batch, LocalProblem, LoRA, Start

SERVER_RANK, LABELS, LR = 64, ("no", "yes"), 1e-3
SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "llama-25m": (512, 1408, 8, 8, 4, 4096),
    "llama-125m": (768, 2048, 16, 12, 4, 32_000),
    "llama-1b": (2048, 8192, 16, 32, 8, 128_256),
    "llama-3b": (3072, 8192, 28, 24, 8, 128_256),
}
PEERS = ("cohort", "floor", "central", "swapped", "processes", "published")


@dataclass
class Setting:
    """What all peers share: the model, who takes part, and their batches."""

    args: argparse.Namespace

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def targets(self) -> Any:
        names = ("query", "value") if self.args.model == "minilm" else ("q_proj", "v_proj")
        return names if self.args.targets == "qv" else "all-linear"

    @cached_property
    def base(self) -> Base:
        """As `fslora run` has it."""
        if self.args.model == "minilm":
            model = ModelConfig(dtype=self.args.dtype, device=str(self.device))
            return load_base(model, AdapterConfig(rank=SERVER_RANK, targets=self.targets), Classes(LABELS), Rng(0))
        return Base(self.plain(self.args.dtype), None, Classes(LABELS), ("score",), self.targets, self.args.model)

    def plain(self, dtype: str, attention: str | None = None) -> nn.Module:
        """The model of transformers, with our attention unless another is named."""
        import transformers as tf

        chosen = attention or ("eager" if dtype == "bfloat16" and self.device.type == "cpu" else "sdpa")
        options = {"dtype": getattr(torch, dtype), "attn_implementation": chosen}
        if self.args.model == "minilm":
            auto = tf.AutoModelForSequenceClassification
            return auto.from_pretrained(minilm_folder(), num_labels=2, **options).to(self.device)
        hidden, inner, layers, heads, kv, vocabulary = SHAPES[self.args.model]
        layers = self.args.layers or layers
        config = tf.LlamaConfig(
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            vocab_size=vocabulary,
            pad_token_id=0,
            use_cache=False,
            num_labels=2,
        )
        with torch.random.fork_rng(), self.device:
            torch.manual_seed(0)
            return tf.AutoModelForSequenceClassification.from_config(config, **options).eval()

    @cached_property
    def batches(self) -> list[list[Batch]]:
        """By client, by local step."""
        return self._texts() if self.args.data else self._equal()

    def _equal(self) -> list[list[Batch]]:
        draw = Rng(0).child("benchmark").torch()

        def one() -> Batch:
            ids = torch.randint(1000, 4000, (self.args.batch, self.args.tokens), generator=draw)
            labels = torch.randint(0, 2, (self.args.batch,), generator=draw)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

        return [[one() for _ in range(self.args.steps)] for _ in range(self.args.clients)]

    def _texts(self) -> list[list[Batch]]:
        """Cut and ordered as a run does it."""
        from transformers import AutoTokenizer

        with gzip.open(self.args.data, "rt") as file:
            rows = [json.loads(line) for line in file]
        texts = [row["text"] if "text" in row else f"{row['instruction']} {row['output']}" for row in rows]
        labels = np.arange(len(texts)) % 2
        split = encode(Examples(texts, labels), AutoTokenizer.from_pretrained(minilm_folder()), self.args.pad)
        order = length_order(self.args.steps, Rng(0)).tolist()
        shares = np.array_split(Rng(0).numpy().permutation(len(texts)), self.args.clients)
        result = []
        for client, share in enumerate(shares):
            parts = local_batches(split.lengths, share, self.args.batch, self.args.steps, None, Rng(client))
            result.append([split.batch(parts[step]) for step in order])
        return result

    @property
    def ranks(self) -> list[int]:
        choice = self.args.ranks
        return [choice[client % len(choice)] for client in range(self.args.clients)]

    @cached_property
    def problems(self) -> list[LocalProblem]:
        draw = Rng(1).torch()
        template = self.base.template(AdapterConfig(rank=SERVER_RANK))

        def start(rank: int) -> Start:
            layers = {
                name: LoRA(torch.randn(rank, i, generator=draw) / i**0.5, torch.zeros(rank, o), SERVER_RANK / rank)
                for name, (i, o) in template.layers.items()
            }
            return Start(Adapter(layers, template.dense))

        return [
            LocalProblem(c, start(rank), batches, Rng(c))
            for c, (rank, batches) in enumerate(zip(self.ranks, self.batches, strict=True))
        ]

    def on_device(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


def cohort(setting: Setting) -> Callable[[], object]:
    engine = CohortEngine(setting.base, LocalConfig(), 0.0, setting.args.chunk or setting.args.clients)
    problems = setting.problems
    return lambda: list(engine.train(problems, LR))


def floor(setting: Setting) -> Callable[[], object]:
    """The gradient goes down to the first block's input, as it has to where the first block is adapted."""
    model = setting.plain(setting.args.dtype).requires_grad_(False).eval()
    model.enable_input_require_grads()
    steps = [concatenated(parts, 0, positions=0) for parts in zip(*setting.batches, strict=True)]

    def run() -> None:
        for batch in steps:
            inputs = setting.on_device(batch)
            labels = inputs.pop("labels")
            logits = model(**inputs).logits.float()
            functional.cross_entropy(logits, labels).backward()

    return run


def peft_config(setting: Setting, rank: int) -> Any:
    from peft import LoraConfig, TaskType

    targets = list(setting.targets) if isinstance(setting.targets, tuple) else setting.targets
    return LoraConfig(r=rank, lora_alpha=SERVER_RANK, target_modules=targets, task_type=TaskType.SEQ_CLS)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Mapping[str, torch.Tensor]) -> float:
    """One ordinary training step."""
    optimizer.zero_grad()
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    loss = functional.cross_entropy(model(**inputs).logits.float(), batch["labels"])
    loss.backward()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    return loss.item()


def central(setting: Setting) -> Callable[[], object]:
    from peft import get_peft_model

    model = get_peft_model(
        setting.plain(setting.args.dtype), peft_config(setting, round(sum(setting.ranks) / len(setting.ranks)))
    ).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    steps = [concatenated(parts, 0, positions=0) for parts in zip(*setting.batches, strict=True)]

    def run() -> None:
        optimizer = torch.optim.AdamW(trained, lr=LR)
        for batch in steps:
            step(model, optimizer, setting.on_device(batch))

    return run


def swappable(setting: Setting) -> nn.Module:
    """One model with a PEFT adapter per rank."""
    from peft import get_peft_model

    first, *others = sorted(set(setting.ranks))
    plain, config = setting.plain(setting.args.dtype), peft_config(setting, first)
    model = get_peft_model(plain, config, adapter_name=f"r{first}").eval()
    for rank in others:
        model.add_adapter(f"r{rank}", peft_config(setting, rank))
    return model


def swapped(setting: Setting, share: slice = slice(None), model: nn.Module | None = None) -> Callable[[], Any]:
    """Each client's values are copied in, trained and copied out."""
    model = model or swappable(setting)
    named = list(model.named_parameters())
    parameters = {rank: {name: p for name, p in named if f".r{rank}." in name} for rank in set(setting.ranks)}
    received = {rank: {name: p.detach().clone() for name, p in own.items()} for rank, own in parameters.items()}
    clients = list(zip(setting.ranks, setting.batches, strict=True))[share]

    def one(rank: int, batches: list[Batch]) -> dict[str, torch.Tensor]:
        model.set_adapter(f"r{rank}")
        own = parameters[rank]
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(received[rank][name])
        optimizer = torch.optim.AdamW([p.requires_grad_() for p in own.values()], lr=LR)
        for batch in batches:
            step(model, optimizer, setting.on_device(batch))
        return {name: p.detach().cpu().clone() for name, p in own.items()}

    return lambda: [one(rank, batches) for rank, batches in clients]


def processes(setting: Setting) -> Callable[[], object]:
    """Two copies of this script that wait for a line, train their half, and answer."""
    arguments = command_line(setting.args)
    helpers = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments, "--serve", str(half)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for half in (0, 1)
    ]

    def run() -> None:
        for helper in helpers:
            assert helper.stdin
            helper.stdin.write("go\n")
            helper.stdin.flush()
        for helper in helpers:
            assert helper.stdout
            if helper.stdout.readline().strip() != "done":
                raise RuntimeError("a worker process failed")

    return run


def published(setting: Setting) -> Callable[[], object]:
    """A deep copy per client, full rank, gradients masked to the client's sketch."""
    from peft import get_peft_model

    server = get_peft_model(setting.plain("float32", "sdpa"), peft_config(setting, SERVER_RANK)).eval()

    def one(client: int, rank: int, batches: list[Batch]) -> object:
        model = copy.deepcopy(server)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
        held = draw_rows("independent", SERVER_RANK, [rank], 0, [client], Rng(0)).long()
        mask = torch.zeros(SERVER_RANK, device=setting.device).index_fill(0, held.to(setting.device), 1.0)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" in name:
                keep = mask[:, None] if "lora_A" in name else mask
                parameter.register_hook(lambda gradient, keep=keep: gradient * keep)
        for batch in batches:
            step(model, optimizer, setting.on_device(wide(batch, setting.args.pad if setting.args.data else 0)))
        return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}

    clients = list(enumerate(zip(setting.ranks, setting.batches, strict=True)))
    return lambda: [one(client, rank, batches) for client, (rank, batches) in clients]


def wide(batch: Batch, width: int) -> Batch:
    """The batch padded to a fixed width, where one is given."""
    return {
        name: functional.pad(tensor, (0, max(0, width - tensor.shape[1])), value=padding(name, 0))
        if tensor.dim() == 2
        else tensor
        for name, tensor in batch.items()
    }


MAKERS: dict[str, Callable[[Setting], Callable[[], object]]] = {
    "cohort": cohort,
    "floor": floor,
    "central": central,
    "swapped": swapped,
    "processes": processes,
    "published": published,
}


def command_line(args: argparse.Namespace) -> list[str]:
    """The arguments that make the same setting in another process."""
    names = ("model", "dtype", "clients", "batch", "tokens", "steps", "targets", "pad", "chunk", "threads", "layers")
    given = [part for name in names for part in (f"--{name}", str(getattr(args, name)))]
    given += ["--ranks", *map(str, args.ranks)]
    return [*given, *(["--data", str(args.data)] if args.data else [])]


def serve(setting: Setting, half: int) -> None:
    """Trains every second client whenever a line comes in."""
    torch.set_num_threads(1)
    work = swapped(setting, slice(half, None, 2))
    for _ in sys.stdin:
        work()
        print("done", flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("minilm", *SHAPES), default="minilm")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--targets", choices=("qv", "all"), default="qv")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--layers", type=int, default=0, help="layers of a random model; 0 for its own number")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--pad", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=0, help="clients that ours trains at once; 0 for all")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0 for one per core")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory in fresh processes")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--only", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def main() -> None:
    transformers.logging.set_verbosity_error()
    args = parse()
    setting = Setting(args)
    if args.serve is not None:
        serve(setting, args.serve)
        return
    if args.only:
        work = MAKERS[args.only](setting)
        work()
        work()
        print(peak())
        return
    names = [name for name in PEERS if name in args.peers.split(",")]
    times = alternate({name: MAKERS[name](setting) for name in names}, args.repeats)
    result: dict[str, Any] = {
        "settings": {k: str(v) for k, v in vars(args).items() if k not in ("only", "serve", "out")},
        "environment": dict(environment()),
        "peers": {},
    }
    rows = []
    for name in names:
        taken, alone = times[name], name == "processes"
        memory = 0 if args.no_memory or alone else peak_of(__file__, [*command_line(args), "--only", name])
        ratios = {kind: taken.ratios(times["cohort"], kind) for kind in ("wall", "cpu")}
        rate = args.clients * args.steps / statistics.median(taken.wall)
        cpu = "" if alone else spread(ratios["cpu"])
        shown = f"{memory / 2**20:,.0f}" if memory else ""
        rows.append([name, f"{rate:.1f}", spread(ratios["wall"]), cpu, shown])
        result["peers"][name] = {"wall": taken.wall, "cpu": taken.cpu, "ratios": ratios, "peak": memory}
    workload = f"texts of {args.data.parent.name}, at most {args.pad} tokens" if args.data else f"{args.tokens} tokens"
    print(
        f"{args.model}, {args.dtype}, {args.clients} clients x batch {args.batch} x {workload}, {args.steps} steps, "
        f"{args.targets}, {torch.get_num_threads()} threads, {environment()['cpu']}\n"
    )
    print(table(["peer", "client-steps/s", "time / ours", "processor time / ours", "peak MiB"], rows))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
