"""RAC-LoRA: one factor is random and frozen, the other trained from zero; merge into the base, draw anew.

Paper: Randomized Asymmetric Chain of LoRA: The First Meaningful Theoretical Framework for Low-Rank Adaptation,
Malinovsky, Michieli, Hammoud, Ceritli, Elesedy, Ozay, Richtarik, arXiv 2410.08305 (Fed-RAC-LoRA).

    side "B":  A_S random, common to all;  B_i ← local steps from 0;   W ← W + s (Σ_i p_i B_i) A_S
    side "A":  B_S random, common to all;  A_i ← local steps from 0;   W ← W + s B_S (Σ_i p_i A_i)

Exact, since the random factor is shared. One plain SGD step from 0 is W - lr s² G H_A with the projection
H_A = A_Sᵀ (A_S A_Sᵀ)⁺ A_S if the rows of A_S are orthonormal, which is why that is our default: with Gaussian rows the
paper preconditions by (A_S A_Sᵀ)⁺, which no ordinary optimizer does.

| paper | here |
| --- | --- |
| A_S, B_S | ``draw_factor`` from a seed and the layer's name |
| list of (seed, B̄) | the log of base changes; what is drawn from the seed does not travel |
| block t | one round: the factor is redrawn, and what was trained is merged, every round |
| s | ``template.scale(template.rank)``, for every client |

Unequal ranks (beyond the paper): the sketch is nested, client i trains against its first k_i rows. B_i filled up with
zeros is no approximation, as B starts from zero: the rows beyond k_i move by the share of clients that reach them, a
smaller step and not a wrong one. One scale for all, because all train against rows of the same factor.

A seed belongs to a change and travels with it: a client that was absent, and any number of failed rounds in between,
cannot shift the draws. A block is one round: a longer one is between this and FFA-LoRA, which is the case of one
block without end. p_i are by examples; the paper's objective is the plain mean over clients (``uniform``). No public
code was found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from fslora.algebra.adapters import add, completed
from fslora.algebra.rows import ScatterMean, leading
from fslora.algebra.sketch import RandomFactor, draw_factor
from fslora.methods.base import Method
from fslora.methods.baselog import changed, confirmed, merged, missed
from fslora.rng import Rng
from fslora.types import (
    Adapter,
    BaseUpdate,
    Broadcast,
    Client,
    ClientUpdate,
    LoRA,
    Round,
    ServerState,
    Site,
    Start,
    Template,
    Tensor,
)


class RACLoRA(Method):
    """Randomized asymmetric chain of LoRA, federated."""

    name: ClassVar[str] = "rac-lora"
    paper: ClassVar[str] = "Randomized Asymmetric Chain of LoRA (Fed-RAC-LoRA), arXiv 2410.08305"
    differs: ClassVar[str] = "how many leading rows of a random factor, drawn anew each round, it trains against"
    travels: ClassVar[str] = "the trained factor alone, down as a change of the base, and a seed"
    error_feedback: ClassVar[bool] = False

    side: Literal["A", "B"] = Field("B", description="The factor that is trained, from zero; the other one is random.")
    sketch: RandomFactor = Field(
        "orthonormal", description="Rows of the random factor: 'orthonormal', or 'gaussian' of expected norm 1."
    )
    weighting: Literal["uniform", "examples"] = Field(
        "examples", description="Clients count by their number of examples, or equally."
    )

    @property
    def changes_base(self) -> bool:
        """Every round's mean is added to the base."""
        return True

    def broadcast(self, state: ServerState, client: Client, round: Round) -> Broadcast:
        """Returns the head, the changes that the client has missed, and the seed of the round's random factor."""
        head = Adapter({}, state.adapter.dense)
        return Broadcast(head, base=missed(state, client.id), extras={"seed": self._seed(round)})

    def start(self, broadcast: Broadcast, site: Site) -> Start:
        """Returns the client's rows of the random factor, and zeros to train."""
        pairs = self._pairs(broadcast.extras["seed"], site.template)
        return Start(leading(Adapter(pairs, broadcast.adapter.dense), site.client.rank), self.side)

    def aggregate(self, state: ServerState, updates: Iterator[ClientUpdate], round: Round) -> ServerState:
        """Returns the state after adding the mean trained factor times the random one to the base."""
        seed = self._seed(round)
        drawn = Adapter(self._pairs(seed, round.template), state.adapter.dense)
        total, clients = ScatterMean(drawn), []
        for update in updates:
            total.add(update.adapter, None, update.weight(self.weighting))
            clients.append(update.client)
        mean = total.mean("cohort").only(self.side)
        head = add(Adapter({}, state.adapter.dense), Adapter({}, mean.dense)).dense
        state = replace(confirmed(state, clients), adapter=Adapter(state.adapter.layers, head))
        return changed(state, completed(mean, drawn), travels=Adapter(mean.layers, {"seed": seed}))

    def base_update(self, update: BaseUpdate, template: Template) -> Adapter:
        """Returns a change with its random factor drawn again; a sum of changes is complete as it is."""
        if update.whole:
            return super().base_update(update, template)
        return completed(Adapter(update.adapter.layers), Adapter(self._pairs(update.adapter.dense["seed"], template)))

    def global_adapter(self, state: ServerState) -> Adapter:
        """Returns the sum of all changes, and the head."""
        return merged(state)

    def _seed(self, round: Round) -> Tensor:
        return torch.tensor(round.rng.child("sketch").integer())

    def _pairs(self, seed: Tensor, template: Template) -> dict[str, LoRA]:
        """Returns by layer the random factor, and zeros as the other; no more rows than the layer is wide."""
        rng, scale, pairs = Rng(int(seed)), template.scale(template.rank), {}
        for name, (d_in, d_out) in template.layers.items():
            drawn, other = (d_in, d_out) if self.side == "B" else (d_out, d_in)
            factor = draw_factor(self.sketch, template.rank, drawn, rng.child(name))
            zeros = torch.zeros(len(factor), other)
            pairs[name] = LoRA(factor, zeros, scale) if self.side == "B" else LoRA(zeros, factor, scale)
        return pairs
