"""What a model is trained and judged by: one objective per kind of task. Engines and evaluation know no kind by name.

A *unit* is what one loss belongs to: an example, or a token that is to be predicted. A client's loss is the mean over
the units of its batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from fslora.config import ModelConfig
from fslora.data.batches import Encoded
from fslora.data.types import Examples
from fslora.metrics import Scores
from fslora.types import Batch, Tensor

Columns = Mapping[str, np.ndarray]
"""Name → one value per example, [n]."""


class Reader(Protocol):
    """A model as objectives see it; `fslora.models.base.Base` is one."""

    @property
    def vocabulary(self) -> int:
        """How many tokens the model tells apart."""

    def logits(self, batch: Batch) -> Tensor:
        """Returns the logits for a batch."""

    def token_losses(self, batch: Batch, at: Tensor, labels: Tensor) -> Tensor:
        """Returns a causal model's cross-entropy [u] at the positions ``at``, bool [b t], of tokens ``labels`` [u]."""

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[str]:
        """Returns what a causal model writes after each prompt, at most so many tokens."""


@dataclass(frozen=True)
class Predictions:
    """What a model said of each example, and how that is scored."""

    columns: Columns
    score: Callable[[Columns], Scores]

    @property
    def losses(self) -> np.ndarray:
        """[n] each example's loss: its own, or the sum over its tokens."""
        return self.columns["loss"]

    def scores(self, index: np.ndarray | slice = slice(None)) -> Scores:
        """Returns the loss and the metrics over the examples of ``index``."""
        return self.score({name: column[index] for name, column in self.columns.items()})


def joined(parts: Sequence[Predictions]) -> Predictions:
    """Returns the predictions of several parts, one after the other."""
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    return Predictions(columns, parts[0].score)


class Objective(ABC):
    """One kind of task."""

    auto: ClassVar[str]
    """The class of transformers that loads its models."""
    peft_task: ClassVar[str | None]
    """What PEFT calls it; None where it has no name for it."""
    has_head: ClassVar[bool] = True
    """Whether a head that is made for the task is trained whole."""
    processor: ClassVar[str] = "AutoTokenizer"
    """What turns examples into a model's inputs."""
    label_names: tuple[str, ...] = ()
    """The classes that the head tells apart."""

    @property
    def model_options(self) -> dict[str, Any]:
        """What the model is loaded with beside its name."""
        return {
            "num_labels": len(self.label_names),
            "id2label": dict(enumerate(self.label_names)),
            "label2id": {name: index for index, name in enumerate(self.label_names)},
        }

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """The names of what ``scores`` holds beside the loss; the first one is what runs are judged by."""

    @abstractmethod
    def encode(self, examples: Examples, tokenizer: Any, model: ModelConfig) -> Encoded:
        """Returns the examples as a model takes them; what had to be cut is counted."""

    @abstractmethod
    def losses(self, base: Reader, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns every unit's loss [u], float32, and its example's place in the batch [u]; both on the device."""

    @abstractmethod
    def predict(self, base: Reader, data: Encoded) -> Predictions:
        """Returns the predictions on every example of a split; the base has its adapter attached."""

    @abstractmethod
    def usage(self, max_length: int) -> str:
        """Returns Python lines that use ``model`` and ``processor`` on one example; nothing of the data is quoted."""

    def card(self, base_name: str, max_length: int) -> str:
        """Returns Python lines that load an exported adapter and use it."""
        options = self.model_options
        given = "".join(f", {key}={options[key]!r}" for key in ("num_labels", "problem_type") if key in options)
        return f"""from peft import PeftModel
from transformers import {self.auto}, {self.processor}

base = {base_name!r}  # or a local folder with the same weights
model = {self.auto}.from_pretrained(base{given})
model = PeftModel.from_pretrained(model, "path/to/this/folder").eval()
processor = {self.processor}.from_pretrained(base)
{self.usage(max_length)}"""
