"""What methods ask of an engine beyond training both factors: frozen pairs, one factor, penalties, sensitivities.

Each is compared with a computation by hand (plain autograd over one adapter), and the two engines with each other,
for clients of differing ranks, batch sizes and numbers of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from fslora.algebra.adapters import combine, sub
from fslora.algebra.rows import others, take
from fslora.config import LocalConfig
from fslora.engine import cohort, sequential
from fslora.engine.cohort import CohortEngine
from fslora.engine.sequential import SequentialEngine
from fslora.models.slots import SinglePair
from fslora.rng import Rng
from fslora.types import Adapter, Batch, LocalProblem, LoRA, Start, Tensor, Trained
from test_engines import (
    SIZES,
    STEPS,
    TOLERANCE,
    assert_same,
    pass_tokens,  # noqa: F401  (a fixture)
    problems,
    random_adapter,
)

EQUAL = (4, 4, 4, 4)
"""Batch sizes that take the fused path through an adapted layer; SIZES takes the other one."""
R, MINE = 8, torch.tensor([1, 4, 6])
# One SGD step of lr 1, in float32: parameters near 0.2, gradients below 10.
ONE_STEP = 2e-5

architectures = pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2"])
factors = pytest.mark.parametrize("trains", ["both", "A", "B"])
PLAIN_SGD = LocalConfig(optimizer="sgd", momentum=0.0, clip_norm=0.0, lr=1.0)
ADAMW = LocalConfig(optimizer="adamw", weight_decay=0.01, clip_norm=0.5, lr=1e-3)
SGD = LocalConfig(optimizer="sgd", momentum=0.9, weight_decay=0.01, clip_norm=0.5, lr=1e-2)

setups = pytest.mark.parametrize(("local", "sizes"), [(SGD, EQUAL), (ADAMW, SIZES)], ids=["sgd-equal", "adamw-unequal"])
"""Optimizers act on each entry by itself, so that two of the four combinations say all."""


def engines(base, local: LocalConfig, dropout: float = 0.0, chunk: int = 4):
    return CohortEngine(base, local, dropout, chunk), SequentialEngine(base, local, dropout)


def trained(engine, given: list[LocalProblem]) -> list[Trained]:
    return list(engine.train(given, engine.local.lr))


def starting(given: list[LocalProblem], change: Callable[[int, Start], Start]) -> list[LocalProblem]:
    """The same problems from other starts."""
    return [replace(problem, start=change(problem.client, problem.start)) for problem in given]


def frozen_pairs(base, client: int) -> dict[str, LoRA]:
    """Parts that a client only computes with: none, or of its own rank; client 2 has them in half of the layers."""
    rank = (3, 0, 6, 1)[client]
    layers = random_adapter(base, rank, Rng(2).child(client), scale=0.3).layers if rank else {}
    return {name: pair for place, (name, pair) in enumerate(layers.items()) if client != 2 or place % 2}


def with_frozen(base) -> Callable[[int, Start], Start]:
    return lambda client, start: replace(start, frozen=frozen_pairs(base, client))


def tails(adapter: Adapter) -> Tensor:
    """A penalty that couples both factors of a layer, as HetLoRA's."""
    norm = torch.linalg.vector_norm
    return 0.3 * torch.stack([norm(p.Bt[1:]) * norm(p.A[1:]) for p in adapter.layers.values()]).sum()


def squares(adapter: Adapter) -> Tensor:
    """A penalty on everything, the head included."""
    return 0.05 * torch.stack([t.square().sum() for t in adapter.tensors().values()]).sum()


PENALTIES = (tails, None, squares, tails)


def gradients(base, start: Start, batch: Batch, penalised: bool = False) -> dict[str, Tensor]:
    """The gradient of one client's loss by each of its tensors, by plain autograd over one adapter."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in start.adapter.tensors().items()}
    pairs = {}
    for name, pair in start.adapter.layers.items():
        frozen = start.frozen.get(name)
        still = SinglePair(frozen.A, frozen.Bt, frozen.scale) if frozen else None
        pairs[name] = SinglePair(leaves[f"{name}:A"], leaves[f"{name}:Bt"], pair.scale, frozen=still)
    with base.attached(pairs, base.single_heads({n: leaves[f"{n}:dense"] for n in start.adapter.dense})):
        loss = functional.cross_entropy(base.logits(batch), batch["labels"])
    if penalised:
        loss = loss + start.penalty(start.adapter.with_tensors(leaves))
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), found, strict=True)}


def resting(trains: str) -> str:
    return {"A": ":Bt", "B": ":A", "both": "nothing"}[trains]


# --- all of it at once: fast equals slow ---


@architectures
@factors
@setups
def test_cohort_equals_sequential(tiny_base, architecture, trains, local, sizes):
    """Frozen pairs of ranks 3, 0, 6 and 1, a penalty for three of four, scores for two, 3, 2, 3 and 1 steps."""
    base = tiny_base(architecture)
    given = starting(
        problems(base, sizes=sizes),
        lambda client, start: Start(
            start.adapter, trains, frozen_pairs(base, client), PENALTIES[client], measures_sensitivity=client % 2 == 0
        ),
    )
    (_, slow) = engines(base, local)
    expected = trained(slow, given)
    for chunk in (3, 4):  # 3: three clients and one
        results = trained(CohortEngine(base, local, 0.0, chunk), given)
        assert_same(results, expected)
        for fast, oracle in zip(results, expected, strict=True):
            assert fast.sensitivity.keys() == oracle.sensitivity.keys()
            assert bool(fast.sensitivity) == (fast.client % 2 == 0)
            for name, score in fast.sensitivity.items():
                assert len(score) == fast.adapter.layers[name].rank
                torch.testing.assert_close(score, oracle.sensitivity[name], atol=TOLERANCE, rtol=1e-3)


@architectures
def test_cohort_equals_sequential_under_dropout(tiny_base, architecture):
    """One client per chunk draws the same masks in both engines, so that dropout can be compared number by number."""
    base = tiny_base(architecture)
    given = starting(
        problems(base),
        lambda client, start: Start(start.adapter, "both", frozen_pairs(base, client), PENALTIES[client]),
    )
    fast, slow = engines(base, ADAMW, dropout=0.3, chunk=1)
    assert_same(trained(fast, given), trained(slow, given))
    assert trained(slow, given)[0].losses != trained(engines(base, ADAMW)[1], given)[0].losses


# --- frozen pairs ---


@architectures
@setups
def test_a_frozen_pair_is_a_changed_base(tiny_base, architecture, sizes, local):
    """Training beside it equals training on W0 + s B A, decay and clipping included; the pair itself keeps its bits."""
    base = tiny_base(architecture)
    given = starting(problems(base, sizes=sizes), with_frozen(base))
    before = [{n: (p.A.clone(), p.Bt.clone()) for n, p in problem.start.frozen.items()} for problem in given]
    results = [trained(engine, given) for engine in engines(base, local)]
    for place, problem in enumerate(given):
        with base.changed(problem.start.frozen):
            alone = [replace(problem, start=Start(problem.start.adapter))]
            expected = trained(SequentialEngine(base, local, 0.0), alone)
        for result in results:
            assert_same([result[place]], expected)
        for name, pair in problem.start.frozen.items():
            assert torch.equal(pair.A, before[place][name][0])
            assert torch.equal(pair.Bt, before[place][name][1])
    plain = trained(SequentialEngine(base, local, 0.0), starting(given, lambda c, start: Start(start.adapter)))
    assert [abs(a.losses[0] - b.losses[0]) > 1e-3 for a, b in zip(results[1], plain, strict=True)] == [
        bool(problem.start.frozen) for problem in given
    ]


@architectures
@pytest.mark.parametrize("sizes", [EQUAL, SIZES], ids=["equal", "unequal"])
def test_dropout_does_not_touch_a_frozen_pair(tiny_base, architecture, sizes):
    """Where the trained B is zero, the first loss is that without dropout: whatever is dropped meets a zero."""
    base = tiny_base(architecture)

    def blank(client: int, start: Start) -> Start:
        layers = {n: LoRA(p.A, torch.zeros_like(p.Bt), p.scale) for n, p in start.adapter.layers.items()}
        return Start(Adapter(layers, start.adapter.dense), frozen=frozen_pairs(base, client))

    given = starting(problems(base, sizes=sizes), blank)
    exact = [result.losses[0] for result in trained(SequentialEngine(base, SGD, 0.0), given)]
    for engine in engines(base, SGD, dropout=0.5):
        assert [result.losses[0] for result in trained(engine, given)] == pytest.approx(exact, abs=1e-5)
    alive = starting(problems(base, sizes=sizes), with_frozen(base))
    touched = [
        trained(SequentialEngine(base, SGD, dropout), alive)[0].losses[0] for dropout in (0.0, 0.5)
    ]  # the same with a B that is not zero: dropout is at work
    assert abs(touched[0] - touched[1]) > 1e-4


@architectures
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_and_trained_parts_are_a_lora_under_a_gradient_mask(tiny_base, architecture, optimizer):
    """Rank R with gradients masked to K: the same losses and trained parts, the others bit-identical.

    Without decay, which would move masked entries too.
    """
    base = tiny_base(architecture)
    local = LocalConfig(optimizer=optimizer, momentum=0.9, weight_decay=0.0, clip_norm=0.5, lr=1e-3)
    (problem,) = problems(base, ranks=(R,), sizes=(4,), steps=(3,))
    whole = problem.start.adapter
    rows = dict.fromkeys(whole.layers, MINE.to(torch.int32))
    masks = {name: torch.zeros(R, 1).index_fill_(0, MINE, 1.0) for name in whole.layers}
    parameters = {name: tensor.clone() for name, tensor in whole.tensors().items()}
    for parameter in parameters.values():
        parameter.requires_grad_()
    stepper = (
        torch.optim.AdamW(parameters.values(), lr=local.lr, weight_decay=0.0)
        if optimizer == "adamw"
        else torch.optim.SGD(parameters.values(), lr=local.lr, momentum=0.9)
    )
    losses = []
    for batch in problem.batches:
        now = {name: parameter.detach() for name, parameter in parameters.items()}
        losses.append(float(loss_of(base, whole.with_tensors(now), batch)))
        found = gradients(base, Start(whole.with_tensors(now)), batch)
        for name, parameter in parameters.items():
            layer, kind = name.rsplit(":", 1)
            parameter.grad = found[name] * (1.0 if kind == "dense" else masks[layer])
        torch.nn.utils.clip_grad_norm_(parameters.values(), local.clip_norm)
        stepper.step()
    masked = whole.with_tensors({name: parameter.detach() for name, parameter in parameters.items()})
    for name, pair in others(masked, rows).items():
        assert torch.equal(pair.A, others(whole, rows)[name].A)
        assert torch.equal(pair.Bt, others(whole, rows)[name].Bt)
    for engine in engines(base, local):
        start = Start(take(whole, rows), frozen=others(whole, rows))
        (ours,) = trained(engine, [replace(problem, start=start)])
        assert_same([ours], [Trained(problem.client, take(masked, rows), tuple(losses))])
        assert not torch.equal(ours.adapter.layers[base.targets[0]].A, start.adapter.layers[base.targets[0]].A)


def loss_of(base, adapter: Adapter, batch: Batch) -> Tensor:
    with torch.no_grad(), base.using(adapter):
        return functional.cross_entropy(base.logits(batch), batch["labels"])


# --- one factor ---


@architectures
@pytest.mark.parametrize("trains", ["A", "B"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_other_factor_keeps_its_bits(tiny_base, architecture, trains, optimizer):
    """Under strong decay and momentum the factor that rests is bit-identical, and what trains all moves."""
    base = tiny_base(architecture)
    local = LocalConfig(optimizer=optimizer, momentum=0.9, weight_decay=0.5, lr=1e-2)
    given = starting(problems(base), lambda client, start: replace(start, trains=trains))
    for engine in engines(base, local):
        for problem, result in zip(given, trained(engine, given), strict=True):
            before = problem.start.adapter.tensors()
            for name, tensor in result.adapter.tensors().items():
                assert torch.equal(tensor, before[name]) == name.endswith(resting(trains)), name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@factors
def test_only_what_is_trained_has_optimizer_state(tiny_base, monkeypatch, trains, optimizer):
    """The optimizer's parameters, and each tensor of its state, count the trained entries and no others."""
    base, made = tiny_base("bert"), []
    for module in (cohort, sequential):

        def kept(*args, build=module.make_optimizer, **options):
            made.append(build(*args, **options))
            return made[-1]

        monkeypatch.setattr(module, "make_optimizer", kept)
    given = starting(
        problems(base, ranks=(4, 4), sizes=(4, 4), steps=(2, 2)),
        lambda client, start: replace(start, trains=trains, frozen=frozen_pairs(base, client)),
    )
    local = LocalConfig(optimizer=optimizer, momentum=0.9, lr=1e-3)
    expected = sum(p.start.adapter.only(trains).nbytes // 4 for p in given)
    for engine in engines(base, local):
        made.clear()
        trained(engine, given)
        parameters = [p for optimizer in made for group in optimizer.param_groups for p in group["params"]]
        state = [t for optimizer in made for entry in optimizer.state.values() for t in entry.values() if t.dim()]
        assert sum(p.numel() for p in parameters) == expected
        assert sum(t.numel() for t in state) == expected * (2 if optimizer == "adamw" else 1)


@architectures
@factors
@pytest.mark.parametrize("sizes", [EQUAL, SIZES], ids=["equal", "unequal"])
def test_one_step_is_the_gradient(tiny_base, architecture, trains, sizes):
    """start - trained after one plain SGD step of lr 1 is the gradient of the trained factors, zero for the other."""
    base = tiny_base(architecture)
    given = starting(
        problems(base, sizes=sizes, steps=(1, 1, 1, 1)),
        lambda client, start: Start(start.adapter, trains, frozen_pairs(base, client)),
    )
    for engine in engines(base, PLAIN_SGD):
        for problem, result in zip(given, trained(engine, given), strict=True):
            moved = sub(problem.start.adapter, result.adapter).tensors()
            for name, expected in gradients(base, problem.start, problem.batches[0]).items():
                if name.endswith(resting(trains)):
                    assert not moved[name].any()
                else:
                    torch.testing.assert_close(moved[name], expected, atol=ONE_STEP, rtol=1e-4)


def test_a_chunk_trains_the_same_factors(tiny_base):
    """Clients that train different factors in one chunk are refused; one after the other they are not."""
    base = tiny_base("bert")
    given = starting(problems(base), lambda client, start: replace(start, trains="A" if client else "B"))
    with pytest.raises(ValueError, match="different factors"):
        trained(CohortEngine(base, SGD, 0.0, 4), given)
    assert len(trained(CohortEngine(base, SGD, 0.0, 1), given)) == 4


# --- penalties ---


@architectures
@factors
def test_the_gradient_is_that_of_the_sum(tiny_base, architecture, trains):
    """One plain SGD step: ∇(loss + penalty) by autograd of the sum, each client its own; losses without penalty."""
    base = tiny_base(architecture)
    plain = starting(problems(base, steps=(1, 1, 1, 1)), lambda client, start: replace(start, trains=trains))
    given = starting(plain, lambda client, start: replace(start, penalty=PENALTIES[client]))
    for engine in engines(base, PLAIN_SGD):
        without = trained(engine, plain)
        for problem, result, other in zip(given, trained(engine, given), without, strict=True):
            penalised = problem.start.penalty is not None
            assert result.losses == pytest.approx(other.losses, abs=1e-6)
            moved = sub(problem.start.adapter, result.adapter).tensors()
            for name, expected in gradients(base, problem.start, problem.batches[0], penalised).items():
                if not name.endswith(resting(trains)):
                    torch.testing.assert_close(moved[name], expected, atol=ONE_STEP, rtol=1e-4)
            apart = sub(result.adapter, other.adapter).layers[base.targets[0]]
            trained_factor = apart.A if trains != "B" else apart.Bt
            assert (
                bool(trained_factor.abs().max() > 1e-4) == penalised
                or problem.start.adapter.layers[base.targets[0]].rank == 1
            )  # a tail of nothing


def test_the_penalty_is_clipped_with_the_loss(tiny_base):
    """clip_norm bounds the gradient of the sum: one plain SGD step of lr 1 is exactly that long."""
    base = tiny_base("bert")
    local = LocalConfig(optimizer="sgd", momentum=0.0, clip_norm=0.1, lr=1.0)
    given = starting(problems(base, steps=(1, 1, 1, 1)), lambda client, start: replace(start, penalty=squares))
    for engine in engines(base, local):
        for problem, result in zip(given, trained(engine, given), strict=True):
            moved = sub(problem.start.adapter, result.adapter).tensors()
            assert float(sum(t.square().sum() for t in moved.values())) ** 0.5 == pytest.approx(0.1, rel=1e-3)


def test_a_penalty_without_gradient_at_zero_stays_finite(tiny_base):
    """‖B‖‖A‖ at B = 0 (every adapter's start): no NaN; clients train as without it in the first step."""
    base = tiny_base("bert")

    def blank(client: int, start: Start, penalty) -> Start:
        layers = {n: LoRA(p.A, torch.zeros_like(p.Bt), p.scale) for n, p in start.adapter.layers.items()}
        return Start(Adapter(layers, start.adapter.dense), penalty=penalty)

    for engine in engines(base, PLAIN_SGD):
        first = trained(engine, starting(problems(base, steps=(1,) * 4), lambda c, s: blank(c, s, tails)))
        assert_same(first, trained(engine, starting(problems(base, steps=(1,) * 4), lambda c, s: blank(c, s, None))))
        later = trained(engine, starting(problems(base), lambda c, s: blank(c, s, tails)))
        assert all(bool(torch.isfinite(t).all()) for result in later for t in result.adapter.tensors().values())


# --- sensitivities ---


def by_hand(base, start: Start, batch: Batch) -> dict[str, Tensor]:
    """Layer → [k]: mean over a part's trained entries of |w · ∂loss/∂w|, one part after the other."""
    found, scores = gradients(base, start, batch, penalised=start.penalty is not None), {}
    for name, pair in start.adapter.layers.items():
        kept = [(w, found[f"{name}:{kind}"]) for kind, w in (("A", pair.A), ("Bt", pair.Bt))]
        kept = [(w, g) for (w, g), kind in zip(kept, "AB", strict=True) if start.trains in ("both", kind)]
        scores[name] = torch.tensor(
            [
                sum(float((w[j] * g[j]).abs().sum()) for w, g in kept) / sum(w.shape[1] for w, _ in kept)
                for j in range(pair.rank)
            ]
        )
    return scores


@architectures
@factors
@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
def test_sensitivity_is_weight_times_gradient(tiny_base, architecture, trains, clip_norm):
    """One step: mean |w ∂loss/∂w| over each part's trained entries, before clipping, at the weights before the step.

    Also |w (w_new - w)| / lr of a plain SGD step that is not clipped.
    """
    base = tiny_base(architecture)
    given = starting(
        problems(base, steps=(1, 1, 1, 1)),
        lambda client, start: Start(
            start.adapter, trains, frozen_pairs(base, client), PENALTIES[client], measures_sensitivity=True
        ),
    )
    for engine in engines(base, replace_clip(PLAIN_SGD, clip_norm)):
        for problem, result in zip(given, trained(engine, given), strict=True):
            expected = by_hand(base, problem.start, problem.batches[0])
            assert result.sensitivity.keys() == expected.keys()
            for name, score in expected.items():
                torch.testing.assert_close(result.sensitivity[name], score, atol=1e-6, rtol=1e-3)
                assert (score > 0).all()
            if clip_norm == 0:
                name, old = next(iter(problem.start.adapter.layers.items()))
                new = result.adapter.layers[name]
                moved = {"A": old.A * (new.A - old.A), "B": old.Bt * (new.Bt - old.Bt)}
                entries = torch.cat([moved[kind] for kind in "AB" if trains in ("both", kind)], dim=1)
                torch.testing.assert_close(result.sensitivity[name], entries.abs().mean(1), atol=1e-5, rtol=1e-3)


def replace_clip(local: LocalConfig, clip_norm: float) -> LocalConfig:
    return local.model_copy(update={"clip_norm": clip_norm})


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_sensitivity_is_the_mean_over_the_local_steps(tiny_base, architecture):
    """3, 2, 3 and 1 steps: the mean of what each step by itself measures, from where the one before it ended."""
    base = tiny_base(architecture)
    local = LocalConfig(optimizer="sgd", momentum=0.0, lr=1e-2)
    given = starting(problems(base), lambda client, start: replace(start, measures_sensitivity=True))
    results = [trained(engine, given) for engine in engines(base, local)]
    for place, problem in enumerate(given):
        total, adapter = None, problem.start.adapter
        for batch in problem.batches:
            single = replace(problem, start=Start(adapter, measures_sensitivity=True), batches=[batch])
            (step,) = trained(SequentialEngine(base, local, 0.0), [single])
            scores = {name: score / STEPS[place] for name, score in step.sensitivity.items()}
            total = {n: score + total[n] for n, score in scores.items()} if total else scores
            adapter = step.adapter
        for result in results:
            for name, score in result[place].sensitivity.items():
                torch.testing.assert_close(score, total[name], atol=TOLERANCE, rtol=1e-3)


def test_asking_changes_nothing_and_only_who_asks_is_told(tiny_base):
    """The same bits are trained with and without; clients that do not ask get nothing."""
    base = tiny_base("bert")
    given = problems(base)
    for engine in engines(base, ADAMW):
        plain = trained(engine, given)
        asked = trained(engine, starting(given, lambda c, start: replace(start, measures_sensitivity=c == 2)))
        assert [bool(result.sensitivity) for result in asked] == [False, False, True, False]
        for left, right in zip(plain, asked, strict=True):
            assert left.losses == right.losses
            assert all(torch.equal(t, right.adapter.tensors()[n]) for n, t in left.adapter.tensors().items())


def test_a_start_is_not_written_to(tiny_base):
    """What a method hands over keeps its bits, whatever is trained from it."""
    base = tiny_base("bert")
    given = starting(
        problems(base), lambda client, start: Start(start.adapter, "both", frozen_pairs(base, client), squares, True)
    )
    kept = [combine(torch.clone, problem.start.adapter).tensors() for problem in given]
    for engine in engines(base, ADAMW):
        trained(engine, given)
        for problem, before in zip(given, kept, strict=True):
            assert all(torch.equal(t, before[n]) for n, t in problem.start.adapter.tensors().items())
