"""How fast does a server average sketches, held against the memory bandwidth, and what does it hold meanwhile?

    OMP_NUM_THREADS=1 python benchmarks/server.py [--repeats 9] [--clients 1000] [--out server.json]

A 3B-shaped adapter (28 layers; q 3072 -> 3072, k and v 3072 -> 1024, up 3072 -> 8192, down 8192 -> 3072; rank 64,
66.1 M numbers). Clients of ranks 8, 16, 32 and 48, one random index set per module: a pool of one of each rank, far
beyond the caches, cycled. One thread; the peers take turns in one process and are timed in processor time, because
others use the machine. Per client:

    block     a reference: in-place addition (add_) of as many bytes as the update has, as one block
    add_      the reference: the same in the update's own pieces, add_ on the first rows of every tensor
    scatter   ours: ScatterMean.add
    pad       every module of the update is filled up with zeros to rank 64 and added
    list      all updates are filled up, kept in a list, stacked and averaged (four clients; what the published
              style does). Its memory for many clients is extrapolated.

"of add_" and "of a block" are the time of that reference over the peer's own, of the same turn: median and range.
Peak memory is what a fresh process needs beyond the global adapter and the pool. The last rows are FSLoRA's whole
server step over a stream of clients, run for real, mean and addition included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path

import torch

from fslora.algebra.adapters import zeros_like
from fslora.algebra.rows import ScatterMean, scatter
from fslora.algebra.sketch import draw_rows
from fslora.memory import forget_peak_memory, peak_memory
from fslora.methods.fslora import FSLoRA
from fslora.rng import Rng
from fslora.runner import environment
from fslora.types import Adapter, ClientUpdate, LoRA, Round, ServerState, Template

MODULES = {"q": (3072, 3072), "k": (3072, 1024), "v": (3072, 1024), "up": (3072, 8192), "down": (8192, 3072)}
RANK, RANKS = 64, (8, 16, 32, 48)
MIB = 2**20


def shapes(layers: int) -> dict[str, tuple[int, int]]:
    return {f"{layer}.{name}": shape for layer in range(layers) for name, shape in MODULES.items()}


def random_adapter(layers: int, rank: int, seed: int) -> Adapter:
    stream = Rng(0).child("adapter", rank, seed).torch()
    pairs = {
        name: LoRA(torch.randn(rank, i, generator=stream), torch.randn(rank, o, generator=stream), 1.0)
        for name, (i, o) in shapes(layers).items()
    }
    return Adapter(pairs)


def pool(layers: int) -> list[ClientUpdate]:
    """One update of every rank."""
    made = []
    for client, rank in enumerate(RANKS):
        rng = Rng(0).child("rows")
        rows = {name: draw_rows("independent", RANK, RANKS, client, RANKS, rng.child(name)) for name in shapes(layers)}
        made.append(ClientUpdate(client, random_adapter(layers, rank, client), 1, rows))
    return made


Turn = Callable[[], object]


def block(state: Adapter, updates: list[ClientUpdate]) -> Turn:
    total = torch.zeros(state.nbytes // 4)
    sources = [torch.randn(update.adapter.nbytes // 4) for update in updates]
    return lambda: [total[: len(source)].add_(source) for source in sources]


def add(state: Adapter, updates: list[ClientUpdate]) -> Turn:
    total = zeros_like(state).tensors()

    def turn() -> None:
        for update in updates:
            for name, tensor in update.adapter.tensors().items():
                total[name][: len(tensor)].add_(tensor)

    return turn


def scattered(state: Adapter, updates: list[ClientUpdate]) -> Turn:
    total = ScatterMean(state)
    return lambda: [total.add(update.adapter, update.rows) for update in updates]


def padded(state: Adapter, updates: list[ClientUpdate]) -> Turn:
    total = zeros_like(state)

    def turn() -> None:
        for update in updates:
            for name, pair in update.adapter.layers.items():
                one = scatter(Adapter({name: pair}), {name: update.rows[name]}, RANK).layers[name]
                total.layers[name].A.add_(one.A)
                total.layers[name].Bt.add_(one.Bt)

    return turn


def listed(state: Adapter, updates: list[ClientUpdate]) -> Turn:
    def turn() -> dict[str, torch.Tensor]:
        kept = [scatter(update.adapter, update.rows, RANK).tensors() for update in updates]
        return {name: torch.stack([tensors[name] for tensors in kept]).mean(0) for name in state.tensors()}

    return turn


PEERS = {"block": block, "add_": add, "scatter": scattered, "pad": padded, "list": listed}
"""Peer → (state, pool) → one turn over the whole pool."""


def measured(turns: dict[str, Turn], repeats: int) -> dict[str, list[float]]:
    """Seconds of processor time per client, the peers in turns, after one turn that does not count."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    for repeat in range(repeats + 1):
        for name, turn in turns.items():
            if name == "list" and repeat > 3:
                continue
            began = time.process_time()
            turn()
            if repeat:
                times[name].append((time.process_time() - began) / len(RANKS))
    return times


def streamed(layers: int, clients: int) -> dict[str, float]:
    """FSLoRA's server step over a stream of so many clients."""
    state, updates = ServerState(random_adapter(layers, RANK, 0)), pool(layers)
    plan = Round(0, (), Rng(0), Template(shapes(layers), {}, RANK, RANK))
    forget_peak_memory()
    before, wall, cpu = peak_memory(), time.perf_counter(), time.process_time()
    stream: Iterator[ClientUpdate] = islice(cycle(updates), clients)
    FSLoRA(average="holders").aggregate(state, stream, plan)
    return {
        "clients": clients,
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "memory_bytes": peak_memory() - before,
    }


def alone(layers: int, peer: str) -> int:
    """Bytes that two turns of one peer need beyond the global adapter and the pool."""
    state, updates = random_adapter(layers, RANK, 0), pool(layers)
    forget_peak_memory()
    before = peak_memory()
    turn = PEERS[peer](state, updates)
    turn()
    turn()
    return peak_memory() - before


def fresh(args: argparse.Namespace, what: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--layers", str(args.layers), "--only", what]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000], help="lengths of the streams")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.only:
        kind, _, what = args.only.partition(":")
        print(
            json.dumps(streamed(args.layers, int(what)) if kind == "stream" else {"memory": alone(args.layers, what)})
        )
        return
    streams = [fresh(args, f"stream:{clients}") for clients in args.clients]
    memory = {name: fresh(args, f"peer:{name}")["memory"] for name in ("scatter", "pad", "list")}
    state, updates = random_adapter(args.layers, RANK, 0), pool(args.layers)
    useful = sum(update.adapter.nbytes for update in updates) / len(updates)
    times = measured({name: make(state, updates) for name, make in PEERS.items()}, args.repeats)
    print(f"adapter {state.nbytes / MIB:.0f} MiB, mean update {useful / MIB:.0f} MiB; 1 thread; {environment()['cpu']}")
    print("| peer | ms per client | GB/s (useful) | of add_ | of a block | memory beyond adapter and pool |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    ratios: dict[str, dict[str, list[float]]] = {}
    for name, taken in times.items():
        ratios[name] = {of: [t / own for t, own in zip(times[of], taken, strict=False)] for of in ("add_", "block")}
        middle = statistics.median(taken)
        shown = [f"{statistics.median(r):.0%} ({min(r):.0%}-{max(r):.0%})" for r in ratios[name].values()]
        held = f"{memory[name] / MIB:.0f} MiB" if name in memory else ""
        print(f"| {name} | {1e3 * middle:.1f} | {3 * useful / middle / 1e9:.1f} | {' | '.join(shown)} | {held} |")
    per_client = memory["list"] / len(RANKS)
    extrapolated = ", ".join(f"{clients} clients {per_client * clients / 2**30:.1f} GiB" for clients in args.clients)
    print(f"\nlist, extrapolated from four clients: {extrapolated}\n")
    print("| FSLoRA's server step over | wall | processor | memory beyond adapter and pool |")
    print("| --- | ---: | ---: | ---: |")
    for s in streams:
        print(
            f"| {s['clients']} clients | {s['wall_seconds']:.2f} s | {s['cpu_seconds']:.2f} s "
            f"| {s['memory_bytes'] / MIB:.0f} MiB |"
        )
    if args.out:
        result = {"seconds": times, "of_add": ratios, "memory": memory, "streams": streams}
        args.out.write_text(json.dumps({"environment": dict(environment()), **result}, indent=1))


if __name__ == "__main__":
    main()
