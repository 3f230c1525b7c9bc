"""Singular values of stacked factors by every route, what is made of them, and pairs at other scales and ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora.algebra.adapters import at_scale, fresh_rows, grown, initial
from fslora.algebra.lowrank import (
    decomposed,
    mean_product,
    svd_by_gram,
    svd_by_qr,
    svd_by_range,
    svd_of,
)
from fslora.rng import Rng
from fslora.types import Adapter, LoRA, Template
from kit import deltas
from kit import mean_product as dense_mean

# Float64 QR, SVD and eigh of matrices with a few dozen rows, entries of the product near 10.
EXACT = 1e-10
# The Gram route squares the condition: the square root of float64's rounding, times values near 10.
SQUARED = 1e-6
# Pairs are stored in float32: half a unit in the last place of entries near 10, summed over a few dozen parts.
STORED = 2e-5
LAWS = settings(max_examples=25, deadline=None, derandomize=True, database=None)
SHAPES = [(7, 4, 3), (4, 7, 3), (30, 20, 8), (20, 30, 8), (12, 9, 9), (9, 12, 10), (5, 3, 8), (3, 5, 40), (1, 6, 2)]
"""(d_in, d_out, K): stacks far below, near and above the layer's width; none square."""


def random_pair(d_in: int, d_out: int, parts: int, seed: int = 0, scale: float = 0.7) -> LoRA:
    stream = Rng(seed).child(d_in, d_out, parts).torch()
    return LoRA(torch.randn(parts, d_in, generator=stream), torch.randn(parts, d_out, generator=stream), scale)


def decaying(d_in: int, d_out: int, parts: int, power: float = 1.0) -> LoRA:
    """A stack whose singular values fall roughly as j^-power."""
    pair = random_pair(d_in, d_out, parts)
    mix = torch.randn(parts, parts, generator=Rng(1).torch()) / parts**0.5
    return LoRA(mix @ (pair.A / torch.arange(1, parts + 1).unsqueeze(1) ** power), pair.Bt, 1.0)


def dense(pair: LoRA) -> torch.Tensor:
    return pair.scale * pair.Bt.double().T @ pair.A.double()


def close(left: torch.Tensor, right: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(left.double(), right.double(), atol=tolerance, rtol=0)


def eye(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)


# --- exact routes ---


@pytest.mark.parametrize("route", [svd_by_qr, svd_by_gram, svd_of])
@pytest.mark.parametrize(("d_in", "d_out", "parts"), SHAPES)
def test_every_exact_route_is_the_dense_svd(route, d_in, d_out, parts):
    """scale · B A = U diag(S) Vᵀ, UᵀU = VᵀV = I, S that of the dense SVD, [o k], [k], [i k], signs fixed, error 0."""
    pair = random_pair(d_in, d_out, parts)
    found, count = route(pair), min(d_in, d_out, parts)
    assert (found.U.shape, found.S.shape, found.V.shape) == ((d_out, count), (count,), (d_in, count))
    close((found.U * found.S) @ found.V.T, dense(pair), EXACT)
    close(found.S, torch.linalg.svdvals(dense(pair))[:count], EXACT)
    for basis in (found.U, found.V):
        close(basis.T @ basis, eye(count), EXACT)
    assert (found.U.gather(0, found.U.abs().argmax(0, keepdim=True)) > 0).all()
    assert found.error == 0.0


@pytest.mark.parametrize("route", [svd_by_qr, svd_by_gram])
@pytest.mark.parametrize(("d_in", "d_out"), [(9, 6), (6, 9)])
def test_null_directions_are_orthonormal_too(route, d_in, d_out):
    """A stack of 12 parts whose product has rank 2, and one that is zero: S ends in zeros, U and V stay orthonormal."""
    narrow = random_pair(d_in, d_out, 2)
    twice = LoRA(narrow.A.repeat(6, 1), narrow.Bt.repeat(6, 1), 0.5)
    for pair, rank in ((twice, 2), (LoRA(twice.A, torch.zeros_like(twice.Bt), 0.5), 0)):
        found = route(pair)
        assert found.rank == rank
        close(found.S[rank:], torch.zeros(6 - rank), SQUARED)
        close((found.U * found.S) @ found.V.T, dense(pair), SQUARED)
        for basis in (found.U, found.V):
            close(basis.T @ basis, eye(6), EXACT)


def test_small_singular_values_survive():
    """A spectrum over six decades: QR keeps all digits, Gram eight below the largest, V orthonormal in both."""
    wide = random_pair(24, 17, 12)
    pair = LoRA(wide.A, torch.linalg.qr(wide.Bt.T).Q.T * torch.logspace(0, -6, 12).unsqueeze(1), 1.0)
    truth = torch.linalg.svdvals(dense(pair))[:12]
    assert truth[-1] < 1e-5 * truth[0]
    close(svd_by_qr(pair).S, truth, 1e-13)
    close(svd_by_gram(pair).S, truth, 1e-8 * float(truth[0]))
    close(svd_by_gram(pair).V.T @ svd_by_gram(pair).V, eye(12), EXACT)


@LAWS
@given(st.sampled_from(SHAPES), st.integers(0, 10**6))
def test_the_svd_belongs_to_the_product(shape, seed):
    """(-B, -A), (B/4, 4A), and parts in another order, are the same product: the same U, S and V."""
    pair = random_pair(*shape, seed=seed)
    order = torch.randperm(pair.rank, generator=Rng(seed).torch())
    first = svd_of(pair)
    for A, Bt in ((-pair.A, -pair.Bt), (4 * pair.A, pair.Bt / 4), (pair.A[order], pair.Bt[order])):
        again = svd_of(LoRA(A, Bt, pair.scale))
        close(again.S, first.S, EXACT)
        for left, right in ((first.U, again.U), (first.V, again.V)):
            close(left, right, 1e-5)  # the gap between neighbouring values divides the rounding


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize(("d_in", "d_out", "parts"), [(30, 20, 8), (9, 12, 10)])
def test_a_rank_takes_the_leading_triples(d_in, d_out, parts, rank):
    """Exact routes return the first of their triples for a rank: ‖W - W_k‖² is the sum of the other σ²; error 0."""
    pair = random_pair(d_in, d_out, parts)
    whole, cut = svd_of(pair), svd_of(pair, rank, Rng(0))
    assert torch.equal(cut.S, whole.S[:rank])
    lost = (dense(pair) - (cut.U * cut.S) @ cut.V.T).square().sum()
    close(lost, whole.S[rank:].square().sum(), EXACT)
    assert cut.error == 0.0


def test_the_route_is_chosen_by_size():
    """QR below 3/4 of the smaller side, Gram above; random only with a rank, a stream, 512 values and 6 (rank + 16)."""

    def route(parts: int, rank: int | None = None, rng: Rng | None = None, d_in: int = 800, d_out: int = 520) -> str:
        pair = LoRA(torch.zeros(parts, d_in), torch.zeros(parts, d_out), 1.0)
        return svd_of(pair, rank, rng).route

    assert [route(p, d_in=40, d_out=60) for p in (1, 29, 30, 40, 90)] == ["qr", "qr", "gram", "gram", "gram"]
    assert [route(p, d_in=60, d_out=40) for p in (29, 30)] == ["qr", "gram"]
    assert route(512, 8, Rng(0)) == "range"
    assert route(511, 8, Rng(0)) == "gram"
    assert route(512, 69, Rng(0)) == "range"
    assert route(512, 70, Rng(0)) == "gram"
    assert route(900, 8, Rng(0), d_out=500) == "gram"
    assert route(512, 8) == route(512, None, Rng(0)) == "gram"


# --- the randomised route ---


def excess(pair: LoRA, found) -> float:
    """sqrt(‖W - U S Vᵀ‖² - ‖W - W_k‖²) / ‖W‖."""
    W, energies = dense(pair), svd_by_qr(pair).S.square()
    lost = (W - (found.U * found.S) @ found.V.T).square().sum() - energies[len(found.S) :].sum()
    return float((lost / energies.sum()).clamp(min=0).sqrt())


@pytest.mark.parametrize(("d_in", "d_out"), [(160, 120), (120, 160)])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_random_range_says_how_much_it_may_lose(d_in, d_out, power):
    """excess ≤ error ≤ ‖W - U S Vᵀ‖ / ‖W‖, up to the noise of 16 probes, from flat spectra to steep ones."""
    pair = decaying(d_in, d_out, 110, power)
    found = svd_by_range(pair, 10, Rng(0))
    W = dense(pair)
    total = float((W - (found.U * found.S) @ found.V.T).norm() / W.norm())
    # The mean of 16 probes' squares is within 40% of its expectation at more than 3 sigma, its root within 20%.
    assert excess(pair, found) <= 1.2 * found.error
    assert found.error <= 1.2 * total
    assert found.error > 1e-4
    assert found.route == "range"


def test_the_reported_error_is_that_of_the_searched_range():
    """‖(I - QQᵀ) W‖: of 6 singular values 10 and 94 of 1, 26 were searched; 74 are left: sqrt(74 / 694)."""
    U, V = (torch.linalg.qr(torch.randn(d, 100, generator=Rng(d).torch())).Q for d in (160, 120))
    S = torch.tensor([10.0] * 6 + [1.0] * 94)
    found = svd_by_range(LoRA(V.T.contiguous(), (U * S).T.contiguous(), 1.0), 10, Rng(0))
    # 16 probes of 74 equal directions: their mean square has a standard deviation of sqrt(2 / (16 · 74)) = 4%.
    assert found.error == pytest.approx((74 / 694) ** 0.5, rel=0.06)
    close(found.S[:6], S[:6], 1e-4)


def test_a_product_within_the_searched_rank_is_found_whole():
    """A stack of 80 parts whose product has rank 6: U S Vᵀ is the product, and the error is float32's rounding."""
    narrow = random_pair(90, 70, 6)
    mix = torch.randn(80, 6, generator=Rng(4).torch())
    pair = LoRA(mix @ narrow.A, torch.linalg.pinv(mix).T @ narrow.Bt, 0.5)
    found = svd_by_range(pair, 8, Rng(0))
    close((found.U * found.S) @ found.V.T, dense(pair), 1e-4)
    assert found.error < 1e-5
    assert found.rank in (6, 7, 8)  # what lies beyond 6 is float32's rounding, near the threshold
    for basis in (found.U, found.V):
        close(basis.T @ basis, eye(8), 1e-5)
    assert (found.U.gather(0, found.U.abs().argmax(0, keepdim=True)) > 0).all()


def test_random_draws_have_an_address():
    """The same stream gives the same bits, another one another range; a product of zeros has no error, and no NaN."""
    pair = decaying(160, 120, 110, 0.5)
    first, again, other = (svd_by_range(pair, 10, Rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.U, again.U)
    assert torch.equal(first.S, again.S)
    assert first.error == again.error
    assert not torch.equal(first.S, other.S)
    nothing = svd_by_range(LoRA(pair.A, torch.zeros_like(pair.Bt), 1.0), 10, Rng(0))
    assert nothing.error == 0.0
    assert not nothing.S.any()


# --- pairs ---


@pytest.mark.parametrize("split", ["B", "sqrt"])
@pytest.mark.parametrize(("d_in", "d_out", "parts"), SHAPES)
def test_a_pair_of_the_svd_is_the_same_product(d_in, d_out, parts, split):
    """s · B A = U S Vᵀ for any scale s; split B: A Aᵀ = I, BᵀB = (S/s)²; sqrt: A Aᵀ = BᵀB = S/s. In float32."""
    pair = random_pair(d_in, d_out, parts)
    found = svd_of(pair)
    made = found.pair(2.5, split=split)
    assert made.scale == 2.5
    close(dense(made), dense(pair), STORED)
    grams = (eye(made.rank), torch.diag((found.S / 2.5) ** 2)) if split == "B" else [torch.diag(found.S / 2.5)] * 2
    for factor, gram in zip((made.A, made.Bt), grams, strict=True):
        assert factor.dtype == torch.float32
        assert factor.is_contiguous()
        close(factor.double() @ factor.double().T, gram, 1e-4)  # squares of numbers near 20, from float32 factors


def test_a_pair_leaves_rounding_out_but_is_never_empty():
    """Values below 1e-7 of the largest are not kept, whatever rank is asked for; of a zero product one part, B = 0."""
    U, V = (torch.linalg.qr(torch.randn(9, 4, generator=Rng(i).torch())).Q for i in (0, 1))
    pair = LoRA(V.T.contiguous(), (U * torch.tensor([5.0, 1.0, 1.5e-7, 0.0])).T.contiguous(), 1.0)
    assert svd_by_qr(pair).rank == 2
    assert svd_by_qr(pair).pair(1.0).rank == svd_by_qr(pair).pair(1.0, 4).rank == 2
    assert svd_by_qr(pair).pair(1.0, 1).rank == svd_by_qr(pair).pair(1.0, 0).rank == 1
    nothing = svd_of(LoRA(pair.A, torch.zeros(4, 9), 1.0)).pair(1.0)
    assert nothing.rank == 1
    assert nothing.A.any()
    assert not nothing.Bt.any()


def test_decomposing_an_adapter():
    """Layer by layer, at one scale and rank; dense tensors as they are; the largest error of the layers."""
    small, large = random_pair(7, 4, 3), decaying(600, 520, 515, 0.5)
    adapter = Adapter({"small": small, "large": large}, {"head": torch.ones(2)})
    made, error = decomposed(adapter, 2, 0.25, Rng(0))
    assert {name: (pair.rank, pair.scale) for name, pair in made.layers.items()} == {
        "small": (2, 0.25),
        "large": (2, 0.25),
    }
    assert torch.equal(made.dense["head"], torch.ones(2))
    assert error == svd_by_range(large, 2, Rng(0).child("large")).error > 0
    whole, none = decomposed(Adapter({"small": small}), None, 0.25, Rng(0), "sqrt")
    assert none == 0.0
    close(dense(whole.layers["small"]), dense(small), STORED)
    close(whole.layers["small"].A.norm(), whole.layers["small"].Bt.norm(), STORED)


@LAWS
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 50), st.floats(0.1, 4)), min_size=1, max_size=4))
def test_the_mean_product_is_the_mean_of_products(clients):
    """B A = Σ p_i s_i B_i A_i with p_i = w_i / Σ w and unequal ranks and scales; dense tensors Σ p_i h_i."""
    adapters = [
        Adapter(
            {"l": random_pair(7, 4, rank, i, scale), "m": random_pair(3, 5, rank, i + 50, scale)},
            {"h": torch.full((2,), i + 0.1)},
        )
        for i, (rank, _, scale) in enumerate(clients)
    ]
    weights = [weight for _, weight, _ in clients]
    mean = mean_product(adapters, weights)
    shares = [weight / sum(weights) for weight in weights]
    expected = dense_mean({name: [a.layers[name] for a in adapters] for name in ("l", "m")}, shares)
    found = deltas(mean)
    for name, product in expected.items():
        close(found[name], product, STORED)
    close(found["h"], sum(p * a.dense["h"].double() for p, a in zip(shares, adapters, strict=True)), 1e-6)
    assert mean.layers["l"].rank == sum(rank for rank, _, _ in clients)


def test_equal_dense_tensors_have_themselves_as_mean():
    """Bit for bit, although the weights' shares do not sum to one in float."""
    head = torch.randn(50, generator=Rng(0).torch())
    made = mean_product([Adapter({}, {"h": head})] * 3, [1, 1, 5])
    assert torch.equal(made.dense["h"], head)
    assert made.dense["h"].data_ptr() != head.data_ptr()


def test_another_scale_is_the_same_product():
    """at_scale(pair, s): scale s, A as it was, B times the ratio."""
    pair = random_pair(5, 3, 2, scale=0.5)
    moved = at_scale(pair, 4.0)
    assert moved.scale == 4.0
    assert torch.equal(moved.A, pair.A)
    assert torch.equal(moved.Bt, pair.Bt / 8)


TEMPLATE = Template({"l": (6, 4), "m": (4, 9)}, {"h": torch.zeros(2)}, 8, 16.0)


@pytest.mark.parametrize("rank", [1, 3, 5, 8])
def test_growing_keeps_the_leading_product_and_adds_parts_that_can_learn(rank):
    """The first parts at the new rank's scale, then rows of A drawn as a fresh one and B = 0; nothing is mutated."""
    adapter = Adapter(
        {"l": random_pair(6, 4, 3, scale=0.5), "m": random_pair(4, 9, 5, scale=0.5)}, {"h": torch.ones(2)}
    )
    made = grown(adapter, TEMPLATE, rank, Rng(0))
    for name, pair in adapter.layers.items():
        new, kept = made.layers[name], min(rank, pair.rank)
        assert (new.rank, new.scale) == (rank, 16.0 / rank)
        close(dense(new), dense(LoRA(pair.A[:kept], pair.Bt[:kept], 0.5)), 1e-6)
        assert torch.equal(new.A[:kept], pair.A[:kept])
        assert not new.Bt[kept:].any()
        assert (new.A[kept:].abs() <= TEMPLATE.layers[name][0] ** -0.5).all()
        assert new.A[kept:].abs().sum(1).gt(0).all()
    assert torch.equal(made.dense["h"], torch.ones(2))


def test_fresh_parts_depend_on_their_place_and_stream_alone():
    """Whatever rank is asked for, part j of a round's stream is the same, as in nested clients; layers draw apart."""
    adapter = Adapter({"l": random_pair(6, 4, 2)})
    small, large = grown(adapter, TEMPLATE, 4, Rng(0)), grown(adapter, TEMPLATE, 8, Rng(0))
    assert torch.equal(small.layers["l"].A, large.layers["l"].A[:4])
    assert torch.equal(small.layers["m"].A, large.layers["m"].A[:4])
    alone = grown(Adapter({}), TEMPLATE, 1, Rng(0)).layers
    unit = {name: (pair.A[0] * pair.A.shape[1] ** 0.5)[:4] for name, pair in alone.items()}
    assert (unit["l"] - unit["m"]).abs().max() > 0.1
    assert not torch.equal(large.layers["m"].A, grown(adapter, TEMPLATE, 8, Rng(1)).layers["m"].A)


def test_an_initial_adapter_is_made_of_fresh_rows():
    """A of `initial` is fresh_rows of its layer's stream: uniform in ±1/sqrt(d_in)."""
    streams = {name: Rng(0).child(name) for name in TEMPLATE.layers}
    made = initial(TEMPLATE, 5, {name: rng.torch() for name, rng in streams.items()})
    for name, (d_in, _) in TEMPLATE.layers.items():
        assert torch.equal(made.layers[name].A, fresh_rows(5, d_in, streams[name].torch()))
    assert 0.99 / 20 < fresh_rows(500, 400, Rng(0).torch()).abs().max() <= 1 / 20
