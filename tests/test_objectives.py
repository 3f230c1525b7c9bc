"""Every kind of task: its losses are transformers' own, the cohort equals one client after the other, nothing leaks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from conftest import WORDS, tiny_tokenizer
from fslora.config import AdapterConfig, DataConfig, LocalConfig, ModelConfig
from fslora.data import tokens
from fslora.data.batches import IGNORED, encode
from fslora.data.types import Dataset, Examples
from fslora.engine.cohort import CohortEngine
from fslora.engine.sequential import SequentialEngine
from fslora.errors import ConfigError, ModelError
from fslora.evaluate import predict, predict_dealt
from fslora.export import export_merged, export_peft
from fslora.footprint import StorageTracker
from fslora.metrics import METRICS
from fslora.models.base import Base
from fslora.models.load import load_base
from fslora.models.output import FrozenCrossEntropy
from fslora.objectives import Causal, Classes, Images, Tags, Value, metric_of, objective_of
from fslora.objectives.causal import Fitting
from fslora.rng import Rng
from fslora.types import Adapter, LocalProblem, Start
from test_engines import TOLERANCE, assert_same, random_adapter

INSTRUCT = DataConfig(task="instruct", source="x.jsonl")
CHOICE = DataConfig(
    task="instruct", source="x.jsonl", evaluate="choice", answer="answer", choices=("good", "bad", "poor")
)
GENERATE = DataConfig(task="instruct", source="x.jsonl", evaluate="generate", answer="answer", max_new_tokens=4)
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "initializer_range": 0.2,
}


def causal_model(architecture: str):
    import transformers as tf

    match architecture:
        case "llama":
            return tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL))
        case "qwen2, tied":
            return tf.Qwen2ForCausalLM(tf.Qwen2Config(**SMALL, tie_word_embeddings=True))
        case "gemma2, capped":  # squashes its logits behind the output layer
            return tf.Gemma2ForCausalLM(tf.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0))
        case "gpt2":
            shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 64}
            return tf.GPT2LMHeadModel(tf.GPT2Config(**shape, bos_token_id=2, eos_token_id=3, initializer_range=0.2))
        case "mixtral":
            return tf.MixtralForCausalLM(tf.MixtralConfig(**SMALL, num_local_experts=4))
        case "qwen2 moe":
            moe = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 32, "num_experts": 4}
            return tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**SMALL, **moe))
    raise ValueError(architecture)


CAUSAL = ("llama", "qwen2, tied", "gemma2, capped", "gpt2", "mixtral", "qwen2 moe")


def causal_tokenizer():
    """A tokenizer that starts texts and can end them; without a padding token, as many causal models' are."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.add_special_tokens({"bos_token": "[CLS]", "eos_token": "[SEP]"})
    return tokenizer


@pytest.fixture(scope="session")
def causal_folder(tmp_path_factory):
    folders = {}

    def make(architecture: str):
        if architecture not in folders:
            folders[architecture] = tmp_path_factory.mktemp("causal")
            with torch.random.fork_rng():
                torch.manual_seed(0)
                causal_model(architecture).save_pretrained(folders[architecture])
            causal_tokenizer().save_pretrained(folders[architecture])
        return folders[architecture]

    return make


@pytest.fixture(scope="session")
def causal_base(causal_folder):
    def make(architecture: str, data: DataConfig = INSTRUCT, targets="all-linear", **model) -> Base:
        config = ModelConfig(name=str(causal_folder(architecture)), max_length=32, **model)
        return load_base(config, AdapterConfig(rank=8, targets=targets), Causal(data, ("all",)), Rng(0))

    return make


def instructions(count: int, seed: int = 0, answers=("good", "bad", "poor"), longest: int = 12) -> Examples:
    draw = np.random.default_rng(seed)
    texts = tuple(" ".join(draw.choice(WORDS, draw.integers(1, longest))) + "\n" for _ in range(count))
    chosen = tuple(str(answer) for answer in draw.choice(answers, count))
    columns = {
        "target": tuple(f"the value is {answer}" for answer in chosen),
        "choices": (tuple(f"the value is {answer}" for answer in answers),) * count,
        "answer": chosen,
        "options": (answers,) * count,
    }
    return Examples(texts, np.zeros(count, dtype=np.int64), columns=columns)


def encoded(base: Base, examples: Examples):
    return base.objective.encode(examples, base.tokenizer, ModelConfig(max_length=32))


def problems(base: Base, make=instructions, sizes=(4, 1, 3), ranks=(2, 8, 5), steps=(3, 2, 3)) -> list[LocalProblem]:
    given = []
    for client, (rank, size, count) in enumerate(zip(ranks, sizes, steps, strict=True)):
        data = encoded(base, make(size * count, client))
        batches = [data.batch(range(step * size, (step + 1) * size)) for step in range(count)]
        rng = Rng(1).child(client)
        given.append(LocalProblem(client, Start(random_adapter(base, rank, rng)), batches, rng))
    return given


def check_engines(base: Base, given: list[LocalProblem], dropout: float = 0.0) -> None:
    local = LocalConfig(lr=1e-3, clip_norm=0.5)
    slow = list(SequentialEngine(base, local, dropout).train(given, local.lr))
    for chunk in (1, 3):
        assert_same(list(CohortEngine(base, local, dropout, chunk).train(given, local.lr)), slow)


@pytest.mark.parametrize("architecture", CAUSAL)
@pytest.mark.parametrize("sizes", [(3, 3, 3), (4, 1, 3)], ids=["equal", "unequal"])
def test_cohort_equals_sequential(causal_base, architecture, sizes):
    base = causal_base(architecture)
    check_engines(base, problems(base, sizes=sizes))


@pytest.mark.parametrize("architecture", CAUSAL)
def test_causal_losses_are_transformers_own(causal_base, architecture):
    """The mean over predicted tokens is what the model itself returns for labels of -100 on the prompts."""
    base = causal_base(architecture)
    batch = encoded(base, instructions(5)).batch(range(5))
    # transformers shifts by itself; ours are shifted already, and the last predicted token is no input.
    ids = torch.cat([batch["input_ids"], torch.zeros(5, 1, dtype=torch.int64)], dim=1)
    labels = torch.cat([torch.full((5, 1), IGNORED), batch["token_labels"]], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.zeros(5, 1, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        expected = base.model(input_ids=ids, attention_mask=mask, labels=labels).loss
        losses, example = base.objective.losses(base, batch)
    assert losses.mean().item() == pytest.approx(expected.item(), abs=1e-5)
    assert example.tolist() == sorted(example.tolist())
    assert set(example.tolist()) == set(range(5))


@pytest.mark.parametrize("architecture", CAUSAL)
def test_logits_are_computed_only_where_they_are_asked_for(causal_base, architecture):
    base = causal_base(architecture)
    batch = encoded(base, instructions(4)).batch(range(4))
    at = batch["token_labels"] != IGNORED
    seen = []
    output = base.model.get_output_embeddings()
    frozen, slot = base._output.frozen, base._output
    slot.frozen = lambda x: seen.append(tuple(x.shape)) or frozen(x)
    try:
        with torch.no_grad():
            some, every = base.logits(batch, at), base.logits(batch)
    finally:
        slot.frozen = frozen
    assert output is slot.module
    assert seen[0] == (int(at.sum()), 32)
    torch.testing.assert_close(some, every[at], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3 * 64, 2**25])
@pytest.mark.parametrize("architecture", CAUSAL)
def test_the_loss_without_whole_logits_is_the_loss(causal_base, architecture, chunk, monkeypatch):
    """Value and gradient by the hidden states, whatever the size of a chunk; capped logits are left to the model."""
    monkeypatch.setattr("fslora.models.output.CHUNK", chunk)
    base = causal_base(architecture)
    assert (base._last is None) == ("capped" in architecture)
    batch = encoded(base, instructions(4)).batch(range(4))
    at = batch["token_labels"] != IGNORED
    labels, adapter = batch["token_labels"][at], random_adapter(base, 4, Rng(0))
    weights = torch.rand(len(labels), generator=Rng(1).torch())

    def gradients(losses):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in adapter.tensors().items()}
        with base.using(adapter.with_tensors(leaves)):
            each = losses()
        (each * weights).sum().backward()
        return each.detach(), [leaf.grad for leaf in leaves.values() if leaf.grad is not None]

    ours = gradients(lambda: base.token_losses(batch, at, labels))
    plain = gradients(lambda: functional.cross_entropy(base.logits(batch, at), labels, reduction="none"))
    assert len(ours[1]) == len(plain[1]) > 0
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)


def test_no_more_logits_than_a_chunk_are_held(monkeypatch):
    """Peak of forward and backward, tensor by tensor: several copies of all logits, or a small part of one."""
    x, weight = torch.randn(2048, 8, generator=Rng(0).torch()), torch.randn(1024, 8, generator=Rng(1).torch())
    labels, whole, peaks = torch.zeros(2048, dtype=torch.long), 4 * 2048 * 1024, {}
    for chunk in (64 * 1024, 2**25):
        monkeypatch.setattr("fslora.models.output.CHUNK", chunk)
        with StorageTracker() as tracker:
            FrozenCrossEntropy.apply(x.clone().requires_grad_(), weight, None, labels).sum().backward()
        peaks[chunk] = sum(tracker.peak.values())
    assert peaks[2**25] >= whole
    assert peaks[64 * 1024] < whole / 4


@pytest.mark.parametrize("count", [1, 300, 999, 1000])
def test_losses_do_not_depend_on_the_padding_of_a_chunk(monkeypatch, count):
    monkeypatch.setattr("fslora.models.output.CHUNK", 300 * 64)
    draw = Rng(0).torch()
    x, weight, bias = torch.randn(count, 8, generator=draw), torch.randn(64, 8, generator=draw), torch.randn(64)
    labels, shares = torch.randint(64, (count,), generator=draw), torch.rand(count, generator=draw)

    def losses(loss):
        leaf = x.clone().requires_grad_()
        each = loss(leaf)
        (each * shares).sum().backward()
        return each.detach(), leaf.grad

    ours = losses(lambda leaf: FrozenCrossEntropy.apply(leaf, weight, bias, labels))
    plain = losses(
        lambda leaf: functional.cross_entropy(functional.linear(leaf, weight, bias), labels, reduction="none")
    )
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj"), r".*layers\.1\..*_proj"])
def test_targets(causal_base, targets):
    base = causal_base("qwen2 moe", targets=targets)
    assert all("experts" not in path.split(".") and "lm_head" not in path for path in base.targets)
    if targets == "all-linear":
        assert any("shared_expert" in path for path in base.targets)
    elif isinstance(targets, str):
        assert {path.split(".")[2] for path in base.targets} == {"1"}
    else:
        assert len(base.targets) == 4
    check_engines(base, problems(base))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "qkv"), r"names 'qkv': no linear module .* there are: .*q_proj.*regular expression"),
        (("lm_head",), r"names 'lm_head': no linear module"),
        ("q_proj", r"names 'q_proj': no linear module .*'model\.layers\.0\.self_attn\.q_proj'"),
    ],
)
def test_targets_that_do_not_exist(causal_base, targets, message):
    with pytest.raises(ModelError, match=message):
        causal_base("llama", targets=targets)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_no_result(causal_base, architecture, dropout):
    local = LocalConfig(lr=1e-3)
    trained, kept = [], []
    for checkpointing in (False, True):
        base = causal_base(architecture, gradient_checkpointing=checkpointing)
        given = problems(base)
        trained.append(list(CohortEngine(base, local, dropout, 3).train(given, local.lr)))
        kept.append(saved_for_backward(base, given[0]))
    assert_same(*trained)
    assert kept[1] < kept[0] / 2, "nothing was left out"


def saved_for_backward(base: Base, problem: LocalProblem) -> int:
    """Entries of the tensors that autograd keeps for one step."""
    counts = []
    with base.using(problem.start.adapter):
        for slot in base._slots.values():
            slot.change.A.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: counts.append(t.numel()) or t, lambda t: t):
            base.objective.losses(base, problem.batches[0])
    return sum(counts)


def test_checkpointing_does_not_disturb_generation(causal_base):
    texts = [
        causal_base("llama", GENERATE, gradient_checkpointing=on).generate([[2, 7, 8], [2, 9]], 6)
        for on in (False, True)
    ]
    assert texts[0] == texts[1]


@given(
    prompt=st.lists(st.integers(4, 40), max_size=30),
    response=st.lists(st.integers(41, 60), min_size=1, max_size=20),
    limit=st.integers(1, 24),
)
def test_a_prompt_gives_way_to_its_response(prompt, response, limit):
    """What is predicted is the response, whole wherever it fits, and each token is predicted from all before it."""
    fit = Fitting(limit)
    ids, labels = fit.sequence(prompt, response)
    assert len(ids) == len(labels) <= limit
    predicted = [label for label in labels if label != IGNORED]
    fits = len(response) <= limit
    assert fit.shortened == (not fits)
    if prompt:
        assert predicted == response[:limit]
        kept = [token for token in ids if token <= 40]
        assert kept[:1] == prompt[:1]
        assert kept[1:] == (prompt[len(prompt) - len(kept) + 1 :] if len(kept) > 1 else [])
        assert fit.truncated == (len(kept) < len(prompt))
    else:  # nothing stands before the first token that it could be predicted from
        assert predicted == response[:limit][1:]
        assert fit.truncated == 0
    for place, label in enumerate(labels[:-1]):
        if label != IGNORED:
            assert ids[place + 1] == label


def test_prompts_and_responses_as_tokens(causal_base):
    base = causal_base("llama")
    examples = Examples(("the cat\n", "dog:"), np.zeros(2, dtype=np.int64), columns={"target": ("sat", "ran on")})
    data = encoded(base, examples)
    words = base.tokenizer.convert_ids_to_tokens
    assert [words(ids) for ids in data.fields["input_ids"]] == [
        ["[CLS]", "the", "cat", "sat"],
        ["[CLS]", "dog", "[UNK]", "ran", "on"],
    ]
    sep = base.tokenizer.eos_token_id
    assert data.fields["token_labels"][0][-2:] == [base.tokenizer.convert_tokens_to_ids("sat"), sep]
    assert data.fields["token_labels"][1][:2] == [IGNORED, IGNORED]
    plain = Causal(DataConfig(task="text")).encode(examples, base.tokenizer, ModelConfig())
    assert sep not in plain.fields["token_labels"][0], "a piece of a longer text does not end it"


def test_choices_are_judged_by_the_whole_response(causal_base):
    """Against every candidate scored alone with the model's own loss."""
    base = causal_base("llama", CHOICE)
    examples = instructions(9)
    adapter = random_adapter(base, 4, Rng(5))
    predictions = predict(base, adapter, encoded(base, examples))
    expected = []
    for text, several, target in zip(
        examples.texts, examples.columns["choices"], examples.columns["target"], strict=True
    ):
        sums = []
        for candidate in several:
            one = Examples((text,), np.zeros(1, dtype=np.int64), columns={"target": (candidate,)})
            data = replace(base.objective, data=INSTRUCT).encode(one, base.tokenizer, ModelConfig(max_length=32))
            with torch.no_grad(), base.using(adapter):
                sums.append(base.objective.losses(base, data.batch([0]))[0].sum().item())
        expected.append(several[int(np.argmin(sums))] == target)
    assert predictions.columns["right"].tolist() == expected
    assert 0 < sum(expected) < len(expected), "the test tells nothing"
    scores = predictions.scores()
    assert scores["accuracy"] == pytest.approx(np.mean(expected))
    assert scores["perplexity"] == pytest.approx(np.exp(scores["loss"]))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_generation_side_by_side_is_generation_alone(causal_base, architecture):
    """Padding on the left changes nothing, with an adapter attached."""
    base = causal_base(architecture, GENERATE)
    with base.using(random_adapter(base, 4, Rng(5))):
        prompts = [[2, 10, 11, 12, 13], [2, 20], [2, 30, 31]]
        together = base.generate(prompts, 6)
        assert together == [base.generate([prompt], 6)[0] for prompt in prompts]
    assert len(set(together)) > 1


def test_generated_answers_are_looked_for(causal_base):
    """The answer is what the model writes: right by construction for some, wrong for the others."""
    base = causal_base("llama", GENERATE)
    examples = instructions(6)
    data = encoded(base, examples)
    with torch.no_grad(), base.using(Adapter({})):
        written = base.generate(data.columns["prompt"], GENERATE.max_new_tokens)
    answers = [text if place % 2 else "nothing like it" for place, text in enumerate(written)]
    data = replace(data, columns={**data.columns, "answer": answers})
    predictions = predict(base, Adapter({}), data)
    assert predictions.columns["right"].tolist() == [False, True] * 3
    assert predictions.scores()["exact_match"] == 0.5


def test_dealt_predictions_are_the_same_examples(causal_base):
    base = causal_base("llama", CHOICE)
    data = encoded(base, instructions(7))
    one = random_adapter(base, 4, Rng(5))
    alone, dealt = predict(base, one, data), predict_dealt(base, [one, one, one], data)
    np.testing.assert_allclose(alone.losses, dealt.losses, rtol=1e-5)
    assert alone.columns["right"].tolist() == dealt.columns["right"].tolist()


def test_an_encoder_is_no_causal_model(tiny_folder):
    config = ModelConfig(name=str(tiny_folder("bert")), max_length=32)
    with pytest.raises(ModelError, match="is no causal language model"):
        load_base(config, AdapterConfig(rank=4), Causal(INSTRUCT), Rng(0))


def test_chat_needs_a_template(causal_base):
    base = causal_base("llama")
    chat = Causal(INSTRUCT.model_copy(update={"prompt": "chat"}))
    with pytest.raises(ModelError, match="no chat template"):
        chat.encode(instructions(2), base.tokenizer, ModelConfig())
    base.tokenizer.chat_template = "{% for m in messages %}[CLS] one {{ m['content'] }} two {% endfor %}three "
    try:
        data = chat.encode(instructions(1), base.tokenizer, ModelConfig())
    finally:
        base.tokenizer.chat_template = None
    found = base.tokenizer.convert_ids_to_tokens(data.fields["input_ids"][0])
    assert found[:2] == ["[CLS]", "one"]
    assert found.count("[CLS]") == 1
    assert "three" in found


def tagged(count: int, seed: int = 0) -> Examples:
    draw = np.random.default_rng(seed)
    words = tuple(tuple(map(str, draw.choice(WORDS, draw.integers(1, 9)))) for _ in range(count))
    tags = tuple(tuple(len(word) % 3 for word in sentence) for sentence in words)
    texts = tuple(" ".join(sentence) for sentence in words)
    return Examples(texts, np.zeros(count, dtype=np.int64), columns={"words": words, "tags": tags})


def test_tags(tiny_folder):
    config = ModelConfig(name=str(tiny_folder("bert")), max_length=8)
    base = load_base(config, AdapterConfig(rank=8), Tags(("x", "y", "z")), Rng(0))
    data = base.objective.encode(tagged(6), base.tokenizer, config)
    assert data.truncated > 0
    assert max(data.lengths) == 8
    batch = data.batch(range(6))
    with torch.no_grad():
        losses, example = base.objective.losses(base, batch)
        inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "token_labels")}
        expected = base.model(**inputs, labels=batch["token_labels"]).loss
    assert losses.mean().item() == pytest.approx(expected.item(), abs=1e-5)
    predictions = predict(base, Adapter({}, base.template(AdapterConfig()).dense), data)
    for place in range(6):
        assert predictions.losses[place] == pytest.approx(losses[example == place].sum().item(), abs=1e-4)
    assert set(predictions.scores()) == {"accuracy", "macro_f1", "matthews", "loss"}
    check_engines(base, problems(base, tagged))


def test_a_word_s_tag_is_at_its_first_token():
    from fslora.objectives.tags import _at_first_tokens

    assert _at_first_tokens([None, 0, 0, 1, 2, 2, None], (5, 6, 7)) == [IGNORED, 5, IGNORED, 6, 7, IGNORED, IGNORED]


def numbered(count: int, seed: int = 0) -> Examples:
    draw = np.random.default_rng(seed)
    texts = tuple(" ".join(draw.choice(WORDS, draw.integers(1, 9))) for _ in range(count))
    return Examples(texts, np.zeros(count, dtype=np.int64), columns={"value": tuple(draw.normal(size=count).tolist())})


def test_values(tiny_folder):
    config = ModelConfig(name=str(tiny_folder("bert")), max_length=32)
    base = load_base(config, AdapterConfig(rank=8), Value(), Rng(0))
    data = base.objective.encode(numbered(6), base.tokenizer, config)
    batch = data.batch(range(6))
    with torch.no_grad():
        losses, _ = base.objective.losses(base, batch)
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        expected = base.model(**inputs, labels=batch["labels"]).loss
    assert losses.mean().item() == pytest.approx(expected.item(), abs=1e-5)
    scores = predict(base, Adapter({}, base.template(AdapterConfig()).dense), data).scores()
    assert set(scores) == {"pearson", "spearman", "loss"}
    assert scores["loss"] == pytest.approx(expected.item(), abs=1e-5)
    check_engines(base, problems(base, numbered))


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory):
    import transformers as tf

    folder = tmp_path_factory.mktemp("vit")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tf.ViTForImageClassification(tf.ViTConfig(**shape, image_size=16, patch_size=8)).save_pretrained(folder)
    tf.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def test_images(vision_folder, tmp_path):
    from PIL import Image

    draw = np.random.default_rng(0)

    def pictures(count: int, seed: int = 0) -> Examples:
        paths = []
        for place in range(count):
            paths.append(str(tmp_path / f"{seed}-{place}.png"))
            Image.fromarray(draw.integers(0, 255, (20, 12, 3), dtype=np.uint8)).save(paths[-1])
        return Examples(tuple(paths), draw.integers(0, 2, count))

    config = ModelConfig(name=str(vision_folder))
    base = load_base(config, AdapterConfig(rank=8), Images(("a", "b")), Rng(0))
    data = base.objective.encode(pictures(5, seed=9), base.tokenizer, config)
    assert data.batch([0, 3])["pixel_values"].shape == (2, 3, 16, 16)
    assert base.tokens(data.batch([0, 3])) == 2 * (1 + 4)
    assert data.take(np.array([3, 1])).labels.tolist() == data.labels[[3, 1]].tolist()
    scores = predict(base, Adapter({}, base.template(AdapterConfig()).dense), data).scores()
    assert {"accuracy", "f1", "loss"} <= set(scores)
    check_engines(base, problems(base, pictures))


def test_every_kind_has_its_objective_and_metric():
    empty = Examples((), np.zeros(0, dtype=np.int64))

    def judged(kind, data):
        dataset = Dataset("x", ("a", "b"), empty, empty, empty, {}, kind)
        return metric_of(objective_of(dataset, data), data).name

    assert judged("classes", DataConfig()) == "accuracy"
    assert judged("value", DataConfig()) == "pearson"
    assert judged("tags", DataConfig()) == "accuracy"
    assert judged("images", DataConfig()) == "accuracy"
    assert judged("causal", INSTRUCT) == "perplexity"
    assert judged("causal", CHOICE) == "accuracy"
    assert judged("causal", GENERATE) == "exact_match"
    assert judged("classes", DataConfig(metric="matthews")) == "matthews"
    assert judged("causal", CHOICE.model_copy(update={"metric": "perplexity"})) == "perplexity"
    with pytest.raises(ConfigError, match=r"data\.metric is 'pearson'; for this task there are accuracy"):
        judged("classes", DataConfig(metric="pearson"))
    for objective in (Classes(("a", "b")), Value(), Tags(("a",)), Causal(CHOICE), Causal(GENERATE), Images(("a",))):
        assert set(objective.metrics) <= set(METRICS)


def test_large_sets_are_tokenised_once(tmp_path, monkeypatch, causal_base):
    base = causal_base("llama")
    monkeypatch.setenv("FSLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokens, "CACHED_CHARACTERS", 10)
    texts = ("the cat sat on the mat", "", "a dog \N{SNOWMAN} ran")
    examples = Examples(texts, np.zeros(3, dtype=np.int64))
    first = encode(examples, base.tokenizer, 32)
    (kept,) = (tmp_path / "cache" / "tokens").iterdir()
    stamp = kept.stat().st_mtime_ns
    assert encode(examples, base.tokenizer, 32).fields == first.fields
    assert kept.stat().st_mtime_ns == stamp

    def refuse(*args, **kwargs):
        raise AssertionError("tokenised again")

    with monkeypatch.context() as patch:
        patch.setattr(type(base.tokenizer), "__call__", refuse)
        assert encode(examples, base.tokenizer, 32).fields == first.fields
    encode(Examples((*texts[:2], "other"), np.zeros(3, dtype=np.int64)), base.tokenizer, 32)
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2
    kept.write_bytes(b"damaged")
    assert encode(examples, base.tokenizer, 32).fields == first.fields


def test_a_tolerance_that_can_fail():
    """The engines' tests would notice a loss over the wrong tokens: it is far beyond their tolerance."""
    logits, labels = torch.randn(6, 9, generator=Rng(0).torch()), torch.arange(6)
    right = functional.cross_entropy(logits, labels)
    wrong = functional.cross_entropy(logits, labels.roll(1))
    assert abs(right - wrong) > 1000 * TOLERANCE


@pytest.mark.parametrize("architecture", ["llama", "qwen2, tied", "gpt2", "mixtral"])
def test_exported_causal_adapters_load_in_peft(causal_base, causal_folder, architecture, tmp_path):
    """The same logits with stock PEFT, and the lines of the adapter's card run as they stand."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = causal_base(architecture)
    adapter = random_adapter(base, 4, Rng(5))
    assert not adapter.dense, "a causal model has no head of its own"
    folder = export_peft(adapter, (), base.name, tmp_path / "a", "", base.fan_in_fan_out, base.objective.peft_task)
    plain = AutoModelForCausalLM.from_pretrained(causal_folder(architecture))
    model = PeftModel.from_pretrained(plain, folder).eval()
    batch = encoded(base, instructions(3)).batch(range(3))
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "token_labels")}
    with torch.no_grad(), base.using(adapter):
        ours = base.logits(batch)
        theirs = model(**inputs).logits
    there = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[there], theirs[there], atol=1e-5, rtol=1e-5)
    card = base.objective.card(base.name, 32).replace("path/to/this/folder", str(folder))
    exec(compile(card, "card", "exec"), {})


def test_merged_causal_models_are_ordinary_models(causal_base, tmp_path):
    from transformers import AutoModelForCausalLM

    base = causal_base("qwen2, tied")
    adapter = random_adapter(base, 4, Rng(5))
    batch = encoded(base, instructions(3)).batch(range(3))
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "token_labels")}
    with torch.no_grad(), base.using(adapter):
        expected = base.logits(batch)
    merged = AutoModelForCausalLM.from_pretrained(export_merged(adapter, base, tmp_path / "merged")).eval()
    there = batch["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits[there], expected[there], atol=1e-5, rtol=1e-5)
