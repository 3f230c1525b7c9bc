"""Letters over Flower (1.41): records as messages, and a transport on its ``Grid``.

Flower's own strategies are not used: none of them survives adapters of unequal shapes. What was measured and decides
the form here: messages are given as a list (a generator fails in deployment), answers are told apart by the message
they answer (an error on behalf of a dead node comes from another node), and a node that is slow sends nothing at all.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Message

from fslora.deploy.envelope import Record
from fslora.deploy.letters import Hello, opened
from fslora.deploy.messages import from_flower, to_flower
from fslora.deploy.server import Kind
from fslora.errors import ConfigError, FsloraError, WireError

HELLO = "query.hello"
HELLO_SECONDS = 120.0
"""How long a node may take to introduce itself before it is asked again."""
TRIES = 3
"""How often a node may fail to introduce itself."""


class FlowerTransport:
    """Sites at the nodes of a Flower federation, known by the name that they introduce themselves with.

    Args:
        grid: Flower's.
        check: Raises where a site that introduced itself cannot take part.
        note: Is told of sites that come, go, or cannot take part.
    """

    def __init__(self, grid: Any, check: Callable[[Hello], None], note: Callable[[str], None]) -> None:
        self._grid = grid
        self._check = check
        self._note = note
        self._hellos: dict[int, Hello] = {}
        """Node → who it said it is. A node that restarts comes back as another one."""
        self._asked: dict[str, tuple[int, float]] = {}
        """Message → the node that was asked who it is, and when."""
        self._refused: Counter[int] = Counter()
        """Node → how often it failed to introduce itself."""
        self._open: dict[str, str] = {}
        """Message → the site whose answer it waits for."""
        self._gone: list[str] = []
        """Sites that went before their letter could be sent."""

    def sites(self) -> Mapping[str, Hello]:
        """Returns the sites whose nodes are online and have introduced themselves."""
        return {hello.site: hello for hello in self._online().values()}

    def wait(self, clients: int, seconds: float, pause: float = 0.5) -> int:
        """Waits until so many clients are there, at most so long; returns how many are."""
        until = time.monotonic() + seconds
        while True:
            there = len({member.id for hello in self.sites().values() for member in hello.members})
            if there >= clients or time.monotonic() > until:
                return there
            time.sleep(pause)

    def send(self, letters: Mapping[str, Record], round: int, kind: Kind = "train") -> None:
        """Sends each site its letter, in one message."""
        self._open = {}
        nodes = {hello.site: node for node, hello in self._online().items()}
        there = [site for site in letters if site in nodes]
        self._gone = [site for site in letters if site not in nodes]
        messages = [Message(to_flower(letters[site]), nodes[site], kind, group_id=str(round + 1)) for site in there]
        for site, sent in zip(there, self._grid.push_messages(messages), strict=True):
            self._open[sent] = site

    def poll(self) -> Iterable[tuple[str, Record | str]]:
        """Returns the answers that came since, and errors in the place of answers."""
        came: list[tuple[str, Record | str]] = [(site, "it has gone") for site in self._gone]
        self._gone = []
        for reply in self._grid.pull_messages(list(self._open)) if self._open else ():
            site = self._open.pop(reply.metadata.reply_to_message_id, None)
            if site is not None:
                came.append((site, _read(reply)))
        return came

    def _online(self) -> dict[int, Hello]:
        """Asks nodes that are new who they are, and returns those that have said it, newest last."""
        online = set(self._grid.get_node_ids())
        self._hear()
        now = time.monotonic()
        waiting = {node for node, asked in self._asked.values() if now - asked < HELLO_SECONDS}
        refused = {node for node, times in self._refused.items() if times >= TRIES}
        new = sorted(online - self._hellos.keys() - refused - waiting)
        if new:
            empty = to_flower(Record((), "{}"))
            messages = [Message(empty, node, HELLO, group_id="hello") for node in new]
            self._asked.update(
                {sent: (node, now) for sent, node in zip(self._grid.push_messages(messages), new, strict=True)}
            )
        return {node: hello for node, hello in self._hellos.items() if node in online}

    def _hear(self) -> None:
        for reply in self._grid.pull_messages(list(self._asked)) if self._asked else ():
            node, _ = self._asked.pop(reply.metadata.reply_to_message_id, (None, 0.0))
            if node is None:
                continue
            answer = _read(reply)
            try:
                if isinstance(answer, str):
                    raise WireError(answer)
                hello, _ = opened(Hello, answer)
                self._check(hello)
                self._check_alone(hello)
            except FsloraError as error:
                # What it said will not be otherwise next time; that it could not speak may have passed.
                self._refused[node] += 1 if isinstance(answer, str) else TRIES
                self._note(f"a site cannot take part: {error}")
                continue
            self._hellos.pop(node, None)
            self._hellos[node] = hello
            self._note(f"site {hello.site} is there, with clients {[member.id for member in hello.members]}")

    def _check_alone(self, hello: Hello) -> None:
        """Refuses a client that another site holds; the same site at another node has been restarted."""
        for other in self._hellos.values():
            both = {member.id for member in hello.members} & {member.id for member in other.members}
            if other.site != hello.site and both:
                raise ConfigError(
                    f"site {hello.site!r} says that it holds client {min(both)}, which is at site {other.site!r}; "
                    "give every client to one site"
                )


def _read(reply: Any) -> Record | str:
    """Returns the record of a message, or why there is none."""
    if reply.has_error():
        return f"{(reply.error.reason or 'no reason given').strip()[:400]} (Flower's error {reply.error.code})"
    try:
        return from_flower(reply.content)
    except WireError as error:
        return str(error)
