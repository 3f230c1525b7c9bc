"""A class per word: transformers' token classifiers. A word's class is learnt and read at its first token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch.nn import functional

from fslora.config import ModelConfig
from fslora.data.batches import IGNORED, Encoded
from fslora.data.types import Examples
from fslora.metrics import Scores, class_scores
from fslora.objectives.base import Columns, Objective, Predictions, Reader
from fslora.types import Batch, Tensor


@dataclass(frozen=True)
class Tags(Objective):
    """Cross-entropy over tags, one unit per word."""

    label_names: tuple[str, ...]
    auto: ClassVar[str] = "AutoModelForTokenClassification"
    peft_task: ClassVar[str | None] = "TOKEN_CLS"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Accuracy over words first."""
        return ("accuracy", "macro_f1", "matthews")

    def encode(self, examples: Examples, tokenizer: Any, model: ModelConfig) -> Encoded:
        """Returns the words as token ids, cut to ``max_length``, with each word's tag at its first token."""
        kwargs: dict[str, Any] = {"is_split_into_words": True, "return_attention_mask": False, "verbose": False}
        words = [list(entry) for entry in examples.columns["words"]]
        if not words:
            return Encoded({"input_ids": [], "token_labels": []}, examples.labels, 0, tokenizer.pad_token_id)
        whole = tokenizer(words, **kwargs)
        cut = sum(len(ids) > model.max_length for ids in whole["input_ids"])
        if cut:
            whole = tokenizer(words, truncation=True, max_length=model.max_length, **kwargs)
        labels = [_at_first_tokens(whole.word_ids(i), tags) for i, tags in enumerate(examples.columns["tags"])]
        return Encoded({**whole, "token_labels": labels}, examples.labels, cut, tokenizer.pad_token_id)

    def losses(self, base: Reader, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the cross-entropy of each word, and the example it stands in."""
        logits, labels = base.logits(batch), batch["token_labels"]
        example, place = (labels != IGNORED).nonzero(as_tuple=True)  # where the labels are: no wait for a GPU
        chosen = logits[example.to(logits.device), place.to(logits.device)]
        wanted = labels[example, place].to(logits.device)
        each = functional.cross_entropy(chosen.float(), wanted, reduction="none")
        return each, example.to(logits.device)

    def predict(self, base: Reader, data: Encoded) -> Predictions:
        """Returns, per example, the sum of its words' losses, their likeliest tags and their tags."""
        losses = np.zeros(len(data))
        predicted, tags = np.empty(len(data), dtype=object), np.empty(len(data), dtype=object)
        for index, batch in data.evaluated():
            logits, labels = base.logits(batch).float().cpu(), batch["token_labels"]
            each = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
            losses[index] = each.sum(1).numpy()
            for place, example in enumerate(index):
                there = labels[place] != IGNORED
                predicted[example] = logits[place][there].argmax(1).numpy()
                tags[example] = labels[place][there].numpy()
        return Predictions({"loss": losses, "predicted": predicted, "tags": tags}, self.scores)

    def scores(self, columns: Columns) -> Scores:
        """Returns mean loss, accuracy, macro F1 and Matthews correlation over words."""
        predicted, tags = np.concatenate(columns["predicted"]), np.concatenate(columns["tags"])
        found = class_scores(predicted, tags, len(self.label_names))
        found.pop("f1", None)
        return {**found, "loss": float(columns["loss"].sum() / len(tags))}

    def usage(self, max_length: int) -> str:
        """Returns lines that tag the tokens of a sentence."""
        return f"""labels = {list(self.label_names)!r}
inputs = processor("Some words.", return_tensors="pt", truncation=True, max_length={max_length})
print([labels[tag] for tag in model(**inputs).logits[0].argmax(-1)])"""


def _at_first_tokens(words: list[int | None], tags: tuple[int, ...]) -> list[int]:
    """Each word's tag at its first token, IGNORED elsewhere; ``words`` says which word a token belongs to."""
    pairs = zip(words, [None, *words[:-1]], strict=True)
    return [tags[word] if word is not None and word != before else IGNORED for word, before in pairs]
