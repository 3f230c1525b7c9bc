"""Whole adapters, rank-one parts and small SVDs, against slow dense references or numbers done by hand."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora.algebra.adapters import add, add_into, all_finite, combine, initial, rescaled, sub, zeros_like
from fslora.algebra.lowrank import small_svd, truncated
from fslora.algebra.rows import ScatterMean, holders, scatter, take
from fslora.rng import Rng
from fslora.types import Adapter, LoRA, Template

# One float32 division of sums that are exact (small integers): half a unit in the last place, relative.
DIVISION = 1e-6
# Float64 QR and SVD of matrices of at most 9 x 9 with entries near 1, to many times their rounding.
SVD64 = 1e-10
# The same after the factors were rounded to float32, as they are stored; products of a few such factors.
SVD32 = 1e-5
LAWS = settings(max_examples=40, deadline=None, derandomize=True, database=None)

LAYERS = {"query": (5, 3), "out": (2, 4)}
"""Layer → (d_in, d_out), neither square."""
SHAPES = [(7, 4, 3), (4, 7, 3), (9, 5, 5), (3, 5, 6), (5, 3, 8), (6, 6, 2), (1, 6, 2), (6, 1, 3)]
"""(d_in, d_out, rank): wide, tall, square, and ranks above the smaller side."""


def whole_numbers(rank: int, rng: Rng, scale: float = 0.5) -> Adapter:
    """An adapter of whole numbers in -9..9: sums of such products are exact in float32."""
    draw = rng.numpy()

    def tensor(*shape: int) -> torch.Tensor:
        return torch.from_numpy(draw.integers(-9, 10, shape).astype(np.float32))

    layers = {name: LoRA(tensor(rank, d_in), tensor(rank, d_out), scale) for name, (d_in, d_out) in LAYERS.items()}
    return Adapter(layers, {"head.weight": tensor(3, 4), "head.bias": tensor(3)})


def random_pair(d_in: int, d_out: int, rank: int, seed: int = 0, scale: float = 0.7) -> LoRA:
    """A float64 pair, so that the reference and the function under test see the same numbers."""
    stream = Rng(seed).child(d_in, d_out, rank).torch()
    return LoRA(
        torch.randn(rank, d_in, generator=stream, dtype=torch.float64),
        torch.randn(rank, d_out, generator=stream, dtype=torch.float64),
        scale,
    )


def assert_equal(left: Adapter, right: Adapter) -> None:
    """Same names, same scales, same bits."""
    a, b = left.tensors(), right.tensors()
    assert a.keys() == b.keys()
    assert {n: p.scale for n, p in left.layers.items()} == {n: p.scale for n, p in right.layers.items()}
    unequal = [name for name in a if not torch.equal(a[name], b[name])]
    assert not unequal


# --- whole adapters ---


def test_delta_is_scale_times_b_a():
    """LoRA.delta = scale · Btᵀ A, [o i], on numbers done by hand."""
    pair = LoRA(A=torch.tensor([[1.0, 2.0, 0.0]]), Bt=torch.tensor([[3.0, -1.0]]), scale=0.5)
    assert pair.delta.tolist() == [[1.5, 3.0, 0.0], [-0.5, -1.0, 0.0]]
    assert pair.rank == 1


def test_nbytes_is_four_per_float32_element():
    """Adapter.nbytes = 4 · (Σ r (d_in + d_out) + head)."""
    assert whole_numbers(6, Rng(0)).nbytes == 4 * (6 * (5 + 3) + 6 * (2 + 4) + 3 * 4 + 3)


def test_add_and_sub_by_hand_keep_the_left_scale():
    """add and sub act tensor by tensor; scales come from the left operand."""
    left = Adapter({"l": LoRA(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), 2.0)}, {"b": torch.tensor([1.0])})
    right = Adapter({"l": LoRA(torch.tensor([[5.0, 7.0]]), torch.tensor([[11.0]]), 9.0)}, {"b": torch.tensor([4.0])})
    total, difference = add(left, right), sub(left, right)
    assert total.layers["l"].A.tolist() == [[6.0, 9.0]]
    assert total.layers["l"].Bt.tolist() == [[14.0]]
    assert total.dense["b"].tolist() == [5.0]
    assert difference.layers["l"].A.tolist() == [[-4.0, -5.0]]
    assert difference.layers["l"].Bt.tolist() == [[-8.0]]
    assert difference.dense["b"].tolist() == [-3.0]
    assert total.layers["l"].scale == difference.layers["l"].scale == 2.0


@LAWS
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 6))
def test_sub_undoes_add(seed, rank):
    """(x + y) - y = x and x - x = 0, bit for bit on whole numbers."""
    x, y = whole_numbers(rank, Rng(seed).child("x")), whole_numbers(rank, Rng(seed).child("y"))
    assert_equal(sub(add(x, y), y), x)
    assert_equal(sub(x, x), zeros_like(x))


def test_combine_refuses_adapters_of_other_names():
    """Adapters that differ in layers or in dense tensors have no sum, on either side of the difference."""
    whole = whole_numbers(2, Rng(0))
    fewer_layers = Adapter({"query": whole.layers["query"]}, whole.dense)
    renamed = Adapter({"query": whole.layers["query"], "in": whole.layers["out"]}, whole.dense)
    fewer_dense = Adapter(whole.layers, {"head.bias": whole.dense["head.bias"]})
    for other in (fewer_layers, renamed, fewer_dense):
        for first, second in ((whole, other), (other, whole)):
            with pytest.raises(ValueError, match="differ"):
                combine(torch.add, first, second)
    with pytest.raises(ValueError, match="differ"):
        combine(lambda x, y, z: x, whole, whole, fewer_dense)


def test_rescaled_multiplies_the_function_and_copies_nothing():
    """rescaled(x, f).delta = f · x.delta, on the same memory."""
    adapter = whole_numbers(3, Rng(1))
    scaled = rescaled(adapter, 4.0)
    for name, pair in adapter.layers.items():
        assert torch.equal(scaled.layers[name].delta, 4.0 * pair.delta)
        assert scaled.layers[name].A.data_ptr() == pair.A.data_ptr()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_all_finite_looks_at_every_tensor(value):
    """One bad entry in any A, any Bt or any dense tensor is found."""
    for name in whole_numbers(2, Rng(0)).tensors():
        adapter = whole_numbers(2, Rng(0))
        assert all_finite(adapter)
        adapter.tensors()[name].view(-1)[-1] = value
        assert not all_finite(adapter), name


def test_initial_adapter_is_peft_like_and_addressed_by_layer():
    """A ~ U(±1/sqrt(d_in)), B = 0, scale alpha/r (alpha/sqrt(r) rank-stabilised); layers draw apart."""
    head = {"head.weight": torch.ones(2, 2)}

    def fresh(layers, rank=64, rslora=False):
        template = Template(layers, head, rank, 32.0, rslora)
        return initial(template, rank, {name: Rng(0).child(name).torch() for name in layers})

    one, two = fresh({"a": (400, 3)}), fresh({"b": (5, 5), "a": (400, 3)})
    assert torch.equal(one.layers["a"].A, two.layers["a"].A)
    A = one.layers["a"].A
    assert A.shape == (64, 400)
    assert 0.99 / 20 < A.abs().max() <= 1 / 20
    # The variance of U(-h, h) is h² / 3; with 25,600 draws its estimate is within 3 % at more than 4 sigma.
    assert A.var().item() == pytest.approx((1 / 20) ** 2 / 3, rel=0.03)
    assert not one.layers["a"].Bt.any()
    assert one.layers["a"].Bt.shape == (64, 3)
    assert one.layers["a"].scale == 0.5
    assert fresh({"a": (400, 3)}, rslora=True).layers["a"].scale == 4.0
    one.dense["head.weight"].zero_()
    assert head["head.weight"].all(), "the template's head must not be shared with the adapter"


# --- rank-one parts ---


def index_set(draw, rank: int) -> dict[str, torch.Tensor]:
    """One non-empty subset of the parts per layer; the layers hold the same number of parts."""
    k = draw(st.integers(1, rank))
    return {name: torch.tensor(sorted(draw(st.permutations(range(rank)))[:k]), dtype=torch.int32) for name in LAYERS}


@LAWS
@given(data=st.data(), rank=st.integers(1, 7))
def test_take_and_scatter_round_trip(data, rank):
    """take(scatter(p, I), I) = p; scatter(take(x, I), I) is x inside I and zero outside; bit for bit."""
    rows = index_set(data.draw, rank)
    x = whole_numbers(rank, Rng(rank))
    part = take(x, rows)
    spread = scatter(part, rows, rank)
    assert_equal(take(spread, rows), part)
    for name, pair in x.layers.items():
        mask = torch.zeros(rank, 1)
        mask[rows[name].long()] = 1
        assert torch.equal(spread.layers[name].A, pair.A * mask)
        assert torch.equal(spread.layers[name].Bt, pair.Bt * mask)
        assert spread.layers[name].scale == pair.scale
        for place, part_of_server in enumerate(rows[name].tolist()):
            assert torch.equal(part.layers[name].A[place], pair.A[part_of_server])
            assert torch.equal(part.layers[name].Bt[place], pair.Bt[part_of_server])
    assert all(torch.equal(spread.dense[name], tensor) for name, tensor in x.dense.items())


def test_scatter_copies():
    """Scattering does not write into, or share low-rank memory with, what it was given."""
    part = whole_numbers(2, Rng(0))
    rows = {name: torch.tensor([0, 1], dtype=torch.int32) for name in LAYERS}
    scatter(part, rows, 2).layers["query"].A.fill_(99)
    assert_equal(part, whole_numbers(2, Rng(0)))


@st.composite
def contributions(draw):
    """(rank, [(part, rows or None, weight)]): what a cohort sends."""
    rank = draw(st.integers(1, 6))
    sent = []
    for client in range(draw(st.integers(1, 5))):
        rows = None if draw(st.booleans()) else index_set(draw, rank)
        k = rank if rows is None else len(rows["query"])
        sent.append(
            (
                whole_numbers(k, Rng(draw(st.integers(0, 999))).child(client)),
                rows,
                float(draw(st.integers(1, 40))),
            )
        )
    return rank, sent


def naive_mean(rank: int, sent, over: str) -> dict[str, np.ndarray]:
    """The definition, part by part and entry by entry in float64."""
    cohort_weight = float(sum(weight for _, _, weight in sent))
    result = {}
    for layer in LAYERS:
        for kind in ("A", "Bt"):
            width = getattr(sent[0][0].layers[layer], kind).shape[1]
            mean = np.zeros((rank, width))
            for j in range(rank):
                held = 0.0
                for part, rows, weight in sent:
                    mine = list(range(rank)) if rows is None else rows[layer].tolist()
                    if j in mine:
                        mean[j] += weight * getattr(part.layers[layer], kind)[mine.index(j)].double().numpy()
                        held += weight
                divisor = cohort_weight if over == "cohort" else held
                mean[j] = mean[j] / divisor if divisor else 0.0
            result[f"{layer}:{kind}"] = mean
    for name in sent[0][0].dense:
        total = sum(weight * part.dense[name].double().numpy() for part, _, weight in sent)
        result[f"{name}:dense"] = total / cohort_weight
    return result


def streamed(rank: int, sent) -> ScatterMean:
    total = ScatterMean(whole_numbers(rank, Rng(77), scale=0.25))
    for part, rows, weight in sent:
        total.add(part, rows, weight)
    return total


@LAWS
@given(contributions(), st.sampled_from(["cohort", "holders"]))
def test_scatter_mean_is_the_naive_dense_loop(made, over):
    """mean_j = Σ w_i x_ij / Σ w_i over the cohort, or over part j's holders; dense tensors over the cohort."""
    rank, sent = made
    mean = streamed(rank, sent).mean(over)
    expected = naive_mean(rank, sent, over)
    found = mean.tensors()
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        np.testing.assert_allclose(found[name].double().numpy(), reference, rtol=DIVISION, err_msg=name)
    assert all(pair.scale == 0.25 for pair in mean.layers.values()), "scales are those of the global adapter"


@LAWS
@given(contributions(), st.sampled_from(["cohort", "holders"]))
def test_scatter_mean_does_not_depend_on_the_order(made, over):
    """Any order gives the same mean: bit for bit, because sums of whole numbers are exact."""
    rank, sent = made
    forwards = streamed(rank, sent).mean(over)
    for order in list(permutations(sent))[:: max(1, len(sent))]:
        assert_equal(streamed(rank, order).mean(over), forwards)


@LAWS
@given(contributions())
def test_holders_and_cohort_agree_where_all_hold_all(made):
    """If everyone holds every part, both averages are the same bits, with rows given or None."""
    rank, sent = made
    everyone = [(whole_numbers(rank, Rng(i)), None, weight) for i, (_, _, weight) in enumerate(sent)]
    assert_equal(streamed(rank, everyone).mean("holders"), streamed(rank, everyone).mean("cohort"))
    every_row = {name: torch.arange(rank, dtype=torch.int32) for name in LAYERS}
    listed = [(part, every_row, weight) for part, _, weight in everyone]
    assert_equal(streamed(rank, listed).mean("holders"), streamed(rank, everyone).mean("cohort"))


def test_scatter_mean_by_hand():
    """Two clients, three parts: part 0 held by the first, part 1 by both, part 2 by nobody."""
    like = Adapter({"l": LoRA(torch.zeros(3, 1), torch.zeros(3, 1), 1.0)}, {"b": torch.zeros(1)})

    def part(values, bias):
        column = torch.tensor(values).unsqueeze(1)
        return Adapter({"l": LoRA(column, 10 * column, 5.0)}, {"b": torch.tensor([bias])})

    def both():
        total = ScatterMean(like)
        assert total.weight == 0
        total.add(part([8.0, 4.0], 2.0), {"l": torch.tensor([0, 1], dtype=torch.int32)}, weight=1.0)
        total.add(part([8.0], 6.0), {"l": torch.tensor([1], dtype=torch.int32)}, weight=3.0)
        assert total.weight == 4
        return total

    cohort, over_holders = both().mean("cohort"), both().mean("holders")
    assert cohort.layers["l"].A.flatten().tolist() == [2.0, 7.0, 0.0]
    assert cohort.layers["l"].Bt.flatten().tolist() == [20.0, 70.0, 0.0]
    assert over_holders.layers["l"].A.flatten().tolist() == [8.0, 7.0, 0.0]
    assert over_holders.layers["l"].Bt.flatten().tolist() == [80.0, 70.0, 0.0]
    assert cohort.dense["b"].tolist() == over_holders.dense["b"].tolist() == [5.0]


def test_a_weight_may_be_a_number_of_examples():
    """Weight 3 and weight 3.0 are one weight: clients that count by their examples bring whole numbers."""
    rows = {name: torch.tensor([0, 2], dtype=torch.int32) for name in LAYERS}
    part = whole_numbers(2, Rng(3))
    for held in (rows, None):
        whole = part if held else whole_numbers(3, Rng(3))
        assert_equal(streamed(3, [(whole, held, 3)]).mean("holders"), streamed(3, [(whole, held, 3.0)]).mean("holders"))


@pytest.mark.parametrize("over", ["cohort", "holders"])
def test_parts_nobody_holds_stay_zero(over):
    """A part without holders has mean exactly zero, never 0/0."""
    rows = {name: torch.tensor([1, 4], dtype=torch.int32) for name in LAYERS}
    mean = streamed(6, [(whole_numbers(2, Rng(3)), rows, 0.3)]).mean(over)
    for pair in mean.layers.values():
        for tensor in (pair.A, pair.Bt):
            assert torch.equal(tensor[[0, 2, 3, 5]], torch.zeros(4, tensor.shape[1]))
            assert tensor[[1, 4]].any()


def test_scatter_mean_leaves_what_it_was_given_alone():
    """Neither the global adapter nor an update is written to, also where its mean is of that update alone."""
    like, part = whole_numbers(2, Rng(1)), whole_numbers(2, Rng(2))
    total = ScatterMean(like)
    total.add(part, None, 7.0)
    add_into(total.mean("cohort"), like)
    assert_equal(like, whole_numbers(2, Rng(1)))
    assert_equal(part, whole_numbers(2, Rng(2)))


def test_a_mean_is_taken_once():
    """The sums become the mean: afterwards nothing can be added and no mean be taken; weight and shares are known."""
    total = streamed(2, [(whole_numbers(2, Rng(2)), None, 2.0)])
    mean = total.mean("holders")
    with pytest.raises(ValueError, match="taken already"):
        total.add(whole_numbers(2, Rng(2)), None)
    with pytest.raises(ValueError, match="taken already"):
        total.mean("cohort")
    assert_equal(mean, streamed(2, [(whole_numbers(2, Rng(2)), None, 2.0)]).mean("holders"))
    assert total.weight == 2
    assert all(torch.equal(share, torch.ones(2)) for share in total.shares().values())


def test_adding_in_place_is_adding():
    """add_into(delta, base) = base + delta bit for bit, in the memory of delta; base stays."""
    base, delta = whole_numbers(3, Rng(1), scale=0.5), combine(torch.sqrt, combine(torch.abs, whole_numbers(3, Rng(2))))
    expected, memory = add(base, delta), {name: tensor.data_ptr() for name, tensor in delta.tensors().items()}
    found = add_into(delta, base)
    assert_equal(found, expected)
    assert {name: tensor.data_ptr() for name, tensor in found.tensors().items()} == memory
    assert_equal(base, whole_numbers(3, Rng(1), scale=0.5))


@pytest.mark.parametrize("over", ["cohort", "holders"])
def test_the_mean_of_nothing_is_an_error(over):
    """No updates: ValueError, not NaN."""
    with pytest.raises(ValueError, match="no updates"):
        ScatterMean(whole_numbers(2, Rng(0))).mean(over)


def test_holders_counts_by_layer():
    """holders(rows, r)[layer, j] = 1 where the layer's set holds j, else 0; int64."""
    rows = {"a": torch.tensor([0, 3], dtype=torch.int32), "b": torch.tensor([1], dtype=torch.int32)}
    found = holders(rows, 5)
    assert found.dtype == torch.int64
    assert found.tolist() == [[1, 0, 0, 1, 0], [0, 1, 0, 0, 0]]


# --- small SVDs ---


@pytest.mark.parametrize(("d_in", "d_out", "rank"), SHAPES)
def test_small_svd_is_the_dense_svd(d_in, d_out, rank):
    """scale · Bᵀt A = U diag(S) Vᵀ with orthonormal U and V, and S that of the product's dense SVD."""
    pair = random_pair(d_in, d_out, rank)
    u, s, v = small_svd(pair)
    count = min(d_in, d_out, rank)
    assert (u.shape, s.shape, v.shape) == ((d_out, count), (count,), (d_in, count))
    dense = torch.linalg.svdvals(pair.delta)
    torch.testing.assert_close(s, dense[:count], atol=SVD64, rtol=0)
    assert (dense[count:] < SVD64).all()
    torch.testing.assert_close(u @ torch.diag(s) @ v.T, pair.delta, atol=SVD64, rtol=0)
    for basis in (u, v):
        torch.testing.assert_close(basis.T @ basis, torch.eye(count).double(), atol=SVD64, rtol=0)


@LAWS
@given(st.sampled_from(SHAPES), st.integers(0, 10**6))
def test_signs_are_fixed_by_the_product_alone(shape, seed):
    """Each column of U has its largest entry positive; (-B, -A) gives (B, A)'s U and V, (B/4, 4 A) its S."""
    pair = random_pair(*shape, seed=seed)
    u, s, v = small_svd(pair)
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
    again = small_svd(pair)
    assert all(torch.equal(left, right) for left, right in zip((u, s, v), again, strict=True))
    flipped = small_svd(LoRA(-pair.A, -pair.Bt, pair.scale))
    for left, right in zip((u, s, v), flipped, strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=0)  # near-equal singular values cost digits
    swapped = small_svd(LoRA(pair.A * 4, pair.Bt / 4, pair.scale))
    torch.testing.assert_close(swapped[1], s, atol=SVD64, rtol=SVD64)


@pytest.mark.parametrize(("d_in", "d_out", "rank"), SHAPES)
def test_truncation_is_eckart_young(d_in, d_out, rank):
    """‖W - W_k‖² = Σ_{j>k} σ_j², the energy kept is 1 - tail/total, and the scale and dtype stay."""
    double = random_pair(d_in, d_out, rank)
    pair = LoRA(double.A.float(), double.Bt.float(), double.scale)
    W = pair.scale * pair.Bt.double().T @ pair.A.double()
    sigma = torch.linalg.svdvals(W)
    total = sigma.square().sum()
    for k in range(1, rank + 1):
        cut, energy = truncated(pair, k)
        assert (cut.rank, cut.scale) == (k, pair.scale)
        assert cut.A.dtype == cut.Bt.dtype == torch.float32
        assert cut.A.shape == (k, d_in)
        assert cut.Bt.shape == (k, d_out)
        tail = sigma[k:].square().sum()
        error = (W - cut.scale * cut.Bt.double().T @ cut.A.double()).square().sum()
        assert error.item() == pytest.approx(tail.item(), abs=SVD32 * total.item())
        assert energy == pytest.approx(1 - (tail / total).item(), abs=SVD32)
        # Each factor carries the root of the singular values: the two Gram matrices are the same diagonal.
        roots = torch.zeros(k, dtype=torch.float64)
        roots[: min(k, len(sigma))] = sigma[:k] / pair.scale
        for factor in (cut.A.double(), cut.Bt.double()):
            torch.testing.assert_close(factor @ factor.T, torch.diag(roots), atol=1e-4, rtol=0)  # float32, near 10


def test_truncation_beats_other_pairs_of_its_rank():
    """No pair of rank k, taken or drawn, is nearer than the truncation (Eckart-Young's optimality)."""
    pair = random_pair(7, 5, 5)
    best = (pair.delta - truncated(pair, 2)[0].delta).norm()
    for first in range(5):
        for second in range(first):
            taken = LoRA(pair.A[[second, first]], pair.Bt[[second, first]], pair.scale)
            assert (pair.delta - taken.delta).norm() > best
    _, _, v = small_svd(pair)
    for seed in range(20):
        A = v[:, :2].T + 0.1 * torch.randn(2, 7, generator=Rng(seed).torch(), dtype=torch.float64)
        best_B = torch.linalg.lstsq(A.T, pair.delta.T).solution  # the best B for this A
        assert (pair.delta - best_B.T @ A).norm() > best


def test_rank_above_the_layer_is_padded_with_zeros():
    """rank > min(d): the product is exact, energy is 1, and the parts that cannot exist are zero rows."""
    pair = random_pair(3, 5, 6)
    cut, energy = truncated(pair, 5)
    torch.testing.assert_close(cut.delta, pair.delta, atol=SVD64, rtol=0)
    assert energy == pytest.approx(1.0, abs=SVD64)
    assert not cut.A[3:].any()
    assert not cut.Bt[3:].any()
    assert cut.A.is_contiguous()
    assert cut.Bt.is_contiguous()


def test_truncating_a_pair_of_lower_rank_loses_nothing():
    """A pair of 6 parts whose product has rank 2 is held whole by 2 parts."""
    narrow = random_pair(8, 9, 2)
    mix = torch.randn(6, 2, generator=Rng(4).torch(), dtype=torch.float64)
    wide = LoRA(mix @ narrow.A, torch.linalg.pinv(mix).T @ narrow.Bt, narrow.scale)
    torch.testing.assert_close(wide.delta, narrow.delta, atol=SVD64, rtol=0)
    cut, energy = truncated(wide, 2)
    torch.testing.assert_close(cut.delta, narrow.delta, atol=SVD64, rtol=0)
    assert energy == pytest.approx(1.0, abs=SVD64)
    assert truncated(wide, 1)[1] < 1 - 1e-3


def test_truncating_an_untrained_pair_keeps_zero():
    """B = 0, as before the first round: zeros, all energy (of nothing) kept, no NaN."""
    cut, energy = truncated(LoRA(torch.ones(3, 4), torch.zeros(3, 5), 0.5), 2)
    assert energy == 1.0
    assert torch.equal(cut.delta, torch.zeros(5, 4))
    assert bool(torch.isfinite(cut.A).all())


@pytest.mark.parametrize("rank", [0, -1, 4])
def test_truncation_refuses_an_impossible_rank(rank):
    """Only ranks 1..pair.rank can be asked for."""
    with pytest.raises(ValueError, match=r"not in 1\.\.3"):
        truncated(random_pair(5, 4, 3), rank)
