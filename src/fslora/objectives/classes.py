"""A class per text (or pair of texts), and a number per text: transformers' sequence classifiers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from fslora.config import ModelConfig
from fslora.data.batches import Encoded, encode
from fslora.data.types import Examples
from fslora.metrics import Scores, class_scores, value_scores
from fslora.objectives.base import Columns, Objective, Predictions, Reader
from fslora.types import Batch, Tensor


@dataclass(frozen=True)
class Classes(Objective):
    """Cross-entropy over classes, one unit per example."""

    label_names: tuple[str, ...]
    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_task: ClassVar[str | None] = "SEQ_CLS"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Accuracy first."""
        return ("accuracy", "macro_f1", "matthews", *(("f1",) if len(self.label_names) == 2 else ()))

    def encode(self, examples: Examples, tokenizer: Any, model: ModelConfig) -> Encoded:
        """Returns the texts as token ids, cut to ``max_length``."""
        return encode(examples, tokenizer, model.max_length)

    def losses(self, base: Reader, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the cross-entropy of each example."""
        logits = base.logits(batch)
        each = functional.cross_entropy(logits.float(), batch["labels"].to(logits.device), reduction="none")
        return each, torch.arange(len(each), device=each.device)

    def predict(self, base: Reader, data: Encoded) -> Predictions:
        """Returns losses and the likeliest classes."""
        losses, predicted = np.zeros(len(data)), np.zeros(len(data), dtype=np.int64)
        for index, batch in data.evaluated():
            logits = base.logits(batch).float().cpu()
            losses[index] = functional.cross_entropy(logits, batch["labels"], reduction="none").numpy()
            predicted[index] = logits.argmax(1).numpy()
        return Predictions({"loss": losses, "predicted": predicted, "labels": data.labels}, self.scores)

    def scores(self, columns: Columns) -> Scores:
        """Returns mean loss, accuracy, macro F1, Matthews correlation and, of two classes, F1."""
        found = class_scores(columns["predicted"], columns["labels"], len(self.label_names))
        return {**found, "loss": float(columns["loss"].mean())}

    def usage(self, max_length: int) -> str:
        """Returns lines that classify a text."""
        return f"""labels = {list(self.label_names)!r}
inputs = processor("A text.", return_tensors="pt", truncation=True, max_length={max_length})
print(labels[model(**inputs).logits.argmax().item()])"""


@dataclass(frozen=True)
class Value(Objective):
    """Squared error of one number per text. The model learns it standardised by nothing: scale it in the data."""

    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_task: ClassVar[str | None] = "SEQ_CLS"

    @property
    def model_options(self) -> dict[str, Any]:
        """One output."""
        return {"num_labels": 1, "problem_type": "regression"}

    @property
    def metrics(self) -> tuple[str, ...]:
        """The Pearson correlation first."""
        return ("pearson", "spearman")

    def encode(self, examples: Examples, tokenizer: Any, model: ModelConfig) -> Encoded:
        """Returns the texts as token ids, with their numbers for labels."""
        values = np.array(examples.columns["value"], dtype=np.float32)
        return replace(encode(examples, tokenizer, model.max_length), labels=values)

    def losses(self, base: Reader, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the squared error of each example."""
        predicted = base.logits(batch).float().squeeze(1)
        each = (predicted - batch["labels"].to(predicted.device)).square()
        return each, torch.arange(len(each), device=each.device)

    def predict(self, base: Reader, data: Encoded) -> Predictions:
        """Returns squared errors and the predicted numbers."""
        predicted = np.zeros(len(data))
        for index, batch in data.evaluated():
            predicted[index] = base.logits(batch).float().squeeze(1).cpu().numpy()
        columns = {"loss": (predicted - data.labels) ** 2, "predicted": predicted, "labels": data.labels}
        return Predictions(columns, self.scores)

    def scores(self, columns: Columns) -> Scores:
        """Returns the mean squared error as loss, and both correlations."""
        return {**value_scores(columns["predicted"], columns["labels"]), "loss": float(columns["loss"].mean())}

    def usage(self, max_length: int) -> str:
        """Returns lines that predict a number."""
        return f"""inputs = processor("A text.", return_tensors="pt", truncation=True, max_length={max_length})
print(model(**inputs).logits.item())"""
