"""Products B A of many pairs: stacked, bounded, and their singular values, without forming what factors allow."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fslora.types import LoRA, Tensor


def small_svd(pair: LoRA) -> tuple[Tensor, Tensor, Tensor]:
    """Returns U [o r], S [r], V [i r] with ``scale · Bᵀt A = U diag(S) Vᵀ``, at the cost of two thin QRs.

    Q_B R_B = B, Q_A R_A = Aᵀ, and the SVD of the r x r core R_B R_Aᵀ is that of the product.
    Signs are fixed (the entry of largest magnitude in each column of U is positive), so equal input gives
    equal output.
    """
    q_b, r_b = torch.linalg.qr(pair.Bt.double().T)
    q_a, r_a = torch.linalg.qr(pair.A.double().T)
    u, s, vt = torch.linalg.svd(pair.scale * r_b @ r_a.T, full_matrices=False)
    u, v = q_b @ u, q_a @ vt.T
    largest = u.abs().argmax(dim=0)
    signs = torch.where(u[largest, torch.arange(u.shape[1])] < 0, -1.0, 1.0)
    return u * signs, s, v * signs


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
