"""Does FSLoRA converge as its theorem says? Measured where the objective and its gradient are known exactly.

    python examples/convergence.py --out FOLDER [--quick]

Paper: Federated Sketching LoRA, arXiv 2501.19389, section 4. docs/theory.md says what was measured and what it means.

The rounds are the package's own: `FSLoRA.broadcast` draws, takes and rescales, `FSLoRA.aggregate` scatters and
averages, with the paper's choices (independent draws, mean over the cohort, server SGD with lr 1, all N clients in
every round). Local SGD is written out here, because the engines train language models and this is a matrix.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch.nn.utils.rnn import pad_sequence

from fslora.methods.fslora import FSLoRA
from fslora.rng import Rng
from fslora.types import Adapter, Client, ClientUpdate, LoRA, Round, ServerState, Tensor
from known_problem import (
    LAYER,
    NOISE,
    RANK,
    TEMPLATE,
    Constants,
    constants,
    gradient,
    normal,
    problem,
    squared_norm,
    start,
)

METHOD = FSLoRA(sketch="independent", average="cohort", weighting="uniform")


@dataclass(frozen=True)
class Setting:
    """One point of a sweep: the ranks k_i of N clients, H and T. All clients take part in every round."""

    ranks: tuple[int, ...]
    local_steps: int
    rounds: int
    apart: float = 1.0
    """Heterogeneity: root mean square over the clients of ‖T_i − mean of T‖, where ‖mean of T − W0‖ = 2."""
    redrawn: bool = False
    """A control, not FSLoRA: a fresh sketch in every local step (every client holds the whole pair)."""
    counts_freezing: bool = False
    """Whether the step size counts the sketch's variance H times, because one draw serves all H steps."""


# --- the algorithm ---


def step_size(setting: Setting, known: Constants) -> tuple[float, bool]:
    """Returns γ, and whether the cap 1 / (2 H Lbar) (the theorem's "small enough") has set it.

    γ = sqrt(2 N F0 / (Lbar s² H T)) makes the two leading terms of the bound equal: F0 / (γ H T) and γ Lbar s² / (2 N).
    """
    clients, H = len(setting.ranks), setting.local_steps
    variance = known.data + known.sketch * (H if setting.counts_freezing else 1)
    gamma = sqrt(2 * clients * known.gap / (known.smoothness * variance * H * setting.rounds))
    cap = 1 / (2 * H * known.smoothness)
    return min(gamma, cap), gamma > cap


def leading(setting: Setting, known: Constants, gamma: float, frozen: bool) -> float:
    """Returns F0 / (γ H T) + γ Lbar s² / (2 N); ``frozen``: s² = σ² + H σ_S² instead of the theorem's σ² + σ_S²."""
    steps = setting.local_steps
    variance = known.data + known.sketch * (steps if frozen and not setting.redrawn else 1)
    noise = gamma * known.smoothness * variance / (2 * len(setting.ranks))
    return known.gap / (gamma * steps * setting.rounds) + noise


def local_sgd(pairs: Sequence[LoRA], residual: Tensor, gamma: float, sketches: Sequence[Tensor | float]) -> list[LoRA]:
    """Returns every client's change after one SGD step per entry of ``residual``, W0 − T_i + noise, [h c o i].

    ``sketches`` multiply the parts, [c r 1] or 1 for each step. Smaller ranks are filled up with zeros in both factors,
    which stay zero: their gradients are zero.
    """
    A, Bt = (pad_sequence([getattr(pair, name) for pair in pairs], batch_first=True) for name in ("A", "Bt"))
    scale = torch.tensor([[[pair.scale]] for pair in pairs], dtype=A.dtype)
    first_A, first_Bt = A, Bt
    for rest, S in zip(residual, sketches, strict=True):
        weighted = scale * S
        G = rest + Bt.mT @ (weighted * A)
        A, Bt = A - gamma * weighted * (Bt @ G), Bt - gamma * weighted * (A @ G.mT)
    changes = zip(A - first_A, Bt - first_Bt, pairs, strict=True)
    return [LoRA(dA[: pair.rank], dBt[: pair.rank], pair.scale) for dA, dBt, pair in changes]


def run(setting: Setting, gamma: float, seed: int) -> list[float]:
    """Returns ‖∇f^S(X_t)‖² for t = 0 … T − 1. The seed draws sketches and noise; problem and X_0 are fixed."""
    base, targets = problem(len(setting.ranks), setting.apart)
    held = (RANK,) * len(setting.ranks) if setting.redrawn else setting.ranks
    cohort = tuple(Client(number, k, 1) for number, k in enumerate(held))
    state, norms = ServerState(Adapter({LAYER: start()})), []
    for number in range(setting.rounds):
        norms.append(squared_norm(gradient(state.adapter.layers[LAYER], base, targets, setting.ranks)))
        round = Round(number, cohort, Rng(seed).child("round", number), TEMPLATE)
        sent = [METHOD.broadcast(state, client, round) for client in cohort]
        noise = NOISE * normal(round.rng.child("noise"), setting.local_steps, *targets.shape)
        # What travels carries r / k in its scale; only the control has anything left to sketch.
        sketches = _redrawn(setting, round.rng) if setting.redrawn else [1.0] * setting.local_steps
        pairs = [broadcast.adapter.layers[LAYER] for broadcast in sent]
        changes = local_sgd(pairs, base - targets + noise, gamma, sketches)
        updates = (ClientUpdate(c.id, Adapter({LAYER: changes[c.id]}), 1, sent[c.id].rows) for c in cohort)
        state = METHOD.aggregate(state, updates, round)
    return norms


def _redrawn(setting: Setting, rng: Rng) -> list[Tensor]:
    k = torch.tensor(setting.ranks)[:, None]
    keys = torch.rand(setting.local_steps, len(k), RANK, generator=rng.child("control").torch())
    places = keys.argsort(-1).argsort(-1)  # a random permutation for every step and client
    return list(((places < k) * (RANK / k).double())[..., None])


# --- what is measured ---

WHOLE, HALF, QUARTER, MIXED = "k = r", "k = r/2", "k = r/4", "k = r/4, r/4, r/2, r"
APART = f"{WHOLE}, clients twice as far apart"
CONTROL, SMALLER = "the same, S redrawn in every step", "the same, smaller γ"
FLEETS = {WHOLE: (8, 8, 8, 8), HALF: (4, 4, 4, 4), QUARTER: (2, 2, 2, 2), MIXED: (2, 2, 4, 8)}
COLOURS = {WHOLE: "C0", HALF: "C1", QUARTER: "C2", MIXED: "C3", APART: "C9", CONTROL: "C4", SMALLER: "C5"}
Results = dict[str, dict[str, list[dict]]]
"""What is varied → line → points."""


def sweeps(quick: bool) -> dict[str, dict[str, list[Setting]]]:
    """Returns what is varied → line → settings; four clients and H = 4 where those are not varied."""
    horizons = [32, 64] if quick else [64, 128, 256, 512, 1024, 2048]
    copies, T_N = ([1, 2], 32) if quick else ([1, 2, 4], 512)
    steps, T_H = ([1, 4], 32) if quick else ([1, 2, 4, 8, 16, 32], 512)
    whole, mixed = ([Setting(FLEETS[name], H, T_H) for H in steps] for name in (WHOLE, MIXED))
    return {
        "T": {name: [Setting(ranks, 4, T) for T in horizons] for name, ranks in FLEETS.items()},
        "N": {name: [Setting(FLEETS[name] * n, 4, T_N) for n in copies] for name in (WHOLE, MIXED)},
        "H": {
            WHOLE: whole,
            APART: [replace(setting, apart=2.0) for setting in whole],
            MIXED: mixed,
            CONTROL: [replace(setting, redrawn=True) for setting in mixed],
            SMALLER: [replace(setting, counts_freezing=True) for setting in mixed],
        },
    }


def measure(setting: Setting, seeds: int) -> dict:
    """Returns one point: constants, step size, predictions, the mean over t for every seed, and the mean curve."""
    known = constants(setting.ranks, setting.apart)
    gamma, capped = step_size(setting, known)
    norms = np.array([run(setting, gamma, seed) for seed in range(seeds)])
    bins = np.array_split(np.arange(setting.rounds), min(setting.rounds, 64))
    return {
        "setting": asdict(setting),
        "constants": asdict(known),
        "gamma": gamma,
        "theorem": leading(setting, known, gamma, frozen=False),
        "frozen": leading(setting, known, gamma, frozen=True),
        # Otherwise the cap has set the step (the 1 / T term), or the bound says no more than what the run starts from.
        "leads": bool(not capped and leading(setting, known, gamma, frozen=False) <= norms[0, 0] / 2),
        "mean": norms.mean(1).tolist(),
        "min": norms.min(1).tolist(),
        "curve": [[float(b.mean()) + 1, float(norms[:, b].mean())] for b in bins],
    }


def exponents(varied: str, points: Sequence[dict]) -> dict:
    """Returns one line's exponents, fitted where the leading terms lead; {} for fewer than two such points.

    Measured (mean and standard deviation over the seeds), between the last two points, and of both predictions.
    """
    used = [point for point in points if point["leads"]]
    if len(used) < 2:
        return {}
    x = [_at(varied, point) for point in used]

    def slope(y: Sequence[float], first: int = 0) -> float:
        return float(np.polyfit(np.log(x[first:]), np.log(y[first:]), 1)[0])

    by_seed = [slope(values) for values in zip(*(point["mean"] for point in used), strict=True)]
    return {
        "over": x,
        "measured": fmean(by_seed),
        "spread": stdev(by_seed),
        "last": slope([fmean(point["mean"]) for point in used], first=-2),
        "theorem": slope([point["theorem"] for point in used]),
        "frozen": slope([point["frozen"] for point in used]),
    }


def tables(results: Results) -> str:
    """Returns two Markdown tables: exponents by line, and constants by sketch ratio at the longest horizon."""
    rows = ["| varied | clients | fitted over | measured | last two | leading terms | with σ² + H σ_S² |"]
    rows.append("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for varied, lines in results.items():
        for name, points in lines.items():
            if not (e := exponents(varied, points)):
                rows.append(f"| {varied} | {name} | too short | | | | |")
                continue
            values = " | ".join(f"{e[kind]:.2f}" for kind in ("last", "theorem", "frozen"))
            fitted = f"{e['over'][0]} … {e['over'][-1]} | {e['measured']:.2f} ± {e['spread']:.2f}"
            rows.append(f"| {varied} | {name} | {fitted} | {values} |")
    rows += ["", "| clients | T | Lbar | F0 | σ² | σ_S² | γ | leading terms | measured | measured / leading |"]
    rows.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, points in results["T"].items():
        point, c = points[-1], points[-1]["constants"]
        known = f"{c['smoothness']:.2f} | {c['gap']:.2f} | {c['data']:.1f} | {c['sketch']:.1f} | {point['gamma']:.4f}"
        mean, bound, T = fmean(point["mean"]), point["theorem"], point["setting"]["rounds"]
        measured = f"{bound:.4f} | {mean:.4f} ± {stdev(point['mean']):.4f} | {mean / bound:.2f}"
        rows.append(f"| {name} | {T} | {known} | {measured} |")
    return "\n".join(rows)


def draw(results: Results) -> Figure:
    """Returns the figure: above, the norm over the rounds; below, its mean against T, N and H, and the bound."""
    figure = Figure(figsize=(15, 10), layout="constrained")
    axes = figure.subplots(2, 3, sharey="row")
    for (above, below), (varied, lines) in zip(axes.T, results.items(), strict=True):
        shown = {name: (points[-1], COLOURS[name]) for name, points in lines.items()}
        if varied != "T":
            shades = colormaps["viridis"](np.linspace(0, 0.9, len(lines[MIXED])))
            shown = {f"{varied} = {_at(varied, p)}": (p, c) for p, c in zip(lines[MIXED], shades, strict=True)}
        for name, (point, colour) in shown.items():
            above.loglog(*zip(*point["curve"], strict=True), color=colour, label=name)
        rounds, fleet = lines[MIXED][-1]["setting"]["rounds"], "" if varied == "T" else f", {MIXED}"
        above.set(title=f"T = {rounds}{fleet}", xlabel="round")
        above.legend(fontsize=8, loc="lower left")
        for name, points in lines.items():
            _line(below, varied, points, COLOURS[name], name)
        below.plot([], [], "k--", lw=1, label="leading terms of the bound")
        ticks = [_at(varied, point) for point in lines[MIXED]]
        below.set(title=f"Mean over the T rounds, against {varied}", xlabel=varied, xscale="log", yscale="log")
        below.set_xticks(ticks, [str(tick) for tick in ticks])
        below.xaxis.set_minor_locator(NullLocator())
        below.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    for axis in axes.flat:
        axis.grid(alpha=0.25, which="both")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
    axes[0, 0].set_ylabel("squared norm of the gradient of $f^S$")
    axes[1, 0].set_ylabel("its mean over the rounds (hollow: not fitted)")
    return figure


def _at(varied: str, point: dict) -> int:
    setting = Setting(**point["setting"])
    return {"T": setting.rounds, "N": len(setting.ranks), "H": setting.local_steps}[varied]


def _line(axis: Axes, varied: str, points: Sequence[dict], colour: str, name: str) -> None:
    x, means = [_at(varied, point) for point in points], np.array([point["mean"] for point in points])
    axis.errorbar(x, means.mean(1), yerr=means.std(1, ddof=1), color=colour, label=name)
    axis.plot(x, [point["theorem"] for point in points], color=colour, ls="--", lw=1)
    for at, point in zip(x, points, strict=True):
        axis.plot(at, fmean(point["mean"]), "o", color=colour, mfc=colour if point["leads"] else "white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for convergence.json and convergence.png")
    parser.add_argument("--seeds", type=int, default=3, help="two or more")
    parser.add_argument("--quick", action="store_true", help="tiny horizons: shows that it runs, measures nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are too small to share
    results = {
        varied: {name: [measure(setting, args.seeds) for setting in settings] for name, settings in lines.items()}
        for varied, lines in sweeps(args.quick).items()
    }
    args.out.mkdir(parents=True, exist_ok=True)
    fits = {v: {name: exponents(v, points) for name, points in lines.items()} for v, lines in results.items()}
    (args.out / "convergence.json").write_text(json.dumps({"points": results, "exponents": fits}, indent=1))
    draw(results).savefig(args.out / "convergence.png", dpi=110)
    print(tables(results))


if __name__ == "__main__":
    main()
