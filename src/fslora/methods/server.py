"""The server's step: the cohort's mean delta is a pseudo-gradient, -Δ, for an ordinary optimizer.

``sgd`` with lr 1 and no momentum is the papers' plain "add the mean". ``adam`` and ``adamw`` are FedAdam:
Source: Adaptive Federated Optimization, Reddi et al., arXiv 2003.00295, algorithm 2 (with bias correction,
as `torch.optim.Adam` has it).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from fslora.algebra.adapters import add_into, combine, zeros_like
from fslora.types import Adapter, ServerState, Tensor


class ServerOptimizer(BaseModel):
    """The ``[method.server]`` table."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    optimizer: Literal["sgd", "adam", "adamw"] = Field("sgd", description="'sgd', 'adam' or 'adamw'.")
    lr: float = Field(1.0, gt=0, description="Learning rate; 1 with sgd adds the mean delta as it is.")
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd: momentum.")
    beta1: float = Field(0.9, ge=0, lt=1, description="adam, adamw: decay of the first moment.")
    beta2: float = Field(0.99, ge=0, lt=1, description="adam, adamw: decay of the second moment.")
    eps: float = Field(1e-8, gt=0, description="adam, adamw: added to the denominator.")
    weight_decay: float = Field(0.0, ge=0, description="adamw: decoupled weight decay, times lr.")


def server_step(state: ServerState, delta: Adapter, server: ServerOptimizer) -> ServerState:
    """Returns the state after one server step along ``delta`` (the cohort's mean, shaped like the adapter).

    What is new in the state takes the memory of ``delta``, which is not to be used again: with the plain step a server
    then holds two adapters, the old one and the sum that becomes the new one.
    """
    if server.optimizer == "sgd":
        return _sgd(state, delta, server)
    return _adam(state, delta, server)


def _sgd(state: ServerState, delta: Adapter, server: ServerOptimizer) -> ServerState:
    if server.momentum:
        velocity = state.slots.get("momentum") or zeros_like(delta)
        velocity = combine(lambda v, d: d.add_(server.momentum * v), velocity, delta)
        adapter = combine(lambda x, v: x + server.lr * v, state.adapter, velocity)
        return replace(state, adapter=adapter, slots={**state.slots, "momentum": velocity})
    step = delta if server.lr == 1.0 else combine(lambda d: d.mul_(server.lr), delta)
    return replace(state, adapter=add_into(step, state.adapter))


def _adam(state: ServerState, delta: Adapter, server: ServerOptimizer) -> ServerState:
    step = state.scalars.get("server_steps", 0.0) + 1
    first = state.slots.get("first_moment") or zeros_like(delta)
    second = state.slots.get("second_moment") or zeros_like(delta)
    second = combine(lambda v, d: server.beta2 * v + (1 - server.beta2) * d * d, second, delta)
    first = combine(lambda m, d: d.mul_(1 - server.beta1).add_(server.beta1 * m), first, delta)  # ends the delta
    decay = 1 - server.lr * server.weight_decay if server.optimizer == "adamw" else 1.0

    def update(x: Tensor, m: Tensor, v: Tensor) -> Tensor:
        m_hat = m / (1 - server.beta1**step)
        v_hat = v / (1 - server.beta2**step)
        return torch.add(x * decay, m_hat / (v_hat.sqrt() + server.eps), alpha=server.lr)

    return ServerState(
        adapter=combine(update, state.adapter, first, second),
        slots={**state.slots, "first_moment": first, "second_moment": second},
        scalars={**state.scalars, "server_steps": step},
    )
