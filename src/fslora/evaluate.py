"""Predictions of adapters on a base, batched and without gradient; what they score on all that is held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fslora.data.batches import Encoded
from fslora.metrics import Scores
from fslora.models.base import Base
from fslora.objectives import Predictions, joined
from fslora.prepare import Federation
from fslora.types import Adapter


@torch.no_grad()
def predict(base: Base, adapter: Adapter, data: Encoded) -> Predictions:
    """Returns the predictions of one adapter on every example of a split."""
    with base.using(adapter):
        return base.objective.predict(base, data)


def predict_dealt(base: Base, adapters: Sequence[Adapter], data: Encoded) -> Predictions:
    """Returns predictions of which every adapter makes its share: the examples are dealt to them in turns.

    With one model per client this estimates the mean over clients of each model's score on the whole split, at the
    cost of scoring one.
    """
    if len(adapters) == 1:
        return predict(base, adapters[0], data)
    speakers = range(min(len(adapters), len(data)))  # of many clients only the first ones have a share
    shares = [np.arange(position, len(data), len(adapters)) for position in speakers]
    dealt = joined([predict(base, adapters[i], data.take(index)) for i, index in enumerate(shares)])
    order = np.argsort(np.concatenate(shares))
    return Predictions({name: column[order] for name, column in dealt.columns.items()}, dealt.score)


@dataclass(frozen=True)
class Scored:
    """What a method ends with on everything that is held out: the test split, and every client's own share."""

    test: Scores
    """On the test split; or the mean over ``own``, where that is what is scored (``run.eval_on``)."""
    own: Mapping[int, Scores]
    """Client → on its own held-out examples; without the clients that have none, or did not answer."""
    by_label: Mapping[str, Scores]
    """Of a mixture (of tasks, say), the scores of each part of the test split; empty where there are no parts."""


def untrained(federation: Federation) -> Adapter:
    """Returns what stands for no training: the base with its fresh head."""
    return Adapter({}, federation.template.dense)


def scored(federation: Federation, adapters: Sequence[Adapter], own: Mapping[int, Scores] | None = None) -> Scored:
    """Returns the scores of the one adapter that all share, or of one per client, by id.

    On the test split the scores of personal models are the mean over clients; on its own examples every client is
    scored with its own.

    Args:
        federation: Base and data.
        adapters: What is scored; an adapter without layers is the base with that head.
        own: The clients' scores on their own examples, where these are elsewhere.
    """
    own = own_scores(federation, adapters) if own is None else own
    if federation.experiment.run.eval_on == "clients":
        return Scored(mean_over_clients(federation, own), own, {})
    tested = predict_dealt(federation.base, adapters, federation.test)
    return Scored(tested.scores(), own, _by_label(federation, tested))


def own_scores(federation: Federation, adapters: Sequence[Adapter]) -> dict[int, Scores]:
    """Returns the scores of each client that has held-out examples here, on these."""
    base, train, holdout = federation.base, federation.train, federation.sites.partition.holdout
    if not len(holdout.flat):
        return {}
    clients = np.flatnonzero(holdout.sizes).tolist()
    if len(adapters) > 1:
        return {client: predict(base, adapters[client], train.take(holdout[client])).scores() for client in clients}
    together, starts = predict(base, adapters[0], train.take(holdout.flat)), holdout.bounds
    return {client: together.scores(slice(starts[client], starts[client + 1])) for client in clients}


def mean_over_clients(federation: Federation, own: Mapping[int, Scores]) -> Scores:
    """Returns the mean of the clients' scores, by their number of held-out examples; empty without any client.

    Of a share of examples, such as accuracy, that is the share over all of them; of any other score it is the mean.
    """
    sizes = federation.sites.partition.holdout.sizes
    total = sum(int(sizes[client]) for client in own)
    names = next(iter(own.values()), {})
    return {name: sum(int(sizes[client]) * own[client][name] for client in sorted(own)) / total for name in names}


def by_label(before: Scored, after: Scored) -> dict[str, dict[str, Scores]]:
    """Returns, per part of a mixture, two adapters' test scores; empty where there are no parts."""
    return {name: {"before": before.by_label[name], "after": scores} for name, scores in after.by_label.items()}


def client_scores(federation: Federation, before: Scored, after: Scored) -> list[dict[str, Any]]:
    """Returns, per client, two adapters' scores on the client's own held-out examples (None without any)."""
    return [
        {
            "id": client.id,
            "rank": client.rank,
            "examples": client.examples,
            "before": before.own.get(client.id),
            "after": after.own.get(client.id),
        }
        for client in federation.sites.fleet
    ]


def _by_label(federation: Federation, tested: Predictions) -> dict[str, Scores]:
    """The test scores of each stratum of a task whose labels are not what is learnt."""
    names, dataset = federation.sites.dataset.label_names, federation.sites.dataset
    if dataset.kind != "causal" or len(names) < 2:
        return {}
    places = {name: np.flatnonzero(dataset.test.labels == label) for label, name in enumerate(names)}
    return {name: tested.scores(index) for name, index in places.items() if len(index)}
