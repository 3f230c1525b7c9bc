"""FLoRIST: stack the clients' factors, decompose the small core, keep what carries most of the energy, for all.

Paper: FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of Large Language Models,
Ramesh, Dass, arXiv 2506.09199.

    server:    Σ_i p_i s_i B_i A_i = U Σ Vᵀ from the stacked factors,   p_i = n_i / Σ_j n_j
               r = the smallest with Σ_{j<r} σ_j² ≥ τ Σ_j σ_j², layer by layer;   B = U_r Σ_r,  A = V_rᵀ
    client i:  warm:   goes on from the first k_i parts of (A, B)
               merge:  W ← W + s B A, and a fresh pair of its own rank

| paper | here |
| --- | --- |
| B_st, A_st | `mean_product`: weights and scales on B (the paper: on A), never on both |
| two thin SVDs and the core's | `svd_of`: two thin QRs and the core's SVD, of the same spectrum and cheaper |
| r by layer | the rank of each layer's pair in the state; ``rank_pattern`` in an export |

The paper's runs have one round, so that how the next one starts is hardly settled: as reported it is warm, the
snapshot of its code that we know of merges. ``next_init`` offers both; warm is the default. Further choices:

- A client that cannot hold r parts gets the first k_i. One that can hold more fills up to k_i with random rows of A and
  zeros in B, drawn from a seed that travels: filled with zeros, as reported, both factors of these parts would have a
  zero gradient for ever, and the rank could only shrink. The seed, and so the rows, are common to a round's clients.
- s_i = alpha / k_i is multiplied in. The snapshot leaves it out, which is right only while all scales are equal.
- τ = 1 keeps all singular values that are more than rounding; nothing is left to sums of floats. An update of zero
  keeps one part, whose B is zero.
- The head is averaged by the same p_i and replaced, never merged.

τ should be fixed in advance: choosing it by test accuracy, as the paper's presets do, is selection on the test set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from fslora.algebra.adapters import grown
from fslora.algebra.lowrank import mean_product, svd_of
from fslora.algebra.rows import leading
from fslora.methods.base import Method
from fslora.methods.baselog import changed, confirmed, merged, missed
from fslora.rng import Rng
from fslora.types import Adapter, Broadcast, Client, ClientUpdate, Round, ServerState, Site, Start, Tensor, Trained


class FLoRIST(Method):
    """Stacking, factored SVD, energy threshold."""

    name: ClassVar[str] = "florist"
    paper: ClassVar[str] = "FLoRIST: Singular Value Thresholding, arXiv 2506.09199"
    differs: ClassVar[str] = "the rank it sends; it gets the same parts as all, as far as it can hold them"
    travels: ClassVar[str] = "the thresholded pair down, or as a change of the base; one pair up"
    streams: ClassVar[bool] = False
    error_feedback: ClassVar[bool] = False

    tau: float = Field(0.9, gt=0, le=1, description="Share of each layer's energy that the broadcast pair keeps.")
    next_init: Literal["warm", "merge"] = Field(
        "warm", description="Clients go on from the pair ('warm'), or 'merge' it into the base and begin anew."
    )
    weighting: Literal["uniform", "examples"] = Field(
        "examples", description="Clients count by their number of examples (the paper's), or equally."
    )

    @property
    def changes_base(self) -> bool:
        """Pairs are added to the base where they are merged."""
        return self.next_init == "merge"

    def broadcast(self, state: ServerState, client: Client, round: Round) -> Broadcast:
        """Returns the thresholded pair, as far as the client can hold it, or what it missed of the base; and a seed."""
        seed = torch.tensor(round.rng.child("fresh").integer())
        carried = leading(state.adapter, client.rank) if self.next_init == "warm" else Adapter({}, state.adapter.dense)
        return Broadcast(carried, base=missed(state, client.id), extras={"seed": seed})

    def start(self, broadcast: Broadcast, site: Site) -> Start:
        """Returns what came, filled up to the client's rank with random rows of A and zeros in B."""
        rng = Rng(int(broadcast.extras["seed"]))
        return Start(grown(broadcast.adapter, site.template, site.client.rank, rng))

    def client_update(self, broadcast: Broadcast, start: Start, trained: Trained, site: Site) -> ClientUpdate:
        """Returns both factors as they are: a product needs all of them."""
        return ClientUpdate(site.client.id, trained.adapter, site.client.examples)

    def aggregate(self, state: ServerState, updates: Iterator[ClientUpdate], round: Round) -> ServerState:
        """Returns the state with the leading part of the mean product, carried on or added to the base."""
        sent = list(updates)
        weights = [update.weight(self.weighting) for update in sent]
        mean = mean_product([update.adapter for update in sent], weights)
        scale, pairs = round.template.scale(round.template.rank), {}
        for name, pair in mean.layers.items():
            svd = svd_of(pair)
            pairs[name] = svd.pair(scale, rank_of_energy(svd.S, self.tau))
        scalars = {**state.scalars, "report.svd_error": 0.0}
        if self.next_init == "warm":
            return replace(state, adapter=Adapter(pairs, mean.dense), scalars=scalars)
        state = replace(state, adapter=Adapter(state.adapter.layers, mean.dense), scalars=scalars)
        return changed(confirmed(state, [update.client for update in sent]), Adapter(pairs))

    def global_adapter(self, state: ServerState) -> Adapter:
        """Returns the pair, or where pairs are merged their sum so far; and the head."""
        return merged(state)


def rank_of_energy(S: Tensor, tau: float) -> int:
    """Returns the smallest r with Σ_{j<r} σ_j² ≥ tau Σ_j σ_j²; all for tau 1, none for a spectrum of zeros."""
    if tau >= 1:
        return len(S)
    energy = S.square().cumsum(0)
    return int((energy < tau * energy[-1]).sum()) + 1 if energy[-1] > 0 else 0
