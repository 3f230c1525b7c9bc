"""Text, token by token: causal language models on plain text and on instructions.

Only the responses are learnt, and logits are computed only where something is to be predicted. A prompt that does not
fit into the context loses its beginning, never the response its own; a response that is longer than the whole context
loses its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import numpy as np

from fslora.config import DataConfig, ModelConfig
from fslora.data.answers import found
from fslora.data.batches import IGNORED, TOKENS_PER_BATCH, Encoded, by_length
from fslora.data.tokens import tokenised
from fslora.data.types import Examples
from fslora.errors import ModelError
from fslora.metrics import Scores
from fslora.objectives.base import Columns, Objective, Predictions, Reader
from fslora.types import Batch, Tensor

Ids = list[int]

LOGITS_PER_BATCH = 2**27
"""Entries: what one batch of an evaluation may take for logits (0.5 GiB), whatever the vocabulary."""


@dataclass(frozen=True)
class Causal(Objective):
    """Cross-entropy of the next token, one unit per token of a response."""

    data: DataConfig
    label_names: tuple[str, ...] = ()
    """Strata, such as the tasks of a mixture."""
    auto: ClassVar[str] = "AutoModelForCausalLM"
    peft_task: ClassVar[str | None] = "CAUSAL_LM"
    has_head: ClassVar[bool] = False

    @property
    def model_options(self) -> dict[str, Any]:
        """Nothing: the model keeps its own output layer."""
        return {}

    @property
    def metrics(self) -> tuple[str, ...]:
        """Perplexity; before it what is answered right, where that is evaluated."""
        return {
            "loss": ("perplexity",),
            "choice": ("accuracy", "perplexity"),
            "generate": ("exact_match", "perplexity"),
        }[self.evaluates]

    @property
    def evaluates(self) -> str:
        """What the evaluation looks at: 'loss', 'choice' or 'generate'."""
        return self.data.evaluate if self.data.task == "instruct" else "loss"

    def encode(self, examples: Examples, tokenizer: Any, model: ModelConfig) -> Encoded:
        """Returns prompt and response as one sequence, and the response's tokens as what is to be predicted.

        Raises:
            ModelError: ``data.prompt`` is 'chat' and the tokenizer has no chat template.
        """
        prompts = self._prompts(examples.texts, tokenizer)
        fit = Fitting(model.max_length)
        targets = _responses(examples.texts, examples.columns["target"], tokenizer, self._ends)
        pairs = [fit.sequence(*pair) for pair in zip(prompts, targets, strict=True)]
        columns: dict[str, list[Any]] = {}
        if self.evaluates == "choice":
            candidates = examples.columns["choices"]
            texts = [text for text, several in zip(examples.texts, candidates, strict=True) for _ in several]
            flat = iter(_responses(texts, list(chain.from_iterable(candidates)), tokenizer, self._ends))
            each = [[next(flat) for _ in several] for several in candidates]
            uncounted = Fitting(model.max_length)
            columns["choices"] = [[uncounted.sequence(p, t) for t in ts] for p, ts in zip(prompts, each, strict=True)]
            columns["right"] = [
                several.index(target) for several, target in zip(candidates, examples.columns["target"], strict=True)
            ]
        if self.evaluates == "generate":
            room = model.max_length - self.data.max_new_tokens
            columns["prompt"] = [_without_start(prompt, max(1, room)) for prompt in prompts]
            columns["answer"] = list(examples.columns["answer"])
            columns["options"] = list(examples.columns.get("options", [()] * len(examples)))
        fields = {"input_ids": [ids for ids, _ in pairs], "token_labels": [labels for _, labels in pairs]}
        return Encoded(fields, examples.labels, fit.truncated, tokenizer.pad_token_id, fit.shortened, columns)

    @property
    def _ends(self) -> bool:
        """Whether a response is followed by the end token: pieces of plain text go on."""
        return self.data.task == "instruct"

    def _prompts(self, texts: Sequence[str], tokenizer: Any) -> list[Ids]:
        if not texts:
            return []
        if self.data.task == "instruct" and self.data.prompt == "chat":
            if not getattr(tokenizer, "chat_template", None):
                raise ModelError(
                    "data.prompt is 'chat', but this model's tokenizer has no chat template; use 'headings'"
                )
            texts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
                )
                for text in texts
            ]
            return tokenised(tokenizer, texts, specials=False)["input_ids"]
        starts = _start(tokenizer)
        return [starts + ids for ids in tokenised(tokenizer, texts, specials=False)["input_ids"]]

    def losses(self, base: Reader, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the cross-entropy of each token of the responses, and the example it belongs to."""
        wanted = batch["token_labels"] != IGNORED
        each = base.token_losses(batch, wanted, batch["token_labels"][wanted])
        return each, wanted.nonzero()[:, 0].to(each.device)

    def predict(self, base: Reader, data: Encoded) -> Predictions:
        """Returns each response's loss, summed over its tokens, and whether the answer was right."""
        losses, tokens = self._scored(base, data)
        columns = {"loss": losses, "tokens": tokens}
        if self.evaluates == "choice":
            columns["right"] = self._chosen(base, data)
        if self.evaluates == "generate":
            columns["right"] = self._written(base, data)
        return Predictions(columns, self.scores)

    def scores(self, columns: Columns) -> Scores:
        """Returns the mean loss over tokens, the perplexity, and the share of right answers."""
        loss = float(columns["loss"].sum() / max(1, columns["tokens"].sum()))
        scores = {"loss": loss, "perplexity": float(np.exp(min(loss, 50.0)))}
        if "right" in columns:
            scores[self.metrics[0]] = float(columns["right"].mean())
        return scores

    def _scored(self, base: Reader, data: Encoded) -> tuple[np.ndarray, np.ndarray]:
        """Each sequence's summed loss and number of predicted tokens, [n] both."""
        losses, tokens = np.zeros(len(data)), np.zeros(len(data), dtype=np.int64)
        limit = min(TOKENS_PER_BATCH, LOGITS_PER_BATCH // base.vocabulary)
        for index, batch in data.evaluated(limit):
            each, example = self.losses(base, batch)
            which = example.cpu().numpy()
            losses[index] = np.bincount(which, weights=each.double().cpu().numpy(), minlength=len(index))
            tokens[index] = np.bincount(which, minlength=len(index))
        return losses, tokens

    def _chosen(self, base: Reader, data: Encoded) -> np.ndarray:
        """Whether the likeliest of each example's candidate responses is the right one, bool [n]."""
        counts = [len(several) for several in data.columns["choices"]]
        sequences = list(chain.from_iterable(data.columns["choices"]))
        fields = {"input_ids": [ids for ids, _ in sequences], "token_labels": [labels for _, labels in sequences]}
        flat = Encoded(fields, np.zeros(len(sequences), dtype=np.int64), 0, data.pad_id)
        parts = np.split(self._scored(base, flat)[0], np.cumsum(counts)[:-1])
        return np.array([part.argmin() == right for part, right in zip(parts, data.columns["right"], strict=True)])

    def _written(self, base: Reader, data: Encoded) -> np.ndarray:
        """Whether the text that the model writes after each prompt holds the answer, bool [n]; greedy decoding."""
        right = np.zeros(len(data), dtype=bool)
        prompts, answers, options = (data.columns[name] for name in ("prompt", "answer", "options"))
        lengths = np.array([len(prompt) for prompt in prompts])
        for index, _ in by_length(lengths + self.data.max_new_tokens):
            texts = base.generate([prompts[i] for i in index], self.data.max_new_tokens)
            for i, text in zip(index, texts, strict=True):
                right[i] = found(self.data.extract, text, options[i], answers[i])
        return right

    def usage(self, max_length: int) -> str:
        """Returns lines that write a text."""
        return """inputs = processor("A prompt.", return_tensors="pt")
print(processor.decode(model.generate(**inputs, max_new_tokens=32)[0]))"""


@dataclass
class Fitting:
    """Puts prompt and response into the context, and counts what had to be cut."""

    limit: int
    truncated: int = 0
    """Prompts that lost their beginning."""
    shortened: int = 0
    """Responses that lost their end."""

    def sequence(self, prompt: Ids, response: Ids) -> tuple[Ids, Ids]:
        """Returns (input ids, what is to be predicted at each): the last token of all is only predicted."""
        if len(response) > self.limit:
            self.shortened += 1
            response = response[: self.limit]
        room = max(1, self.limit + 1 - len(response))
        if len(prompt) > room:
            self.truncated += 1
            prompt = _without_start(prompt, room)
        ids = prompt + response
        labels = [IGNORED] * max(0, len(prompt) - 1) + (response if prompt else response[1:])
        return (ids[:-1], labels) if len(ids) > 1 else (ids, [IGNORED])


def _without_start(prompt: Ids, room: int) -> Ids:
    """The end of a prompt behind its first token, which may be the model's start token."""
    return prompt if len(prompt) <= room else prompt[:1] + prompt[len(prompt) - room + 1 :]


def _start(tokenizer: Any) -> Ids:
    """What the tokenizer puts before a text: its start token, if it uses one."""
    ids: Ids = tokenizer("", add_special_tokens=True)["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def _responses(prompts: Sequence[str], texts: Sequence[str], tokenizer: Any, ends: bool) -> list[Ids]:
    """The responses' tokens; a space goes before one whose prompt ends without white space."""
    if not texts:
        return []
    spaced = [
        " " + text if prompt and not prompt[-1].isspace() else text for prompt, text in zip(prompts, texts, strict=True)
    ]
    end = [tokenizer.eos_token_id] if ends and tokenizer.eos_token_id is not None else []
    return [ids + end for ids in tokenised(tokenizer, spaced, specials=False)["input_ids"]]
