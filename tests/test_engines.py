"""Fast equals slow: cohort = sequential = a PEFT model trained by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import ARCHITECTURES, LABELS, WORDS
from fslora.algebra.adapters import combine
from fslora.config import AdapterConfig, LocalConfig, ModelConfig
from fslora.data.batches import encode
from fslora.data.types import Examples
from fslora.engine.cohort import PASS_COST, PASS_TOKENS, CohortEngine, passes
from fslora.engine.sequential import SequentialEngine
from fslora.models.load import load_base
from fslora.models.slots import Dropout
from fslora.objectives import Classes
from fslora.rng import Rng
from fslora.types import Adapter, LocalProblem, LoRA, Start, Trained

# Two orders of summation in float32 over a few steps; AdamW divides by small second moments.
TOLERANCE = 2e-5
ONE_PASS, ONE_CLIENT_EACH = 10_000, 1
RANKS, SIZES, STEPS = (2, 8, 5, 1), (4, 1, 3, 4), (3, 2, 3, 1)


@pytest.fixture(autouse=True, params=[ONE_PASS, 40, ONE_CLIENT_EACH])
def pass_tokens(request, monkeypatch) -> int:
    """Whether the clients of a step go through the model together, some of them, or each by itself."""
    monkeypatch.setitem(PASS_TOKENS, "cpu", request.param)
    return request.param


@given(
    widths=st.lists(st.integers(1, 300), min_size=1, max_size=40),
    size=st.integers(1, 16),
    most=st.none() | st.integers(1, 5000),
)
def test_passes_take_every_client_once_and_those_of_one_length_together(widths, size, most):
    sizes = [size] * len(widths)
    found = passes(sizes, widths, most)
    assert sorted(c for members in found for c in members) == list(range(len(widths)))
    assert all(members == sorted(members) for members in found)
    longest = [max(widths[c] for c in members) for members in found]
    shortest = [min(widths[c] for c in members) for members in found]
    assert all(above >= below for above, below in zip(shortest[1:], longest, strict=False))
    assert len({len(members) for members in found[:-1]}) <= 1
    tokens = size * sum(widths)
    padded = sum(PASS_COST + size * len(own) * width for own, width in zip(found, longest, strict=True))
    if most is None:
        assert len(found) == 1
    elif 2 * tokens <= 3 * most:
        assert padded <= PASS_COST + size * len(widths) * max(widths)
    else:
        assert len(found) == len(widths) or tokens / len(found) <= 2 * 1.5 * most


def test_short_texts_are_not_padded_to_a_long_one_where_that_costs_more_than_a_pass():
    assert passes([4] * 4, [10, 200, 12, 190], 2048) == [[0, 2], [1, 3]]
    assert passes([4] * 4, [10, 20, 12, 19], 2048) == [[0, 1, 2, 3]]


def random_adapter(base, rank: int, rng: Rng, scale: float = 0.7) -> Adapter:
    """An adapter whose B is not zero, so that every gradient is alive from the first step."""
    template = base.template(AdapterConfig(rank=8))
    stream = rng.torch()
    layers = {
        name: LoRA(
            0.2 * torch.randn(rank, d_in, generator=stream), 0.2 * torch.randn(rank, d_out, generator=stream), scale
        )
        for name, (d_in, d_out) in template.layers.items()
    }
    return Adapter(layers, template.dense)


def problems(base, ranks=RANKS, sizes=SIZES, steps=STEPS, longest=12) -> list[LocalProblem]:
    """Clients of different ranks, batch sizes, text lengths and numbers of steps."""
    made = []
    for client, (rank, size, count) in enumerate(zip(ranks, sizes, steps, strict=True)):
        rng = Rng(1).child(client)
        draw = rng.numpy()
        texts = tuple(" ".join(draw.choice(WORDS, draw.integers(1, longest))) for _ in range(size * count))
        data = encode(Examples(texts, draw.integers(0, len(LABELS), size * count)), base.tokenizer, 32)
        batches = [data.batch(range(step * size, (step + 1) * size)) for step in range(count)]
        made.append(LocalProblem(client, Start(random_adapter(base, rank, rng)), batches, rng))
    return made


def assert_same(left: list[Trained], right: list[Trained], tolerance: float = TOLERANCE) -> None:
    for a, b in zip(left, right, strict=True):
        assert a.client == b.client
        assert a.losses == pytest.approx(b.losses, abs=1e-5)
        named = b.adapter.tensors()
        for name, tensor in a.adapter.tensors().items():
            torch.testing.assert_close(
                tensor, named[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_cohort_equals_sequential(tiny_base, architecture, optimizer):
    base = tiny_base(architecture)
    # Plain Adam turns rounding into steps of full size where a gradient is zero; a larger batch of noise is no test.
    local = LocalConfig(optimizer=optimizer, weight_decay=0.01, clip_norm=0.5, lr=1e-3)
    given = problems(base)
    slow = list(SequentialEngine(base, local, 0.0).train(given, local.lr))
    for chunk in (1, 3, 4):
        assert_same(list(CohortEngine(base, local, 0.0, chunk).train(given, local.lr)), slow)


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), SIZES])
def test_training_moves_everything_and_leaves_the_base_alone(tiny_base, sizes):
    base = tiny_base("bert")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    local = LocalConfig(lr=1e-3)
    given = problems(base, sizes=sizes)
    for problem, trained in zip(given, CohortEngine(base, local, 0.0, 4).train(given, local.lr), strict=True):
        start = problem.start.adapter.tensors()
        for name, tensor in trained.adapter.tensors().items():
            assert not torch.equal(tensor, start[name]), name
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_order_of_clients_does_not_matter(tiny_base):
    base, local = tiny_base("bert"), LocalConfig(lr=1e-3)
    given = problems(base)
    forwards = list(CohortEngine(base, local, 0.0, 4).train(given, local.lr))
    backwards = list(CohortEngine(base, local, 0.0, 4).train(given[::-1], local.lr))
    assert_same(forwards, backwards[::-1])


def test_same_input_same_bits(tiny_base):
    base, local = tiny_base("llama"), LocalConfig(lr=1e-3)
    given = problems(base)
    first, second = (list(CohortEngine(base, local, 0.1, 4).train(given, local.lr)) for _ in range(2))
    assert first[1].losses == second[1].losses
    assert all(torch.equal(t, second[0].adapter.tensors()[n]) for n, t in first[0].adapter.tensors().items())


def test_padding_of_ranks_is_inert(tiny_base):
    """A client of rank 1 beside one of rank 8 trains as if it were alone, weight decay and clipping included."""
    base, local = tiny_base("bert"), LocalConfig(lr=1e-3, weight_decay=0.1, clip_norm=0.1)
    given = problems(base, ranks=(1, 8), sizes=(4, 4), steps=(3, 3))
    together = list(CohortEngine(base, local, 0.0, 2).train(given, local.lr))
    alone = list(CohortEngine(base, local, 0.0, 1).train(given, local.lr))
    assert together[0].adapter.layers[base.targets[0]].rank == 1
    assert_same(together, alone)


def test_dropout_keeps_the_mean_and_differs_between_draws():
    dropout = Dropout(0.25, Rng(0))
    x = torch.ones(200, 500)
    first, second = dropout.mask(x, "one.layer"), dropout.mask(x, "another")
    assert torch.equal(first, dropout.mask(x, "one.layer")), "a layer that is computed again gets the same mask"
    assert not torch.equal(first, second)
    assert first.mean().item() == pytest.approx(1.0, abs=0.01)
    assert first.unique().tolist() == pytest.approx([0.0, 4 / 3])


def test_dropout_changes_cohort_and_sequential_alike(tiny_base):
    """Statistically: over many draws of one step the mean loss under dropout is the same for both engines."""
    base, local = tiny_base("bert"), LocalConfig(lr=1e-6)
    given = problems(base, ranks=(4, 4), sizes=(8, 8), steps=(1, 1))
    exact = next(SequentialEngine(base, local, 0.0).train(given, 1e-6)).losses[0]

    def mean_loss(engine) -> tuple[float, float]:
        losses = []
        for draw in range(150):
            seeded = [LocalProblem(p.client, p.start, p.batches, Rng(draw).child(p.client)) for p in given]
            losses.append(next(iter(engine.train(seeded, 1e-6))).losses[0])
        sample = torch.tensor(losses)
        return sample.mean().item(), sample.std().item() / len(losses) ** 0.5

    cohort, error = mean_loss(CohortEngine(base, local, 0.3, 2))
    slow, slow_error = mean_loss(SequentialEngine(base, local, 0.3))
    assert error > 0
    assert abs(cohort - slow) < 4 * (error**2 + slow_error**2) ** 0.5
    assert abs(cohort - exact) < 1.0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_equals_a_peft_model_trained_by_hand(tiny_base, tiny_folder, architecture, optimizer):
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = tiny_base(architecture)
    local = LocalConfig(optimizer=optimizer, lr=1e-3, clip_norm=0.5)
    (problem,) = problems(base, ranks=(4,), sizes=(4,), steps=(3,))
    (ours,) = CohortEngine(base, local, 0.0, 1).train([problem], local.lr)

    model = AutoModelForSequenceClassification.from_pretrained(tiny_folder(architecture), num_labels=len(LABELS))
    model.config.pad_token_id = base.tokenizer.pad_token_id
    scale = next(iter(problem.start.adapter.layers.values())).scale
    config = LoraConfig(
        r=4,
        lora_alpha=scale * 4,
        target_modules=list(base.targets),
        modules_to_save=list(base.head),
        task_type=TaskType.SEQ_CLS,
        fan_in_fan_out=architecture == "gpt2",
    )
    peft = get_peft_model(model, config).eval()
    parameters = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    for name, parameter in parameters.items():
        parameter.data.copy_(_peft_value(name, problem.start.adapter))
    kind = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    options = {"weight_decay": 0.0} if optimizer == "adamw" else {"momentum": local.momentum}
    stepper = kind(parameters.values(), lr=local.lr, **options)
    losses = []
    for batch in problem.batches:
        stepper.zero_grad()
        loss = peft(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)
        stepper.step()
        losses.append(loss.item())
    assert ours.losses == pytest.approx(losses, abs=1e-5)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.data, _peft_value(name, ours.adapter), atol=TOLERANCE, rtol=TOLERANCE)


def _peft_value(name: str, adapter: Adapter):
    """Our tensor for one trainable PEFT parameter."""
    path = name.removeprefix("base_model.model.")
    if ".lora_A." in path:
        return adapter.layers[path.split(".lora_A.")[0]].A
    if ".lora_B." in path:
        return adapter.layers[path.split(".lora_B.")[0]].Bt.T
    return adapter.dense[path.replace(".modules_to_save.default", "")]


def test_adapter_arithmetic_names_what_differs(tiny_base):
    base = tiny_base("bert")
    whole = random_adapter(base, 2, Rng(0))
    part = Adapter(dict(list(whole.layers.items())[:1]), whole.dense)
    with pytest.raises(ValueError, match="differ"):
        combine(torch.add, whole, part)


def test_a_bfloat16_base_trains_float32_adapters(tiny_folder):
    """The same problem on a base rounded to bfloat16: near the float32 result, trained tensors float32."""
    results = {}
    for dtype in ("float32", "bfloat16"):
        model = ModelConfig(name=str(tiny_folder("bert")), max_length=32, dtype=dtype)
        base = load_base(model, AdapterConfig(rank=8, targets="all-linear"), Classes(LABELS), Rng(0))
        assert {p.dtype for p in base.model.parameters()} == {getattr(torch, dtype)}
        engine = CohortEngine(base, LocalConfig(optimizer="sgd", lr=0.1), 0.0, 4)
        results[dtype] = list(engine.train(problems(base), 0.1))
    for exact, rounded in zip(results["float32"], results["bfloat16"], strict=True):
        assert rounded.losses == pytest.approx(exact.losses, rel=0.05)
        for name, tensor in exact.adapter.tensors().items():
            other = rounded.adapter.tensors()[name]
            assert other.dtype == torch.float32
            # bfloat16 has 8 bits of mantissa; the error is held against the size of the tensor.
            assert (tensor - other).norm() < 0.05 * tensor.norm(), name
