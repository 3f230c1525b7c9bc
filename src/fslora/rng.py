"""Randomness with an address: every draw is named, so no draw depends on what was drawn before it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

Name = str | int


@dataclass(frozen=True)
class Rng:
    """A seed and the path of names below it, e.g. ``Rng(0).child("sketch", round, client.id, layer)``.

    Two addresses give independent streams; one address gives the same stream in every process and in
    any order of calls. That is what makes resuming, reordering clients and running elsewhere exact.
    """

    seed: int
    path: tuple[Name, ...] = ()

    def child(self, *names: Name) -> Rng:
        """Returns the stream addressed by ``names`` below this one."""
        return Rng(self.seed, self.path + names)

    def integer(self) -> int:
        """Returns a 63-bit integer, the same for the same address on every platform."""
        text = "\x1f".join([str(self.seed), *(f"{type(name).__name__}:{name}" for name in self.path)])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def torch(self, device: torch.device | str = "cpu") -> torch.Generator:
        """Returns a fresh generator for this address; on a GPU the same address draws other numbers than on a CPU."""
        return torch.Generator(device).manual_seed(self.integer())

    def numpy(self) -> np.random.Generator:
        """Returns a fresh NumPy generator for this address."""
        return np.random.default_rng(self.integer())
