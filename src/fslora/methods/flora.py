"""FLoRA: the clients' factors are stacked, which gives the exact mean product; the stack is added to the base.

Paper: FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations, Wang, Shen, He,
Sun, Wang, Lyu, Li, arXiv 2409.05976 (also "FedStackLoRA").

    client i:  trains A_i, B_i of rank k_i on the base W, from a random A_i and B_i = 0
    server:    B = [p_1 s_1 B_1 ... p_M s_M B_M],  A = [A_1; ...; A_M],   B A = Σ_i p_i s_i B_i A_i
    all:       W ← W + B A, and begin anew

| paper | here |
| --- | --- |
| p_k, r_k, alpha_k / r_k | ``examples`` over their sum, ``client.rank``, ``template.scale(client.rank)`` |
| the stack, and its merging | the newest change of the base (`fslora.methods.baselog`) |

The weight goes on one factor: we fold p_i and the ratio of scales into B_i (the paper: p_i on A_i), so that clients
whose scales differ stack into one pair. The head is averaged and replaced, never merged.

Choices the paper leaves open: every client draws its own A_i each round, from a seed that travels; one that was absent
gets every stack it missed, or their sum where that is smaller. A stack goes down with the next broadcast, so the
stack of the last round is never sent. A client starts from B = 0, so its first gradient of A is zero: expect slow
starts where rounds are short.

The public code recognises factors by a dimension that equals the rank, which is ambiguous; ours have names. Its
branch for FedIT keeps the first client alone: its numbers for FedIT are not to be quoted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from fslora.algebra.adapters import add, sub
from fslora.algebra.lowrank import stacked
from fslora.algebra.rows import ScatterMean
from fslora.methods.base import Method, initial_adapter
from fslora.methods.baselog import changed, confirmed, merged, missed
from fslora.rng import Rng
from fslora.types import Adapter, Broadcast, Client, ClientUpdate, Round, ServerState, Site, Start, Trained


class FLoRA(Method):
    """Exact aggregation by stacking."""

    name: ClassVar[str] = "flora"
    paper: ClassVar[str] = "FLoRA: Federated Fine-Tuning with Heterogeneous Low-Rank Adaptations, arXiv 2409.05976"
    differs: ClassVar[str] = "the rank of a pair that starts anew each round"
    travels: ClassVar[str] = "the last stack of all clients' pairs down, one pair up"
    streams: ClassVar[bool] = False
    error_feedback: ClassVar[bool] = False

    weighting: Literal["uniform", "examples"] = Field(
        "examples", description="Clients count by their number of examples (the paper's), or equally."
    )

    @property
    def changes_base(self) -> bool:
        """Every stack is added to the base."""
        return True

    def broadcast(self, state: ServerState, client: Client, round: Round) -> Broadcast:
        """Returns the head, the stacks that the client has missed, and the seed of its next A."""
        seed = torch.tensor(round.rng.child("fresh", client.id).integer())
        return Broadcast(Adapter({}, state.adapter.dense), base=missed(state, client.id), extras={"seed": seed})

    def start(self, broadcast: Broadcast, site: Site) -> Start:
        """Returns a fresh pair of the client's rank: A drawn from the seed, B = 0."""
        fresh = initial_adapter(site.template, site.client.rank, Rng(int(broadcast.extras["seed"])))
        return Start(Adapter(fresh.layers, broadcast.adapter.dense))

    def client_update(self, broadcast: Broadcast, start: Start, trained: Trained, site: Site) -> ClientUpdate:
        """Returns both factors as they are, and the change of the head."""
        head = sub(Adapter({}, trained.adapter.dense), Adapter({}, start.adapter.dense)).dense
        return ClientUpdate(site.client.id, Adapter(trained.adapter.layers, head), site.client.examples)

    def aggregate(self, state: ServerState, updates: Iterator[ClientUpdate], round: Round) -> ServerState:
        """Returns the state after adding the stack to the base and the mean change to the head."""
        sent = list(updates)
        counts = [update.weight(self.weighting) for update in sent]
        shares = [count / sum(counts) for count in counts]
        stack = {name: stacked([u.adapter.layers[name] for u in sent], shares) for name in round.template.layers}
        head = ScatterMean(Adapter({}, state.adapter.dense))
        for update, share in zip(sent, shares, strict=True):
            head.add(Adapter({}, update.adapter.dense), None, share)
        dense = add(Adapter({}, state.adapter.dense), head.mean("cohort")).dense
        state = replace(state, adapter=Adapter(state.adapter.layers, dense))
        return changed(confirmed(state, [update.client for update in sent]), Adapter(stack))

    def global_adapter(self, state: ServerState) -> Adapter:
        """Returns the sum of all stacks, and the head."""
        return merged(state)
