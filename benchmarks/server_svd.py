"""Which route to the SVD of stacked factors is cheapest where, and how exact is it? (`fslora.algebra.lowrank.svd_of`)

    OMP_NUM_THREADS=1 python benchmarks/server_svd.py [--quick]
    OMP_NUM_THREADS=1 python benchmarks/server_svd.py --flexlora [--repeats 3]

One layer's stack of K rank-one parts, as a server gets it from its clients. The routes are alternated in one process;
the best CPU time of the repetitions counts. Columns:

    seconds   CPU time of one thread
    error     ‖W_k - U S Vᵀ‖ / ‖W‖ of the exact routes (k = all); by how much the randomised one is worse than the best
              approximation of its rank 64, sqrt(‖W - U S Vᵀ‖² - ‖W - W_64‖²) / ‖W‖
    reported  what the route says of its own error; * marks the route that `svd_of` takes for rank 64

"flat" stacks are Gaussian (the worst case for a random range), "decaying" ones share directions of energy 1/j².

With --flexlora: FlexLoRA's server step for one layer of 3072 x 3072 and clients of ranks 8, 16, 32 and 48, as the paper
does it (the dense mean and its SVD, float32) against `svd_of` on the stack, alternated; "times cheaper" is the median
of the turns' ratios, and "lost" is by how much the result of rank 64 is worse than the best one.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from fslora.algebra.lowrank import SVD, svd_by_gram, svd_by_qr, svd_by_range, svd_of
from fslora.rng import Rng
from fslora.types import LoRA

RANK = 64
SHAPES = [(384, 384), (384, 1536), (1024, 1024), (1024, 3072)]
LARGE = [(3072, 3072)]
SHARES = (0.125, 0.25, 0.5, 0.75, 1.0, 2.0)
"""K over the smaller side."""
ROUTES = {"qr": svd_by_qr, "gram": svd_by_gram, "range": lambda pair: svd_by_range(pair, RANK, Rng(0))}


def stack(d_in: int, d_out: int, parts: int, decaying: bool) -> LoRA:
    """K rank-one parts, scaled so that the product's entries are near 1."""
    stream = Rng(0).child(d_in, d_out, parts).torch()
    A, Bt = torch.randn(parts, d_in, generator=stream), torch.randn(parts, d_out, generator=stream)
    if decaying:
        mix = torch.randn(parts, parts, generator=stream) / parts
        A = mix @ (A / torch.arange(1, parts + 1).unsqueeze(1))
    return LoRA(A, Bt, parts**-0.5)


def dense(pair: LoRA) -> torch.Tensor:
    return pair.scale * pair.Bt.double().T @ pair.A.double()


def error(found: SVD, W: torch.Tensor, energies: torch.Tensor) -> float:
    """Excess over the best approximation of as many parts as were found."""
    lost = (W - (found.U * found.S) @ found.V.T).square().sum()
    return max(float((lost - energies[len(found.S) :].sum()) / energies.sum()), 0.0) ** 0.5


def flexlora(repeats: int) -> None:
    print("| clients | K | spectrum | route | dense seconds | ours | times cheaper | lost | reported |")
    print("| ---: | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for clients in (10, 100):
        parts = sum((8, 16, 32, 48)[client % 4] for client in range(clients))
        for decaying in (False, True):
            pair = stack(3072, 3072, parts, decaying)
            seconds: dict[str, list[float]] = {"dense": [], "ours": []}
            for _ in range(repeats):
                began = time.process_time()
                S = torch.linalg.svd(pair.delta, full_matrices=False).S
                between = time.process_time()
                found = svd_of(pair, RANK, Rng(0))
                seconds["dense"].append(between - began)
                seconds["ours"].append(time.process_time() - between)
            ratios = [theirs / ours for theirs, ours in zip(seconds["dense"], seconds["ours"], strict=True)]
            best = {name: statistics.median(taken) for name, taken in seconds.items()}
            print(
                f"| {clients} | {parts} | {'decaying' if decaying else 'flat'} | {found.route} | {best['dense']:.2f} "
                f"| {best['ours']:.3f} | {statistics.median(ratios):.0f} ({min(ratios):.0f}-{max(ratios):.0f}) "
                f"| {error(found, dense(pair), S.double().square()):.1e} | {found.error:.1e} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Two small shapes, one repetition.")
    parser.add_argument("--large", action="store_true", help="Also 3072 x 3072: minutes.")
    parser.add_argument("--flexlora", action="store_true", help="Against the dense mean and its SVD.")
    parser.add_argument("--repeats", type=int, default=3, help="With --flexlora.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.flexlora:
        flexlora(args.repeats)
        return
    shapes, repeats = (SHAPES[:2], 1) if args.quick else (SHAPES + LARGE * args.large, 2)
    print("| d_in x d_out | K | spectrum | route | seconds | error | reported |")
    print("| --- | ---: | --- | --- | ---: | ---: | ---: |")
    for d_in, d_out in shapes:
        for share in SHARES:
            for decaying in (False, True):
                pair = stack(d_in, d_out, int(share * min(d_in, d_out)), decaying)
                taken = svd_of(pair, RANK, Rng(0)).route
                seconds: dict[str, float] = {}
                found: dict[str, SVD] = {}
                for _ in range(repeats):
                    for route, decompose in ROUTES.items():
                        if route == "range" and pair.rank < RANK:
                            continue
                        began = time.process_time()
                        found[route] = decompose(pair)
                        spent = time.process_time() - began
                        seconds[route] = min(spent, seconds.get(route, spent))
                W, energies = dense(pair), found["qr"].S.square()
                for route, svd in found.items():
                    print(
                        f"| {d_in} x {d_out} | {pair.rank} | {'decaying' if decaying else 'flat'} "
                        f"| {route}{'*' if route == taken else ''} | {seconds[route]:.4f} "
                        f"| {error(svd, W, energies):.1e} | {svd.error:.1e} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
