"""How long a deployed run waits, and for how many: defaults and limits, for command line, server and sites alike."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, isfinite


@dataclass(frozen=True)
class Patience:
    """How long a run waits, and for how many."""

    deadline: float = 600.0
    """Seconds that a round waits for its answers."""
    quorum: float = 0.5
    """The share of a cohort that is enough once the deadline has passed."""
    wait: float = 300.0
    """Seconds that the server waits for all clients to be there before the first round."""
    over_select: float = 1.0
    """How many times its cohort a round asks; it goes on with the answers that come first."""
    poll: float = 0.5
    """Seconds between looks for answers."""

    def __post_init__(self) -> None:
        """Refuses what makes no sense."""
        for name in ("deadline", "wait", "poll"):
            if not (isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} is {getattr(self, name)}; give seconds, 0 or more")
        if not 0 <= self.quorum <= 1:
            raise ValueError(f"quorum is {self.quorum}; give a share from 0 to 1")
        if not (isfinite(self.over_select) and self.over_select >= 1):
            raise ValueError(f"over-select is {self.over_select}; give 1 or more, e.g. 1.3")

    def spares(self, cohort: int) -> int:
        """Returns how many clients are asked beyond a cohort of this size."""
        # Rounded first: 1.1 times 10 is a little more than 11 in floating point.
        return ceil(round(self.over_select * cohort, 9)) - cohort
