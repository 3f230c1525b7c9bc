"""The values that the whole package speaks in, and the one legend of tensor dimensions.

Legend: ``c`` clients in a cohort, ``b`` batch, ``t`` tokens, ``i`` d_in, ``o`` d_out, ``r`` server rank,
``k`` a client's rank. A layer computes ``x W0ᵀ + scale · (x Aᵀ) Bᵀ`` with A [r i] and B [o r].

B is kept rank-major, as ``Bt`` [r o]: one rank-one part is then one row of A and one row of Bt, so taking
and scattering a sketch touches contiguous rows. PEFT's layout [o r] is made at export and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fslora.rng import Rng

Tensor = torch.Tensor
Rows = Mapping[str, Tensor]
"""Layer name → int32 [k], strictly increasing: which of the server's r rank-one parts a client holds."""


@dataclass(frozen=True)
class LoRA:
    """The low-rank pair of one layer; its contribution to the weight is ``scale · Btᵀ A``, [o i]."""

    A: Tensor
    """[r i] float32."""
    Bt: Tensor
    """[r o] float32: B transposed."""
    scale: float
    """What multiplies B A: alpha / rank at the server, times r / k in a client's sketch."""

    @property
    def rank(self) -> int:
        """The number of rank-one parts."""
        return self.A.shape[0]

    @property
    def delta(self) -> Tensor:
        """The dense contribution to the layer's weight, [o i]. For tests and merging; never in training."""
        return self.scale * self.Bt.T @ self.A


@dataclass(frozen=True)
class Adapter:
    """Everything that is trained: low-rank pairs by layer, and whole tensors such as a head."""

    layers: Mapping[str, LoRA]
    """Module name in the base model → its pair."""
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameter name in the base model → float32 tensor trained and averaged whole (the head)."""

    def tensors(self) -> dict[str, Tensor]:
        """Returns every tensor under a unique name, in a fixed order; nothing is copied."""
        named: dict[str, Tensor] = {}
        for name, pair in self.layers.items():
            named[f"{name}:A"] = pair.A
            named[f"{name}:Bt"] = pair.Bt
        named.update({f"{name}:dense": tensor for name, tensor in self.dense.items()})
        return named

    def with_tensors(self, named: Mapping[str, Tensor]) -> Adapter:
        """Returns the adapter of these layers and scales that holds other tensors, named as ``tensors`` names them."""
        layers = {name: LoRA(named[f"{name}:A"], named[f"{name}:Bt"], pair.scale) for name, pair in self.layers.items()}
        return Adapter(layers, {name: named[f"{name}:dense"] for name in self.dense})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they stand."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


@dataclass(frozen=True)
class Template:
    """What a method needs to know of the model: shapes, the server's rank and scale, the head's start."""

    layers: Mapping[str, tuple[int, int]]
    """Module name → (d_in, d_out)."""
    dense: Mapping[str, Tensor]
    """Parameter name → initial value, float32."""
    rank: int
    """The server's rank r."""
    alpha: float
    """LoRA's alpha; the scale at rank k is alpha / k, or alpha / sqrt(k) with rslora."""
    rslora: bool = False
    """Whether the scale is the rank-stabilised one."""

    def scale(self, rank: int) -> float:
        """Returns what multiplies B A in an ordinary LoRA of this rank."""
        return self.alpha / (rank**0.5 if self.rslora else rank)


@dataclass(frozen=True)
class Client:
    """One member of the fleet."""

    id: int
    rank: int
    """The largest rank it can hold and train."""
    examples: int
    """The number of training examples it holds."""


@dataclass(frozen=True)
class Round:
    """One round as the server plans it."""

    number: int
    """From 0."""
    cohort: tuple[Client, ...]
    """The clients that take part, by increasing id."""
    rng: Rng
    """The round's own stream; methods address their draws below it."""


@dataclass(frozen=True)
class Broadcast:
    """What travels from the server to one client."""

    adapter: Adapter
    """What the client starts from, at its own rank and scale."""
    rows: Rows | None = None
    """Which of the server's rank-one parts these are; None where the method draws no index sets."""

    @property
    def nbytes(self) -> int:
        """Bytes down: every tensor that travels, index sets included."""
        return self.adapter.nbytes + _rows_nbytes(self.rows)


@dataclass(frozen=True)
class ClientUpdate:
    """What travels back from one client."""

    client: int
    """The client's id."""
    delta: Adapter
    """Trained minus received, in the shapes that were received."""
    examples: int
    """Training examples of the client; what weighting by size counts."""
    rows: Rows | None = None
    """The index sets of the broadcast that this answers."""

    @property
    def nbytes(self) -> int:
        """Bytes up: every tensor that travels, index sets included."""
        return self.delta.nbytes + _rows_nbytes(self.rows)


@dataclass(frozen=True)
class ServerState:
    """All that the server carries from round to round; saving and resuming need nothing else."""

    adapter: Adapter
    slots: Mapping[str, Adapter] = field(default_factory=dict)
    """Further adapter-shaped state, such as the moments of a server optimizer."""
    scalars: Mapping[str, float] = field(default_factory=dict)
    """Counters and the like."""


Batch = Mapping[str, Tensor]
"""A model's inputs for b examples, [b t] each, padded on the right to their own longest, and ``labels`` [b]."""


@dataclass(frozen=True)
class LocalProblem:
    """What an engine trains for one client: a start and the batches of its local steps, in order."""

    client: int
    adapter: Adapter
    batches: Sequence[Batch]
    rng: Rng
    """For dropout."""


@dataclass(frozen=True)
class Trained:
    """What an engine gives back for one client."""

    client: int
    adapter: Adapter
    losses: tuple[float, ...]
    """Mean loss of each local step, before the step."""


def _rows_nbytes(rows: Rows | None) -> int:
    return 0 if rows is None else sum(index.nbytes for index in rows.values())
