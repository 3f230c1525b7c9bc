"""examples/: the closed forms are the averages over all sketches, and the script runs."""

from __future__ import annotations

import importlib
import json
import sys
from itertools import combinations
from math import isfinite
from pathlib import Path

import pytest
import torch

from fslora.algebra.adapters import rescaled
from fslora.algebra.rows import take
from fslora.rng import Rng
from fslora.types import Adapter, LoRA

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
EXACT = 1e-10
D_OUT, D_IN = 4, 5


@pytest.fixture
def example(monkeypatch):
    """Imports a script of examples/ as it would import its neighbours."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def normal(name: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=Rng(3).child(name).torch(), dtype=torch.float64)


def problem(rank: int, clients: int):
    """A pair that requires gradients, W0 and targets."""
    A, Bt = normal("A", rank, D_IN).requires_grad_(), normal("Bt", rank, D_OUT).requires_grad_()
    return LoRA(A, Bt, 0.7), normal("base", D_OUT, D_IN), normal("targets", clients, D_OUT, D_IN)


def sketched_losses(pair: LoRA, base: torch.Tensor, target: torch.Tensor, k: int) -> list[torch.Tensor]:
    """One client's loss under each of the C(r, k) sketches, made by the package's own take and rescale."""
    losses = []
    for index in combinations(range(pair.rank), k):
        rows = {"l": torch.tensor(index, dtype=torch.int32)}
        part = rescaled(take(Adapter({"l": pair}), rows), pair.rank / k).layers["l"]
        losses.append(0.5 * (base + part.delta - target).square().sum())
    return losses


FLEETS = [(r, (k,) * 3) for r in (2, 4, 5) for k in range(1, r + 1)] + [(5, (1, 2, 5))]


@pytest.mark.parametrize(("rank", "ranks"), FLEETS)
def test_objective_and_gradient_are_the_averages_over_all_sketches(example, rank, ranks):
    """f^S = (1/N) Σ_i (1/C(r, k_i)) Σ_S ½ ‖W0 + s B S A − T_i‖²; its gradient, by hand, is autograd's of that sum."""
    known = example("known_problem")
    pair, base, targets = problem(rank, len(ranks))
    by_client = [torch.stack(sketched_losses(pair, base, t, k)).mean() for t, k in zip(targets, ranks, strict=True)]
    mean = torch.stack(by_client).mean()
    torch.testing.assert_close(known.objective(pair, base, targets, ranks), mean, atol=EXACT, rtol=EXACT)
    closed = known.gradient(pair, base, targets, ranks)
    for loss in (mean, known.objective(pair, base, targets, ranks)):
        A, Bt = torch.autograd.grad(loss, [pair.A, pair.Bt])
        torch.testing.assert_close(closed.A, A, atol=EXACT, rtol=EXACT)
        torch.testing.assert_close(closed.Bt, Bt, atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize(("rank", "ranks"), FLEETS)
def test_sketch_variance_is_that_of_the_gradients(example, rank, ranks):
    """σ_S² = (1/N) Σ_i mean over S of ‖∇f_i(X; S) − mean‖², gradients by autograd; 0 at k = r."""
    known = example("known_problem")
    pair, base, targets = problem(rank, len(ranks))
    total = 0.0
    for target, k in zip(targets, ranks, strict=True):
        losses = sketched_losses(pair, base, target, k)
        gradients = [torch.autograd.grad(loss, [pair.A, pair.Bt]) for loss in losses]
        stacked = torch.stack([torch.cat([part.flatten() for part in both]) for both in gradients])
        total += (stacked - stacked.mean(0)).square().sum(1).mean().item() / len(ranks)
    assert known.sketch_variance(pair, base, targets, ranks) == pytest.approx(total, rel=EXACT, abs=EXACT)


def test_the_constants_are_taken_where_the_gradient_vanishes(example):
    """∇f^S(X*) = 0 for every fleet of the example; at k = r nothing is left of the mean residual."""
    known, convergence = example("known_problem"), example("convergence")
    for ranks in convergence.FLEETS.values():
        base, targets = known.problem(len(ranks), 1.0)
        end = known.stationary(base, targets, ranks)
        assert known.squared_norm(known.gradient(end, base, targets, ranks)) < 1e-20
        if ranks == convergence.FLEETS[convergence.WHOLE]:
            torch.testing.assert_close(base + end.delta, targets.mean(0), atol=1e-9, rtol=0)


def test_the_number_of_clients_changes_no_objective(example):
    """N copies of a fleet: the same f^S up to a constant, hence the same gradient; heterogeneity as asked for."""
    known = example("known_problem")
    gradients = []
    for clients in (4, 12):
        base, targets = known.problem(clients, 2.0)
        assert (targets - targets.mean(0)).square().sum().item() / clients == pytest.approx(4.0)
        gradients.append(known.gradient(known.start(), base, targets, (2, 4) * (clients // 2)))
    torch.testing.assert_close(gradients[0].Bt, gradients[1].Bt, atol=1e-12, rtol=0)


def test_one_full_rank_step_without_noise_is_gradient_descent(example, monkeypatch):
    """k = r, H = 1, σ_w = 0: the package's round is X − γ ∇f, so the norms are those of plain descent."""
    known, convergence = example("known_problem"), example("convergence")
    monkeypatch.setattr(convergence, "NOISE", 0.0)
    setting = convergence.Setting((8, 8), local_steps=1, rounds=5)
    base, targets = known.problem(2, 1.0)
    point, expected = known.start(), []
    for _ in range(5):
        slope = known.gradient(point, base, targets, (8, 8))
        expected.append(known.squared_norm(slope))
        point = LoRA(point.A - 0.05 * slope.A, point.Bt - 0.05 * slope.Bt, point.scale)
    assert convergence.run(setting, 0.05, seed=0) == pytest.approx(expected, rel=1e-10)


def test_the_control_s_mean_step_is_the_gradient(example):
    """Redrawn sketches, one step at γ = 1 without noise: over draws, the mean change of A is −∇_A f^S."""
    known, convergence = example("known_problem"), example("convergence")
    ranks, (base, targets) = (2, 4), known.problem(2, 1.0)
    pair = LoRA(known.start().A, normal("B", 8, 10), 1.0)
    setting, steps = convergence.Setting(ranks, local_steps=1, rounds=1, redrawn=True), []
    for seed in range(400):
        S = convergence._redrawn(setting, Rng(seed))
        changes = convergence.local_sgd([pair, pair], (base - targets)[None], 1.0, S)
        steps.append(-(changes[0].A + changes[1].A) / 2)
    draws = torch.stack(steps)
    off = draws.mean(0) - known.gradient(pair, base, targets, ranks).A
    # 96 entries: the largest of them is not expected beyond 4.5 standard errors.
    assert (off.abs() < 4.5 * draws.std(0) / len(steps) ** 0.5).all()


def test_the_quick_form_runs_and_descends(example, monkeypatch, tmp_path, capsys):
    """--quick writes both files and prints the tables; every norm is finite and the curves end below their start."""
    convergence = example("convergence")
    monkeypatch.setattr(sys, "argv", ["convergence.py", "--out", str(tmp_path), "--quick", "--seeds", "2"])
    convergence.main()
    printed = capsys.readouterr().out
    assert printed.count("\n| ") > 12
    assert (tmp_path / "convergence.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "convergence.json").read_text())["points"]
    points = [point for lines in results.values() for line in lines.values() for point in line]
    for point in points:
        norms = [norm for _, norm in point["curve"]]
        assert all(isfinite(norm) and norm > 0 for norm in norms + point["mean"])
        assert norms[-1] < norms[0]
        assert 0 < point["gamma"] * point["setting"]["local_steps"] * point["constants"]["smoothness"] <= 0.5
