"""The cohort engine against Flower's simulation (Ray) of the same round, over a short run and in steady state.

    pip install 'flwr[simulation]==1.41.0'
    python benchmarks/flower_simulation.py [--clients 8] [--steps 5] [--rounds 4] [--repeats 2] [engines.py's arguments]

Flower: one node per client, the work of FedAvg without its strategy (no stock one takes unequal shapes): each round the
server sends each client its adapter, the client trains it with PEFT on a model that its actor keeps, and sends it back.
One actor per core, one thread each: its fastest layout here. Ours and Flower are run in turn, each in a fresh process:

    start to end    seconds of the whole process: imports, loading, all rounds
    steady          median seconds of the rounds after the first
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import engines
from alternate import spread, table
from fslora.memory import keep_freed_memory
from fslora.runner import environment


def ours(args: argparse.Namespace) -> list[float]:
    """Seconds of each round."""
    keep_freed_memory()
    work = engines.cohort(engines.Setting(args))
    return [timed(work) for _ in range(args.rounds)]


def timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def flower(args: argparse.Namespace) -> list[float]:
    """Seconds of each round, as the server sees them."""
    from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    arguments, kept = engines.command_line(args), {}
    server, client, seconds = ServerApp(), ClientApp(), []

    @client.train()
    def train(message, context):
        if not kept:
            sys.path.insert(0, str(Path(engines.__file__).parent))
            torch.set_num_threads(1)
            kept["setting"] = engines.Setting(engines.parse(arguments))
            kept["model"] = engines.swappable(kept["setting"])
        number = int(context.node_config["partition-id"])
        if number not in kept:
            kept[number] = engines.swapped(kept["setting"], slice(number, number + 1), kept["model"])
        (trained,) = kept[number]()
        arrays = ArrayRecord({name: Array(tensor.float().numpy()) for name, tensor in trained.items()})
        return Message(RecordDict({"adapter": arrays}), reply_to=message)

    @server.main()
    def main(grid, context):
        while len(nodes := list(grid.get_node_ids())) < args.clients:
            time.sleep(0.1)
        setting = engines.Setting(args)
        shapes = [
            {key: np.zeros(tuple(value.shape), np.float32) for key, value in problem.start.adapter.tensors().items()}
            for problem in setting.problems
        ]
        for _ in range(args.rounds):
            began = time.perf_counter()
            messages = [
                Message(
                    RecordDict({"adapter": ArrayRecord({name: Array(a) for name, a in arrays.items()})}),
                    message_type=MessageType.TRAIN,
                    dst_node_id=node,
                )
                for node, arrays in zip(nodes, shapes, strict=True)
            ]
            replies = list(grid.send_and_receive(messages))
            if any(reply.has_error() for reply in replies) or len(replies) != len(nodes):
                raise RuntimeError(str(next((r.error for r in replies if r.has_error()), "a reply is missing")))
            sums = [sum(float(a.numpy().sum()) for a in reply.content["adapter"].values()) for reply in replies]
            assert all(np.isfinite(sums))
            seconds.append(time.perf_counter() - began)

    actors = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": os.cpu_count()}}
    run_simulation(server, client, args.clients, backend_config=actors)
    return seconds


def fresh(kind: str, argv: list[str]) -> dict[str, Any]:
    """One whole process."""
    environ = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_DEDUP_LOGS": "0"}
    if kind == "flower":
        environ["OMP_NUM_THREADS"] = "1"
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, *argv, "--serve-as", kind], capture_output=True, text=True, check=False, env=environ
    )
    whole = time.perf_counter() - began
    lines = [line for line in done.stdout.splitlines() if line.startswith("ROUNDS ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{kind} failed:\n{done.stderr[-3000:]}")
    rounds = json.loads(lines[-1].removeprefix("ROUNDS "))
    return {"whole": whole, "rounds": rounds, "steady": statistics.median(rounds[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve-as", choices=("ours", "flower"), help=argparse.SUPPRESS)
    own, rest = parser.parse_known_args()
    args = engines.parse(["--clients", "8", "--steps", "5", *rest])
    args.rounds = own.rounds
    transformers.logging.set_verbosity_error()
    if own.serve_as:
        print("ROUNDS", json.dumps({"ours": ours, "flower": flower}[own.serve_as](args)), flush=True)
        return
    argv = ["--rounds", str(own.rounds), *rest]
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "flower": []}
    for _ in range(own.repeats):
        for kind, results in found.items():
            results.append(fresh(kind, argv))
    rows = []
    for kind, results in found.items():
        ratios = {
            key: spread([theirs[key] / mine[key] for theirs, mine in zip(results, found["ours"], strict=True)])
            for key in ("whole", "steady")
        }
        medians = {key: statistics.median(result[key] for result in results) for key in ("whole", "steady")}
        rate = args.clients * args.steps / medians["steady"]
        rows.append(
            [
                kind,
                f"{medians['whole']:.1f}",
                ratios["whole"],
                f"{medians['steady']:.2f}",
                ratios["steady"],
                f"{rate:.1f}",
            ]
        )
    print(
        f"{args.model}, {args.dtype}, {args.clients} clients x {args.steps} steps, {args.targets}, "
        f"{own.rounds} rounds, {environment()['cpu']}\n"
    )
    print(table(["", "start to end, s", "/ ours", "a later round, s", "/ ours", "client-steps/s"], rows))
    if own.out:
        own.out.write_text(json.dumps({"runs": found, "environment": dict(environment())}, indent=1))


if __name__ == "__main__":
    main()
