"""One letter as large as an adapter of a 3B model, through a real SuperLink to a real SuperNode and back.

    python benchmarks/letters.py [--rank 64] [--layers 28] [--no-secure]

Random weights in the shapes of a Llama of 3B parameters (q, k, v, up, down), float32, no model. The site makes tensors
of what came and sends them back, after a passage through a socket as between Flower's process and the site's worker.
Prints sizes, seconds and the peak memory of each process. Needs Flower: pip install 'fslora[flower]'.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import threading
import time
from pathlib import Path

import psutil
import tomlkit
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fslora.deploy.bundle import flwr
from fslora.deploy.envelope import Record, receive, send
from fslora.deploy.lab import CONNECTION, Lab
from fslora.deploy.messages import from_flower, to_flower
from fslora.deploy.records import to_payload, to_record
from fslora.deploy.settings import SiteSettings
from fslora.memory import peak_memory
from fslora.wire import Payload

HIDDEN, VALUES, FEEDFORWARD = 3072, 1024, 8192
SHAPES = {
    "q": (HIDDEN, HIDDEN),
    "k": (HIDDEN, VALUES),
    "v": (HIDDEN, VALUES),
    "up": (HIDDEN, FEEDFORWARD),
    "down": (FEEDFORWARD, HIDDEN),
}
client = ClientApp()
server = ServerApp()


def adapter(rank: int, layers: int) -> Payload:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(layers):
        for name, (d_in, d_out) in SHAPES.items():
            tensors[f"layers/{layer}.{name}.A"] = torch.randn(rank, d_in, generator=generator)
            tensors[f"layers/{layer}.{name}.Bt"] = torch.randn(rank, d_out, generator=generator)
    return Payload(tensors, "{}")


def through_a_socket(record: Record) -> Record:
    here, there = socket.socketpair()
    with here, there:
        sender = threading.Thread(target=send, args=(here, {}, record))
        sender.start()
        _, passed = receive(there)
        sender.join()
    assert passed is not None
    return passed


def echo(message: Message, context: Context) -> Message:
    began = time.perf_counter()
    record = through_a_socket(from_flower(message.content))
    passed = time.perf_counter()
    answer = to_record(to_payload(record))
    figures = {"socket": passed - began, "tensors": time.perf_counter() - passed, "peak": peak_memory()}
    return Message(to_flower(Record(answer.entries, json.dumps(figures))), reply_to=message)


def main(grid: Grid, context: Context) -> None:
    told = json.loads(str(context.run_config["settings"]))
    record = to_record(adapter(told["rank"], told["layers"]))
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.2)
    began = time.perf_counter()
    (number,) = grid.push_messages([Message(to_flower(record), nodes[0], "train", group_id="1")])
    sent = time.perf_counter()
    while not (replies := list(grid.pull_messages([number]))):
        time.sleep(0.2)
    if replies[0].has_error():
        raise RuntimeError(replies[0].error.reason)
    answer = from_flower(replies[0].content)
    assert answer.entries == record.entries, "what came back is not what was sent"
    figures = {
        "MiB": sum(len(entry.data) for entry in record.entries) / 2**20,
        "seconds": time.perf_counter() - began,
        "of them until sent": sent - began,
        "site": json.loads(answer.header),
        "peak": peak_memory(),
    }
    path = Path(told["out"])
    path.with_suffix(".partial").write_text(json.dumps(figures))
    path.with_suffix(".partial").rename(path)


client.train()(echo)
server.main()(main)


def project(folder: Path, settings: dict) -> Path:
    folder.mkdir()
    components = {"serverapp": "letters:server", "clientapp": "letters:client"}
    flower = {"publisher": "local", "components": components, "config": {"settings": json.dumps(settings)}}
    about = {"name": "letters", "version": "0.0.1", "license": "Apache-2.0", "dependencies": []}
    document = {"project": about, "tool": {"flwr": {"app": flower}}}
    (folder / "pyproject.toml").write_text(tomlkit.dumps(document))
    return folder


def peak_of(process: int) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10


def measured(rank: int, layers: int, secure: bool, seconds: float) -> dict:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory(prefix="fslora-letters-") as scratch:
        folder, out = Path(scratch), Path(scratch) / "figures.json"
        site = SiteSettings(site="site-1", clients="0", storage=str(folder / "storage"), data="experiment")
        with Lab({"site-1": site}, folder / "logs", secure) as lab:
            told = {"rank": rank, "layers": layers, "out": str(out)}
            number = str(flwr(["run", str(project(folder / "letters", told)), CONNECTION], lab.home)["run-id"])
            end = time.monotonic() + seconds
            while not out.is_file():
                state = flwr(["ls", CONNECTION, "--run-id", number], lab.home)["runs"][0]["status"]
                if time.monotonic() > end or (state.startswith("finished") and not out.is_file()):
                    raise SystemExit(f"run {number} is {state}:\n{(folder / 'logs' / 'superlink.log').read_text()}")
                time.sleep(2)
            figures = json.loads(out.read_text())
            peaks = {name: peak_of(process.pid) for name, process in lab.processes.items()}
    peaks |= {"server's app": figures.pop("peak") / 2**20, "site's app": figures["site"].pop("peak") / 2**20}
    return {**figures, "peak MiB": peaks, "busy": psutil.getloadavg()[0], "processors": os.cpu_count()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--no-secure", dest="secure", action="store_false")
    parser.add_argument("--seconds", type=float, default=900, help="give up after")
    options = parser.parse_args()
    print(json.dumps(measured(**vars(options)), indent=2))
