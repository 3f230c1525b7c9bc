"""What leaves a run: PEFT folders that PEFT itself computes with, merged models, checkpoints, run folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ARCHITECTURES, LABELS, WORDS
from fslora.config import AdapterConfig
from fslora.data.batches import encode
from fslora.data.types import Examples
from fslora.errors import ArtifactError, FsloraError
from fslora.export import export_merged, export_peft, import_peft, lower_rank, rank_for_energy
from fslora.methods.server import ServerOptimizer, server_step
from fslora.objectives import Classes
from fslora.rng import Rng
from fslora.runfolder import RunFolder
from fslora.types import Adapter, ClientMemory, LoRA, ServerState, Template

# The same function in float32 with the products in another order, through two layers and a head.
LOGITS = 1e-5
# alpha = scale · rank is written and divided again: two float64 roundings.
SCALE = 1e-15
# Float32 factors of a float64 SVD; products of entries below 1.
SVD32 = 1e-5


def trained_adapter(template: Template, rank: int, seed: int = 0) -> Adapter:
    """An adapter whose pairs and head have all moved from their start."""
    stream = Rng(seed).child(rank).torch()

    def draw(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=stream)

    layers = {
        name: LoRA(draw(rank, d_in), draw(rank, d_out), template.scale(rank))
        for name, (d_in, d_out) in template.layers.items()
    }
    return Adapter(layers, {name: tensor + draw(*tensor.shape) for name, tensor in template.dense.items()})


def small_template(rank: int = 4, alpha: float = 8.0) -> Template:
    """Shapes alone, for what needs no model; one layer is narrower than the rank may be."""
    head = {"classifier.weight": torch.zeros(3, 6), "classifier.bias": torch.zeros(3)}
    return Template({"a.query": (7, 5), "a.out": (3, 9)}, head, rank, alpha)


def batch_for(base):
    draw = Rng(5).numpy()
    texts = tuple(" ".join(draw.choice(WORDS, draw.integers(1, 12))) for _ in range(6))
    return encode(Examples(texts, draw.integers(0, len(LABELS), 6)), base.tokenizer, 32).batch(range(6))


@torch.no_grad()
def logits_of(model, batch) -> torch.Tensor:
    return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits


@torch.no_grad()
def ours(base, adapter: Adapter, batch) -> torch.Tensor:
    with base.using(adapter):
        return base.logits(batch)


def loaded_by_peft(model_folder: Path, adapter_folder: Path):
    """A freshly loaded transformers model with the exported adapter, as a stranger would load it."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=len(LABELS))
    return PeftModel.from_pretrained(model, adapter_folder).eval()


def exported(adapter: Adapter, base, folder: Path) -> Path:
    return export_peft(adapter, base.head, base.name, folder, fan_in_fan_out=base.fan_in_fan_out)


def assert_same(left: Adapter, right: Adapter) -> None:
    """Same names, same bits, same scales but for rounding."""
    a, b = left.tensors(), right.tensors()
    assert a.keys() == b.keys()
    unequal = [name for name in a if not torch.equal(a[name], b[name])]
    assert not unequal
    for name, pair in left.layers.items():
        assert pair.scale == pytest.approx(right.layers[name].scale, rel=SCALE)


def bits(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


# --- PEFT folders ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rslora", [False, True], ids=["alpha/r", "alpha/sqrt(r)"])
def test_peft_computes_what_we_compute(tiny_base, tiny_folder, tmp_path, architecture, rslora):
    """W0 x + scale B A x and the trained head: PEFT on a fresh model gives the logits of base.using(adapter)."""
    base = tiny_base(architecture)
    template = base.template(AdapterConfig(rank=4, alpha=3.0, rslora=rslora))
    adapter = trained_adapter(template, 4)
    folder = exported(adapter, base, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (architecture == "gpt2")
    batch = batch_for(base)
    expected = ours(base, adapter, batch)
    found = logits_of(loaded_by_peft(tiny_folder(architecture), folder), batch)
    torch.testing.assert_close(found, expected, atol=LOGITS, rtol=LOGITS)
    with torch.no_grad():
        assert (base.logits(batch) - expected).abs().max() > 100 * LOGITS, "the adapter changes nothing"
    assert_same(import_peft(folder), adapter)
    headless = Adapter(adapter.layers, template.dense)
    assert (ours(base, headless, batch) - expected).abs().max() > 100 * LOGITS, "the head changes nothing"


@pytest.mark.parametrize("architecture", ["roberta", "gpt2"])
def test_what_peft_saves_can_be_read(tiny_base, tiny_folder, tmp_path, architecture):
    """import_peft of a folder that PEFT wrote, after it loaded ours, gives back the same bits."""
    base = tiny_base(architecture)
    adapter = trained_adapter(base.template(AdapterConfig(rank=4)), 4)
    folder = exported(adapter, base, tmp_path / "ours")
    loaded_by_peft(tiny_folder(architecture), folder).save_pretrained(tmp_path / "theirs")
    assert_same(import_peft(tmp_path / "theirs"), adapter)


def test_peft_takes_chosen_targets(tiny_base, tiny_folder, tmp_path):
    """With pairs on query and value alone, PEFT puts them there and nowhere else."""
    base = tiny_base("roberta", ("query", "value"))
    adapter = trained_adapter(base.template(AdapterConfig(rank=2)), 2)
    folder = exported(adapter, base, tmp_path / "adapter")
    model = loaded_by_peft(tiny_folder("roberta"), folder)
    placed = {
        name.removeprefix("base_model.model.").split(".lora_A")[0]
        for name, _ in model.named_parameters()
        if ".lora_A." in name
    }
    assert placed == set(adapter.layers)
    assert all(name.endswith(("query", "value")) for name in placed)
    batch = batch_for(base)
    torch.testing.assert_close(logits_of(model, batch), ours(base, adapter, batch), atol=LOGITS, rtol=LOGITS)


def test_a_pooler_that_the_checkpoint_lacks_travels_with_the_head(tmp_path):
    """A BERT saved without its pooler: the drawn one is part of the head, is exported, and PEFT restores it."""
    from conftest import tiny_model, tiny_tokenizer
    from fslora.config import ModelConfig
    from fslora.models.load import load_base

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny_model("bert")
    model.pooler = None
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    base = load_base(
        ModelConfig(name=str(tmp_path / "model"), max_length=32), AdapterConfig(rank=2), Classes(LABELS), Rng(0)
    )
    assert "bert.pooler.dense" in base.head
    adapter = trained_adapter(base.template(AdapterConfig(rank=2)), 2)
    assert "bert.pooler.dense.weight" in adapter.dense
    folder = exported(adapter, base, tmp_path / "adapter")
    batch = batch_for(base)
    found = logits_of(loaded_by_peft(tmp_path / "model", folder), batch)
    torch.testing.assert_close(found, ours(base, adapter, batch), atol=LOGITS, rtol=LOGITS)
    assert_same(import_peft(folder), adapter)


def test_an_exported_folder_is_plain_peft(tmp_path):
    """lora_alpha = scale · rank, A [r i] and B [o r] under PEFT's names, and a README."""
    adapter = trained_adapter(small_template(), 4)
    folder = export_peft(adapter, ("classifier",), "some/base", tmp_path / "adapter", card="Trained by twelve.\n")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["r"], config["lora_alpha"]) == (
        "LORA",
        "SEQ_CLS",
        4,
        8,
    )
    assert (config["base_model_name_or_path"], config["modules_to_save"]) == ("some/base", ["classifier"])
    assert not config["use_rslora"]
    assert sorted(config["target_modules"]) == ["a.out", "a.query"]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "base_model.model.a.query.lora_A.weight": (4, 7),
        "base_model.model.a.query.lora_B.weight": (5, 4),
        "base_model.model.a.out.lora_A.weight": (4, 3),
        "base_model.model.a.out.lora_B.weight": (9, 4),
        "base_model.model.classifier.weight": (3, 6),
        "base_model.model.classifier.bias": (3,),
    }
    text = (folder / "README.md").read_text()
    assert text.startswith("---\n")
    assert "base_model: some/base" in text
    assert text.endswith("Trained by twelve.\n")


@pytest.mark.parametrize("alpha", [1.0, 0.1, 16.0, 1e-10])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_scale_survives_the_round_trip(tmp_path, alpha, rslora):
    """import_peft(export_peft(x)) has x's bits, and its scale whatever convention it came from."""
    shapes = small_template()
    template = Template(shapes.layers, shapes.dense, 6, alpha, rslora)
    adapter = trained_adapter(template, 6)
    assert_same(import_peft(export_peft(adapter, ("classifier",), "b", tmp_path / "a")), adapter)


def test_a_rank_stabilised_peft_adapter_can_be_read(tmp_path):
    """Folders written elsewhere with use_rslora: scale = lora_alpha / sqrt(r)."""
    adapter = trained_adapter(small_template(), 4)
    folder = export_peft(adapter, ("classifier",), "b", tmp_path / "a")
    edit_config(folder, use_rslora=True, lora_alpha=10)
    assert {pair.scale for pair in import_peft(folder).layers.values()} == {5.0}


def test_export_replaces_a_folder_as_a_whole(tmp_path):
    """Nothing of what was there before remains, and no partial folder is left behind."""
    first, second = trained_adapter(small_template(), 4, seed=1), trained_adapter(small_template(), 2, seed=2)
    folder = export_peft(first, ("classifier",), "b", tmp_path / "a")
    (folder / "stale.txt").write_text("old")
    assert export_peft(second, ("classifier",), "b", tmp_path / "a") == folder
    assert not (folder / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert_same(import_peft(folder), second)


def test_layers_may_differ_in_rank_and_scale(tmp_path):
    """What most layers have is r and lora_alpha; the others go into rank_pattern and alpha_pattern, and come back."""
    adapter = trained_adapter(small_template(), 4)
    query, out = adapter.layers["a.query"], adapter.layers["a.out"]
    lower = Adapter({"a.query": query, "a.out": LoRA(out.A[:3], out.Bt[:3], out.scale)}, adapter.dense)
    louder = Adapter({"a.query": query, "a.out": LoRA(out.A, out.Bt, 2 * out.scale)}, adapter.dense)
    for number, unequal in enumerate((lower, louder)):
        folder = export_peft(unequal, ("classifier",), "b", tmp_path / str(number))
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (query.rank, query.scale * query.rank)
        assert config["rank_pattern"] == ({"a\\.out": 3} if unequal is lower else {})
        assert config["alpha_pattern"] == {"a\\.out": unequal.layers["a.out"].scale * unequal.layers["a.out"].rank}
        again = import_peft(folder)
        assert_same(again, unequal)
        assert {n: p.scale for n, p in again.layers.items()} == {n: p.scale for n, p in unequal.layers.items()}


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    """A file in the way: ArtifactError that names the target, and the file is still there."""
    (tmp_path / "file").write_text("mine")
    adapter = trained_adapter(small_template(), 4)
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ArtifactError, match="cannot be written") as caught:
            export_peft(adapter, ("classifier",), "b", target)
        assert str(target) in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def edit_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut_short(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def drop_key(path: Path, key: str) -> None:
    tensors = load_file(path)
    del tensors[key]
    save_file(tensors, path)


def drop_config_key(folder: Path, key: str) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))


DAMAGES = {
    "no folder": shutil.rmtree,
    "no config": lambda folder: (folder / "adapter_config.json").unlink(),
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "config cut short": lambda folder: cut_short(folder / "adapter_config.json"),
    "config of another encoding": lambda folder: (folder / "adapter_config.json").write_bytes(b"\xff\xfe{"),
    "config is a list": lambda folder: (folder / "adapter_config.json").write_text("[]"),
    "config without a rank": lambda folder: drop_config_key(folder, "r"),
    "weights cut short": lambda folder: cut_short(folder / "adapter_model.safetensors", 0.9),
    "weights cut to nothing": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""),
    "weights are something else": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"PK\x03\x04" * 99),
    "a B is missing": lambda folder: drop_key(
        folder / "adapter_model.safetensors", "base_model.model.a.out.lora_B.weight"
    ),
    "DoRA": lambda folder: edit_config(folder, use_dora=True),
    "another kind": lambda folder: edit_config(folder, peft_type="IA3"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_or_foreign_adapter_is_refused(tmp_path, damage):
    """Whatever is missing, cut or of another kind, the error is an ArtifactError that names the folder."""
    folder = export_peft(trained_adapter(small_template(), 4), ("classifier",), "b", tmp_path / "adapter")
    import_peft(folder)
    damage(folder)
    with pytest.raises(ArtifactError) as caught:
        import_peft(folder)
    assert str(folder) in str(caught.value)
    assert isinstance(caught.value, FsloraError)
    assert isinstance(caught.value, OSError)


# --- lower ranks ---


def test_lower_rank_is_the_best_of_its_rank_in_every_layer():
    """Each layer becomes its Eckart-Young truncation; energy is the mean over the layers; the head stays."""
    adapter = trained_adapter(small_template(), 4)
    cut, energy = lower_rank(adapter, 2)
    shares = []
    for name, pair in adapter.layers.items():
        u, s, vt = torch.linalg.svd(pair.delta.double())
        best = u[:, :2] @ torch.diag(s[:2]) @ vt[:2]
        torch.testing.assert_close(cut.layers[name].delta.double(), best, atol=SVD32, rtol=0)
        assert (cut.layers[name].rank, cut.layers[name].scale) == (2, pair.scale)
        shares.append((s[:2].square().sum() / s.square().sum()).item())
    assert energy == pytest.approx(sum(shares) / 2, abs=SVD32)
    assert max(shares) - min(shares) > 0.01
    assert cut.dense is adapter.dense


def test_all_ranks_keep_all_energy():
    """rank = full: the same function, and so for any rank above it; a rank below 1 is refused."""
    adapter = trained_adapter(small_template(), 4)
    for rank in (4, 5):
        whole, energy = lower_rank(adapter, rank)
        assert energy == pytest.approx(1.0, abs=SVD32)
        for name, pair in adapter.layers.items():
            torch.testing.assert_close(whole.layers[name].delta, pair.delta, atol=SVD32, rtol=0)
    with pytest.raises(ValueError, match=r"rank 0 is not in 1\.\.4"):
        lower_rank(adapter, 0)


@pytest.mark.parametrize("energy", [0.0, 0.3, 0.6, 0.9, 0.99, 1.0])
def test_rank_for_energy_is_the_smallest(energy):
    """The rank found keeps the share asked for, and the next lower one does not."""
    adapter = trained_adapter(small_template(6), 6)
    rank = rank_for_energy(adapter, energy)
    assert lower_rank(adapter, rank)[1] >= energy - SVD32
    assert rank == 1 or lower_rank(adapter, rank - 1)[1] < energy


def test_energies_ask_for_different_ranks():
    """Little energy needs rank 1, and the ranks grow with the energy asked for."""
    adapter = trained_adapter(small_template(6), 6)
    ranks = [rank_for_energy(adapter, energy) for energy in (0.0, 0.6, 0.9, 0.99)]
    assert ranks == sorted(ranks)
    assert ranks[0] == 1 < ranks[-1]


def test_a_lower_rank_runs_in_peft(tiny_base, tiny_folder, tmp_path):
    """An adapter cut to a lower rank is an ordinary PEFT adapter of that rank and computes what we compute."""
    base = tiny_base("bert")
    adapter, _ = lower_rank(trained_adapter(base.template(AdapterConfig(rank=6, alpha=3.0)), 6), 2)
    folder = exported(adapter, base, tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2
    batch = batch_for(base)
    found = logits_of(loaded_by_peft(tiny_folder("bert"), folder), batch)
    torch.testing.assert_close(found, ours(base, adapter, batch), atol=LOGITS, rtol=LOGITS)


# --- merged models ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merged_model_is_an_ordinary_one(tiny_base, tmp_path, architecture):
    """W0 + scale B A and the head in one model: same logits and labels, reloaded; the base keeps its bits."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = tiny_base(architecture)
    adapter = trained_adapter(base.template(AdapterConfig(rank=4, alpha=3.0)), 4)
    batch = batch_for(base)
    expected, before = ours(base, adapter, batch), bits(base.model)
    folder = export_merged(adapter, base, tmp_path / "merged")
    assert_unchanged(base.model, before)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    torch.testing.assert_close(logits_of(model, batch), expected, atol=LOGITS, rtol=LOGITS)
    assert tuple(model.config.id2label[i] for i in range(len(LABELS))) == LABELS
    tokens = AutoTokenizer.from_pretrained(folder)("good cat")["input_ids"]
    assert tokens == base.tokenizer("good cat")["input_ids"]


@pytest.mark.parametrize("target", ["file", "file/below"])
def test_a_merged_model_that_cannot_be_written_is_an_error(tiny_base, tmp_path, target):
    """A file in the way: ArtifactError, the file is still there, and the base keeps its bits."""
    base = tiny_base("distilbert")
    adapter = trained_adapter(base.template(AdapterConfig(rank=2)), 2)
    (tmp_path / "file").write_text("mine")
    before = bits(base.model)
    with pytest.raises(ArtifactError, match="cannot be written"):
        export_merged(adapter, base, tmp_path / target)
    assert_unchanged(base.model, before)
    assert (tmp_path / "file").read_text() == "mine"


# --- checkpoints ---


def trained_state(seed: int = 0) -> ServerState:
    """A state with every kind of thing in it: adapter, head, moments, a step count."""
    state = ServerState(trained_adapter(small_template(), 4, seed))
    for number in (1, 2):
        delta = trained_adapter(small_template(), 4, seed + number)
        state = server_step(state, delta, ServerOptimizer(optimizer="adam", lr=0.1))
    return state


def assert_same_state(left: ServerState, right: ServerState) -> None:
    assert left.slots.keys() == right.slots.keys()
    assert dict(left.scalars) == dict(right.scalars)
    for one, two in ((left.adapter, right.adapter), *((left.slots[n], right.slots[n]) for n in left.slots)):
        assert {n: p.scale for n, p in one.layers.items()} == {n: p.scale for n, p in two.layers.items()}
        a, b = one.tensors(), two.tensors()
        assert list(a) == list(b)
        assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_a_checkpoint_gives_back_the_same_bits(tmp_path):
    """load_checkpoint after save_checkpoint: the rounds done and a bit-equal state, slots and scalars too."""
    state = trained_state()
    assert state.slots.keys() == {"first_moment", "second_moment"}
    RunFolder(tmp_path).save_checkpoint(12, state)
    rounds, again, _ = RunFolder(tmp_path).load_checkpoint()
    assert rounds == 12
    assert_same_state(again, state)


def test_odd_scales_and_special_values_survive(tmp_path):
    """Scales keep all their digits, special numbers and transposed tensors their bits."""
    special = torch.tensor([[-0.0, 1e-45, float("inf"), 3.4028235e38, 1.0 + 2**-23]])
    turned = torch.arange(6.0).reshape(3, 2).T
    assert not turned.is_contiguous()
    layers = {"l": LoRA(special, torch.ones(1, 2), 0.1 + 0.2), "m": LoRA(turned, turned, 1.0)}
    RunFolder(tmp_path).save_checkpoint(1, ServerState(Adapter(layers)))
    _, again, _ = RunFolder(tmp_path).load_checkpoint()
    assert torch.equal(again.adapter.layers["m"].A, turned)
    assert again.adapter.layers["l"].scale == 0.1 + 0.2
    assert torch.equal(again.adapter.layers["l"].A.view(torch.int32), special.view(torch.int32))


def test_there_is_no_checkpoint_at_first(tmp_path):
    """None, not an error, before the first one."""
    assert RunFolder(tmp_path).load_checkpoint() is None


def test_only_the_newest_checkpoint_is_kept(tmp_path):
    """Each save replaces the one before; saving a round again replaces it; nothing partial stays."""
    folder = RunFolder(tmp_path)
    for rounds in (1, 2, 10, 10):
        folder.save_checkpoint(rounds, trained_state(rounds))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["round-000010"]
    rounds, state, memories = folder.load_checkpoint()
    assert memories == {}
    assert rounds == 10
    assert_same_state(state, trained_state(10))


def test_the_newest_of_several_is_loaded(tmp_path):
    """A crash between writing and removing leaves two: the later one counts, a partial one does not."""
    folder = RunFolder(tmp_path)
    folder.save_checkpoint(9, trained_state(9))
    kept = shutil.copytree(tmp_path / "checkpoints" / "round-000009", tmp_path / "kept")
    folder.save_checkpoint(10, trained_state(10))
    shutil.copytree(kept, tmp_path / "checkpoints" / "round-000009")
    (tmp_path / "checkpoints" / ".partial-000011").mkdir()
    rounds, state, memories = folder.load_checkpoint()
    assert memories == {}
    assert rounds == 10
    assert_same_state(state, trained_state(10))


CHECKPOINT_DAMAGES = {
    "description cut short": lambda folder: cut_short(folder / "state.json"),
    "description missing": lambda folder: (folder / "state.json").unlink(),
    "description empty": lambda folder: (folder / "state.json").write_text(""),
    "description of another shape": lambda folder: (folder / "state.json").write_text("[1, 2]"),
    "description without its format": lambda folder: (folder / "state.json").write_text("{}"),
    "another format": lambda folder: edit_state(folder, format=99),
    "scales are missing": lambda folder: edit_state(folder, scales=None),
    "a layer is missing": lambda folder: drop_key(folder / "state.safetensors", "adapter|a.out:A"),
    "tensors cut short": lambda folder: cut_short(folder / "state.safetensors", 0.9),
    "tensors missing": lambda folder: (folder / "state.safetensors").unlink(),
    "tensors empty": lambda folder: (folder / "state.safetensors").write_bytes(b""),
}


def edit_state(folder: Path, **changes) -> None:
    path = folder / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("damage", CHECKPOINT_DAMAGES.values(), ids=CHECKPOINT_DAMAGES.keys())
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    """However it is damaged, the error is an ArtifactError that names the checkpoint."""
    folder = RunFolder(tmp_path)
    folder.save_checkpoint(3, trained_state())
    checkpoint = tmp_path / "checkpoints" / "round-000003"
    damage(checkpoint)
    with pytest.raises(ArtifactError) as caught:
        folder.load_checkpoint()
    assert str(checkpoint) in str(caught.value)


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_one(tmp_path):
    """A file where the next checkpoint is to be prepared: ArtifactError, and the one before still loads."""
    folder = RunFolder(tmp_path)
    folder.save_checkpoint(1, trained_state(1))
    (tmp_path / "checkpoints" / ".partial-000002").write_text("in the way")
    with pytest.raises(ArtifactError, match=r"round-000002 cannot be written.*fslora resume"):
        folder.save_checkpoint(2, trained_state(2))
    rounds, state, memories = folder.load_checkpoint()
    assert memories == {}
    assert rounds == 1
    assert_same_state(state, trained_state(1))


# --- run folders ---


def test_metrics_come_back_as_they_were_appended(tmp_path):
    """One JSON line per row, in order; up_to leaves out later rounds; no file means no rows."""
    folder = RunFolder(tmp_path)
    assert folder.metrics() == []
    rows = [{"round": number, "loss": 0.1 * number, "note": "müde\u2028"} for number in range(4)]
    for row in rows:
        folder.append_metrics(row)
    assert folder.metrics() == rows
    assert folder.metrics(up_to=2) == rows[:3]
    assert len((tmp_path / "metrics.jsonl").read_text().split("\n")) == 5


def test_a_last_line_cut_anywhere_is_left_out(tmp_path):
    """A crash may cut the last line at any byte: the rows before it are all there, and it once it is whole."""
    folder = RunFolder(tmp_path)
    rows = [{"round": number, "validation": {"loss": 0.5, "text": "größer"}} for number in range(3)]
    for row in rows:
        folder.append_metrics(row)
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes()
    last = len(content) - len(content.splitlines(keepends=True)[-1])
    for length in range(last, len(content)):
        path.write_bytes(content[:length])
        whole = length == len(content) - 1  # all but the newline
        assert folder.metrics() == (rows if whole else rows[:2]), length


def test_a_line_damaged_in_the_middle_is_an_error(tmp_path):
    """Rows after a damaged line are not dropped in silence: ArtifactError that names the file."""
    folder = RunFolder(tmp_path)
    for number in range(3):
        folder.append_metrics({"round": number})
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged in (b'{"round": \n', b"\xff\xfe\n"):
        path.write_bytes(lines[0] + damaged + lines[2])
        with pytest.raises(ArtifactError, match=r"metrics\.jsonl.*damaged"):
            folder.metrics()


def test_rewinding_drops_what_came_after(tmp_path):
    """rewind(n) returns the rows up to round n and leaves just these in the file; a cut line goes too."""
    folder = RunFolder(tmp_path)
    for number in range(5):
        folder.append_metrics({"round": number})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 5, "lo')
    kept = [{"round": number} for number in range(4)]
    assert folder.rewind(3) == kept
    assert folder.metrics() == kept
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(json.dumps(row) + "\n" for row in kept)
    folder.append_metrics({"round": 4})
    assert [row["round"] for row in folder.metrics()] == [0, 1, 2, 3, 4]
    assert RunFolder(tmp_path).rewind(0) == [{"round": 0}]


def test_rewinding_an_empty_folder_writes_no_rows(tmp_path):
    """A run that has just begun has nothing to drop."""
    assert RunFolder(tmp_path).rewind(0) == []
    assert RunFolder(tmp_path).metrics() == []


def test_a_run_folder_is_new_and_empty(tmp_path):
    """create makes the folder and refuses one with something in it; open wants an experiment.toml."""
    folder = RunFolder.create(tmp_path / "deep" / "run")
    assert list(folder.path.iterdir()) == []
    assert RunFolder.create(folder.path) == folder, "an empty folder will do"
    with pytest.raises(ArtifactError, match="no run folder"):
        RunFolder.open(folder.path)
    folder.write_text("experiment.toml", "[run]\n")
    assert RunFolder.open(folder.path) == folder
    with pytest.raises(ArtifactError, match=r"is not empty; `fslora resume"):
        RunFolder.create(folder.path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="cannot be written"):
        RunFolder.create(tmp_path / "file")
    assert folder.variant("fedit").path == folder.path / "variants" / "fedit"
    assert folder.variant("fedit").path.is_dir()


def test_files_are_replaced_as_a_whole(tmp_path):
    """write_text and write_json leave the new content and no temporary file; read_json is the inverse."""
    folder = RunFolder(tmp_path)
    assert folder.read_json("summary.json") is None
    folder.write_json("summary.json", {"old": [1, 2, 3], "long": "x" * 999})
    folder.write_json("summary.json", {"new": "größer"})
    assert folder.read_json("summary.json") == {"new": "größer"}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    assert (tmp_path / "summary.json").stat().st_mode & 0o777 == 0o644
    (tmp_path / "summary.json").write_text('{"new": ')
    with pytest.raises(ArtifactError, match="damaged"):
        folder.read_json("summary.json")


def test_what_cannot_be_written_is_an_artifact_error(tmp_path):
    """A folder in the place of the file, or no folder at all: ArtifactError that names the target."""
    folder = RunFolder(tmp_path)
    (tmp_path / "summary.json").mkdir()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ArtifactError, match=r"summary\.json cannot be written"):
        folder.write_json("summary.json", {})
    with pytest.raises(ArtifactError, match=r"metrics\.jsonl cannot be written"):
        folder.append_metrics({"round": 0})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "summary.json"]


def test_a_run_folder_that_went_away_is_an_artifact_error(tmp_path):
    """The folder was removed under a running run: ArtifactError from every writer."""
    gone = RunFolder(tmp_path / "gone")
    with pytest.raises(ArtifactError, match="cannot be written"):
        gone.append_metrics({"round": 0})
    with pytest.raises(ArtifactError, match="cannot be written"):
        gone.write_text("summary.json", "{}")


def test_tensors_that_share_memory_can_be_saved(tmp_path):
    """A slot that is the adapter itself, and views of one tensor: they come back with equal values."""
    whole = torch.arange(24.0).reshape(4, 6)
    adapter = Adapter({"l": LoRA(whole[:2], whole[2:], 1.0), "m": LoRA(whole[1:3], whole[:2], 1.0)})
    folder = RunFolder(tmp_path)
    folder.clients(0).put(3, ClientMemory({"own": adapter, "same": adapter}), 1)
    folder.save_checkpoint(1, ServerState(adapter, {"same": adapter}))
    _, state, memories = folder.load_checkpoint()
    for again in (state.adapter, state.slots["same"], memories[3].slots["own"], memories[3].slots["same"]):
        assert_same(again, adapter)
