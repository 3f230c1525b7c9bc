"""FedEx-LoRA: average both factors, and add what that misses of the mean product to the frozen base.

Paper: FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language Models, Singhal, Ponkshe,
Vepakomma, arXiv 2410.09432.

    Ā = Σ_i p_i A_i,   B̄ = Σ_i p_i B_i,   R = Σ_i p_i B_i A_i - B̄ Ā,   W ← W + s R,   p_i = 1 / M

| paper | here |
| --- | --- |
| Ā, B̄ | ``ServerState.adapter``, at the server's rank r |
| W | the base with all residuals so far (`fslora.methods.baselog`) |
| s | alpha / r of the server's rank, for every client |

R is a covariance, and never formed: R = Σ_{i≠m} p_i (B_i - B_m)(A_i - Ā) for any one client m. With equal ranks it
has rank (M - 1) r at most (the paper: M r), and goes down as these factors: with the pair, M r (d_in + d_out)
numbers per layer and client, in float32, as much as FLoRA's stack. Stacks above the layer's width go as `bounded`.

The paper assumes equal ranks. Beyond it, every client starts from exactly the total weight T = W + s B̄ Ā: client i
trains the first k_i parts of the pair and keeps the others frozen beside them (`Start.frozen`), which is the base
T - s B̄[:, :k_i] Ā[:k_i] that it would otherwise need to be sent. What a client did not train it has at the value it
got, so that B_i and A_i are complete, means and residual are the formulas above, and W + s B̄ Ā after the round is the
exact mean of the clients' weights. (Filled up with zeros instead, the pair would shrink round by round and the base
take what it loses; the total would be the same.) With a client of the smallest rank as m, R has rank Σ_{i≠m} k_i. All
this costs (r + Σ_{i≠m} k_i)(d_in + d_out) numbers down, whatever k_i is, k_i (d_in + d_out) up.

``residual_rank`` sends the best approximation of R of that rank (the paper's truncated variant): exact no longer,
(r + r')(d_in + d_out) down; 0 is FedIT on these clients.

The official aggregator transposes R, which is right for GPT-2's Conv1D alone and hidden elsewhere by square layers; its
GLUE script fails before it aggregates. Adding s R to a base of less than float32 loses part of it; the sum of all
residuals is kept in float32, and added to the pristine base in one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from fslora.algebra.adapters import add
from fslora.algebra.lowrank import bounded, decomposed, stacked
from fslora.algebra.rows import ScatterMean, leading
from fslora.methods.base import Method
from fslora.methods.baselog import changed, confirmed, missed, with_base
from fslora.types import Adapter, Broadcast, Client, ClientUpdate, LoRA, Round, ServerState, Site, Start


class FedExLoRA(Method):
    """FedAvg of LoRA factors with the exact residual in the base."""

    name: ClassVar[str] = "fedex-lora"
    paper: ClassVar[str] = "FedEx-LoRA: Exact Aggregation for Federated Fine-Tuning, arXiv 2410.09432"
    differs: ClassVar[str] = "how many leading parts it trains; the others stay frozen beside them"
    travels: ClassVar[str] = "all parts and the last residual in factors down; both factors of its own parts up"
    streams: ClassVar[bool] = False

    residual_rank: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Rank to which the residual is cut; none for the exact one (the paper's), 0 for no residual."
    )
    weighting: Literal["uniform", "examples"] = Field(
        "uniform", description="Clients count equally (the paper's), or by their number of examples."
    )

    @property
    def changes_base(self) -> bool:
        """The residuals are added to the base, unless there are none."""
        return self.residual_rank != 0

    def broadcast(self, state: ServerState, client: Client, round: Round) -> Broadcast:
        """Returns the whole pair, and the residuals that the client has missed."""
        return Broadcast(state.adapter, base=missed(state, client.id))

    def start(self, broadcast: Broadcast, site: Site) -> Start:
        """Returns the client's first parts to train, the others frozen beside them."""
        rank = site.client.rank
        rest = {name: LoRA(p.A[rank:], p.Bt[rank:], p.scale) for name, p in broadcast.adapter.layers.items()}
        return Start(leading(broadcast.adapter, rank), frozen={name: p for name, p in rest.items() if p.rank})

    def aggregate(self, state: ServerState, updates: Iterator[ClientUpdate], round: Round) -> ServerState:
        """Returns the state after the mean of the factors, with the residual of their product in the base."""
        sent = list(updates)
        weights = [update.weight(self.weighting) for update in sent]
        total = ScatterMean(state.adapter)
        for update, weight in zip(sent, weights, strict=True):
            total.add(update.adapter, None, weight)
        mean, error = total.mean("cohort"), 0.0
        after = replace(confirmed(state, [update.client for update in sent]), adapter=add(state.adapter, mean))
        if len(sent) > 1 and self.residual_rank != 0:
            shares, lost = [weight / sum(weights) for weight in weights], {}
            for name, pair in mean.layers.items():
                lost[name] = bounded(residual(pair, [update.adapter.layers[name] for update in sent], shares))
            change = Adapter(lost)
            if self.residual_rank is not None:
                scale = round.template.scale(round.template.rank)
                change, error = decomposed(change, self.residual_rank, scale, round.rng.child("svd"))
            after = changed(after, change)
        return replace(after, scalars={**after.scalars, "report.svd_error": error})

    def global_adapter(self, state: ServerState) -> Adapter:
        """Returns the pair and the sum of all residuals."""
        return with_base(state, state.adapter)


def residual(mean: LoRA, deltas: Sequence[LoRA], shares: Sequence[float]) -> LoRA:
    """Returns R = Σ_{i≠m} p_i (B_i - B_m)(A_i - Ā) in factors of rank Σ_{i≠m} k_i; m is a client of the smallest rank.

    Args:
        mean: Mean change of the complete pairs, [r i] and [r o].
        deltas: Every client's change of the first k_i parts; it changed no others. At least two.
        shares: p_i, which sum to one.
    """
    m = min(range(len(deltas)), key=lambda i: deltas[i].rank)
    pairs, least = [], deltas[m].rank
    for i, delta in enumerate(deltas):
        if i != m:
            Bt = torch.cat([delta.Bt[:least] - deltas[m].Bt, delta.Bt[least:]])
            pairs.append(LoRA(delta.A - mean.A[: delta.rank], Bt, delta.scale))
    return stacked(pairs, [share for i, share in enumerate(shares) if i != m])
