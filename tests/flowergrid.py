"""A Flower grid in this process: messages go to ClientApps directly, errors come back as Flower makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count

from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity


class Grid:
    """Nodes by number; each answers with the app, in the order of ``arrival``."""

    def __init__(self, app, run_config: Mapping, nodes: dict[int, Mapping], arrival: Callable = list) -> None:
        self.app, self.run_config, self.nodes, self.arrival = app, run_config, nodes, arrival
        self.change: Callable[[int, Message, Message], Message | None] = lambda node, asked, reply: reply
        """What becomes of a node's reply."""
        self._numbers = count(1)
        self._replies: dict[str, Message] = {}
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        assert isinstance(messages, list), "deployment walks them twice"
        ids = []
        for message in messages:
            number = f"m{next(self._numbers)}"
            message.metadata._message_id = number
            ids.append(number)
        for message in self.arrival(messages):
            node = message.metadata.dst_node_id
            reply = self.change(node, message, self._answer(node, message))
            if reply is not None:
                self._replies[message.metadata.message_id] = reply
        return ids

    def pull_messages(self, message_ids):
        return [self._replies.pop(number) for number in list(self._replies) if number in set(message_ids)]

    def _answer(self, node: int, message: Message) -> Message:
        context = Context(7, node, dict(self.nodes[node]), RecordDict(), dict(self.run_config))
        try:
            return self.app(message, context)
        except Exception as error:
            return Message(Error(code=2, reason=f"{type(error).__name__}: {error}"), reply_to=message)
