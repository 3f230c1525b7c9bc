"""A transport without a network: sites in this process, for tests and to try a method's letters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fslora.deploy.envelope import Record
from fslora.deploy.letters import Hello
from fslora.deploy.server import Kind
from fslora.deploy.site import SiteWorker, introduction
from fslora.errors import FsloraError


class InProcess:
    """Hands letters over as records, bytes and all.

    Args:
        workers: The sites.
        on_the_way: What happens to an answer: another one, or the reason why it does not come; None: it is silent.
        arrival: The order in which sites answer; by default that of ``workers``.
    """

    def __init__(
        self,
        workers: Sequence[SiteWorker],
        on_the_way: Callable[[str, int, Record], Record | str | None] | None = None,
        arrival: Callable[[list[str]], list[str]] = list,
    ) -> None:
        self.workers = {worker.name: worker for worker in workers}
        self._on_the_way = on_the_way or (lambda site, round, reply: reply)
        self._arrival = arrival
        self._replies: list[tuple[str, Record | str]] = []

    def sites(self) -> Mapping[str, Hello]:
        """Returns all of them."""
        return {
            name: introduction(name, worker.federation.sites, worker.members, "")
            for name, worker in self.workers.items()
        }

    def send(self, letters: Mapping[str, Record], round: int, kind: Kind = "train") -> None:
        """Lets the sites answer, one after the other."""
        self._replies = []
        for site in self._arrival([name for name in self.workers if name in letters]):
            worker = self.workers[site]
            answer = worker.train if kind == "train" else worker.evaluate
            try:
                reply = self._on_the_way(site, round, answer(letters[site]))
            except FsloraError as error:
                reply = str(error)
            if reply is not None:
                self._replies.append((site, reply))

    def poll(self) -> list[tuple[str, Record | str]]:
        """Returns all answers at once."""
        replies, self._replies = self._replies, []
        return replies
