"""Numbers in fewer bytes: a float32 tensor as small named tensors, and back.

    tensor ─ share of its entries ─ values [n] and their places ─ float32, bfloat16 or int8 with scales ─ parts

- Top-k (Sparsified SGD with Memory, Stich et al., arXiv 1809.07599): of every tensor the entries of largest magnitude.
  Their places are an int32 each, or one bit for every entry of the tensor, whichever is smaller.
- int8 (QSGD, Alistarh et al., arXiv 1610.02132, with a row's largest magnitude in the place of its norm):
  x ≈ s q with q in -127..127 and s = max|x| / 127, one s for each row, or for all values that top-k kept.

Rounding of int8. To the nearest level the error is at most s / 2, the least there is; but it is not unbiased, and what
is always below half a level is never sent. With a stream of its own, x is rounded up or down at random so that its
expectation is x, with an error below s. The wire (`fslora.wire`) says where it uses which.

What is encoded came from ourselves and is not checked; what is decoded came from somebody else, and is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Literal

import numpy as np
import torch

from fslora.errors import WireError
from fslora.rng import Rng
from fslora.types import Tensor

Numbers = Literal["float32", "bfloat16", "int8"]
"""How a number travels."""
Parts = Mapping[str, Tensor]
"""What travels of one tensor: ``values``, and ``scales``, ``index`` or ``mask`` where there are such."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
LEVELS = 127
"""Of int8, on each side of zero."""


@dataclass(frozen=True)
class Code:
    """How float32 tensors are encoded. The default passes them on as they are."""

    numbers: Numbers = "float32"
    share: float = 1.0
    """Share of the entries of each tensor that is kept; at least one entry."""

    @property
    def lossless(self) -> bool:
        """Whether every tensor comes back as it was."""
        return self.numbers == "float32" and self.share == 1

    def encode(self, tensor: Tensor, rng: Rng | None = None) -> dict[str, Tensor]:
        """Returns the parts of a tensor; none for an empty one.

        Args:
            tensor: float32, of any shape.
            rng: For int8: rounds at random, without bias; by default to the nearest level.
        """
        if not tensor.numel():
            return {}
        if self._kept(tensor.numel()) == tensor.numel():
            return self._numbers(tensor, rng)
        flat = tensor.flatten()
        index = flat.abs().topk(self._kept(len(flat)), sorted=False).indices.sort().values
        return {**self._numbers(flat[index], rng), **_places(index, len(flat))}

    def decode(self, parts: Parts, shape: Sequence[int]) -> Tensor:
        """Returns the tensor of this shape that the parts stand for, float32.

        Raises:
            WireError: A part is missing, too many, of another type or shape, or not finite; or places are none.
        """
        self._check(parts, shape)
        tensor = self.rebuild(parts, shape)
        if not torch.isfinite(tensor).all():
            raise WireError("it is not finite")
        return tensor

    def rebuild(self, parts: Parts, shape: Sequence[int]) -> Tensor:
        """Returns what ``decode`` returns, of parts that are known to be our own."""
        count = prod(shape)
        if not count:
            return torch.zeros(tuple(shape))
        values = parts["values"]
        if self.numbers == "int8":
            rows = _rows(values)
            values = (rows.float() * parts["scales"].unsqueeze(1)).reshape(values.shape)
        values = values.float()
        if self._kept(count) == count:
            return values
        tensor = torch.zeros(count)
        tensor[_indices(parts, count)] = values
        return tensor.reshape(tuple(shape))

    def _kept(self, count: int) -> int:
        # 0.07 · 100 is a little above 7 in floating point.
        return max(1, ceil(self.share * count - 1e-9))

    def _numbers(self, tensor: Tensor, rng: Rng | None) -> dict[str, Tensor]:
        if self.numbers != "int8":
            return {"values": tensor.to(DTYPES[self.numbers])}
        rows = _rows(tensor)
        scales = rows.abs().amax(1) / LEVELS
        levels = torch.where(scales.unsqueeze(1) > 0, rows / scales.unsqueeze(1), 0.0)
        levels = (levels + torch.rand(levels.shape, generator=rng.torch())).floor() if rng else levels.round()
        # What is not finite has to arrive as that, and does through its row's scale.
        whole = levels.clamp(-LEVELS, LEVELS).nan_to_num(0.0).to(torch.int8)
        return {"values": whole.reshape(tensor.shape), "scales": scales}

    def _check(self, parts: Parts, shape: Sequence[int]) -> None:
        expected = self._expected(tuple(shape))
        if parts.keys() != expected.keys():
            raise WireError(f"its parts are {sorted(parts)}, not {sorted(expected)}")
        for name, (dtype, size) in expected.items():
            part = parts[name]
            if part.dtype != dtype or part.shape != size:
                raise WireError(f"its {name} are {part.dtype} {list(part.shape)}, not {dtype} {list(size)}")
        if "scales" in parts and not (torch.isfinite(parts["scales"]).all() and (parts["scales"] >= 0).all()):
            raise WireError("its scales are not finite, or negative")
        count = prod(shape)
        if "index" in parts:
            index = parts["index"].long()
            if index[0] < 0 or index[-1] >= count or (index.diff() <= 0).any():
                raise WireError(f"its index does not increase within 0..{count - 1}")
        if "mask" in parts:
            bits = np.unpackbits(parts["mask"].numpy(), bitorder="little")
            if bits.sum() != self._kept(count) or bits[count:].any():
                raise WireError(f"its mask does not mark {self._kept(count)} of {count} entries")

    def _expected(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Part → type and shape, for a tensor of this shape."""
        count = prod(shape)
        if not count:
            return {}
        kept = self._kept(count)
        size = shape if kept == count else (kept,)
        expected = {"values": (DTYPES[self.numbers], size)}
        if self.numbers == "int8":
            expected["scales"] = (torch.float32, (size[0] if len(size) > 1 else 1,))
        if kept < count and _by_index(kept, count):
            expected["index"] = (torch.int32, (kept,))
        elif kept < count:
            expected["mask"] = (torch.uint8, (ceil(count / 8),))
        return expected


EXACT = Code()
"""What goes in comes out."""


def _rows(tensor: Tensor) -> Tensor:
    """The tensor as a matrix; one row where it is a vector or a number."""
    return tensor.reshape(len(tensor) if tensor.dim() > 1 else 1, -1)


def _by_index(kept: int, count: int) -> bool:
    return 4 * kept < ceil(count / 8)


def _places(index: Tensor, count: int) -> dict[str, Tensor]:
    if _by_index(len(index), count):
        return {"index": index.to(torch.int32)}
    bits = torch.zeros(count, dtype=torch.bool).index_fill_(0, index, True)
    return {"mask": torch.from_numpy(np.packbits(bits.numpy(), bitorder="little"))}


def _indices(parts: Parts, count: int) -> Tensor:
    if "index" in parts:
        return parts["index"].long()
    bits = np.unpackbits(parts["mask"].numpy(), count=count, bitorder="little")
    return torch.from_numpy(np.flatnonzero(bits))
