"""The wire: what is counted is what is needed, what is lost is bounded or sent later, what is hostile is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora import config, runner
from fslora.algebra.codes import EXACT, Code
from fslora.config import WireConfig
from fslora.errors import ConfigError, WireError
from fslora.methods import METHODS, Method
from fslora.methods.fedit import FedIT
from fslora.methods.fslora import FSLoRA
from fslora.planning import plan as planned
from fslora.rng import Rng
from fslora.runfolder import RunFolder
from fslora.types import Adapter, Broadcast, Client, ClientUpdate, LoRA, Template
from fslora.wire import RESIDUAL, Payload, Wire, remembering
from kit import (
    FLEET,
    RANK,
    TEMPLATE,
    World,
    assert_same_world,
    begun,
    fake_training,
    parts_of,
    plan,
    played,
    through_disk,
)
from test_run import Quiet, assert_same_run

LAWS = settings(max_examples=50, deadline=None, derandomize=True, database=None)
# Some dozens of float32 additions of numbers near 1.
SUMMATION = 2e-6
# Division by a scale and multiplication with it again, in float32.
ROUNDING = 1e-6
BFLOAT16 = 2.0**-8
"""Relative error of a number with 8 significant bits."""
CODES = {
    "bfloat16": Code("bfloat16"),
    "int8": Code("int8"),
    "top-k": Code("float32", 0.2),
    "int8, top-k": Code("int8", 0.2),
    "bfloat16, one in fifty": Code("bfloat16", 0.02),
}
every_lossy_code = pytest.mark.parametrize("code", CODES.values(), ids=CODES)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=Rng(seed).child(*shape).torch())


def back(code: Code, tensor: torch.Tensor, rng: Rng | None = None) -> torch.Tensor:
    return code.decode(code.encode(tensor, rng), tensor.shape)


# --- one tensor ---


def test_the_default_copies_nothing():
    tensor = drawn(4, 6)
    parts = EXACT.encode(tensor)
    assert parts.keys() == {"values"}
    assert back(EXACT, tensor).data_ptr() == parts["values"].data_ptr() == tensor.data_ptr()


def test_bfloat16_keeps_what_is_bfloat16():
    tensor = drawn(5, 7).bfloat16().float()
    assert torch.equal(back(Code("bfloat16"), tensor), tensor)
    tensor = drawn(5, 7)
    assert ((back(Code("bfloat16"), tensor) - tensor).abs() <= BFLOAT16 * tensor.abs()).all()
    assert Code("bfloat16").encode(tensor)["values"].nbytes == 5 * 7 * 2


@LAWS
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 10**6))
def test_int8_errs_by_half_a_step_or_by_less_than_one(rows, width, seed):
    """s = max|x| / 127 by row; nearest: |error| ≤ s / 2; at random: < s, the same for the same address."""
    tensor = drawn(rows, width, seed=seed) * torch.logspace(-3, 3, rows).unsqueeze(1)
    step = tensor.abs().amax(1, keepdim=True) / 127
    code, rng = Code("int8"), Rng(seed).child("round")
    assert ((back(code, tensor) - tensor).abs() <= step * (0.5 + 127 * ROUNDING)).all()
    assert ((back(code, tensor, rng) - tensor).abs() <= step * (1 + 127 * ROUNDING)).all()
    assert torch.equal(back(code, tensor, rng), back(code, tensor, rng))
    parts = code.encode(tensor)
    assert {name: part.nbytes for name, part in parts.items()} == {"values": rows * width, "scales": rows * 4}


def test_int8_at_random_is_unbiased():
    """The mean over 4,000 addresses is x within five standard errors, where the nearest level is off by 0.3 s."""
    tensor = torch.tensor([[127.0, 0.3, -0.3, 50.7]])
    mean = torch.stack([back(Code("int8"), tensor, Rng(0).child(i)) for i in range(4000)]).mean(0)
    assert ((mean - tensor).abs() < 5 * 0.5 / 4000**0.5).all()
    assert back(Code("int8"), tensor).tolist() == [[127.0, 0.0, 0.0, 51.0]]


@pytest.mark.parametrize("tensor", [torch.zeros(3, 4), torch.full((2, 2), 1e-44), torch.tensor([1e-44, 1.0])])
def test_int8_of_nothing_and_next_to_nothing(tensor):
    """Rows of zeros have scale 0; steps that float32 cannot hold send zeros."""
    assert ((back(Code("int8"), tensor) - tensor).abs() <= tensor.abs().max() / 254).all() or tensor.max() < 1e-40


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.9])
@pytest.mark.parametrize("shape", [(7, 40), (3,), (1, 1), (2, 300)])
def test_top_k_keeps_the_largest(share, shape):
    """As many as the share, rounded up; none is smaller than one left out; places take the smaller form."""
    tensor = drawn(*shape)
    code = Code("float32", share)
    parts, kept = code.encode(tensor), back(code, tensor)
    count = tensor.numel()
    n = min(count, max(1, -int(-share * count // 1)))
    here = kept != 0
    assert int(here.sum()) == n
    assert torch.equal(kept[here], tensor[here])
    if n < count:
        assert tensor[here].abs().min() >= tensor[~here].abs().max()
        assert sum(part.nbytes for part in parts.values()) == 4 * n + min(4 * n, -(-count // 8))


def test_a_share_is_not_off_by_one_in_floating_point():
    assert len(Code("float32", 0.07).encode(drawn(100))["values"]) == 7


@every_lossy_code
def test_what_is_empty_sends_nothing(code):
    assert code.encode(torch.zeros(0, 5)) == {}
    assert code.decode({}, (0, 5)).shape == (0, 5)


def damaged(parts: dict, **changes) -> dict:
    return {name: part for name, part in {**parts, **changes}.items() if part is not None}


@pytest.mark.parametrize(
    ("code", "changes", "text"),
    [
        (EXACT, {"values": torch.full((4, 10), float("nan"))}, "not finite"),
        (EXACT, {"values": torch.ones(4, 10).double()}, "float64"),
        (EXACT, {"values": torch.ones(3, 10)}, r"\[3, 10\]"),
        (EXACT, {"values": None}, "its parts are"),
        (EXACT, {"scales": torch.ones(4)}, "its parts are"),
        (Code("bfloat16"), {"values": torch.full((4, 10), float("inf")).bfloat16()}, "not finite"),
        (Code("int8"), {"scales": torch.full((4,), float("inf"))}, "not finite"),
        (Code("int8"), {"scales": -torch.ones(4)}, "negative"),
        (Code("int8"), {"scales": torch.full((4,), 3e38)}, "not finite"),
        (Code("int8"), {"scales": torch.ones(5)}, r"scales are .*\[5\]"),
        (Code("float32", 0.2), {"mask": torch.full((5,), 255, dtype=torch.uint8)}, "does not mark 8 of 40"),
        (Code("float32", 0.2), {"mask": torch.zeros(6, dtype=torch.uint8)}, r"mask are .*\[6\]"),
        (Code("float32", 0.01), {"index": torch.tensor([40], dtype=torch.int32)}, r"within 0\.\.39"),
        (Code("float32", 0.01), {"index": torch.tensor([-1], dtype=torch.int32)}, r"within 0\.\.39"),
        (Code("float32", 0.01), {"index": torch.tensor([1])}, "int64"),
        (Code("float32", 0.01), {"index": None, "mask": torch.ones(5, dtype=torch.uint8)}, "its parts are"),
    ],
)
def test_hostile_parts_are_refused(code, changes, text):
    parts = code.encode(drawn(4, 10))
    with pytest.raises(WireError, match=text):
        code.decode(damaged(parts, **changes), (4, 10))


def test_an_index_has_to_increase():
    code, tensor = Code("float32", 0.02), drawn(10, 20)
    index = torch.tensor([3, 3, 5, 9], dtype=torch.int32)
    with pytest.raises(WireError, match="increase"):
        code.decode({**code.encode(tensor), "index": index}, tensor.shape)


# --- whole messages, driven as the round loop drives them ---


@dataclass(frozen=True)
class Delivered:
    """One client's round over a wire."""

    client: Client
    broadcast: Broadcast
    received: Broadcast
    meant: ClientUpdate
    arrived: ClientUpdate
    down: Payload
    up: Payload


def deliver(method: Method, wire: Wire, world: World, round) -> tuple[World, list[Delivered]]:
    """The world after a round of fake training over a wire, and what was delivered."""
    passed, memories = [], dict(world.memories)
    for client in round.cohort:
        site, template = world.site(client, round.template), round.template
        broadcast = method.broadcast(world.state, client, round)
        down = wire.pack_broadcast(broadcast, template)
        received = wire.unpack_broadcast(down, template)
        start = method.start(received, site)
        trained = fake_training()(start, client, round)
        meant = method.client_update(received, start, trained, site)
        up, unsent = wire.pack_update(meant, template, site.memory, round.rng.child("wire", client.id))
        arrived = wire.unpack_update(up, client, broadcast, template)
        memories[client.id] = remembering(method.remember(received, start, trained, site), unsent)
        passed.append(Delivered(client, broadcast, received, meant, arrived, down, up))
    state = method.aggregate(world.state, iter([x.arrived for x in passed]), round)
    return World(state, memories), passed


def rounds(method: Method, wire: Wire, number: int, template: Template = TEMPLATE) -> Iterator[list[Delivered]]:
    world = begun(method, template=template)
    for t in range(number):
        world, passed = deliver(method, wire, world, plan(t, template=template))
        yield passed


def over(method: Method, wire: Wire, number: int) -> World:
    world = begun(method)
    for t in range(number):
        world, _ = deliver(method, wire, world, plan(t))
    return world


@pytest.mark.parametrize("name", METHODS)
def test_the_default_wire_changes_no_bit(name):
    method = METHODS[name]()
    assert_same_world(over(method, Wire(), 3), played(method, 3))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("numbers", ["bfloat16", "int8"])
def test_every_method_runs_over_lossy_wires(name, numbers):
    """Deterministic, finite, through the disk; and what is sent is less than half, or a quarter and the scales."""
    method = METHODS[name]()
    wire = Wire(Code(numbers), Code(numbers), method.error_feedback)
    world = over(method, wire, 3)
    assert_same_world(over(method, wire, 3), world)
    assert_same_world(through_disk(world), world)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in parts_of(world).values())
    sizes = {"bfloat16": 0.5, "int8": 0.25}
    for delivered in next(rounds(method, wire, 1)):
        adapter = delivered.meant.adapter
        scales = sum(len(t) if t.dim() > 1 else 1 for t in adapter.tensors().values()) if numbers == "int8" else 0
        extras = sum(tensor.nbytes for tensor in delivered.meant.extras.values())
        assert delivered.up.nbytes == sizes[numbers] * adapter.nbytes + 4 * scales + extras


@pytest.mark.parametrize("shape", [(16, 16), (64, 64), (384, 1536), (4096, 1024)])
@pytest.mark.parametrize("rank", [8, 64, 300])
def test_bytes_are_what_is_needed(shape, rank):
    """FSLoRA: (d_in + d_out) k numbers a layer and the head; index sets add at most 1 % down, and nothing up."""
    head = {"head": torch.zeros(3, shape[1])}
    template = Template({"one": shape, "two": shape[::-1]}, head, rank, alpha=8.0)
    fleet = tuple(Client(i, k, 5) for i, k in enumerate((1, rank // 4, rank)))
    method = FSLoRA()
    state, round = method.init(template, fleet, Rng(0)), plan(0, (0, 1, 2), fleet, template)
    for numbers, size in (("float32", 4), ("bfloat16", 2)):
        wire = Wire(Code(numbers), Code(numbers))
        for client in fleet:
            needed = size * (2 * client.rank * sum(shape) + head["head"].numel())
            broadcast = method.broadcast(state, client, round)
            update = ClientUpdate(client.id, broadcast.adapter, 5, broadcast.rows)
            down = wire.pack_broadcast(broadcast, template)
            up, _ = wire.pack_update(update, template, World(state).site(client).memory, Rng(0))
            index = 1 if rank <= 256 else 2
            assert up.nbytes == needed
            assert down.nbytes == needed + 2 * client.rank * index
            # Below this width two bytes of index are more than 1 % of the numbers.
            assert down.nbytes <= 1.01 * needed or index / (size * sum(shape)) > 0.01


def test_index_sets_do_not_come_back_up():
    """The server puts those of its own broadcast beside an update, whatever a client may say."""
    for passed in rounds(FSLoRA(), Wire(), 2):
        for x in passed:
            assert not [name for name in x.up.tensors if name.startswith("rows")]
            assert x.arrived.rows is x.broadcast.rows
            assert all(x.received.rows[layer].dtype == torch.int32 for layer in x.broadcast.rows)
            assert all(torch.equal(x.received.rows[layer], index) for layer, index in x.broadcast.rows.items())


def test_changes_of_the_base_travel_as_they_are():
    """Every client has to end with the server's own bits."""
    wire = Wire(Code("int8"), Code("int8"), error_feedback=False)
    for method in (METHODS["flora"](), METHODS["rac-lora"](), METHODS["fedex-lora"]()):
        seen = 0
        for passed in rounds(method, wire, 3):
            for x in passed:
                assert len(x.received.base) == len(x.broadcast.base)
                for mine, theirs in zip(x.received.base, x.broadcast.base, strict=True):
                    assert (mine.version, mine.whole) == (theirs.version, theirs.whole)
                    a, b = mine.adapter.tensors(), theirs.adapter.tensors()
                    assert a.keys() == b.keys()
                    assert all(torch.equal(a[name], b[name]) for name in a)
                    seen += 1
        assert seen


# --- error feedback ---


def total(sums: dict[str, torch.Tensor], update: ClientUpdate) -> None:
    """Adds an update to sums in the server's coordinates, float64; a factor that did not travel adds nothing."""
    for name, tensor in update.adapter.tensors().items():
        layer, _, kind = name.rpartition(":")
        if kind == "dense":
            sums[name] = sums.get(name, 0) + tensor.double()
            continue
        index = update.rows[layer].long() if update.rows else torch.arange(len(tensor))
        whole = sums.setdefault(name, torch.zeros(RANK, tensor.shape[1], dtype=torch.float64))
        whole.index_add_(0, index[: len(tensor)], tensor.double())


@every_lossy_code
@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if kind.error_feedback])
def test_what_was_sent_and_what_is_left_is_what_was_meant(name, code):
    """Σ_t sent + residual = Σ_t true changes, client by client, whatever parts and factors travelled when."""
    method, wire = METHODS[name](), Wire(up=code)
    world, meant, arrived = begun(method), {}, {}
    for t in range(5):
        world, passed = deliver(method, wire, world, plan(t))
        for x in passed:
            total(meant.setdefault(x.client.id, {}), x.meant)
            total(arrived.setdefault(x.client.id, {}), x.arrived)
    for client, sums in meant.items():
        left = world.memories[client].slots[RESIDUAL].tensors()
        for tensor_name, true in sums.items():
            residual = torch.zeros_like(true)
            residual[: len(left[tensor_name])] = left[tensor_name].double()
            torch.testing.assert_close(arrived[client][tensor_name] + residual, true, atol=SUMMATION, rtol=SUMMATION)
    if code.share < 1 and name != "local":
        assert any(bool(t.any()) for t in world.memories[0].slots[RESIDUAL].tensors().values())


def test_a_sketch_takes_up_what_it_holds_of_the_residual():
    """By hand: parts 1 and 3 were left over; the next set has 3 and 4, so 3 is sent with the rest, and 1 stays."""
    template = Template({"one": (2, 1)}, {}, rank=5, alpha=1.0)
    wire = Wire(up=Code("float32", 0.5))

    def update(rows: list[int], A: list[list[float]]) -> ClientUpdate:
        pair = LoRA(torch.tensor(A), torch.zeros(2, 1), 1.0)
        return ClientUpdate(0, Adapter({"one": pair}), 1, {"one": torch.tensor(rows, dtype=torch.int32)})

    nothing = World(FSLoRA().init(template, FLEET[:1], Rng(0))).site(FLEET[1]).memory
    _, left = wire.pack_update(update([1, 3], [[8.0, 1.0], [2.0, 9.0]]), template, nothing, Rng(0))
    assert left.layers["one"].A.tolist() == [[0, 0], [0, 1], [0, 0], [2, 0], [0, 0]]
    memory = remembering(nothing, left)
    second = update([3, 4], [[1.0, 0.5], [0.25, 7.0]])
    payload, left = wire.pack_update(second, template, memory, Rng(0))
    broadcast = Broadcast(second.adapter, second.rows)
    arrived = wire.unpack_update(payload, FLEET[0], broadcast, template)
    assert arrived.adapter.layers["one"].A.tolist() == [[3, 0], [0, 7]]
    assert left.layers["one"].A.tolist() == [[0, 0], [0, 1], [0, 0], [0, 0.5], [0.25, 0]]


def test_feedback_sends_what_top_k_alone_never_would():
    """The same change ten times over: with feedback every entry arrives in time, without it the small ones never do."""
    change = torch.tensor([[8.0, 1.0, -2.0, 4.0, 3.0]])
    template = Template({"one": (5, 1)}, {}, rank=1, alpha=1.0)
    client = Client(0, 1, 1)
    update = ClientUpdate(0, Adapter({"one": LoRA(change, torch.zeros(1, 1), 1.0)}), 1)
    arrived = {}
    for feedback in (True, False):
        wire, memory = Wire(up=Code("float32", 0.2), error_feedback=feedback), World(begun(FSLoRA()).state)
        kept, got = memory.site(client).memory, torch.zeros(1, 5)
        for _ in range(40):
            payload, left = wire.pack_update(update, template, kept, Rng(0))
            kept = remembering(kept, left)
            got += wire.unpack_update(payload, client, Broadcast(update.adapter), template).adapter.layers["one"].A
        arrived[feedback] = got / 40
    assert arrived[False].tolist() == [[8.0, 0.0, 0.0, 0.0, 0.0]]
    # What is left over is bounded, here by the 18 of one change.
    assert ((arrived[True] - change).abs() <= 18 / 40).all()


def test_a_wire_that_loses_nothing_keeps_nothing():
    for method in (FSLoRA(), METHODS["fedsa-lora"]()):
        world = over(method, Wire(Code("int8")), 2)
        assert not any(RESIDUAL in memory.slots for memory in world.memories.values())
    world = over(FSLoRA(), Wire(up=Code("int8"), error_feedback=False), 2)
    assert not any(memory.slots for memory in world.memories.values())


# --- hostile messages ---


def honest(method: Method | None = None, wire: Wire | None = None) -> tuple[Wire, Delivered]:
    wire = wire or Wire(Code("int8"), Code("int8", 0.5))
    *_, passed = rounds(method or FSLoRA(), wire, 2)
    return wire, passed[0]


def with_header(payload: Payload, change) -> Payload:
    header = json.loads(payload.header)
    change(header)
    return replace(payload, header=json.dumps(header))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda h: h.update(client=5), "from client 5, not 0"),
        (lambda h: h.update(examples=0), "examples"),
        (lambda h: h.update(examples=1e400), "header is damaged"),
        (lambda h: h.update(more=1), "more"),
        (lambda h: h.pop("form"), "form"),
        (lambda h: h["form"]["scales"].update(up="x"), "scales"),
        (lambda h: h["form"]["scales"].pop("up"), "its layers are"),
        (lambda h: h["form"]["scales"].update(other=1.0), "its layers are"),
        (lambda h: h["form"]["shapes"].pop("up:A"), "up:A"),
        (lambda h: h["form"]["shapes"].update({"evil:dense": [1]}), "evil:dense"),
        (lambda h: h["form"]["shapes"].update({"head.bias:dense": [10**9]}), r"head.bias:dense has shape"),
        (lambda h: h["form"]["shapes"].update({"up:A": [10**9, 6]}), r"up:A has shape \[1000000000, 6\]"),
        (lambda h: h["form"]["shapes"].update({"up:A": [-1, 6]}), "shapes"),
        (lambda h: h["form"]["shapes"].update({"up:A": [1, 7]}), r"not \[1, 6\]"),
        (lambda h: h["form"]["shapes"].update({"up:A": []}), "up:A has shape"),
        (lambda h: h["form"]["shapes"].update({"up:A": [2, 6]}), "up:A: its"),
    ],
)
def test_hostile_headers_are_refused(change, text):
    wire, x = honest()
    with pytest.raises(WireError, match=text):
        wire.unpack_update(with_header(x.up, change), x.client, x.broadcast, TEMPLATE)


@pytest.mark.parametrize("header", ["", "null", "[]", "{", '{"form": 3}'])
def test_a_header_that_is_none_is_refused(header):
    wire, x = honest()
    with pytest.raises(WireError, match="header is damaged"):
        wire.unpack_update(replace(x.up, header=header), x.client, x.broadcast, TEMPLATE)
    with pytest.raises(WireError, match="header is damaged"):
        wire.unpack_broadcast(replace(x.down, header=header), TEMPLATE)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"rows/up": torch.zeros(1)}, "'rows/up' has no place"),
        ({"base.0/up:A": torch.zeros(1)}, "'base.0/up:A' has no place"),
        ({"adapter/up:C/values": torch.zeros(1)}, "'adapter/up:C/values' is not in its header"),
        ({"adapter/up:A/more": torch.zeros(1)}, "up:A: its parts are"),
        ({"adapter/up:A/scales": torch.full((1,), float("nan"))}, "up:A: its scales are not finite"),
        ({"extras/score": torch.full((1,), float("nan"))}, "score: it is not finite"),
        ({"extras/score": torch.zeros(10**4)}, "there can be 8 numbers"),
    ],
)
def test_hostile_tensors_are_refused(tensors, text):
    wire, x = honest()
    with pytest.raises(WireError, match=text):
        wire.unpack_update(replace(x.up, tensors={**x.up.tensors, **tensors}), x.client, x.broadcast, TEMPLATE)


def test_an_update_has_the_parts_that_were_asked_for():
    """More parts than client and broadcast allow, other than its index set has, or two ranks in a pair."""
    wire = Wire()

    def refused(update: ClientUpdate, client: Client, broadcast: Broadcast, text: str) -> None:
        payload, _ = wire.pack_update(update, TEMPLATE, World(begun(FedIT()).state).site(client).memory, Rng(0))
        with pytest.raises(WireError, match=text):
            wire.unpack_update(payload, client, broadcast, TEMPLATE)

    _, x = honest(wire=wire)
    sizes = {name: TEMPLATE.layers[name] for name in TEMPLATE.layers}

    def pairs(a: int, b: int) -> Adapter:
        layers = {n: LoRA(torch.zeros(a, i), torch.zeros(b, o), 1.0) for n, (i, o) in sizes.items()}
        return Adapter(layers, x.meant.adapter.dense)

    refused(replace(x.meant, adapter=pairs(3, 3)), x.client, x.broadcast, "has 3 parts; there can be 1")
    refused(replace(x.meant, adapter=pairs(2, 2)), FLEET[0], replace(x.broadcast, rows=None), "there can be 1")
    refused(replace(x.meant, adapter=pairs(1, 2)), x.client, x.broadcast, "1 rows of A and 2 of B")
    four = replace(x.meant, client=3, adapter=pairs(4, 4))
    refused(four, FLEET[3], x.broadcast, "index set has 1")
    refused(replace(x.meant, adapter=Adapter(x.meant.adapter.layers)), x.client, x.broadcast, "its whole tensors are")


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"rows/up": torch.tensor([8], dtype=torch.uint8)}, "index set of up"),
        ({"rows/up": torch.tensor([1.0])}, "index set of up"),
        ({"rows/evil": torch.tensor([1], dtype=torch.uint8)}, "index sets of"),
        ({"base.0/up:A": torch.zeros(1, 6)}, "has no place"),
        ({"extras/seed": torch.zeros(3, 3)}, "there can be"),
    ],
)
def test_a_client_refuses_hostile_broadcasts(tensors, text):
    wire, x = honest()
    with pytest.raises(WireError, match=text):
        wire.unpack_broadcast(replace(x.down, tensors={**x.down.tensors, **tensors}), TEMPLATE)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"base.0/up:A": torch.zeros(2, 7)}, r"up:A as \[2, 7\]"),
        ({"base.0/up:A": torch.full((2, 6), float("inf"))}, "up:A: it is not finite"),
        ({"base.0/up:A": None}, "lacks a factor"),
    ],
)
def test_a_client_refuses_hostile_changes_of_the_base(tensors, text):
    wire, x = honest(METHODS["flora"](), Wire(error_feedback=False))
    assert x.broadcast.base
    with pytest.raises(WireError, match=text):
        wire.unpack_broadcast(replace(x.down, tensors=damaged(dict(x.down.tensors), **tensors)), TEMPLATE)


# --- settings, runs and plans ---


def test_feedback_is_refused_where_it_makes_no_sense():
    """It names field, value and remedy, which works; and a variant is held to it too."""
    others = [name for name, kind in METHODS.items() if not kind.error_feedback]
    assert others == ["flexlora", "flora", "florist", "rac-lora", "raflora"]
    for name in others:
        chosen = [f"method.name={name}", "variants={}"]
        for lossy in ("wire.up=int8", "wire.top_k=0.1"):
            with pytest.raises(
                ConfigError, match=rf"error_feedback is true.*'{name}'.*set wire.error_feedback to false"
            ):
                config.load(None, [*chosen, lossy])
            config.load(None, [*chosen, lossy, "wire.error_feedback=false"])
        config.load(None, [*chosen, "wire.down=int8"])
    with pytest.raises(ConfigError, match="error_feedback"):
        config.load(None, ["variants.other.method.name=flora", "variants.other.wire.up=int8"])


@pytest.mark.parametrize("item", ["wire.up=int4", "wire.top_k=0", "wire.top_k=1.5", "wire.upp=int8"])
def test_wrong_settings_name_themselves(item):
    with pytest.raises(ConfigError, match=item.split("=")[0]):
        config.load(None, [item])


def test_the_settings_make_the_wire():
    assert Wire.of(WireConfig()) == Wire()
    made = Wire.of(WireConfig(down="bfloat16", up="int8", top_k=0.5, error_feedback=False))
    assert made == Wire(Code("bfloat16"), Code("int8", 0.5), error_feedback=False)
    assert not made.feeds_back


@pytest.mark.parametrize(
    ("name", "items"),
    [
        ("fslora", ["wire.top_k=0.2"]),
        ("fedsa-lora", ["wire.top_k=0.2"]),
        ("fslora", ["wire.error_feedback=false"]),
    ],
)
def test_a_lossy_run_resumes_bit_for_bit(tiny_settings, tmp_path, name, items):
    """Residuals are in the checkpoint, random rounding has an address; and the plan's bytes are the run's."""
    more = ["run.rounds=3", "variants={}", f"method.name={name}", "wire.down=int8", "wire.up=int8", *items]
    experiment = config.load(None, [*tiny_settings, *more])
    runner.start(experiment, tmp_path / "whole", Quiet())
    with pytest.raises(KeyboardInterrupt):
        runner.start(experiment, tmp_path / "run", Quiet(2))
    runner.resume(tmp_path / "run", Quiet())
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    rows = RunFolder.open(tmp_path / "run").metrics()[1:]
    traffic = planned(experiment)["traffic"]
    assert traffic["total_up"] == sum(row["bytes_up"] for row in rows)
    assert traffic["total_down"] == sum(row["bytes_down"] for row in rows)
    _, _, memories = RunFolder.open(tmp_path / "run").load_checkpoint()
    assert all((RESIDUAL in memory.slots) == experiment.wire.error_feedback for memory in memories.values())


def test_data_in_one_place_do_not_travel(tiny_settings, tmp_path):
    """Pooled, a lossy wire changes no bit and costs no byte."""
    pooled = [*tiny_settings, "run.rounds=2", "variants={}", "fleet.pooled=true", "method.name=fedit"]
    runner.start(config.load(None, pooled), tmp_path / "exact", Quiet())
    lossy = config.load(None, [*pooled, "wire.up=int8", "wire.down=int8"])
    runner.start(lossy, tmp_path / "lossy", Quiet())
    assert planned(lossy)["traffic"]["total_up"] == 0
    rows = [RunFolder.open(tmp_path / name).metrics() for name in ("exact", "lossy")]
    assert [row.get("loss") for row in rows[0]] == [row.get("loss") for row in rows[1]]
