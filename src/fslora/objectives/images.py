"""A class per image: transformers' image classifiers. Images are read when a batch needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from fslora.config import ModelConfig
from fslora.data.batches import Encoded
from fslora.data.types import Examples
from fslora.objectives.classes import Classes
from fslora.types import Batch


@dataclass(frozen=True)
class EncodedImages(Encoded):
    """A split of images by their paths."""

    paths: tuple[str, ...] = ()
    processor: Any = None
    tokens: int = 1
    """Patches per image, for batches of bounded size."""

    @property
    def lengths(self) -> np.ndarray:
        """Patches per image, int64 [n]."""
        return np.full(len(self), self.tokens, dtype=np.int64)

    def take(self, index: np.ndarray) -> EncodedImages:
        """Returns the images of ``index`` as a split of their own."""
        paths = tuple(self.paths[i] for i in index)
        return EncodedImages({}, self.labels[index], 0, 0, paths=paths, processor=self.processor, tokens=self.tokens)

    def batch(self, index: Sequence[int] | np.ndarray) -> Batch:
        """Returns pixels [b channels height width] float32, and labels [b]."""
        from PIL import Image

        images = []
        for i in index:
            with Image.open(self.paths[i]) as image:
                images.append(image.convert("RGB"))
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.from_numpy(self.labels[np.asarray(index)])}


@dataclass(frozen=True)
class Images(Classes):
    """Cross-entropy over classes, one unit per image."""

    auto: ClassVar[str] = "AutoModelForImageClassification"
    peft_task: ClassVar[str | None] = None
    processor: ClassVar[str] = "AutoImageProcessor"

    def encode(self, examples: Examples, tokenizer: Any, model: ModelConfig) -> EncodedImages:
        """Returns the images by their paths; ``tokenizer`` is the image processor."""
        size = tokenizer.size
        side = size.get("height") or size.get("shortest_edge") or 224
        # 16 is the usual side of a patch; this bounds batches of the evaluation, nothing else.
        tokens = max(1, (side // 16) ** 2)
        return EncodedImages({}, examples.labels, 0, 0, paths=examples.texts, processor=tokenizer, tokens=tokens)

    def usage(self, max_length: int) -> str:
        """Returns lines that classify an image."""
        return f"""labels = {list(self.label_names)!r}
inputs = processor(images=[image], return_tensors="pt")  # a PIL image
print(labels[model(**inputs).logits.argmax().item()])"""
