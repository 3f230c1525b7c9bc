"""What the clients will compute: data without a model's weights, or without data at all, and every batch of a run.

Batches are those of the run itself, because every draw has an address; only the tokens may be estimates, where there is
no tokenizer, or an assumption, where the data are not to be read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Literal

import numpy as np
import torch

from fslora.baseline import MOST_TRAINING_EXAMPLES
from fslora.config import Experiment
from fslora.data import KINDS
from fslora.data.batches import (
    IGNORED,
    TOKENS_PER_BATCH,
    Encoded,
    by_length,
    length_order,
    local_batches,
    padded,
    step_width,
)
from fslora.data.partition import Partition, Shares
from fslora.data.types import Dataset, Examples, Kind
from fslora.engine.cohort import PASS_TOKENS, passes
from fslora.fleet import build_fleet, sample_cohort
from fslora.models.base import Base
from fslora.models.load import Outline, device_of, outline_base
from fslora.objectives import metric_of, objective_of
from fslora.objectives.causal import LOGITS_PER_BATCH
from fslora.prepare import Federation, Here, Sites, prepare_sites
from fslora.rng import Rng
from fslora.types import Batch, Client

Certainty = Literal["counted", "estimated", "assumed"]
CHARACTERS_PER_TOKEN = 4
Chosen = tuple[Encoded, np.ndarray]
"""Data, and which of its examples [n]."""
CLIENT_ROUNDS = 4000
"""So many draws of clients are looked at; of longer runs, the first rounds."""


@dataclass(frozen=True)
class OutlinedImages(Encoded):
    """Images by their number and size: none is opened."""

    side: int = 224
    tokens: int = 197

    @property
    def lengths(self) -> np.ndarray:
        """Positions per image, int64 [n]."""
        return np.full(len(self), self.tokens, dtype=np.int64)

    def batch(self, index: Sequence[int] | np.ndarray) -> Batch:
        """Returns pixels without values, and labels."""
        pixels = torch.empty(len(index), 3, self.side, self.side, device="meta")
        return {"pixel_values": pixels, "labels": torch.from_numpy(self.labels[np.asarray(index)])}


def outlined(experiment: Experiment, with_data: bool, here: Here = None) -> tuple[Federation, Outline, Certainty]:
    """Returns a federation whose base has no weights, that base, and how far the tokens are to be relied on.

    Args:
        experiment: What it is of.
        with_data: Whether the data are read.
        here: Which of them, where they are at sites.

    Raises:
        DataError: The data or their partition cannot be used.
        ModelError: The base's configuration cannot be read, or it cannot be adapted.
    """
    sites = prepare_sites(experiment, here) if with_data else _assumed_sites(experiment)
    outline = outline_base(experiment.model, experiment.adapter, sites.objective)
    dataset, tokenizer = sites.dataset, outline.base.tokenizer
    splits = (dataset.train, dataset.validation, dataset.test)
    certainty: Certainty = "counted" if with_data else "assumed"
    encoded: list[Encoded]
    if dataset.kind == "images":
        encoded = [_images(split, outline.base) for split in splits]
    elif with_data and tokenizer is not None:
        encoded = [sites.objective.encode(split, tokenizer, experiment.model) for split in splits]
    else:
        if with_data:
            certainty = "estimated"
        longest = experiment.model.max_length
        encoded = [_stand_in(split, dataset.kind, longest, full=not with_data) for split in splits]
    return Federation(experiment, sites, outline.base, *encoded), outline, certainty


def _assumed_sites(experiment: Experiment) -> Sites:
    """Equally large clients of one class and another; nothing is read."""
    fleet, local, rng = experiment.fleet, experiment.local, Rng(experiment.run.seed)
    each = max(1, experiment.data.max_train // fleet.clients)
    if not experiment.data.max_train:
        each = local.batch_size * (local.steps or 1)
    kind = KINDS[experiment.data.task]
    names = ("no", "yes") if kind in ("classes", "images", "tags") else ()

    def examples(count: int) -> Examples:
        return Examples(("",) * count, np.zeros(count, dtype=np.int64))

    train = examples(each * fleet.clients)
    sides = (examples(experiment.data.max_validation), examples(experiment.data.max_test))
    dataset = Dataset(f"{experiment.data.task}, not read", names, train, *sides, {}, kind)
    sizes = np.full(fleet.clients, each)
    clients = build_fleet(fleet, experiment.adapter.rank, sizes, rng.child("fleet"))
    objective = objective_of(dataset, experiment.data)
    parts = Partition(Shares.of(np.arange(len(train)), sizes), Shares.of(np.arange(0), 0 * sizes), "", {})
    return Sites(dataset, "assumed", parts, clients, objective, metric_of(objective, experiment.data))


def _stand_in(split: Examples, kind: Kind, longest: int, full: bool) -> Encoded:
    """Ids that are all the same: as many as the text's length lets expect, or as many as fit."""

    def tokens(texts: Sequence[str]) -> np.ndarray:
        return np.array([2 + len(text) // CHARACTERS_PER_TOKEN for text in texts], dtype=np.int64)

    if full:
        prompts = np.full(len(split), 0 if kind == "causal" else longest)
        written = longest - prompts
    else:
        pairs = 0 if split.pairs is None else tokens(split.pairs)
        prompts = tokens(split.texts) + pairs
        written = tokens(split.columns["target"]) if kind == "causal" else np.zeros(len(split), dtype=np.int64)
    lengths = np.minimum(prompts + written, longest)
    fields = {"input_ids": [[0] * int(length) for length in lengths]}
    if kind == "causal":
        ends = np.minimum(written, lengths)
        fields["token_labels"] = [[IGNORED] * int(n - m) + [0] * int(m) for n, m in zip(lengths, ends, strict=True)]
    if kind == "tags":
        fields["token_labels"] = [[0] * int(length) for length in lengths]
    labels = np.array(split.columns["value"], dtype=np.float32) if "value" in split.columns else split.labels
    return Encoded(fields, labels, int((prompts + written > longest).sum()), 0)


def _images(split: Examples, base: Base) -> OutlinedImages:
    size = getattr(base.tokenizer, "crop_size", None) or getattr(base.tokenizer, "size", None) or {}
    side = size.get("height") or size.get("shortest_edge") or getattr(base.model.config, "image_size", None) or 224
    empty = OutlinedImages({}, split.labels, 0, 0, side=side)
    return replace(empty, tokens=base.tokens(empty.batch([0])) if len(split) else 1)


@dataclass(frozen=True)
class Turn:
    """One client's local steps in one round."""

    client: Client
    parts: tuple[np.ndarray, ...]
    """The examples of each step, in the order in which they are visited."""


@dataclass(frozen=True)
class Shapes:
    """How many differently shaped passes and batches a run has."""

    passes: int
    """Of training."""
    during: int
    """Batches of evaluations between rounds."""
    after: int
    """Further batches that are evaluated before the first round and after the last one alone."""
    baseline: int
    """Further batches that only the linear head's features are computed on: the base without an adapter."""


@dataclass(frozen=True)
class Workload:
    """Every batch of a federation's run."""

    federation: Federation

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens per training example, [n]."""
        return self.federation.train.lengths

    @cached_property
    def predicted(self) -> np.ndarray:
        """Tokens to be predicted per training example, [n]; 0 where examples are."""
        return predicted(self.federation.train, np.arange(len(self.federation.train)))

    @cached_property
    def cohorts(self) -> list[tuple[Client, ...]]:
        """Who takes part, round by round."""
        federation = self.federation
        size = "all" if federation.experiment.fleet.pooled else federation.experiment.fleet.cohort
        rounds = range(federation.experiment.run.rounds)
        return [sample_cohort(federation.trainers, size, federation.rng.child("round", t, "cohort")) for t in rounds]

    @cached_property
    def turns(self) -> list[list[Turn]]:
        """What each client does, round by round: of all rounds, or of the first ones of a long run."""
        rounds = max(1, CLIENT_ROUNDS // len(self.cohorts[0]))
        return [[self._turn(client, t) for client in cohort] for t, cohort in enumerate(self.cohorts[:rounds])]

    def _turn(self, client: Client, number: int) -> Turn:
        federation, local = self.federation, self.federation.experiment.local
        rng = federation.rng.child("round", number)
        index, stream = federation.shares[client.id], rng.child("batches", client.id)
        parts = local_batches(self.lengths, index, federation.batch_size, local.steps, local.epochs, stream)
        return Turn(client, tuple(parts[i] for i in length_order(len(parts), rng.child("order")).tolist()))

    def counts(self, turn: Turn) -> tuple[int, int, int]:
        """Returns the padded tokens, the tokens to predict and the examples of a client's round."""
        tokens = sum(len(part) * int(self.lengths[part].max()) for part in turn.parts)
        written = sum(int(self.predicted[part].sum()) for part in turn.parts)
        return tokens, written, sum(map(len, turn.parts))

    def heaviest(self, chunk: int) -> list[np.ndarray]:
        """Returns the examples, by client, of the local step that takes most memory in any chunk of any round."""
        return max(self._steps(chunk), key=self._weight)

    def lightest(self, chunk: int) -> list[np.ndarray]:
        """Returns those of the step that takes least."""
        return min(self._steps(chunk), key=self._weight)

    def _steps(self, chunk: int) -> Iterator[list[np.ndarray]]:
        return (parts for turns in self.turns for parts in _steps(turns, chunk))

    def _weight(self, parts: list[np.ndarray]) -> float:
        """About how many numbers the largest pass of a step leaves behind."""
        base = self.federation.base
        return max(
            rows * width * _width(base) + sum(int(self.predicted[part].sum()) for part in own) * _logits(base)
            for own in self._passes(parts)
            for rows, _, width in [self._shape(own)]
        )

    def _passes(self, parts: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """The examples, by client, of each pass that the engine makes of a step."""
        most = PASS_TOKENS.get(device_of(self.federation.experiment.model).type)
        found = passes([len(part) for part in parts], self._longest(parts), most)
        return [[parts[c] for c in members] for members in found]

    def _shape(self, own: Sequence[np.ndarray]) -> tuple[int, int, int]:
        """Examples, clients and padded width of a pass."""
        return sum(map(len, own)), len(own), step_width(self._longest(own), self.federation.base.positions)

    def _longest(self, parts: Sequence[np.ndarray]) -> list[int]:
        return [int(self.lengths[part].max()) for part in parts]

    def shapes(self, chunk: int) -> Shapes:
        """Returns how many differently shaped passes and evaluation batches a run has."""
        different = {self._shape(own) for parts in self._steps(chunk) for own in self._passes(parts)}
        often, once = map(self._batches, self.scored)
        train, run = self.federation.train, self.federation.experiment.run
        linear = self.federation.sites.dataset.kind == "classes" and run.eval_on == "server"
        baseline = self._batches([(train, np.arange(min(len(train), MOST_TRAINING_EXAMPLES)))] if linear else [])
        return Shapes(len(different), len(often), len(once - often), len(baseline - often - once))

    @cached_property
    def scored(self) -> tuple[list[Chosen], list[Chosen]]:
        """What evaluations between rounds score, and what those at the run's two ends score beside it."""
        federation = self.federation
        held = [(federation.train, federation.sites.partition.holdout.flat)]
        if federation.experiment.run.eval_on == "clients":
            return held, []
        validation, test = ((split, np.arange(len(split))) for split in (federation.validation, federation.test))
        return [validation], [test, *held]

    def _batches(self, chosen: Sequence[Chosen]) -> set[tuple[int, int]]:
        """The shapes of evaluation batches, each of so many texts and so wide."""
        return {
            (len(index), width) for data, own in chosen for index, width in by_length(data.lengths[own], self._most())
        }

    def _most(self) -> int:
        """Tokens of an evaluation's batch."""
        base = self.federation.base
        return (
            TOKENS_PER_BATCH if base.objective.has_head else min(TOKENS_PER_BATCH, LOGITS_PER_BATCH // base.vocabulary)
        )

    def heaviest_evaluation(self) -> Batch | None:
        """Returns the batch of an evaluation that takes most memory; None where nothing is held out."""
        base = self.federation.base
        best: tuple[float, Encoded, np.ndarray, int] | None = None
        for split, own in chain.from_iterable(self.scored):
            lengths, written = split.lengths[own], predicted(split, own)
            for index, width in by_length(lengths, self._most()):
                weight = len(index) * float(width) * _width(base)
                weight += float(written[index].sum()) * _logits(base)
                if best is None or weight >= best[0]:
                    best = weight, split, own[index], width
        return None if best is None else padded(best[1].batch(best[2]), best[3], best[1].pad_id)


def predicted(data: Encoded, index: np.ndarray) -> np.ndarray:
    """Returns the number of tokens to predict in each of these examples, [n]; 0 where the examples themselves are."""
    labels = data.fields.get("token_labels")
    if labels is None:
        return np.zeros(len(index), dtype=np.int64)
    return np.array([len(labels[i]) - Counter(labels[i])[IGNORED] for i in index], dtype=np.int64)


def _width(base: Base) -> float:
    """About how many numbers one position leaves behind in a forward pass."""
    shapes = (base.shape(path) for path in base.targets)
    return float(sum(d_in + d_out for d_in, d_out in shapes))


def _logits(base: Base) -> float:
    """About how many numbers one predicted token leaves behind."""
    return 0.0 if base.objective.has_head else 4.0 * base.vocabulary


def _steps(turns: Sequence[Turn], chunk: int) -> Iterator[list[np.ndarray]]:
    """The local steps that a round's clients take together."""
    for first in range(0, len(turns), chunk):
        together = turns[first : first + chunk]
        for step in range(max(len(turn.parts) for turn in together)):
            yield [turn.parts[step] for turn in together if step < len(turn.parts)]
