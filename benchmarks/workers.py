"""Rounds over worker processes against the same rounds in one process: as many threads either way, in turn.

    python benchmarks/workers.py [--workers 2] [--chunks 2] [--repeats 3] [--set model.dtype=bfloat16]
    python benchmarks/workers.py --pipe            # what a 3B-shaped update costs on its way between two processes

Peers: this process with one thread for each worker; the worker processes with one thread each; and one worker process
with all threads, which is what messages between processes cost. Whole rounds of the embedded default with a cohort of
so many full chunks (engine.chunk as it stands): its texts, and texts of 64 tokens each. Ratios are of turns next to
each other: how much longer the one process takes.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from alternate import alternate, spread, table
from fslora import config
from fslora.algebra.adapters import zeros_like
from fslora.console import Silent
from fslora.methods.base import initial_adapter
from fslora.prepare import Federation, Workshop
from fslora.rng import Rng
from fslora.runfolder import RunFolder
from fslora.runner import environment
from fslora.simulate import Simulation, Spread
from fslora.spread.frames import Frame, receive, send
from fslora.spread.pool import Pool
from fslora.types import Template

MIB = 2**20
SHAPES = {"q": (3072, 3072), "k": (3072, 1024), "v": (3072, 1024), "up": (3072, 8192), "down": (8192, 3072)}


def equal_lengths(folder: Path) -> list[str]:
    """Items that make the task one of texts of 64 tokens."""
    draw, words = random.Random(0), "time year people way day man thing woman life child world school".split()
    rows = [f"{' '.join(draw.choices(words, k=80))},{draw.randrange(2)}" for _ in range(4000)]
    (folder / "equal.csv").write_text("\n".join(["text,label", *rows]))
    return ["data.task=table", f"data.source={folder / 'equal.csv'}", "partition.kind=iid", "model.max_length=64"]


def processor_time(pids: list[int]) -> float:
    """Returns the seconds of processor time that these processes have taken."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")


class Peers:
    """The ways to carry out the same round; all kept, so that turns can alternate."""

    def __init__(self, federation: Federation, folder: Path, workers: int) -> None:
        self.federation, self.pools = federation, dict[str, Pool]()
        self.works: dict[str, Callable[[], object]] = {}
        self.last: dict[str, tuple[int, torch.Tensor]] = {}
        self.processor: dict[str, list[float]] = {}
        """Seconds of processor time of each turn, all processes and threads; steadier on a shared machine."""
        alone = Simulation(federation, RunFolder.create(folder / "one"), Silent())
        self.works["one process"] = lambda: self._round("one process", alone)
        for name, count in (("worker processes", workers), ("one worker process", 1)):
            pool = self.pools[name] = Pool(("",) * count)
            pool.use(federation.experiment, federation.sites.partition.digest)
            run = Spread(federation, RunFolder.create(folder / name), Silent(), pool)
            self.works[name] = lambda name=name, run=run: self._round(name, run)
        self.alone = alone

    def _round(self, name: str, run: Simulation | Spread) -> None:
        workers = [worker.process.pid for worker in self.pools[name].workers] if name in self.pools else []
        began = time.process_time() + processor_time(workers)
        state, tally = run.round(run.initial_state(), 0)
        travelled = sum(tally.bytes_down.values()) + sum(tally.bytes_up.values())
        self.processor.setdefault(name, []).append(time.process_time() + processor_time(workers) - began)
        self.last[name] = travelled, torch.cat([t.flatten() for t in state.adapter.tensors().values()])

    def close(self) -> None:
        """Ends the processes."""
        for pool in self.pools.values():
            pool.stop()


def measure(name: str, items: list[str], args: argparse.Namespace) -> list[str]:
    """One row of the table."""
    clients = config.load(None, args.set).engine.chunk * args.chunks
    given = ["variants={}", f"fleet.clients={clients}", "fleet.cohort=all", *items, *args.set]
    with tempfile.TemporaryDirectory() as folder:
        federation = Workshop().federation(config.load(None, given))
        peers = Peers(federation, Path(folder), args.workers)
        try:
            times = alternate(peers.works, args.repeats)
            began = time.perf_counter()
            peers.alone.evaluate(peers.alone.initial_state())
            evaluation = time.perf_counter() - began
        finally:
            peers.close()
    one = times["one process"].wall
    sent, state = peers.last["one process"]
    worst = max(float((state - other).abs().max()) for _, other in peers.last.values())
    over = [spread([a / b for a, b in zip(one, times[peer].wall, strict=True)]) for peer in peers.pools]
    mine, theirs = peers.processor["one process"][1:], peers.processor["worker processes"][1:]
    over.append(spread([a / b for a, b in zip(mine, theirs, strict=True)]))
    return [name, f"{statistics.median(one):.2f}", *over, f"{sent / MIB:.1f}", f"{evaluation:.2f}", f"{worst:.0e}"]


def pipe(repeats: int) -> None:
    """Prints what it takes to bring an update of 28 layers at rank 64 from one process into another one's memory."""
    layers = {f"{n}.{kind}": shape for n in range(28) for kind, shape in SHAPES.items()}
    update = initial_adapter(Template(layers, {}, 64, 64.0), 64, Rng(0))
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        with os.fdopen(writing, "wb") as stream:
            for _ in range(repeats + 1):
                send(stream, Frame({}, update.tensors()))
        os._exit(0)
    os.close(writing)
    seconds, added = [], []
    total = zeros_like(update)
    with os.fdopen(reading, "rb") as stream:
        for _ in range(repeats + 1):
            began = time.perf_counter()
            got = receive(stream).tensors
            came = time.perf_counter()
            for mine, theirs in zip(total.tensors().values(), got.values(), strict=True):
                mine.add_(theirs)
            seconds.append(came - began)
            added.append(time.perf_counter() - came)
    os.waitpid(child, 0)
    print(
        f"{update.nbytes / MIB:.0f} MiB in {len(update.tensors())} tensors: {spread(seconds[1:])} s through a pipe, "
        f"{update.nbytes / 2**30 / statistics.median(seconds[1:]):.2f} GiB/s; adding it {spread(added[1:])} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=2, help="of a round")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--pipe", action="store_true")
    args = parser.parse_args()
    if args.pipe:
        pipe(args.repeats)
        return
    os.environ["OMP_NUM_THREADS"] = str(args.workers)  # of which every worker gets its share
    torch.set_num_threads(args.workers)
    print(f"{args.workers} workers, {args.chunks} chunks a round, {' '.join(args.set)} {environment()['cpu']}\n")
    peers = [f"over {args.workers} processes of one thread", "over one process, not this one", "processor time"]
    header = ["", "one process, s", *peers, "MiB sent", "an evaluation, s", "largest difference"]
    with tempfile.TemporaryDirectory() as folder:
        settings = {"its texts": [], "64 tokens": equal_lengths(Path(folder))}
        for number, (name, items) in enumerate(settings.items()):
            lines = table(header, [measure(name, items, args)]).splitlines()
            print("\n".join(lines[2 * bool(number) :]), flush=True)


if __name__ == "__main__":
    main()
