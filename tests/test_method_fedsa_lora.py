"""FedSA-LoRA: the server knows of A alone; every client goes on with its own B and head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora.algebra.adapters import combine
from fslora.methods.fedit import FedIT
from fslora.methods.fedsa_lora import FedSALoRA
from fslora.methods.ffa_lora import FFALoRA
from fslora.types import Adapter, Client, ClientMemory, LoRA, Start
from kit import (
    FLEET,
    RANK,
    TEMPLATE,
    World,
    assert_same_adapter,
    assert_same_function,
    assert_same_world,
    begun,
    deltas,
    ended,
    exchanges,
    fake_training,
    plan,
    play,
    played,
    served,
)
from quadratic import descent, drawn_targets

# x + (y - x) against y, and sums of at most six float32 numbers near 1.
ROUNDING = 2e-6
LAWS = settings(max_examples=25, deadline=None, derandomize=True, database=None)
EVERYBODY = tuple(range(6))


def own(world: World, client: int) -> Adapter:
    return world.memories[client].slots["own"]


@LAWS
@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 30)), min_size=1, max_size=6),
    st.sampled_from(["examples", "uniform"]),
)
def test_each_row_of_a_is_the_mean_of_its_holders(clients, weighting):
    """Ā_j = Σ p_i A_ij / Σ p_i over the clients with k_i > j; where there is none, the row keeps its bits."""
    fleet = tuple(Client(number, *facts) for number, facts in enumerate(clients))
    method, round = FedSALoRA(weighting=weighting), plan(0, tuple(range(len(fleet))), fleet)
    world = begun(method, fleet=fleet)
    passed = exchanges(method, world, round)
    after = ended(method, world, round, passed).state.adapter
    for name, pair in after.layers.items():
        for j in range(RANK):
            holders = [x for x in passed if x.site.client.rank > j]
            if not holders:
                assert torch.equal(pair.A[j], world.state.adapter.layers[name].A[j])
                continue
            counts = [x.site.client.examples if weighting == "examples" else 1 for x in holders]
            rows = [x.trained.adapter.layers[name].A[j] for x in holders]
            mean = sum(count * row.double() for count, row in zip(counts, rows, strict=True)) / sum(counts)
            torch.testing.assert_close(pair.A[j].double(), mean, atol=ROUNDING, rtol=0)


def test_the_largest_client_alone_decides_its_last_rows():
    """Ranks 2, 3, 5: rows 3 and 4 of the new Ā are the rank-5 client's, row 2 is a mean of two, rows 5.. rest."""
    fleet = tuple(Client(number, rank, 1) for number, rank in enumerate((2, 3, 5)))
    method, round = FedSALoRA(), plan(0, (0, 1, 2), fleet)
    world = begun(method, fleet=fleet)
    passed = exchanges(method, world, round)
    found = ended(method, world, round, passed).state.adapter.layers["down"].A
    trained = [x.trained.adapter.layers["down"].A for x in passed]
    torch.testing.assert_close(found[3:5], trained[2][3:], atol=ROUNDING, rtol=0)
    torch.testing.assert_close(found[2], (trained[1][2] + trained[2][2]) / 2, atol=ROUNDING, rtol=0)
    assert torch.equal(found[5:], world.state.adapter.layers["down"].A[5:])


def test_the_server_never_learns_a_b():
    """Its state depends on no B_i and no head: other ones at the clients give the same bits; its own B stays zero."""
    method, round = FedSALoRA(), plan(2, EVERYBODY)
    world = played(method, 2)
    passed = exchanges(method, world, round)
    garbled = [replace(x, trained=replace(x.trained, adapter=other_own(x.trained.adapter))) for x in passed]
    answers = [replace(x, update=method.client_update(x.broadcast, x.start, x.trained, x.site)) for x in garbled]
    assert any(
        not torch.equal(x.trained.adapter.layers["up"].Bt, y.trained.adapter.layers["up"].Bt)
        for x, y in zip(passed, answers, strict=True)
    )
    here, there = (ended(method, world, round, list(each)).state for each in (passed, answers))
    assert_same_world(World(here), World(there))
    assert not any(pair.Bt.any() for pair in here.adapter.layers.values())
    assert all(torch.equal(here.adapter.dense[name], tensor) for name, tensor in TEMPLATE.dense.items())


def other_own(adapter: Adapter) -> Adapter:
    layers = {name: replace(pair, Bt=pair.Bt * -3 + 1) for name, pair in adapter.layers.items()}
    return Adapter(layers, {name: tensor - 7 for name, tensor in adapter.dense.items()})


def test_the_mean_of_what_clients_serve_is_fedits_product():
    """Equal ranks: Σ p_i B_i Ā = B̄ Ā, FedIT's product exactly; the mean of B_i A_i differs by the covariance."""
    fleet = tuple(replace(client, rank=RANK) for client in FLEET)
    total = sum(client.examples for client in fleet)
    ours, fedit = FedSALoRA(weighting="examples"), FedIT(rank="server")
    round = plan(0, EVERYBODY, fleet)
    world = begun(ours, fleet=fleet)
    passed = exchanges(ours, world, round)
    after = ended(ours, world, round, passed)
    theirs = deltas(play(fedit, begun(fedit, fleet=fleet), round).state.adapter)
    for name in TEMPLATE.layers:
        weights = [client.examples / total for client in fleet]
        mean = sum(p * deltas(a)[name] for p, a in zip(weights, served(ours, after, fleet), strict=True))
        torch.testing.assert_close(mean, theirs[name], atol=10 * ROUNDING, rtol=10 * ROUNDING)
        pairs = [x.trained.adapter.layers[name] for x in passed]
        A, Bt = (sum(p * getattr(q, f).double() for p, q in zip(weights, pairs, strict=True)) for f in ("A", "Bt"))
        covariance = sum(
            p * q.scale * (q.Bt.double() - Bt).T @ (q.A.double() - A) for p, q in zip(weights, pairs, strict=True)
        )
        true = sum(p * deltas(x.trained.adapter)[name] for p, x in zip(weights, passed, strict=True))
        torch.testing.assert_close(true - mean, covariance, atol=10 * ROUNDING, rtol=10 * ROUNDING)
        assert covariance.abs().max() > 0.01


def test_the_first_step_is_ffas():
    """One SGD step from B = 0: the gradient of A is zero, so Ā = A⁰ bit for bit, and B_i is FFA-LoRA's B_i."""
    ours, ffa, round = FedSALoRA(), FFALoRA(), plan(0)
    theirs = begun(ffa)
    world = World(replace(begun(ours).state, adapter=theirs.state.adapter))
    training = descent(drawn_targets(FLEET), 0.01)
    passed = exchanges(ours, world, round, training)
    after = ended(ours, world, round, passed)
    assert_same_adapter(after.state.adapter, world.state.adapter)
    for x, y in zip(passed, exchanges(ffa, theirs, round, training), strict=True):
        for name, pair in own(after, x.site.client.id).layers.items():
            assert pair.Bt.any()
            assert torch.equal(pair.Bt, y.trained.adapter.layers[name].Bt)


def test_one_client_is_uninterrupted_local_lora():
    """M = 1, SGD: three rounds of two steps are six steps of LoRA, at the client's own rank."""
    client = Client(0, 3, 4)
    method, targets = FedSALoRA(), drawn_targets((client,))
    world = begun(method, fleet=(client,))
    site = world.site(client)
    alone = descent(targets, 0.01, steps=6)(Start(method.client_adapter(world.state, site)), client, plan(0))
    for number in range(3):
        world = play(method, world, plan(number, (0,), (client,)), descent(targets, 0.01, steps=2))
    assert_same_function(method.client_adapter(world.state, world.site(client)), alone.adapter, 10 * ROUNDING)
    assert all(product.any() for product in deltas(alone.adapter).values())


def test_equal_factors_make_a_synchronisation_that_changes_no_one():
    """All A_i equal: every client serves after the round what it trained; else it jumps by s B_i (Ā - A_i)."""
    method, round = FedSALoRA(), plan(2, EVERYBODY)
    world = played(method, 2)
    trained = fake_training()

    def alike(start: Start, client: Client, round):
        result = trained(start, client, round)
        layers = {
            name: replace(pair, A=world.state.adapter.layers[name].A[: client.rank] + 0.25)
            for name, pair in result.adapter.layers.items()
        }
        return replace(result, adapter=Adapter(layers, result.adapter.dense))

    for training, moves in ((alike, False), (trained, True)):
        passed = exchanges(method, world, round, training)
        after = ended(method, world, round, passed)
        for x in passed:
            site = after.site(x.site.client)
            mine, was = method.client_adapter(after.state, site), x.trained.adapter
            for name, pair in was.layers.items():
                A = after.state.adapter.layers[name].A[: site.client.rank].double()
                jump = pair.scale * pair.Bt.double().T @ (A - pair.A.double())
                torch.testing.assert_close(
                    deltas(mine)[name], deltas(was)[name] + jump, atol=10 * ROUNDING, rtol=10 * ROUNDING
                )
                assert bool(jump.abs().max() > 0.01) == moves
            assert all(torch.equal(mine.dense[name], tensor) for name, tensor in was.dense.items())


def test_an_absent_client_keeps_its_bits():
    """Who takes no part: the same B_i and head before and after, while its Ā is the newest one."""
    method = FedSALoRA()
    world = played(method, 1)
    before = combine(torch.clone, own(world, 5))
    after = play(method, play(method, world, plan(1, (0, 2))), plan(2, (1, 3)))
    assert_same_adapter(own(after, 5), before)
    mine = method.client_adapter(after.state, after.site(FLEET[5]))
    for name, pair in mine.layers.items():
        assert torch.equal(pair.Bt, before.layers[name].Bt)
        assert torch.equal(pair.A, after.state.adapter.layers[name].A[:3])
    (x,) = exchanges(method, after, plan(3, (5,)))
    assert_same_adapter(x.start.adapter, mine)


def test_two_clients_never_see_each_others():
    """Each starts from what it trained itself (the public code: from what the client trained just before it left)."""
    method = FedSALoRA()
    world = play(method, begun(method), plan(0, (3, 4)))
    for x in exchanges(method, world, plan(1, (3, 4))):
        mine, other = own(world, x.site.client.id), own(world, 7 - x.site.client.id)
        assert torch.equal(x.start.adapter.layers["up"].Bt, mine.layers["up"].Bt)
        assert not torch.equal(x.start.adapter.layers["up"].Bt, other.layers["up"].Bt)
        assert torch.equal(x.start.adapter.dense["head.bias"], mine.dense["head.bias"])
        assert not torch.equal(x.start.adapter.dense["head.bias"], other.dense["head.bias"])


@pytest.mark.parametrize("share_head", [False, True])
def test_a_new_client_begins_with_the_base_model(share_head):
    """B = 0 and the template's head (the shared one, where it is shared), with the newest Ā, after any rounds."""
    method = FedSALoRA(share_head=share_head)
    world = play(method, begun(method), plan(0, (0, 1, 2)))
    mine = method.client_adapter(world.state, world.site(FLEET[4]))
    assert mine.layers.keys() == TEMPLATE.layers.keys()
    for name, pair in mine.layers.items():
        assert pair.Bt.shape == (8, TEMPLATE.layers[name][1])
        assert not pair.Bt.any()
        assert torch.equal(pair.A, world.state.adapter.layers[name].A)
    for name, tensor in mine.dense.items():
        assert torch.equal(tensor, (world.state.adapter if share_head else TEMPLATE).dense[name])
        assert torch.equal(tensor, TEMPLATE.dense[name]) == (not share_head)


def test_a_shared_head_is_averaged_like_a():
    """share_head: head = Σ p_i head_i goes to all, and nobody keeps one of its own."""
    method, round = FedSALoRA(share_head=True, weighting="examples"), plan(0)
    world = begun(method)
    passed = exchanges(method, world, round)
    after = ended(method, world, round, passed)
    total = sum(client.examples for client in FLEET)
    for name, tensor in after.state.adapter.dense.items():
        mean = sum(x.site.client.examples / total * x.trained.adapter.dense[name].double() for x in passed)
        torch.testing.assert_close(tensor.double(), mean, atol=ROUNDING, rtol=0)
        assert all(torch.equal(adapter.dense[name], tensor) for adapter in served(method, after))
    assert not any(memory.slots["own"].dense for memory in after.memories.values())


@pytest.mark.parametrize("share_head", [False, True])
def test_bytes_are_a_alone(share_head):
    """k_i d_in · 4 per layer in each direction; no B and no head in any message, unless the head is shared."""
    method = FedSALoRA(share_head=share_head)
    head = 4 * sum(tensor.numel() for tensor in TEMPLATE.dense.values()) if share_head else 0
    for x in exchanges(method, played(method, 1), plan(1)):
        A = 4 * x.site.client.rank * sum(d_in for d_in, _ in TEMPLATE.layers.values())
        assert x.broadcast.nbytes == x.update.nbytes == A + head
        for message in (x.broadcast.adapter, x.update.adapter):
            assert not any(len(pair.Bt) for pair in message.layers.values())
            assert bool(message.dense) == share_head


def test_clients_must_not_refactor():
    """Negative: (B_1 M, M⁻¹ A_1) is the same local model and another upload, hence another Ā."""
    method, round = FedSALoRA(), plan(2, (2, 3))
    world = played(method, 2)
    passed = exchanges(method, world, round)
    first = passed[0]
    M = torch.eye(4) * 2 + torch.ones(4, 4) / 4
    layers = {
        name: LoRA(torch.linalg.inv(M) @ pair.A, M.T @ pair.Bt, pair.scale)
        for name, pair in first.trained.adapter.layers.items()
    }
    turned = replace(first.trained, adapter=Adapter(layers, first.trained.adapter.dense))
    assert_same_function(turned.adapter, first.trained.adapter, 10 * ROUNDING)
    update = method.client_update(first.broadcast, first.start, turned, first.site)
    plain = ended(method, world, round, passed).state.adapter
    other = ended(method, world, round, [replace(first, trained=turned, update=update), passed[1]]).state.adapter
    assert all((plain.layers[name].A - other.layers[name].A).abs().max() > 0.05 for name in plain.layers)


def test_losing_the_memory_is_another_method():
    """Negative: a client without its memory starts from B = 0 again."""
    method = FedSALoRA()
    world = played(method, 2)
    forgetful = World(world.state, {client: ClientMemory() for client in world.memories})
    (x,) = exchanges(method, forgetful, plan(2, (3,)))
    (y,) = exchanges(method, world, plan(2, (3,)))
    assert not x.start.adapter.layers["up"].Bt.any()
    assert y.start.adapter.layers["up"].Bt.any()
