"""How the engine's time and memory grow: with clients, batch, tokens, rank, layers and adapted layers.

    python benchmarks/growth.py [--repeats 3] [--axes clients,tokens] [--out docs/benchmarks/growth]

One round of one local step, alternated with the floor (see engines.py) at every point, one thread, processor time;
peak memory of fresh processes. An exponent is the slope of log cost over log size between the last two points, and
of memory what lies above the model: the growth that a user meets at the far end, not an average over fixed costs.
Writes OUT.json, OUT.md and OUT.png.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import engines
from alternate import alternate, peak_of, table
from fslora.runner import environment

BASIS = {"model": "minilm", "dtype": "bfloat16", "clients": 8, "batch": 4, "tokens": 64, "targets": "all"}
GPU_BASIS = {"model": "llama-1b", "dtype": "bfloat16", "clients": 8, "batch": 2, "tokens": 256, "targets": "all"}


@dataclass(frozen=True)
class Axis:
    """One quantity that grows while the others rest."""

    name: str
    values: tuple[Any, ...]
    label: str
    basis: dict[str, Any]

    def arguments(self, value: Any) -> list[str]:
        """The arguments of engines.py at one point."""
        settings = {**self.basis, self.name: value, "steps": 1}
        return [part for name, item in settings.items() for part in (f"--{name}", str(item))]


def axes(gpu: bool) -> list[Axis]:
    """What is varied, on a CPU or on a GPU."""
    basis = GPU_BASIS if gpu else BASIS
    layered = basis if gpu else {**basis, "model": "llama-25m", "clients": 4}
    return [
        Axis("clients", (1, 2, 4, 8, 16, 32, 64) if not gpu else (1, 2, 4, 8, 16, 32), "clients of a cohort", basis),
        Axis("batch", (1, 2, 4, 8, 16), "examples of a client's batch", basis),
        Axis("tokens", (16, 32, 64, 128, 256) if not gpu else (64, 128, 256, 512, 1024), "tokens of a text", basis),
        Axis("ranks", (4, 8, 16, 32, 64), "rank of every client", basis),
        Axis("layers", (2, 4, 8, 16), "layers of the model", layered),
        Axis(
            "model",
            ("llama-25m", "llama-125m") if not gpu else ("llama-125m", "llama-1b", "llama-3b"),
            "model",
            layered,
        ),
    ]


def measure(axis: Axis, repeats: int) -> list[dict[str, Any]]:
    """One row per value."""
    rows = []
    for value in axis.values:
        arguments = axis.arguments(value)
        setting = engines.Setting(engines.parse(arguments))
        works = {name: engines.MAKERS[name](setting) for name in ("cohort", "floor")}
        times = alternate(works, repeats)
        size = setting.base.parameters if axis.name == "model" else value
        kind = "wall" if torch.cuda.is_available() else "cpu"
        rows.append(
            {
                "value": value,
                "size": size,
                "seconds": statistics.median(getattr(times["cohort"], kind)),
                "floor": statistics.median(getattr(times["floor"], kind)),
                "peak": peak_of(engines.__file__, [*arguments, "--threads", 1, "--only", "cohort"]),
            }
        )
        print(axis.name, rows[-1], flush=True)
        del setting, works
    return rows


def slope(rows: list[dict[str, Any]], key: str, above: float = 0.0) -> float:
    """The exponent between the last two points."""
    (a, b) = rows[-2:]
    return math.log((b[key] - above) / (a[key] - above)) / math.log(b["size"] / a["size"])


def draw(results: dict[str, list[dict[str, Any]]], labels: dict[str, str], path: Path) -> None:
    """One panel per axis: time above, memory below, on logarithmic scales that a row shares."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, panels = plt.subplots(
        2, len(results), figsize=(2.4 * len(results), 5.2), layout="constrained", squeeze=False, sharey="row"
    )
    for column, (name, rows) in enumerate(results.items()):
        sizes = [row["size"] for row in rows]
        panels[0][column].plot(sizes, [row["seconds"] for row in rows], "o-", color="#1f5fa8", label="cohort")
        panels[0][column].plot(sizes, [row["floor"] for row in rows], "s--", color="#888888", label="floor")
        panels[1][column].plot(sizes, [row["peak"] / 2**20 for row in rows], "o-", color="#1f5fa8")
        panels[1][column].set_xlabel(labels[name])
        for panel in (panels[0][column], panels[1][column]):
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            panel.yaxis.set_major_locator(LogLocator(2))
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.3g}" if value < 1000 else f"{value:,.0f}")
            panel.set_xticks(sizes, [str(row["value"]) for row in rows])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("seconds a round")
    panels[1][0].set_ylabel("peak memory, MiB")
    panels[0][0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--axes", default="")
    parser.add_argument("--out", type=Path, required=True, help="where to write, without an ending")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    known = axes(torch.cuda.is_available())
    chosen = [axis for axis in known if not args.axes or axis.name in args.axes.split(",")]
    results = {axis.name: measure(axis, args.repeats) for axis in chosen}
    lines = []
    for axis in chosen:
        rows = results[axis.name]
        least = min(row["peak"] for row in rows) * 0.0 if axis.name == "model" else rows[0]["peak"]
        grown = slope(rows, "peak") if len(rows) < 3 or axis.name == "model" else slope(rows[1:], "peak", least)
        ratio = [row["floor"] / row["seconds"] for row in rows]
        lines.append(
            [
                axis.label,
                f"{rows[0]['value']} to {rows[-1]['value']}",
                f"{rows[0]['seconds']:.2f} to {rows[-1]['seconds']:.2f} s",
                f"{slope(rows, 'seconds'):.2f}",
                f"{slope(rows, 'floor'):.2f}",
                f"{ratio[0]:.2f} to {ratio[-1]:.2f}",
                f"{rows[0]['peak'] / 2**20:,.0f} to {rows[-1]['peak'] / 2**20:,.0f} MiB",
                f"{grown:.2f}",
            ]
        )
    header = ["axis", "from, to", "time", "exponent", "the floor's", "share of the floor", "peak memory", "exponent"]
    text = table(header, lines)
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text(text + "\n")
    record = {"axes": results, "basis": {a.name: a.basis for a in chosen}, "environment": dict(environment())}
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1))
    draw(results, {axis.name: axis.label for axis in chosen}, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
