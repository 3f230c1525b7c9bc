"""A federated low-rank problem of which everything is known: objective, gradient, variances, the end.

    client i:    f_i(B, A; S) = ½ ‖W0 + s B S A − T_i‖²,   s = alpha / r,   S a random-k sketch, E[S] = identity
    objective:   f^S = (1/N) Σ_i E_S f_i = (1/N) Σ_i ½ ‖W0 + s B A − T_i‖² + ½ s² κ (r Σ_j ‖b_j‖² ‖a_j‖² − ‖B A‖²)
                 κ = (1/N) Σ_i (r − k_i) / (k_i (r − 1)):  sketching adds a penalty, none at k = r
    noise:       a client's gradient with respect to its weight has N(0, σ_w²) added to every entry, anew in each step

It is linear regression on whitened inputs. `convergence.py` runs FSLoRA on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import sqrt
from statistics import fmean

import torch

from fslora.algebra.adapters import combine, initial
from fslora.rng import Rng
from fslora.types import LoRA, Template, Tensor

LAYER, RANK, D_OUT, D_IN = "W", 8, 10, 12
TEMPLATE = Template({LAYER: (D_IN, D_OUT)}, {}, RANK, alpha=8.0)
NOISE = 0.5
"""σ_w: standard deviation of the noise on each entry of a client's gradient with respect to its weight."""


@dataclass(frozen=True)
class Constants:
    """What the theorem's bound is made of, exact at the stationary point that gradient descent on f^S reaches."""

    gap: float
    """F0 = f^S(X_0) − f^S(X*)."""
    smoothness: float
    """Lbar = L · mean of r / k_i, where L is the spectral norm of the unsketched objective's Hessian."""
    data: float
    """σ²: variance of one client's stochastic gradient from the noise, mean over the clients."""
    sketch: float
    """σ_S²: its variance from the draw of S, mean over the clients."""


@cache
def problem(clients: int, apart: float) -> tuple[Tensor, Tensor]:
    """Returns W0 [o i] and the targets T_i [c o i]; what does not depend on the clients is the same for any number.

    Their mean is W0 plus a matrix of rank r / 2 and norm 2; ``apart`` is the root mean square of ‖T_i − mean‖.
    """
    rng = Rng(0).child("problem")
    left, _ = torch.linalg.qr(normal(rng.child("left"), D_OUT, RANK // 2))
    right, _ = torch.linalg.qr(normal(rng.child("right"), D_IN, RANK // 2))
    base, own = normal(rng.child("base"), D_OUT, D_IN), normal(rng.child("own"), clients, D_OUT, D_IN)
    own = own - own.mean(0)
    return base, base + left @ right.T + own * (apart * sqrt(clients) / own.norm())


def objective(pair: LoRA, base: Tensor, targets: Tensor, ranks: Sequence[int]) -> Tensor:
    """Returns f^S."""
    fit = 0.5 * (base + pair.delta - targets).square().sum((1, 2)).mean()
    parts = pair.rank * (pair.A.square().sum(1) * pair.Bt.square().sum(1)).sum()
    return fit + 0.5 * _kappa(ranks, pair.rank) * (pair.scale**2 * parts - pair.delta.square().sum())


def gradient(pair: LoRA, base: Tensor, targets: Tensor, ranks: Sequence[int]) -> LoRA:
    """Returns the gradient of f^S with respect to A and Bt.

    With E the mean residual, D_a = diag ‖a_j‖² and D_b = diag ‖b_j‖²:
    ∇_A = s Bᵀ E + s² κ (r D_b A − Bᵀ B A),   ∇_Bᵀ = s A Eᵀ + s² κ (r D_a Bᵀ − A Aᵀ Bᵀ).
    """
    A, Bt, s, r = pair.A, pair.Bt, pair.scale, pair.rank
    error, weight = base + pair.delta - targets.mean(0), s**2 * _kappa(ranks, r)
    penalty_A = r * Bt.square().sum(1, keepdim=True) * A - Bt @ (Bt.T @ A)
    penalty_Bt = r * A.square().sum(1, keepdim=True) * Bt - A @ (A.T @ Bt)
    return LoRA(s * Bt @ error + weight * penalty_A, s * A @ error.T + weight * penalty_Bt, s)


def squared_norm(pair: LoRA) -> float:
    """Returns ‖A‖² + ‖B‖²."""
    return (pair.A.square().sum() + pair.Bt.square().sum()).item()


def start() -> LoRA:
    """Returns X_0: the package's own initial adapter, A uniform and B zero, in float64."""
    adapter = initial(TEMPLATE, RANK, {LAYER: Rng(0).child("init", LAYER).torch()})
    return combine(torch.Tensor.double, adapter).layers[LAYER]


def stationary(base: Tensor, targets: Tensor, ranks: Sequence[int], steps: int = 4000, lr: float = 0.1) -> LoRA:
    """Returns X*: where exact gradient descent on f^S from X_0 ends."""
    point = start()
    for _ in range(steps):
        slope = gradient(point, base, targets, ranks)
        point = LoRA(point.A - lr * slope.A, point.Bt - lr * slope.Bt, point.scale)
    return point


def sketch_variance(pair: LoRA, base: Tensor, targets: Tensor, ranks: Sequence[int]) -> float:
    """Returns σ_S², the mean over the clients of E_S ‖∇f_i(X; S) − ∇f_i^S(X)‖², from all C(r, k) sketches."""
    variances = []
    for target, k in zip(targets, ranks, strict=True):
        mean = gradient(pair, base, target[None], [k])
        index = torch.tensor(list(combinations(range(pair.rank), k)))
        S = torch.zeros(len(index), pair.rank, 1, dtype=pair.A.dtype).scatter_(1, index[..., None], pair.rank / k)
        error = base + pair.scale * pair.Bt.T @ (S * pair.A) - target  # [sketches o i]
        off = LoRA(pair.scale * S * (pair.Bt @ error) - mean.A, pair.scale * S * (pair.A @ error.mT) - mean.Bt, 1.0)
        variances.append(squared_norm(off) / len(index))
    return fmean(variances)


@cache
def constants(ranks: tuple[int, ...], apart: float) -> Constants:
    """Returns the constants of the bound at X*."""
    base, targets = problem(len(ranks), apart)
    end = stationary(base, targets, ranks)

    def unsketched(flat: Tensor) -> Tensor:
        A, Bt = flat[: end.A.numel()].view_as(end.A), flat[end.A.numel() :].view_as(end.Bt)
        return objective(LoRA(A, Bt, end.scale), base, targets, [end.rank])

    hessian = torch.autograd.functional.hessian(unsketched, torch.cat([end.A.flatten(), end.Bt.flatten()]))
    ratio = fmean(end.rank / k for k in ranks)
    energy = D_OUT * end.A.square().sum() + D_IN * end.Bt.square().sum()
    return Constants(
        gap=(objective(start(), base, targets, ranks) - objective(end, base, targets, ranks)).item(),
        smoothness=ratio * torch.linalg.eigvalsh(hessian).abs().max().item(),
        data=ratio * (end.scale * NOISE) ** 2 * energy.item(),
        sketch=sketch_variance(end, base, targets, ranks),
    )


def normal(rng: Rng, *shape: int) -> Tensor:
    """Returns entries of N(0, 1) in float64."""
    return torch.randn(*shape, generator=rng.torch(), dtype=torch.float64)


def _kappa(ranks: Sequence[int], rank: int) -> float:
    return fmean((rank - k) / (k * (rank - 1)) for k in ranks)
