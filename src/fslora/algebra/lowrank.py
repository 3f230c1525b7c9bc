"""Singular values of B A without ever forming it."""

from __future__ import annotations

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
