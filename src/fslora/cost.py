"""What a round costs a client: operations, memory and simulated time, from the tensors that it really has.

Counted as 2 operations per multiply-add of every linear layer, frozen ones included; attention scores, norms and
activation functions are left out, and so are the activations and the base itself in the memory (both are the same for
every method).
"""

from __future__ import annotations

from collections.abc import Sequence

from fslora.config import FleetConfig, LocalConfig
from fslora.data.batches import IGNORED
from fslora.models.base import Base
from fslora.types import Batch, Client, ClientMemory, LoRA, Start


def client_flops(base: Base, start: Start, batches: Sequence[Batch]) -> float:
    """Returns the operations of one client's local steps on its own, padded batches.

    Per token: the frozen weights once forward and once for the input's gradient; each pair's path both ways, and the
    gradient of each factor that is trained. Per token that is predicted: the output layer of a causal model, both ways.
    """
    tokens = sum(base.tokens(batch) for batch in batches)
    predicted = sum(int((batch["token_labels"] != IGNORED).sum()) for batch in batches if "token_labels" in batch)
    examples = sum(len(batch["labels"]) for batch in batches)
    return operations(base, start, tokens, predicted, examples)


def operations(base: Base, start: Start, tokens: int, predicted: int, examples: int) -> float:
    """Returns the operations of local steps over so many padded tokens, tokens to predict and examples."""
    pairs = sum(_pair_parameters(pair, start) for pair in start.adapter.layers.values())
    frozen = sum(4 * (pair.A.numel() + pair.Bt.numel()) for pair in start.frozen.values())
    heads = sum(6 * tensor.numel() for tensor in start.adapter.dense.values())
    written = 4 * predicted * base.output_parameters
    return float(tokens * (4 * base.linear_parameters + pairs + frozen) + written + examples * heads)


def _pair_parameters(pair: LoRA, start: Start) -> int:
    trained = {"both": pair.A.numel() + pair.Bt.numel(), "A": pair.A.numel(), "B": pair.Bt.numel()}[start.trains]
    return 4 * (pair.A.numel() + pair.Bt.numel()) + 2 * trained


def client_memory(start: Start, memory: ClientMemory, local: LocalConfig) -> int:
    """Returns the bytes that a client holds because of the method.

    What it trains counts with its gradient and its optimizer's state; what it only computes with counts once, and so
    does what it keeps between rounds.
    """
    copies = 2 + {"adamw": 2, "sgd": 1 if local.momentum else 0}[local.optimizer]
    trained = start.adapter.only(start.trains).nbytes
    frozen = sum(pair.A.nbytes + pair.Bt.nbytes for pair in start.frozen.values())
    return copies * trained + (start.adapter.nbytes - trained) + frozen + memory.nbytes


def simulated_seconds(fleet: FleetConfig, client: Client, largest: int, down: int, up: int, flops: float) -> float:
    """Returns how long a client takes for download, training and upload, by the speeds of ``[fleet]``."""
    speed = client.rank / largest if fleet.slowness == "by-rank" else 1.0
    return ((down + up) * 8 / (fleet.megabits * 1e6) + flops / (fleet.gigaflops * 1e9)) / speed
