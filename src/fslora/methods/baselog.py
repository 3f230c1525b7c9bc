"""Changes of the frozen base, for the methods that make them: the sum so far, and what each client has missed.

The sum is kept in factored form (slot ``base``) until somebody asks for merging. Beside it lie the newest single
updates as they travel (slots ``change.N``), and the version that each client has confirmed by an update of its own:
an absent client gets what it missed, in order. Where that is more than the sum itself, it gets the sum, and so older
updates need not be kept: the log never grows beyond the size of the sum, nor what travels beyond the dense weights.

A client adds the updates as they come, leaving out versions that it has (its answer to the last one may have been
lost), and puts a sum in the place of all it added. Adding with ``summed``, it ends with the server's own bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fslora.algebra.lowrank import bounded, stacked, without_identity
from fslora.types import Adapter, BaseUpdate, ServerState

SUM = "base"


def changed(state: ServerState, change: Adapter, travels: Adapter | None = None) -> ServerState:
    """Returns the state after one more change of the base.

    Args:
        state: The server's state.
        change: Pairs to add to the base's weights; its dense tensors are left out.
        travels: The same change as it travels, where clients can draw a factor by themselves: that one has no rows,
            and the seed is a dense tensor. By default the pairs of ``change``.
    """
    version = version_of(state) + 1
    before = state.slots.get(SUM)
    slots = {**state.slots, SUM: summed(before, change), _slot(version): travels or Adapter(change.layers)}
    return _pruned(replace(state, slots=slots, scalars={**state.scalars, "base_version": version}))


def summed(before: Adapter | None, change: Adapter) -> Adapter:
    """Returns the sum of all changes after one more (``before`` is None at the first), in memory of its own."""
    pairs = {name: [before.layers[name], pair] if before else [pair] for name, pair in change.layers.items()}
    return Adapter({name: bounded(stacked(both)) for name, both in pairs.items()})


def missed(state: ServerState, client: int) -> tuple[BaseUpdate, ...]:
    """Returns what a client has to add to its base before it trains: every update it missed, or their sum so far."""
    version, seen = version_of(state), int(state.scalars.get(_seen(client), 0))
    wanted = range(seen + 1, version + 1)
    if all(_slot(number) in state.slots for number in wanted):
        return tuple(BaseUpdate(number, state.slots[_slot(number)]) for number in wanted)
    return (BaseUpdate(version, _travelling(state.slots[SUM]), whole=True),)


def confirmed(state: ServerState, clients: Iterable[int]) -> ServerState:
    """Returns the state that knows of these clients that they have all changes made so far.

    To be called in ``aggregate`` with the clients that answered, before this round's own change.
    """
    version = float(version_of(state))
    return replace(state, scalars={**state.scalars, **{_seen(client): version for client in clients}})


def version_of(state: ServerState) -> int:
    """Returns the number of changes so far."""
    return int(state.scalars.get("base_version", 0))


def with_base(state: ServerState, adapter: Adapter) -> Adapter:
    """Returns an adapter that stands for the changed base and ``adapter`` on it, relative to the base before any."""
    base = state.slots.get(SUM)
    if base is None:
        return adapter
    layers = {name: bounded(stacked([pair, base.layers[name]])) for name, pair in adapter.layers.items()}
    return Adapter(layers, adapter.dense)


def merged(state: ServerState) -> Adapter:
    """Returns the changed base and the head, where nothing else outlives a round; before any change, the adapter."""
    base = state.slots.get(SUM)
    return Adapter(base.layers, state.adapter.dense) if base else state.adapter


def _pruned(state: ServerState) -> ServerState:
    """Drops the oldest updates while all together are larger than their sum as it travels: nobody is sent them."""
    names = sorted(name for name in state.slots if name.startswith("change."))
    room, kept = _travelling(state.slots[SUM]).nbytes, set()
    for name in reversed(names):
        room -= state.slots[name].nbytes
        if room < 0:
            break
        kept.add(name)
    return replace(state, slots={n: slot for n, slot in state.slots.items() if n not in names or n in kept})


def _travelling(total: Adapter) -> Adapter:
    return Adapter({name: without_identity(pair) for name, pair in total.layers.items()})


def _slot(version: int) -> str:
    return f"change.{version:09d}"


def _seen(client: int) -> str:
    return f"base_seen.{client}"
