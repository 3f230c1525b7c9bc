"""Local training: nobody's model depends on anybody else, and nothing travels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fslora.algebra.rows import leading
from fslora.methods.fslora import FSLoRA
from fslora.methods.local import Local
from fslora.rng import Rng
from kit import FLEET, SEED, TEMPLATE, assert_same_adapter, begun, exchanges, fake_training, plan, play, played


def test_nothing_travels_but_the_seed():
    """Down: 8 bytes, the seed. Up: nothing, but who it is from."""
    world = played(Local(), 2)
    for x in exchanges(Local(), world, plan(0)):
        assert (x.broadcast.nbytes, x.update.nbytes) == (8, 0)
        assert int(x.broadcast.extras["seed"]) == SEED
        assert not x.broadcast.adapter.dense
        assert not x.update.adapter.dense
        assert x.update.adapter.layers.keys() == TEMPLATE.layers.keys()


@pytest.mark.parametrize("rslora", [False, True])
def test_everybody_starts_from_the_common_draw(rslora):
    """Round 0: the client draws from the seed the leading rows that every method starts from; scale alpha / k."""
    template = replace(TEMPLATE, rslora=rslora)
    common = FSLoRA().init(template, FLEET, Rng(SEED)).adapter
    world = begun(Local(), template=template)
    for x in exchanges(Local(), world, plan(0, template=template)):
        k = x.site.client.rank
        for name, pair in x.start.adapter.layers.items():
            assert torch.equal(pair.A, common.layers[name].A[:k])
            assert pair.Bt.shape == (k, TEMPLATE.layers[name][1])
            assert not pair.Bt.any()
            assert pair.scale == template.scale(k)
        assert all(torch.equal(x.start.adapter.dense[name], tensor) for name, tensor in TEMPLATE.dense.items())
        assert_same_adapter(Local().client_adapter(world.state, x.site), x.start.adapter)


def test_a_client_goes_on_from_its_own():
    """The start of a client's next round is what its last one ended with, adapter and head; it serves that, too."""
    world = begun(Local())
    first = exchanges(Local(), world, plan(0))
    after = play(Local(), world, plan(0))
    for x in first:
        site = after.site(x.site.client)
        assert_same_adapter(Local().client_adapter(after.state, site), x.trained.adapter)
    second = {x.site.client.id: x for x in exchanges(Local(), after, plan(1))}
    for x in first:
        if x.site.client.id in second:
            assert_same_adapter(second[x.site.client.id].start.adapter, x.trained.adapter)
    assert not torch.equal(first[0].trained.adapter.layers["up"].Bt, first[0].start.adapter.layers["up"].Bt)


def test_the_others_do_not_matter():
    """A client that trains alone, with every round its own, ends with the same bits as in company."""
    together = played(Local(), 3)
    for client in FLEET:
        alone = begun(Local(), fleet=(client,))
        for number in range(3):
            if client in plan(number).cohort:
                alone = play(Local(), alone, replace(plan(number), cohort=(client,)))
        assert alone.memories.keys() == {client.id}
        assert_same_adapter(
            Local().client_adapter(together.state, together.site(client)),
            Local().client_adapter(alone.state, alone.site(client)),
        )


def test_absent_clients_keep_what_they_have():
    """Round 1 is without clients 1, 4 and 5: their memories are the very same."""
    before = played(Local(), 1)
    after = play(Local(), before, plan(1))
    assert {c for c in after.memories if after.memories[c] is before.memories[c]} == {1, 4, 5}


def test_the_server_waits_for_everybody_and_learns_nothing():
    """``aggregate`` asks for every update, because clients of a simulation train when asked; the state is as it was."""
    world, asked = begun(Local()), []

    def updates():
        for x in exchanges(Local(), world, plan(0)):
            asked.append(x.site.client.id)
            yield x.update

    after = Local().aggregate(world.state, updates(), plan(0))
    assert asked == [0, 1, 2, 3, 4, 5]
    assert after is world.state


def test_the_global_adapter_is_the_start():
    """What is exported as global is a fresh adapter of the server's rank: no federated model exists."""
    world = played(Local(), 3)
    assert_same_adapter(Local().global_adapter(world.state), begun(Local()).state.adapter)
    assert all(not pair.Bt.any() for pair in Local().global_adapter(world.state).layers.values())


def test_everybody_has_the_same_server_draw_whatever_its_rank():
    """The rows of a smaller client are the first rows of a larger one."""
    starts = [x.start.adapter for x in exchanges(Local(), begun(Local()), plan(0), fake_training(0.0))]
    small, large = starts[1], starts[3]
    assert torch.equal(leading(large, 2).layers["up"].A, small.layers["up"].A)
