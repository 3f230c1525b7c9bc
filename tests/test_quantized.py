"""Bases in 4 and 8 bits: the same engines, the same exports, and no garbage where a base cannot be changed."""

from __future__ import annotations

import sys

import pytest
import torch

from conftest import LABELS, tiny_tokenizer
from fslora import config
from fslora.config import AdapterConfig, LocalConfig, ModelConfig
from fslora.engine.cohort import CohortEngine
from fslora.engine.sequential import SequentialEngine
from fslora.errors import ConfigError, ModelError
from fslora.export import export_merged, export_peft
from fslora.methods import METHODS
from fslora.models.load import load_base
from fslora.models.quantized import dequantized
from fslora.objectives import Causal, Classes
from fslora.rng import Rng
from fslora.types import Adapter, LoRA
from test_engines import assert_same, random_adapter
from test_engines import problems as labelled
from test_objectives import (
    INSTRUCT,
    SMALL,
    causal_model,
    causal_tokenizer,
    check_engines,
    encoded,
    instructions,
    problems,
)

KINDS = ("4bit", "8bit")
SHAPE = {**SMALL, "hidden_size": 128, "intermediate_size": 192}  # blocks of 64 weights share one scale


@pytest.fixture(scope="module")
def _bitsandbytes():
    pytest.importorskip("bitsandbytes", reason="bases in 4 or 8 bits are an extra: pip install 'fslora[quantized]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import transformers as tf

    made = tmp_path_factory.mktemp("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tf.LlamaForCausalLM(tf.LlamaConfig(**{**SHAPE, "initializer_range": 0.1})).save_pretrained(made)
    causal_tokenizer().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A checkpoint with biases and without a pooler, which is then part of the fresh head."""
    import transformers as tf

    made = tmp_path_factory.mktemp("bert")
    shape = {name: SHAPE[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bert = tf.BertConfig(**shape, num_hidden_layers=2, max_position_embeddings=40, initializer_range=0.1)
        tf.BertForMaskedLM(bert).save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    return made


def causal(folder, quantize: str, **model):
    asked = ModelConfig(name=str(folder), max_length=32, quantize=quantize, device="cpu", **model)
    return load_base(asked, AdapterConfig(rank=8), Causal(INSTRUCT, ("all",)), Rng(0))


def classifier(folder, quantize: str):
    asked = ModelConfig(name=str(folder), max_length=32, quantize=quantize, device="cpu")
    return load_base(asked, AdapterConfig(rank=8), Classes(LABELS), Rng(0))


def linear_bytes(base) -> int:
    return sum(slot.module.weight.nbytes for slot in base._slots.values())


@torch.no_grad()
def logits(base, batch, adapter: Adapter | None = None) -> torch.Tensor:
    with base.using(adapter or Adapter({})):
        return base.logits(batch)


@pytest.mark.usefixtures("_bitsandbytes")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2, tied"])
def test_cohort_equals_sequential(tmp_path, architecture, kind):
    """To the same tolerance as unquantised, whatever was evaluated in between; sizes are no multiples of a block."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        causal_model(architecture).save_pretrained(tmp_path)
    causal_tokenizer().save_pretrained(tmp_path)
    base = causal(tmp_path, kind)
    given = problems(base)
    check_engines(base, given)
    first = list(CohortEngine(base, LocalConfig(lr=1e-3), 0.0, 3).train(given, 1e-3))
    base.model.eval()
    logits(base, given[0].batches[0])
    second = list(CohortEngine(base, LocalConfig(lr=1e-3), 0.0, 3).train(given, 1e-3))
    assert_same(first, second, 0.0)
    for trained, problem in zip(first, given, strict=True):
        start = problem.start.adapter.tensors()
        for name, tensor in trained.adapter.tensors().items():
            assert tensor.dtype == torch.float32
            assert not torch.equal(tensor, start[name]), name


@pytest.mark.usefixtures("_bitsandbytes")
@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier(encoder, kind):
    """Its head, a fresh pooler included, is neither quantised nor drawn differently, and is trained."""
    base, plain = classifier(encoder, kind), classifier(encoder, "none")
    heads = [b.template(AdapterConfig(rank=8)).dense for b in (base, plain)]
    assert "bert.pooler.dense.weight" in heads[0]
    assert heads[0].keys() == heads[1].keys()
    assert all(torch.equal(tensor, heads[1][name]) for name, tensor in heads[0].items())
    # Adam would turn the rounding of some gradient near zero, of 33000 here, into a step of its own.
    local, given = LocalConfig(optimizer="sgd", lr=1e-2), labelled(base)
    slow = list(SequentialEngine(base, local, 0.0).train(given, local.lr))
    assert_same(list(CohortEngine(base, local, 0.0, 4).train(given, local.lr)), slow)


@pytest.mark.usefixtures("_bitsandbytes")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_what_is_counted_and_what_it_weighs(folder, kind, kept):
    base, plain = causal(folder, kind, dtype=kept), causal(folder, "none")
    assert base.quantized
    assert not plain.quantized
    assert base.parameters == plain.parameters
    assert base.linear_parameters == plain.linear_parameters
    assert base.output_parameters == plain.output_parameters
    assert base.template(AdapterConfig(rank=4)).layers == plain.template(AdapterConfig(rank=4)).layers
    assert linear_bytes(base) * {"4bit": 8, "8bit": 4}[kind] == linear_bytes(plain)
    others = {p.dtype for p in base.model.parameters() if p.is_floating_point()}
    assert others == {getattr(torch, kept)}
    for path, slot in base._slots.items():
        weight = plain._slots[path].module.weight
        error = ((dequantized(slot.module).float() - weight).norm() / weight.norm()).item()
        assert error == pytest.approx({"4bit": 0.09, "8bit": 0.0065}[kind], rel=0.2)


@pytest.mark.usefixtures("_bitsandbytes")
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_dequantised_weights(folder, kind):
    base = causal(folder, kind)
    layer = base._slots[base.targets[0]].module
    x = torch.randn(3, 5, layer.in_features, generator=Rng(0).torch()).requires_grad_()
    other = x.detach().clone().requires_grad_()
    y, expected = layer(x), torch.nn.functional.linear(other, dequantized(layer), layer.bias)
    torch.testing.assert_close(y, expected, atol=0, rtol=0)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("_bitsandbytes")
@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_what_we_compute_on_the_same_quantised_base(folder, tmp_path, kind):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = causal(folder, kind)
    adapter = random_adapter(base, 4, Rng(3))
    exported = export_peft(adapter, base.head, base.name, tmp_path / "peft", task="CAUSAL_LM")
    how = {"4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "8bit": {"load_in_8bit": True}}[kind]
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**how), device_map={"": "cpu"}
    )
    # In training mode (nothing here has dropout) bitsandbytes computes in float32 as we do; see models/quantized.py.
    model = PeftModel.from_pretrained(model, exported).train()
    batch = encoded(base, instructions(5)).batch(range(5))
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "token_labels")}
    with torch.no_grad():
        found = model(**inputs).logits
    expected = logits(base, batch, adapter)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    assert (expected - logits(base, batch)).abs().max() > 0.1, "the adapter changes nothing"


@pytest.mark.usefixtures("_bitsandbytes")
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_is_quantised_already(folder, tmp_path, kind):
    base = causal(folder, kind)
    batch = encoded(base, instructions(4)).batch(range(4))
    expected = logits(base, batch)
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(causal(tmp_path, kind), batch), expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(ModelError, match=rf"model\.quantize is 'none', but the weights of .* kept in {kind} already"):
        causal(tmp_path, "none")


@pytest.mark.usefixtures("_bitsandbytes")
@pytest.mark.parametrize("kind", KINDS)
def test_what_would_change_the_weights_says_so(folder, tmp_path, kind):
    base = causal(folder, kind)
    adapter = random_adapter(base, 4, Rng(3))
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    with pytest.raises(ModelError, match="is quantised, and this method changes"), base.changed(adapter.layers):
        pass
    with pytest.raises(ModelError, match="nothing can be added to its weights; export the adapter without --merge"):
        export_merged(adapter, base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    after = base.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.usefixtures("_bitsandbytes")
@pytest.mark.parametrize("kind", KINDS)
def test_wide_pairs_are_computed_beside_the_weights(folder, kind):
    """A stack that would be merged into plain weights gives what its dense product gives."""
    base = causal(folder, kind)
    path = base.targets[0]
    d_in, d_out = base.template(AdapterConfig()).layers[path]
    draw = Rng(1).torch()
    A, Bt = torch.randn(200, d_in, generator=draw), torch.randn(200, d_out, generator=draw)
    stack = LoRA(A, Bt, 1e-3)
    U, S, Vh = torch.linalg.svd(stack.delta)  # [o i]
    narrow = LoRA(Vh[:40], (U[:, :40] * S[:40]).T, 1.0)
    rest = LoRA(Vh[40:], (U[:, 40:] * S[40:]).T, 1.0)
    batch = encoded(base, instructions(3)).batch(range(3))
    whole = LoRA(torch.cat([narrow.A, rest.A]), torch.cat([narrow.Bt, rest.Bt]), 1.0)
    assert stack.rank * (d_in + d_out) > d_in * d_out >= narrow.rank * (d_in + d_out)
    found, expected = (logits(base, batch, Adapter({path: pair})) for pair in (stack, whole))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - logits(base, batch, Adapter({path: narrow}))).abs().max() > 1e-2


def test_rotary_frequencies_stay_exact(folder):
    """In a bfloat16 base the angle of position 500 would otherwise be off by a radian."""
    base = causal(folder, "none", dtype="bfloat16")
    assert base.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}


def test_without_the_package(folder, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    with pytest.raises(ModelError, match=r"model\.quantize is '4bit', .* run `pip install 'fslora\[quantized\]'`"):
        causal(folder, "4bit")


def test_a_device_that_the_package_knows_nothing_of(folder, monkeypatch):
    import importlib.util
    from types import SimpleNamespace

    old = SimpleNamespace(__version__="0.41", supported_torch_devices={"cuda"})
    monkeypatch.setitem(sys.modules, "bitsandbytes", old)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *a: object())
    with pytest.raises(ModelError, match=r"bitsandbytes 0\.41 computes on cuda only, and model\.device is 'cpu'"):
        causal(folder, "8bit")


def test_other_kinds_of_quantised_checkpoints(folder, tmp_path):
    from transformers import AutoConfig

    asked = AutoConfig.from_pretrained(folder)
    asked.quantization_config = {"quant_method": "gptq", "bits": 4}
    asked.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"is quantised \(gptq\) in a way that cannot be trained here"):
        causal(tmp_path, "none")


@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_that_change_the_base_are_refused_at_once(name):
    asked = [f"method.name={name}", "model.quantize=4bit"]
    if config.load(None, asked[:1]).method.changes_base:
        with pytest.raises(
            ConfigError, match=rf"method\.name is '{name}', which adds to the weights .* model\.quantize"
        ):
            config.load(None, asked)
    else:
        assert config.load(None, asked).model.quantize == "4bit"


def test_a_method_that_changes_nothing_when_told_so():
    refused, allowed = ["method.name=florist", "method.next_init=merge"], ["method.name=fedex-lora"]
    with pytest.raises(ConfigError, match="adds to the weights"):
        config.load(None, [*refused, "model.quantize=8bit"])
    assert config.load(None, [*allowed, "method.residual_rank=0", "model.quantize=8bit"])
