"""How long a deployed run waits, and for how many: defaults and limits, for command line, server and sites alike."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite


@dataclass(frozen=True)
class Patience:
    """How long a run waits, and for how many."""

    deadline: float = 600.0
    """Seconds that a round waits for its answers."""
    quorum: float = 0.5
    """The share of a cohort that is enough once the deadline has passed."""
    wait: float = 300.0
    """Seconds that the server waits for all clients to be there before the first round."""
    poll: float = 0.2
    """Seconds between looks for answers."""

    def __post_init__(self) -> None:
        """Refuses what makes no sense."""
        for name in ("deadline", "wait", "poll"):
            if not (isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} is {getattr(self, name)}; give seconds, 0 or more")
        if not 0 <= self.quorum <= 1:
            raise ValueError(f"quorum is {self.quorum}; give a share from 0 to 1")
