"""Random sketches: which k of the server's r rank-one parts a client holds in one round; and random factors.

A sketch of the parts is S = (r / k) · Σ_{j ∈ I} e_j e_jᵀ with |I| = k. In all three draws below each client's own I is
uniform over the k-subsets, hence E[S] = identity and the sketched layer is unbiased; they differ only in
how the index sets of one cohort depend on each other.

Source: Federated Sketching LoRA, arXiv 2501.19389, section 3 (the independent draw). The balanced and the
nested draw are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from fslora.rng import Rng
from fslora.types import Tensor

Sketch = Literal["independent", "balanced", "nested"]
RandomFactor = Literal["orthonormal", "gaussian"]


def draw_rows(kind: Sketch, rank: int, ranks: Sequence[int], position: int, ids: Sequence[int], rng: Rng) -> Tensor:
    """Returns one client's index set for one layer: int32 [k], increasing, a uniformly random k-subset.

    Args:
        kind: ``independent``: every client draws its own. ``balanced``: the clients take consecutive
            segments of one random permutation, round and round, so no part has two holders more than
            another. ``nested``: every client takes the first k of one random permutation, so a smaller
            client's set lies within a larger one's.
        rank: The server's rank r.
        ranks: The rank k of every client in the cohort, in the cohort's order.
        position: Which client of the cohort is asked for.
        ids: The client ids, in the cohort's order; they address the independent draws.
        rng: The stream of this round and layer.

    Raises:
        ValueError: The client's rank is not in 1..rank.
    """
    k = ranks[position]
    if not 1 <= k <= rank:
        raise ValueError(f"client {ids[position]} has rank {k}; a sketch of {rank} parts holds 1 to {rank}")
    stream = rng.child(ids[position]) if kind == "independent" else rng
    permutation = torch.randperm(rank, generator=stream.torch())
    start = sum(ranks[:position]) if kind == "balanced" else 0
    index = permutation[(start + torch.arange(k)) % rank]
    return index.sort().values.to(torch.int32)


def draw_factor(kind: RandomFactor, rank: int, width: int, rng: Rng) -> Tensor:
    """Returns a random factor of isotropic rows, float32 [min(rank, width) width]: more rows would span no more.

    ``gaussian``: independent entries of variance 1 / width, so that a row's expected squared norm is 1.
    ``orthonormal``: the Q factor of such a draw, uniform over all sets of orthonormal rows. Its first k rows depend on
    the first k drawn alone, and have the same distribution as a draw of k.
    """
    gaussian: Tensor = torch.randn(width, min(rank, width), generator=rng.torch(), dtype=torch.float64) / width**0.5
    if kind == "gaussian":
        return gaussian.T.float().contiguous()
    q, r = torch.linalg.qr(gaussian)
    # QR leaves signs open; with a positive diagonal of R it is unique, hence the same under every LAPACK.
    rows: Tensor = (q * r.diagonal().sign()).T
    return rows.float().contiguous()
