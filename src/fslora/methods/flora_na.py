"""FLoRA-NA: mix the clients' factors with weights fitted to the mean of their products.

Paper: Communication-Efficient and Accurate Approach for Aggregation in Federated Low-Rank Adaptation (FLoRA-NA),
Nguyen et al., arXiv 2509.26399.

    B ← Σ_i u_i B_i,   A ← Σ_i v_i A_i,   (u, v) = argmin ‖ Σ_i u_i B_i · Σ_i v_i A_i - Σ_i p_i B_i A_i ‖²

| paper | here |
| --- | --- |
| P, Q | u, v: stay at the server |
| 1 / M | p_i with ``weighting`` "uniform" |

u = v = p is FedIT; neither client nor traffic differ from it. There is no public code, and the paper leaves open, as
its reviewers note, how u and v are found and whether layers share them. We take them per layer, because the
objective is a sum over layers, mix factors rather than their changes, and alternate least squares: for fixed v the
objective is quadratic in u, and the other way round. A step solves for the smallest change of the weights (by the
pseudo-inverse), so clients that coincide leave it where it was, equal clients and a B of zeros are fixed points, and
it never ends above FedIT. It ends in a stationary point, not in the best pair of the rank, which is the truncated SVD;
for that the factors stay in the span and the basis of the clients' own.

With t(i, m, j, l) = ⟨B_i A_m, B_j A_l⟩ = ⟨B_iᵀ B_j, A_m A_lᵀ⟩ all of it is arithmetic on the k x k Gram blocks: per
layer 2 M² k² numbers, each of which every sweep reads thrice. For very large cohorts lower ``sweeps``: the first ten
do most of the work.

The product does not change under (c u, v / c), but the next local steps do: we choose c so that ‖B‖ / ‖A‖ is
FedIT's, and the sign so that Σ v_i > 0.

Unequal ranks are not in the paper: we fill up with zeros to the largest rank of the cohort, which leaves every
product as it is, and a client gets the first parts of the pair, at the server's constant scale. A part that nobody of
the cohort holds keeps its value. As with all zero padding, a part that few clients hold shrinks in every round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from fslora.algebra.rows import ScatterMean, leading, with_leading, zero_filled, zero_padded
from fslora.methods.base import Method
from fslora.types import Broadcast, Client, ClientUpdate, LoRA, Round, ServerState, Tensor

SETTLED = 1e-8
"""Sweeps end when one lowers the error by less than this share of it."""
ROUNDING = 1e-14
"""So is a gain below this share of the mean product's energy: rounding."""
COINCIDE = 1e-10
"""Directions of the weights with less than this share of the energy are those in which clients coincide."""


class FLoRANA(Method):
    """FedAvg of LoRA factors with fitted mixing weights."""

    name: ClassVar[str] = "flora-na"
    paper: ClassVar[str] = "Communication-Efficient and Accurate Aggregation (FLoRA-NA), arXiv 2509.26399"
    differs: ClassVar[str] = "how many of the leading rank-one parts it holds; zero-padded"
    travels: ClassVar[str] = "both factors of those parts, down and up"
    streams: ClassVar[bool] = False

    sweeps: int = Field(50, ge=0, description="Largest number of alternations of the two least squares; 0 is FedIT.")
    weighting: Literal["uniform", "examples"] = Field(
        "uniform", description="Clients count equally in the mean product (the paper's), or by their examples."
    )

    def broadcast(self, state: ServerState, client: Client, round: Round) -> Broadcast:
        """Returns the client's leading parts, at the server's scale."""
        return Broadcast(leading(state.adapter, client.rank))

    def aggregate(self, state: ServerState, updates: Iterator[ClientUpdate], round: Round) -> ServerState:
        """Returns the state with the mixed factors, layer by layer, and the mean dense tensors."""
        arrived = list(updates)
        weights = [update.weight(self.weighting) for update in arrived]
        shares = [weight / sum(weights) for weight in weights]
        deltas = ScatterMean(state.adapter)
        for update, weight in zip(arrived, weights, strict=True):
            deltas.add(update.adapter, None, weight)
        averaged = zero_padded(state.adapter, deltas, "factor")
        uploads = zero_filled(state.adapter, [update.adapter for update in arrived])
        layers = {name: mixed([u.layers[name] for u in uploads], shares, self.sweeps) for name in averaged.layers}
        return replace(state, adapter=with_leading(averaged, layers))


def mixed(factors: Sequence[LoRA], shares: Sequence[float], sweeps: int) -> LoRA:
    """Returns the pair Σ u_i B_i, Σ v_i A_i with fitted u and v, balanced as the one with u = v = p."""
    A = torch.stack([pair.A for pair in factors]).double()  # [m k i]
    Bt = torch.stack([pair.Bt for pair in factors]).double()  # [m k o]
    p = torch.tensor(shares, dtype=torch.float64)
    u, v = mixing_weights(A, Bt, p, sweeps)
    A_mean, Bt_mean, A_mix, Bt_mix = (torch.tensordot(w, t, 1) for w, t in ((p, A), (p, Bt), (v, A), (u, Bt)))
    square = Bt_mean.norm() * A_mix.norm() / (A_mean.norm() * Bt_mix.norm())
    balance = square.sqrt() if square.isfinite() and square > 0 else torch.ones(())
    sign = -1.0 if v.sum() < 0 else 1.0
    dtype = factors[0].A.dtype
    return LoRA((sign / balance * A_mix).to(dtype), (sign * balance * Bt_mix).to(dtype), factors[0].scale)


def mixing_weights(A: Tensor, Bt: Tensor, p: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """Returns u and v [m] after alternating least squares from u = v = p.

    Args:
        A: [m k i] float64, every client's.
        Bt: [m k o] float64, every client's.
        p: [m], the weights of the mean product.
        sweeps: The largest number of alternations.
    """
    G, H = gram_blocks(Bt), gram_blocks(A)
    energy = float(p @ torch.linalg.vecdot(G, H) @ p)  # ‖T‖²
    X, y = quadratic(p, G, H, p)
    u, v, error = p, p, energy - float(2 * p @ y - p @ X @ p)
    for _ in range(sweeps):
        u, _ = step(u, v, G, H, p)
        v, gained = step(v, u, H, G, p)
        before, error = error, energy - float(gained)
        if before - error <= max(SETTLED * before, ROUNDING * energy):
            break
    return u, v


def gram_blocks(factors: Tensor) -> Tensor:
    """Returns the products of every two clients' factors [m k d], of any width, block by block: [m m k·k]."""
    m, k, _ = factors.shape
    flat = factors.reshape(m * k, -1)
    return (flat @ flat.T).reshape(m, k, m, k).transpose(1, 2).reshape(m, m, k * k)


def step(own: Tensor, other: Tensor, G: Tensor, H: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Returns new weights [m] of one factor for fixed ones of the other, and by how much the error is below ‖T‖²."""
    X, y = quadratic(other, G, H, p)
    new = own + torch.linalg.pinv(X, rtol=COINCIDE, hermitian=True) @ (y - X @ own)
    return new, 2 * new @ y - new @ X @ new


def quadratic(v: Tensor, G: Tensor, H: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Returns X [m m] and y [m] of the objective ‖T‖² - 2 uᵀ y + uᵀ X u, for fixed v; roles may be exchanged.

    X_ij = ⟨B_i A, B_j A⟩ and y_i = ⟨B_i A, T⟩, with the mixed A = Σ v_i A_i and the mean product T.

    Args:
        v: [m], the weights of the factor that is fixed.
        G: Gram blocks of the factor that u mixes.
        H: Gram blocks of the factor that v mixes.
        p: [m], the weights of the mean product.
    """
    cross = torch.tensordot(v, H, 1)  # A A_nᵀ, for every n
    return G @ (v @ cross), torch.tensordot(G, p[:, None] * cross, 2)
