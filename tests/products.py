"""What the tests of product-averaging methods share: dense references, and other factors of the same product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from fslora.rng import Rng
from fslora.types import Adapter, ClientUpdate, LoRA
from kit import Exchange, mean_product

# Products of float32 factors with entries near 4, a few dozen terms, through an SVD and back into float32.
PRODUCTS = 2e-5


def close(left: torch.Tensor, right: torch.Tensor, tolerance: float = PRODUCTS) -> None:
    """Equal to a tolerance, absolute below 1 and relative above."""
    torch.testing.assert_close(left.double(), right.double(), atol=tolerance, rtol=tolerance)


def best(W: torch.Tensor, rank: int) -> torch.Tensor:
    """The best approximation of a rank (Eckart-Young)."""
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vt[:rank]


def shares_of(passed: list[Exchange], weighting: str = "examples") -> list[float]:
    """p_i of those that came."""
    counts = [x.site.client.examples if weighting == "examples" else 1 for x in passed]
    return [count / sum(counts) for count in counts]


def expected_mean(passed: list[Exchange], shares: list[float]) -> dict[str, torch.Tensor]:
    """Σ p_i s_i B_i A_i of what clients trained, dense, and Σ p_i of their heads."""
    trained = [x.trained.adapter for x in passed]
    products = mean_product({name: [a.layers[name] for a in trained] for name in trained[0].layers}, shares)
    for name in trained[0].dense:
        products[name] = sum(p * a.dense[name].double() for p, a in zip(shares, trained, strict=True))
    return products


def turned(update: ClientUpdate, change: Callable[[LoRA], LoRA]) -> ClientUpdate:
    """The update with every pair changed."""
    layers = {name: change(pair) for name, pair in update.adapter.layers.items()}
    return replace(update, adapter=Adapter(layers, update.adapter.dense))


def gauge(pair: LoRA, segments: tuple[int, ...] = ()) -> LoRA:
    """(B M, M⁻¹ A) with a well-conditioned M that mixes all parts, or those of one segment with each other."""
    sizes = segments or (pair.rank,)
    stream = Rng(0).torch()
    blocks = [torch.eye(k) + 0.3 * torch.randn(k, k, generator=stream) / k for k in sizes]
    M = torch.block_diag(*blocks)
    return LoRA(torch.linalg.solve(M, pair.A), M.T @ pair.Bt, pair.scale)
