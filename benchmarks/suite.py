"""All engine benchmarks with one command: `make bench` on a CPU, `python benchmarks/suite.py --gpu` on one GPU.

    python benchmarks/suite.py [--gpu] [--cases 1,4] [--repeats 3] [--out docs/benchmarks/cpu]

Every case is one run of engines.py: peers alternated in one process, median and range, peak memory of fresh processes.
Cases with real texts need ../shared/data beside the checkout and are left out, by name, without it. Writes OUT.json and
OUT.md; cases that are not run keep the figures that are there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fslora.runner import environment

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared" / "data"


@dataclass(frozen=True)
class Case:
    """One table."""

    title: str
    arguments: str

    @property
    def missing(self) -> Path | None:
        """The file that it needs and that is not here."""
        words = self.arguments.split()
        path = Path(words[words.index("--data") + 1]) if "--data" in words else None
        return path if path and not path.exists() else None


def text(name: str, pad: int) -> str:
    """Arguments of a case with real texts."""
    peers = "cohort,central,swapped,processes,published"
    return f"--data {DATA / name / 'train.jsonl.gz'} --pad {pad} --steps 4 --no-memory --peers {peers}"


CPU = [
    Case("MiniLM, bfloat16, query and value", "--steps 2"),
    Case(
        "MiniLM, bfloat16, all linear layers", "--steps 2 --targets all --peers cohort,floor,central,swapped,processes"
    ),
    Case("MiniLM, float32, query and value", "--steps 2 --dtype float32"),
    Case("MiniLM, bfloat16, a cohort of one", "--clients 1 --steps 8 --no-memory --peers cohort,floor,central,swapped"),
    Case("MiniLM, bfloat16, batches of one short text", "--batch 1 --tokens 32 --steps 4 --no-memory"),
    Case("MiniLM, bfloat16, phrases of SST-2", text("sst2", 128)),
    Case("MiniLM, bfloat16, news of AG News", text("ag_news", 128)),
    Case("MiniLM, bfloat16, problems of GSM8K", text("gsm8k", 256) + " --clients 8 --steps 2"),
    Case("Llama-like, 25 M, bfloat16, all linear layers", "--model llama-25m --clients 8 --targets all --no-memory"),
    Case(
        "Llama-like, 125 M, bfloat16, query and value",
        "--model llama-125m --clients 4 --no-memory --peers cohort,floor,central,swapped",
    ),
]
GPU_PEERS = "--peers cohort,floor,central,swapped"
GPU = [
    Case("MiniLM, bfloat16, 64 clients, query and value", f"--clients 64 --steps 4 {GPU_PEERS}"),
    Case(
        "Llama-like, 125 M, 64 clients, all linear layers", f"--model llama-125m --clients 64 --targets all {GPU_PEERS}"
    ),
    Case(
        "Llama-like, 1 B, 16 clients, 512 tokens, all linear layers",
        f"--model llama-1b --clients 16 --tokens 512 --targets all {GPU_PEERS}",
    ),
    Case(
        "Llama-like, 1 B, 16 clients, 512 tokens, query and value",
        f"--model llama-1b --clients 16 --tokens 512 {GPU_PEERS}",
    ),
    Case(
        "Llama-like, 3 B, 8 clients, 512 tokens, all linear layers",
        f"--model llama-3b --clients 8 --batch 2 --tokens 512 --targets all --no-memory {GPU_PEERS}",
    ),
]


def run(case: Case, repeats: int, threads: int) -> dict[str, Any]:
    """Runs one case; its table is what engines.py printed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        given = [*case.arguments.split(), "--repeats", repeats, "--threads", threads]
        command = [sys.executable, HERE / "engines.py", *given, "--out", out]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{case.title} failed:\n{done.stderr[-3000:]}")
        shown = case.arguments.replace(str(DATA), "../shared/data")
        return {"arguments": shown, "printed": done.stdout.strip(), **json.loads(out.read_text())}


def page(results: dict[str, dict[str, Any]]) -> str:
    """The Markdown that holds all tables."""
    parts = ["Made by `python benchmarks/suite.py`; not edited by hand."]
    for title, result in results.items():
        head, _, rows = result["printed"].partition("\n\n")
        parts.append(f"### {title}\n\n`python benchmarks/engines.py {result['arguments']}`\n\n{head}\n\n{rows}")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="the cases for one GPU, in less than ten minutes")
    parser.add_argument("--cases", default="", help="numbers from 1; all by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0 for one per core")
    parser.add_argument("--out", type=Path, help="without an ending [default: docs/benchmarks/cpu or gpu]")
    args = parser.parse_args()
    if args.gpu and not torch.cuda.is_available():
        raise SystemExit("--gpu: torch sees no GPU here; leave it out for the cases of a CPU")
    cases = GPU if args.gpu else CPU
    chosen = [cases[int(number) - 1] for number in args.cases.split(",")] if args.cases else cases
    out = args.out or HERE.parent / "docs" / "benchmarks" / ("gpu" if args.gpu else "cpu")
    out.parent.mkdir(parents=True, exist_ok=True)
    record = out.with_suffix(".json")
    results = json.loads(record.read_text())["cases"] if record.exists() else {}
    for case in chosen:
        if case.missing:
            print(f"{case.title}: left out, there is no {case.missing}")
            continue
        results[case.title] = run(case, args.repeats, args.threads)
        print(f"{case.title}\n{results[case.title]['printed']}\n", flush=True)
        ordered = {each.title: results[each.title] for each in cases if each.title in results}
        record.write_text(json.dumps({"cases": ordered, "environment": dict(environment())}, indent=1))
        out.with_suffix(".md").write_text(page(ordered))


if __name__ == "__main__":
    main()
