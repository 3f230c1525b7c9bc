"""The values that the whole package speaks in, and the one legend of tensor dimensions.

Legend: ``c`` clients in a cohort, ``b`` batch, ``t`` tokens, ``i`` d_in, ``o`` d_out, ``r`` server rank,
``k`` a client's rank. A layer computes ``x W0ᵀ + scale · (x Aᵀ) Bᵀ`` with A [r i] and B [o r].

B is kept rank-major, as ``Bt`` [r o]: one rank-one part is then one row of A and one row of Bt, so taking
and scattering a sketch touches contiguous rows. PEFT's layout [o r] is made at export and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from fslora.rng import Rng

Tensor = torch.Tensor
Rows = Mapping[str, Tensor]
"""Layer name → int32 [k], strictly increasing: which of the server's r rank-one parts a client holds."""
Factors = Literal["both", "A", "B"]
"""Which factors of a pair are trained, or travel."""
Weighting = Literal["uniform", "examples"]
"""How clients count in a mean: equally, or by their numbers of examples."""


@dataclass(frozen=True)
class LoRA:
    """The low-rank pair of one layer; its contribution to the weight is ``scale · Btᵀ A``, [o i].

    In a message, a factor that does not travel has no rows.
    """

    A: Tensor
    """[r i] float32."""
    Bt: Tensor
    """[r o] float32: B transposed."""
    scale: float
    """What multiplies B A: alpha / rank at the server, times r / k in a client's sketch."""

    @property
    def rank(self) -> int:
        """The number of rank-one parts."""
        return max(self.A.shape[0], self.Bt.shape[0])

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
    def rank(self) -> int:
        """The largest rank of its layers; 0 without any."""
        return max((pair.rank for pair in self.layers.values()), default=0)

    def only(self, factors: Factors) -> Adapter:
        """Returns the part of it that travels: the other factor's rows are left out, dense tensors stay."""
        if factors == "both":
            return self
        layers = {
            name: LoRA(
                # Not a view: what travels, or is kept, must not hold the other factor's memory.
                A=pair.A.new_empty(0, pair.A.shape[1]) if factors == "B" else pair.A,
                Bt=pair.Bt.new_empty(0, pair.Bt.shape[1]) if factors == "A" else pair.Bt,
                scale=pair.scale,
            )
            for name, pair in self.layers.items()
        }
        return Adapter(layers, self.dense)

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
    template: Template
    """Shapes and scales."""


@dataclass(frozen=True)
class BaseUpdate:
    """A change of the frozen base that every client has to make, in the order of the versions."""

    version: int
    """From 1. A client that has this version already leaves the update out."""
    adapter: Adapter
    """Pairs to add to the base's weights; as it travels, so that a factor drawn from a seed has no rows."""
    whole: bool = False
    """Whether this is the sum of all updates so far, to be added to the base as it was before any."""


@dataclass(frozen=True)
class Broadcast:
    """What travels from the server to one client."""

    adapter: Adapter
    """What the client gets, at its own rank and scale. A factor that it has, or draws by itself, has no rows."""
    rows: Rows | None = None
    """Which of the server's rank-one parts the client trains; None where the method draws no index sets."""
    base: tuple[BaseUpdate, ...] = ()
    """The changes of the base that the client has missed, oldest first."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Whatever else travels: seeds, ranks."""

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor as it stands, index sets included; what travels is `fslora.wire`'s."""
        base = sum(update.adapter.nbytes for update in self.base)
        return self.adapter.nbytes + base + _nbytes(self.rows) + _nbytes(self.extras)


@dataclass(frozen=True)
class ClientUpdate:
    """What travels back from one client."""

    client: int
    """The client's id."""
    adapter: Adapter
    """Deltas or trained values, as the method says. A factor that does not travel has no rows."""
    examples: int
    """Training examples of the client; what weighting by size counts."""
    rows: Rows | None = None
    """The index sets of the broadcast that this answers."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Whatever else travels: scores, ranks."""

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor as it stands, index sets included; what travels is `fslora.wire`'s."""
        return self.adapter.nbytes + _nbytes(self.rows) + _nbytes(self.extras)

    def weight(self, weighting: Weighting) -> float:
        """Returns how much this update counts in a mean."""
        return 1.0 if weighting == "uniform" else float(self.examples)


@dataclass(frozen=True)
class ClientMemory:
    """What one client keeps from one of its rounds to the next; it never travels."""

    slots: Mapping[str, Adapter] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(adapter.nbytes for adapter in self.slots.values())


@dataclass(frozen=True)
class Site:
    """What a client knows without being told: itself, the shapes of the model, its own memory."""

    client: Client
    template: Template
    memory: ClientMemory = ClientMemory()


@dataclass(frozen=True)
class ServerState:
    """All that the server carries from round to round; saving and resuming need nothing else."""

    adapter: Adapter
    slots: Mapping[str, Adapter] = field(default_factory=dict)
    """Further adapter-shaped state, such as the moments of a server optimizer."""
    scalars: Mapping[str, float] = field(default_factory=dict)
    """Counters and the like; those whose names begin with ``report.`` are written beside each round's metrics."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.adapter.nbytes + sum(slot.nbytes for slot in self.slots.values())


Batch = Mapping[str, Tensor]
"""A model's inputs for b examples, [b t] each, padded on the right to their own longest, and ``labels`` [b]."""


@dataclass(frozen=True)
class Start:
    """What one client trains from, and how."""

    adapter: Adapter
    """Complete pairs, at the client's own rank and scale, and the dense tensors."""
    trains: Factors = "both"
    """Which factors are trained; the other one stays as it is, in the forward pass. The same for a whole cohort."""
    frozen: Mapping[str, LoRA] = field(default_factory=dict)
    """Layer → a further pair in the forward pass that is not trained: parts folded into this client's base."""
    penalty: Callable[[Adapter], Tensor] | None = None
    """A scalar of the client's adapter that is added to its loss; None for none."""
    measures_sensitivity: bool = False
    """Whether to return the sensitivity of every rank-one part (`Trained.sensitivity`)."""


@dataclass(frozen=True)
class LocalProblem:
    """What an engine trains for one client: a start and the batches of its local steps, in order."""

    client: int
    start: Start
    batches: Sequence[Batch]
    rng: Rng
    """For dropout."""


@dataclass(frozen=True)
class Trained:
    """What an engine gives back for one client."""

    client: int
    adapter: Adapter
    losses: tuple[float, ...]
    """Mean loss of each local step, before the step, without the penalty."""
    sensitivity: Mapping[str, Tensor] = field(default_factory=dict)
    """Layer → [k]: mean of |w · ∂loss/∂w| over the entries of each trained rank-one part and over the local steps.

    Source: AdaLoRA, arXiv 2303.10512, equation 8, before smoothing. Empty where the start did not ask for it.
    """


def _nbytes(tensors: Mapping[str, Tensor] | None) -> int:
    return 0 if tensors is None else sum(tensor.nbytes for tensor in tensors.values())
