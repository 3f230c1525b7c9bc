"""What each method costs the server in one round, without a model: time, state, traffic, memory.

    OMP_NUM_THREADS=1 python benchmarks/methods.py [--methods fedit,flexlora] [--rank 16] [--quick] [--out FILE]

MiniLM's 36 linear layers (24 of 384 x 384, 6 of 384 x 1536, 6 of 1536 x 384) and a head; a cohort of 5, 20 and 100
clients whose ranks go round r/8, r/4, r/2, r of the server's rank r. Local training is replaced by a change of what
the method trains: a common direction and as much of each client's own. Every method is at its defaults. The second
round is measured, the same cohort having taken part in the first: what grows from round to round is not seen here.

    broadcast, aggregate   wall seconds of the method's own server steps for the whole cohort, best of the repetitions;
                           the updates are ready, neither training nor what clients do themselves is counted
    state                  bytes of the server's state after the round
    down, up               mean bytes of a client's messages in that round, base changes and heads included
    extra                  growth of the resident set at its peak during aggregate, over what it was just before, in a
                           process of its own. Updates are made as they are asked for, so a method that needs all of
                           them at once pays for them here, one that streams pays for one. It is the operating system's
                           figure: every block from 64 KiB is mapped and given back by itself, so malloc hides little;
                           smaller blocks and libraries' work space are in it, too. Below a few MiB it is noise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fslora.methods import METHODS, Method, method_class
from fslora.rng import Rng
from fslora.types import Client, ClientMemory, ClientUpdate, Round, ServerState, Site, Start, Template, Trained

COHORTS = (5, 20, 100)
SHAPES = {"square": (24, 384, 384), "widening": (6, 384, 1536), "narrowing": (6, 1536, 384)}
MAPPED = 64 * 1024
"""Bytes from which an allocation is mapped by itself in the process that measures memory."""


def template(rank: int) -> Template:
    layers = {f"{name}.{i}": (d_in, d_out) for name, (count, d_in, d_out) in SHAPES.items() for i in range(count)}
    return Template(layers, {"head.weight": torch.zeros(2, 384), "head.bias": torch.zeros(2)}, rank, alpha=2.0 * rank)


def fleet(size: int, rank: int) -> tuple[Client, ...]:
    ranks = [max(1, rank // share) for share in (8, 4, 2, 1)]
    return tuple(Client(i, ranks[i % 4], examples=50 + 37 * i % 100) for i in range(size))


def trained(start: Start, client: Client, round: Round, size: float = 0.02) -> Trained:
    """What stands for local training: a common change and as large a one of the client's own, of what is trained."""
    resting = {"A": ":Bt", "B": ":A", "both": "-"}[start.trains]

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        streams = (round.rng.child("common", name), round.rng.child("own", client.id, name))
        return size * sum(torch.randn(tensor.shape, generator=stream.torch()) for stream in streams)

    values = start.adapter.tensors()
    moved = {n: t if n.endswith(resting) else t + change(n, t) for n, t in values.items()}
    scores = {
        name: torch.rand(pair.rank, generator=round.rng.child("score", client.id, name).torch())
        for name, pair in start.adapter.layers.items()
    }
    return Trained(client.id, start.adapter.with_tensors(moved), (1.0,), scores if start.measures_sensitivity else {})


@dataclass
class Federation:
    """The server's state, the clients' memories, and what the last round's messages weighed."""

    method: Method
    state: ServerState
    memories: dict[int, ClientMemory]
    down: dict[int, int]
    up: dict[int, int]

    def updates(self, round: Round) -> Iterator[ClientUpdate]:
        """Makes the cohort's updates one after the other."""
        for client in round.cohort:
            site = Site(client, round.template, self.memories.get(client.id, ClientMemory()))
            broadcast = self.method.broadcast(self.state, client, round)
            start = self.method.start(broadcast, site)
            result = trained(start, client, round)
            update = self.method.client_update(broadcast, start, result, site)
            self.memories[client.id] = self.method.remember(broadcast, start, result, site)
            self.down[client.id], self.up[client.id] = broadcast.nbytes, update.nbytes
            yield update


def measure(method: Method, size: int, rank: int, repeats: int, memory: bool) -> dict[str, float]:
    """Figures of the second round of one method: times and bytes, or the extra memory."""
    model, clients = template(rank), fleet(size, rank)
    rounds = [Round(number, clients, Rng(0).child("round", number), model) for number in (0, 1)]
    federation = Federation(method, method.init(model, clients, Rng(0)), {}, {}, {})
    federation.state = method.aggregate(federation.state, federation.updates(rounds[0]), rounds[0])
    if memory:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        method.aggregate(federation.state, federation.updates(rounds[1]), rounds[1])
        return {"extra_bytes": resident("VmHWM") - before}
    memories = dict(federation.memories)
    updates = list(federation.updates(rounds[1]))
    federation.memories = memories
    seconds: dict[str, float] = {}
    for _ in range(repeats):
        began = time.perf_counter()
        for client in clients:
            method.broadcast(federation.state, client, rounds[1])
        sent = time.perf_counter()
        state = method.aggregate(federation.state, iter(updates), rounds[1])
        spent = {"broadcast_seconds": sent - began, "aggregate_seconds": time.perf_counter() - sent}
        seconds = {name: min(value, seconds.get(name, value)) for name, value in spent.items()}
    return {
        **seconds,
        "state_bytes": state.nbytes,
        "down_bytes": sum(federation.down.values()) / size,
        "up_bytes": sum(federation.up.values()) / size,
    }


def resident(field: str) -> int:
    """Bytes of the resident set now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def in_a_process(name: str, size: int, args: argparse.Namespace, memory: bool) -> dict[str, float]:
    """The figures of a fresh process; where the system does not count resident sets, none of memory."""
    if memory and not Path("/proc/self/clear_refs").exists():
        return {"extra_bytes": float("nan")}
    command = [sys.executable, __file__, "--only", name, "--cohort", size, "--rank", args.rank]
    command += ["--repeats", args.repeats] + ["--memory"] * memory
    environment = {**os.environ, **({"MALLOC_MMAP_THRESHOLD_": str(MAPPED)} if memory else {})}
    done = subprocess.run(list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS), help="names, by commas; all by default")
    parser.add_argument("--rank", type=int, default=16, help="the server's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a cohort of 5, one repetition")
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    for hidden, kind in (("--only", str), ("--cohort", int)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(method_class(args.only)(), args.cohort, args.rank, args.repeats, args.memory)))
        return
    args.repeats = 1 if args.quick else args.repeats
    names = args.methods.split(",")
    for name in names:
        method_class(name)  # a wrong name is an error before the work begins
    ranks = sorted({client.rank for client in fleet(4, args.rank)})
    print(
        f"server rank {args.rank}, client ranks {ranks}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print("| method | clients | broadcast s | aggregate s | state MiB | down KiB | up KiB | extra MiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    rows = []
    for size in COHORTS[:1] if args.quick else COHORTS:
        for name in names:
            row = {k: v for memory in (False, True) for k, v in in_a_process(name, size, args, memory).items()}
            print(
                f"| {name} | {size} | {row['broadcast_seconds']:.4f} | {row['aggregate_seconds']:.4f} "
                f"| {row['state_bytes'] / 2**20:.1f} | {row['down_bytes'] / 2**10:.0f} | {row['up_bytes'] / 2**10:.0f} "
                f"| {row['extra_bytes'] / 2**20:.1f} |",
                flush=True,
            )
            rows.append({"method": name, "clients": size, **row})
    if args.out:
        settings = {"rank": args.rank, "threads": torch.get_num_threads(), "repeats": args.repeats}
        args.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
