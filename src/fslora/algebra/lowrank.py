"""Products B A of many pairs: stacked, bounded, and their singular values, without forming what factors allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fslora.rng import Rng
from fslora.types import Adapter, LoRA, Tensor

Split = Literal["B", "sqrt"]
"""Who carries the singular values: B alone, so that A has orthonormal rows, or both factors their square roots."""
Route = Literal["qr", "gram", "range"]
ROUNDING = 1e-7
"""Singular values below this share of the largest are rounding: pairs are stored in float32."""
OVERSAMPLING, POWER_ITERATIONS, PROBES = 16, 2, 16
"""Of the randomised route: directions searched beyond the rank that is wanted, iterations, vectors to measure with."""


@dataclass(frozen=True)
class SVD:
    """The singular value decomposition of ``scale · B A``, or its leading part."""

    U: Tensor
    """[o k] float64, orthonormal columns; the entry of largest magnitude in each is positive."""
    S: Tensor
    """[k] float64, decreasing."""
    V: Tensor
    """[i k] float64, orthonormal columns."""
    route: Route
    """How it was found, see `svd_of`."""
    error: float
    """0 for the exact routes. Otherwise ‖(I - Q Qᵀ) W‖ / ‖W‖ (Frobenius) as measured with random probes, where Q is
    the range that was searched: the most that can be lost over the best approximation of this rank."""

    @property
    def rank(self) -> int:
        """How many singular values are more than rounding."""
        least = ROUNDING * float(self.S[0])
        return int(self.S.gt(least).sum())

    def pair(self, scale: float, rank: int | None = None, split: Split = "B") -> LoRA:
        """Returns the leading parts as a float32 pair of this scale: at most ``rank``, at least one, no rounding."""
        kept = max(1, self.rank if rank is None else min(rank, self.rank))
        S = self.S[:kept] / scale
        left, right = (S, torch.ones_like(S)) if split == "B" else (S.sqrt(), S.sqrt())
        return LoRA(_rows(self.V[:, :kept] * right), _rows(self.U[:, :kept] * left), scale)


def svd_of(pair: LoRA, rank: int | None = None, rng: Rng | None = None) -> SVD:
    """Returns the SVD of ``scale · B A`` for a pair of any rank K, by the cheapest route.

    ============ ======================================================== =============================================
    route        what it does                                             where
    ============ ======================================================== =============================================
    ``qr``       QR of both factors, SVD of their K x K core              K below 3/4 of the layer's smaller side
    ``gram``     B A itself, about as large as its factors by then, and   from there on
                 the eigenvectors of its smaller Gram matrix
    ``range``    random range finder on the factors, with power           ``rank`` and ``rng`` are given, and an exact
                 iterations; inexact, and says by how much                route takes 512 singular values or more and
                                                                          six times what is searched (rank + 16)
    ============ ======================================================== =============================================

    Both exact routes work in float64: ``qr`` is exact to its rounding, ``gram`` to 1e-8 of the largest singular value.
    One thread's seconds for ``qr`` / ``gram`` / ``range`` at rank 64 (benchmarks/server_svd.py): for 1024 x 1024,
    0.033 / 0.20 / 0.013 at K = 256, 0.35 / 0.33 / 0.023 at 768, 0.97 / 0.40 / 0.056 at 2048; for 1024 x 3072, 0.24 /
    0.44 / 0.032 at 512, 0.51 / 0.61 / 0.047 at 768, 2.5 / 0.93 / 0.11 at 2048. Below 512 there is little to gain.
    ``range`` was 0.7% of ‖W‖ above the best where energies fall as 1/j² (7% reported), and 14% where all are equal
    (80% reported).

    Args:
        pair: The product, in factors.
        rank: How many singular triples are wanted; None for all.
        rng: Where the randomised route may draw from; None forbids it.
    """
    d_in, d_out = pair.A.shape[1], pair.Bt.shape[1]
    exact = min(pair.rank, d_in, d_out)
    if rank is not None and rng is not None and exact >= max(512, 6 * (rank + OVERSAMPLING)):
        return svd_by_range(pair, rank, rng)
    if 4 * pair.rank < 3 * min(d_in, d_out):
        return svd_by_qr(pair, rank)
    found = svd_by_gram(pair)
    return found if rank is None else SVD(found.U[:, :rank], found.S[:rank], found.V[:, :rank], found.route, 0.0)


def svd_by_qr(pair: LoRA, rank: int | None = None) -> SVD:
    """Returns the SVD at the cost of two thin QRs: with Q_B R_B = B and Q_A R_A = Aᵀ, that of the core R_B R_Aᵀ.

    Q_B and Q_A stay products of Householder reflections, applied to as many vectors of the core as are wanted.
    """
    b, a = torch.geqrf(pair.Bt.double().T), torch.geqrf(pair.A.double().T)
    r_b, r_a = (factored[: len(tau)].triu() for factored, tau in (b, a))
    u, s, vt = torch.linalg.svd(pair.scale * r_b @ r_a.T, full_matrices=False)
    return _signed(_reflected(b, u[:, :rank]), s[:rank], _reflected(a, vt[:rank].T), "qr")


def _reflected(qr: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """Returns Q x for the Q of a thin QR, as ``geqrf`` leaves it."""
    filled = torch.cat([x, x.new_zeros(len(qr[0]) - len(x), x.shape[1])])
    return torch.ormqr(*qr, filled)


def svd_by_gram(pair: LoRA) -> SVD:
    """Returns the SVD from eigh(W Wᵀ) = U Σ² Uᵀ and the QR of Wᵀ U = V Σ, for W = B A or its transpose if that is less.

    QR rather than division by Σ, because V must stay orthonormal where Σ is zero.
    """
    W = pair.scale * pair.Bt.double().T @ pair.A.double()
    short = W if W.shape[0] <= W.shape[1] else W.T
    rank = min(pair.rank, len(short))
    u = torch.linalg.eigh(short @ short.T).eigenvectors.flip(1)[:, :rank]
    v, r = torch.linalg.qr(short.T @ u)
    s = r.diagonal()
    v, s = torch.where(s < 0, -v, v), s.abs()
    return _signed(u, s, v, "gram") if W is short else _signed(v, s, u, "gram")


def svd_by_range(pair: LoRA, rank: int, rng: Rng) -> SVD:
    """Returns the leading part of the SVD, found within the range Q of (W Wᵀ)² W Ω for a Gaussian Ω.

    Source: Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1. ‖(I - Q Qᵀ) W‖² is the mean of
    ‖(I - Q Qᵀ) W ω‖² over fresh Gaussian ω; that and ‖Qᵀ W‖² are ‖W‖².
    """
    draw = torch.randn(pair.A.shape[1], rank + OVERSAMPLING + PROBES, generator=rng.torch(), dtype=pair.A.dtype)

    def times(x: Tensor) -> Tensor:  # W x
        return pair.scale * (pair.Bt.T @ (pair.A @ x))

    def back(y: Tensor) -> Tensor:  # Wᵀ y
        return pair.scale * (pair.A.T @ (pair.Bt @ y))

    image = times(draw)
    q = torch.linalg.qr(image[:, PROBES:]).Q
    for _ in range(POWER_ITERATIONS):
        q = torch.linalg.qr(times(torch.linalg.qr(back(q)).Q)).Q
    q_v, r = torch.linalg.qr(back(q).double())
    v, s, ut = torch.linalg.svd(r, full_matrices=False)
    probes = image[:, :PROBES]
    outside = float((probes - q @ (q.T @ probes)).double().square().sum()) / PROBES
    error = (outside / (outside + float(s.square().sum()))) ** 0.5 if outside else 0.0
    return _signed((q.double() @ ut.T)[:, :rank], s[:rank], (q_v @ v)[:, :rank], "range", error)


def _signed(U: Tensor, S: Tensor, V: Tensor, route: Route, error: float = 0.0) -> SVD:
    signs = torch.where(U.gather(0, U.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    return SVD(U * signs, S, V * signs, route, error)


def _rows(columns: Tensor) -> Tensor:
    return columns.T.float().contiguous()


def decomposed(adapter: Adapter, rank: int | None, scale: float, rng: Rng, split: Split = "B") -> tuple[Adapter, float]:
    """Returns every layer's SVD as a pair of this scale, and the largest error of their routes (`SVD.error`).

    Args:
        adapter: Products in factors of any rank; dense tensors stay as they are.
        rank: The most parts to keep, which is the best approximation of that rank; None for all.
        scale: Of the pairs that are returned.
        rng: For the randomised route; layers draw apart.
        split: Who carries the singular values.
    """
    found = {name: svd_of(pair, rank, rng.child(name)) for name, pair in adapter.layers.items()}
    layers = {name: svd.pair(scale, rank, split) for name, svd in found.items()}
    return Adapter(layers, adapter.dense), max(svd.error for svd in found.values())


def small_svd(pair: LoRA) -> tuple[Tensor, Tensor, Tensor]:
    """Returns U [o k], S [k], V [i k] of ``scale · B A``, exact, all of it."""
    found = svd_of(pair)
    return found.U, found.S, found.V


def truncated(pair: LoRA, rank: int) -> tuple[LoRA, float]:
    """Returns the best approximation of one rank (Eckart-Young), scale kept, and the share of energy it keeps.

    Each factor carries the square root of the singular values. Energy is the squared Frobenius norm.

    Raises:
        ValueError: ``rank`` is not in 1..pair.rank.
    """
    if not 1 <= rank <= pair.rank:
        raise ValueError(f"rank {rank} is not in 1..{pair.rank}")
    u, s, v = small_svd(pair)
    total = float(s.square().sum())
    energy = float(s[:rank].square().sum()) / total if total else 1.0
    root = (s[:rank] / pair.scale).sqrt()
    A = (v[:, :rank] * root).T.to(pair.A.dtype)
    Bt = (u[:, :rank] * root).T.to(pair.Bt.dtype)
    short = rank - len(root)
    if short > 0:  # a layer narrower than the rank has fewer singular values
        A = torch.cat([A, A.new_zeros(short, A.shape[1])])
        Bt = torch.cat([Bt, Bt.new_zeros(short, Bt.shape[1])])
    return LoRA(A.contiguous(), Bt.contiguous(), pair.scale), energy


def product_norm(pair: LoRA) -> float:
    """Returns ‖scale · B A‖ (Frobenius) = scale · sqrt(trace((Bᵀ B)(A Aᵀ))), from two r x r Gram matrices."""
    A, Bt = pair.A.double(), pair.Bt.double()
    square = float(((A @ A.T) * (Bt @ Bt.T)).sum())
    return float(pair.scale * max(square, 0.0) ** 0.5)


def energy_by_index(pair: LoRA) -> Tensor:
    """Returns the squared singular values of B A, decreasing, float64 [min(r, d_in, d_out)].

    Values only, from the two r x r Gram matrices: σ² are the eigenvalues of L_Bᵀ (A Aᵀ) L_B with B Bᵀ's square root
    L_B. Energies below about 1e-15 of the largest are rounding.
    """
    A, Bt = pair.A.double(), pair.Bt.double()
    if pair.rank >= min(A.shape[1], Bt.shape[1]):
        values: Tensor = torch.linalg.svdvals(pair.scale * Bt.T @ A)
        return values.square()
    squares, vectors = torch.linalg.eigh(Bt @ Bt.T)
    root = vectors * squares.clamp(min=0).sqrt()
    energies: Tensor = torch.linalg.eigvalsh(root.T @ (A @ A.T) @ root).clamp(min=0).flip(0)
    return energies * pair.scale**2


def stacked(pairs: Sequence[LoRA], weights: Sequence[float] | None = None) -> LoRA:
    """Returns one pair whose product is Σ_i weights_i · scale_i · B_i A_i: the factors one after the other.

    Its scale is that of the first pair; weights and the ratio of scales go into B alone (into both factors they would
    count twice). Source: FLoRA, arXiv 2409.05976, section 3.
    """
    scale = pairs[0].scale
    factors = [(weights[i] if weights else 1.0) * pair.scale / scale for i, pair in enumerate(pairs)]
    Bt = [pair.Bt if factor == 1.0 else pair.Bt * factor for pair, factor in zip(pairs, factors, strict=True)]
    return LoRA(torch.cat([pair.A for pair in pairs]), torch.cat(Bt), scale)


def mean_product(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Returns the weighted mean of what whole adapters do: Σ_i p_i s_i B_i A_i as stacked pairs, Σ_i p_i of the rest.

    p_i is weights_i over their sum. Dense tensors that are equal in all adapters stay as they are, bit for bit.
    """
    shares, first = [weight / sum(weights) for weight in weights], adapters[0]
    layers = {name: stacked([adapter.layers[name] for adapter in adapters], shares) for name in first.layers}
    dense = {}
    for name, tensor in first.dense.items():
        changes = [share * (adapter.dense[name] - tensor) for adapter, share in zip(adapters, shares, strict=True)]
        dense[name] = tensor + torch.stack(changes).sum(0)
    return Adapter(layers, dense)


def bounded(pair: LoRA) -> LoRA:
    """Returns the same product at rank min(d_in, d_out) at most: beyond that one factor is the identity.

    Exact but for the rounding of one product, and never larger than twice the dense matrix.
    """
    d_in, d_out = pair.A.shape[1], pair.Bt.shape[1]
    if pair.rank <= min(d_in, d_out):
        return pair
    if d_in <= d_out:
        return LoRA(torch.eye(d_in, dtype=pair.A.dtype), pair.A.T @ pair.Bt, pair.scale)
    return LoRA(pair.Bt.T @ pair.A, torch.eye(d_out, dtype=pair.Bt.dtype), pair.scale)


def without_identity(pair: LoRA) -> LoRA:
    """Returns the pair as it travels: a factor that is the identity (see ``bounded``) has no rows."""
    if len(pair.A) == pair.A.shape[1] and torch.equal(pair.A, torch.eye(len(pair.A), dtype=pair.A.dtype)):
        return LoRA(pair.A.new_empty(0, len(pair.A)), pair.Bt, pair.scale)
    if len(pair.Bt) == pair.Bt.shape[1] and torch.equal(pair.Bt, torch.eye(len(pair.Bt), dtype=pair.Bt.dtype)):
        return LoRA(pair.A, pair.Bt.new_empty(0, len(pair.Bt)), pair.scale)
    return pair


def with_identity(pair: LoRA) -> LoRA:
    """Returns the pair that ``without_identity`` took apart."""
    if len(pair.A) < len(pair.Bt):
        return LoRA(torch.eye(pair.A.shape[1], dtype=pair.A.dtype), pair.Bt, pair.scale)
    if len(pair.Bt) < len(pair.A):
        return LoRA(pair.A, torch.eye(pair.Bt.shape[1], dtype=pair.Bt.dtype), pair.scale)
    return pair
