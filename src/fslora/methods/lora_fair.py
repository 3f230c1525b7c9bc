"""LoRA-FAIR: average both factors, then correct the mean B towards the mean of the products.

Paper: LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement, Bian, Wang, Zhang,
Xu, arXiv 2411.14961.

    Ā = Σ_i p_i A_i,   B̄ = Σ_i p_i B_i,   ΔW = Σ_i p_i B_i A_i,   p_i = n_i / Σ_j n_j
    ΔB = argmin  D(ΔW, (B̄ + ΔB) Ā) + λ ‖ΔB‖²,      A ← Ā,   B ← B̄ + ΔB

| paper | here |
| --- | --- |
| λ | ``penalty`` |
| D | ``distance`` |
| "averaged initialisation" | nothing is reset: clients go on from Ā and B̄ + ΔB |

What D is, is not settled by what is public of the paper (its formulas leave open which cosine), so there are three:

- ``squared`` (our default): ‖ΔW - (B̄ + ΔB) Ā‖². It has a closed form, ΔB = E Āᵀ (Ā Āᵀ + λ I)⁺ with what averaging
  loses, E = ΔW - B̄ Ā = Σ_i p_i (B_i - B̄)(A_i - Ā): no iterations, and never further from ΔW than FedIT. It cannot
  repair what of E lies outside the row space of Ā. Products are unscaled, so λ is held against the eigenvalues of
  Ā Āᵀ: about 1/3 each for a fresh A, where the paper's λ = 0.01 takes 3% off the correction.
- ``flattened-cosine``: 1 - cos of the two matrices, each as one vector.
- ``column-cosine``: the mean of 1 - cos over columns, one per input feature (the public code derived from theirs).

The cosines are minimised by gradient steps from ΔB = 0 (the paper: SGD). Their gradient grows as 1 / ‖B̄ Ā‖ and a
cosine does not see length: at one fixed step size a small B̄ would be blown up in the first step and never come back.
So each step is divided by the curvature that D has where the directions agree, which leaves no step size to choose.
Public ports start from Xavier noise instead, most of which a small λ leaves in what is served. No d_out x d_in matrix
is formed, whatever D is.

Unequal ranks are not in the paper. As reported of its experiments, factors are filled up with zeros, and a client gets
the first parts of the pair, at the server's constant scale; a part that nobody of the cohort holds keeps its value
and takes no part in the fit. The correction then holds for the whole pair, not for a client's cut of it. And as with
all zero padding, a part that few clients hold shrinks by their share in every round, trained or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from fslora.algebra.lowrank import bounded, stacked
from fslora.algebra.rows import ScatterMean, leading, with_leading, zero_filled, zero_padded
from fslora.methods.base import Method
from fslora.types import Broadcast, Client, ClientUpdate, LoRA, Round, ServerState, Tensor

RANK_DEFICIENT = 1e-12
"""Eigenvalues of Ā Āᵀ below this share of the largest are float32 rounding of a smaller rank, and count as zero."""


class LoRAFAIR(Method):
    """FedAvg of LoRA factors with a fitted correction of B."""

    name: ClassVar[str] = "lora-fair"
    paper: ClassVar[str] = "LoRA-FAIR, arXiv 2411.14961"
    differs: ClassVar[str] = "how many of the leading rank-one parts it holds; zero-padded"
    travels: ClassVar[str] = "both factors of those parts, down and up"
    streams: ClassVar[bool] = False

    distance: Literal["squared", "flattened-cosine", "column-cosine"] = Field(
        "squared", description="Between the mean product and the served one: 'squared' error (closed form) or a cosine."
    )
    penalty: float = Field(0.01, ge=0, description="Weight of the correction's squared norm (the paper's lambda).")
    steps: int = Field(20, ge=1, description="Cosines: gradient steps per round.")
    weighting: Literal["uniform", "examples"] = Field(
        "examples", description="Clients count by their number of examples (the paper's), or equally."
    )

    def broadcast(self, state: ServerState, client: Client, round: Round) -> Broadcast:
        """Returns the client's leading parts, at the server's scale."""
        return Broadcast(leading(state.adapter, client.rank))

    def aggregate(self, state: ServerState, updates: Iterator[ClientUpdate], round: Round) -> ServerState:
        """Returns the state with the mean factors, B corrected layer by layer, and the mean dense tensors."""
        arrived = list(updates)
        weights = [update.weight(self.weighting) for update in arrived]
        shares = [weight / sum(weights) for weight in weights]
        deltas = ScatterMean(state.adapter)
        for update, weight in zip(arrived, weights, strict=True):
            deltas.add(update.adapter, None, weight)
        averaged = zero_padded(state.adapter, deltas, "factor")
        uploads = zero_filled(state.adapter, [update.adapter for update in arrived])
        corrected = {}
        for name, pair in averaged.layers.items():
            factors = [upload.layers[name] for upload in uploads]
            mean = LoRA(pair.A[: factors[0].rank], pair.Bt[: factors[0].rank], pair.scale)
            corrected[name] = replace(mean, Bt=(mean.Bt + self._correction(mean, factors, shares)).to(mean.Bt.dtype))
        return replace(state, adapter=with_leading(averaged, corrected))

    def _correction(self, mean: LoRA, factors: Sequence[LoRA], shares: Sequence[float]) -> Tensor:
        if self.distance == "squared":
            return squared_correction(mean, factors, shares, self.penalty)
        by_column = self.distance == "column-cosine"
        return cosine_correction(mean, factors, shares, self.penalty, self.steps, by_column)


def squared_correction(mean: LoRA, factors: Sequence[LoRA], shares: Sequence[float], penalty: float) -> Tensor:
    """Returns ΔBᵀ = (Ā Āᵀ + λ I)⁺ Ā Eᵀ, float64 [k o].

    Args:
        mean: Ā and B̄.
        factors: A_i and B_i of every client, at the same rank.
        shares: p_i.
        penalty: λ.
    """
    A, Bt = mean.A.double(), mean.Bt.double()
    lost = torch.zeros_like(Bt)  # Ā Eᵀ
    for pair, share in zip(factors, shares, strict=True):
        lost += share * (A @ (pair.A - A).T) @ (pair.Bt - Bt)
    gram = A @ A.T + penalty * torch.eye(len(A), dtype=A.dtype)
    return _inverse(gram) @ lost


def cosine_correction(
    mean: LoRA, factors: Sequence[LoRA], shares: Sequence[float], penalty: float, steps: int, by_column: bool
) -> Tensor:
    """Returns ΔBᵀ after so many steps from zero on D + λ ‖ΔB‖², float64 [k o]; D as in ``cosine_slope``."""
    A, Bt = mean.A.double(), mean.Bt.double()
    doubles = [LoRA(pair.A.double(), pair.Bt.double(), 1.0) for pair in factors]
    target = bounded(stacked(doubles, shares))
    correction = torch.zeros_like(Bt)
    for _ in range(steps):
        slope, curvature = cosine_slope(target, A, Bt + correction, by_column)
        total = curvature + 2 * penalty * torch.eye(len(A), dtype=A.dtype)
        correction = correction - _inverse(total) @ (slope + 2 * penalty * correction)
    return correction


def cosine_slope(target: LoRA, A: Tensor, Bt: Tensor, by_column: bool) -> tuple[Tensor, Tensor]:
    """Returns gradient [k o] and curvature [k k] in Bt of D = mean_j (1 - cos(T_j, X_j)), with X = B A.

    T is the product of ``target``; j are the columns, or all of a matrix is one vector. With w_j = 1 / the number of j,

        gradient   -Σ_j w_j A_j (T_j / (‖T_j‖ ‖X_j‖) - cos_j X_j / ‖X_j‖²)ᵀ
        curvature   Σ_j w_j A_j A_jᵀ / ‖X_j‖², the Hessian across X_j where cos_j = 1

    Where T_j or X_j is zero, j does not count.
    """
    squares = (target.A * (target.Bt @ target.Bt.T @ target.A)).sum(0)  # ‖T_j‖² [i]
    own = (A * (Bt @ Bt.T @ A)).sum(0)  # ‖X_j‖²
    both = (target.A * (target.Bt @ Bt.T @ A)).sum(0)  # T_j · X_j
    if not by_column:
        squares, own, both = squares.sum(), own.sum(), both.sum()
    lengths = (squares.clamp(min=0) * own.clamp(min=0)).sqrt()
    seen = lengths > 0
    share = seen / seen.sum().clamp(min=1)
    towards = torch.where(seen, share / lengths, 0.0)
    around = torch.where(seen, share / own, 0.0)
    cosines = torch.where(seen, both / lengths, 0.0)
    gradient = (A * around * cosines) @ A.T @ Bt - (A * towards) @ target.A.T @ target.Bt
    return gradient, (A * around) @ A.T


def _inverse(symmetric: Tensor) -> Tensor:
    inverse: Tensor = torch.linalg.pinv(symmetric, rtol=RANK_DEFICIENT, hermitian=True)
    return inverse
