"""Tokens and batches: every text is tokenised once; batches are padded to their own longest text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from fslora.data.tokens import tokenised
from fslora.data.types import Examples
from fslora.memory import common_size
from fslora.rng import Rng
from fslora.types import Batch, Tensor

IGNORED = -100
"""In ``token_labels``: nothing is to be predicted here (torch's and transformers' convention)."""
TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Encoded:
    """A split as token ids."""

    fields: dict[str, list[list[int]]]
    """Field (``input_ids``, ``token_type_ids``; ``token_labels``: what to predict at each position) → one list per
    example."""
    labels: np.ndarray
    """[n] int64 classes (strata where there are none), or float32 numbers."""
    truncated: int
    """How many texts were longer than the limit and were cut."""
    pad_id: int
    shortened: int = 0
    """How many responses were longer than the whole context and lost their end."""
    columns: Mapping[str, list[Any]] = field(default_factory=dict)
    """What only the evaluation needs, one entry per example."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per example, int64 [n]."""
        return np.array([len(ids) for ids in self.fields["input_ids"]], dtype=np.int64)

    def take(self, index: np.ndarray) -> Encoded:
        """Returns the examples of ``index`` as a split of their own."""
        fields = {name: [lists[i] for i in index] for name, lists in self.fields.items()}
        columns = {name: [column[i] for i in index] for name, column in self.columns.items()}
        return Encoded(fields, self.labels[index], 0, self.pad_id, 0, columns)

    def batch(self, index: Sequence[int] | np.ndarray) -> Batch:
        """Returns the examples of ``index`` as tensors [b t], padded on the right to the longest of them."""
        lengths = np.array([len(self.fields["input_ids"][i]) for i in index])
        there = np.arange(lengths.max()) < lengths[:, None]
        tensors = {"attention_mask": torch.from_numpy(there.astype(np.int64))}
        for name, lists in self.fields.items():
            filled = np.full(there.shape, padding(name, self.pad_id), dtype=np.int64)
            filled[there] = list(chain.from_iterable(lists[i] for i in index))
            tensors[name] = torch.from_numpy(filled)
        tensors["labels"] = torch.from_numpy(self.labels[np.asarray(index)])
        return tensors

    def evaluated(self, tokens: int = TOKENS_PER_BATCH) -> Iterator[tuple[np.ndarray, Batch]]:
        """Yields all examples, those of similar length together: indices [b] and their tensors [b t]."""
        for index, width in by_length(self.lengths, tokens):
            yield index, padded(self.batch(index), width, self.pad_id)


def padded(batch: Batch, width: int, pad_id: int) -> Batch:
    """Returns a batch whose texts [b t] are padded on the right to this width, [b width]."""
    return {
        name: functional.pad(tensor, (0, width - tensor.shape[1]), value=padding(name, pad_id))
        if tensor.dim() == 2
        else tensor
        for name, tensor in batch.items()
    }


def padding(name: str, pad_id: int) -> int:
    """Returns what fills up a field of a batch."""
    return {"input_ids": pad_id, "token_labels": IGNORED}.get(name, 0)


def step_width(widths: Collection[int], positions: int) -> int:
    """Returns the tokens to which batches of these widths are padded together; those of one width stay as they are.

    The longest's, rounded up where a model of so many ``positions`` has room: two may be reserved, as RoBERTa's are.
    """
    longest = max(widths)
    return common_size(longest, positions - 2) if len(set(widths)) > 1 else longest


def encode(examples: Examples, tokenizer: Any, max_length: int) -> Encoded:
    """Returns the examples as token ids, cut to ``max_length`` tokens; how many were cut is counted."""
    if len(examples) == 0:
        return Encoded({"input_ids": []}, examples.labels, 0, tokenizer.pad_token_id)
    whole = tokenised(tokenizer, examples.texts, examples.pairs)
    cut = sum(len(ids) > max_length for ids in whole["input_ids"])
    if cut:
        whole = tokenised(tokenizer, examples.texts, examples.pairs, max_length)
    return Encoded(whole, examples.labels, cut, tokenizer.pad_token_id)


def by_length(lengths: np.ndarray, tokens: int = TOKENS_PER_BATCH) -> Iterator[tuple[np.ndarray, int]]:
    """Yields index arrays of texts of similar length, at most about ``tokens`` tokens each, and their padded width.

    Widths are few (`common_size`), and none is beyond the longest text.
    """
    order = np.argsort(lengths, kind="stable")
    widths = [min(common_size(int(n), 2 * int(n)), int(lengths[order[-1]])) for n in lengths[order]]
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and widths[stop] * (stop + 1 - start) <= tokens:
            stop += 1
        yield order[start:stop], widths[stop - 1]
        start = stop


def local_batches(
    lengths: np.ndarray, index: np.ndarray, batch_size: int, steps: int | None, epochs: int | None, rng: Rng
) -> list[np.ndarray]:
    """Returns the example indices of one client's local steps in one round.

    Examples are drawn without replacement, pass after pass. The round's draw is then sorted by length and cut
    into batches of similar lengths, which are visited in an order that ``rng``'s round shares between
    clients: concurrent clients train on texts of similar length, so little is padding.

    Args:
        lengths: Tokens per example of the whole split, [n].
        index: The client's own examples.
        batch_size: Examples per step; a client that holds fewer uses all it has.
        steps: Local steps; or None with ``epochs``.
        epochs: Passes over ``index``.
        rng: The client's stream of this round.
    """
    size = min(batch_size, len(index))
    count = steps if steps is not None else max(1, epochs or 1) * -(-len(index) // size)
    needed = count * size if steps is not None else (epochs or 1) * len(index)
    passes = -(-needed // len(index))
    stream = rng.numpy()
    drawn = np.concatenate([stream.permutation(index) for _ in range(passes)])[:needed]
    ordered = drawn[np.argsort(lengths[drawn], kind="stable")]
    return np.array_split(ordered, count)


def length_order(count: int, rng: Rng) -> Tensor:
    """Returns the order in which a round visits ``count`` batches of rising length; shared by its clients."""
    return torch.randperm(count, generator=rng.torch())
