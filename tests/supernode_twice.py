"""A SuperNode that gives every answer again: at once, and once more after its next one. For tests; run as a program.

What became of the repeated ones stands in the file that FSLORA_REPEATED names.
"""

from __future__ import annotations

import os
from typing import Any

from flwr.supernode import start_client_internal
from flwr.supernode.cli import flower_supernode

once = start_client_internal._push_messages
last: list[tuple[Any, Any, float]] = []
"""The answer before, with its objects' tree and the seconds that it took."""
contents: dict[str, bytes] = {}


def push_messages(state: Any, object_store: Any, send: Any, push_object: Any) -> None:
    sent: list[tuple[Any, Any, float]] = []

    def noted_send(message: Any, tree: Any, seconds: float) -> Any:
        sent.append((message, tree, seconds))
        return send(message, tree, seconds)

    def noted_push(run: int, session: str, name: str, content: bytes) -> None:
        contents[name] = content
        push_object(run, session, name, content)

    once(state, object_store, noted_send, noted_push)
    for message, tree, seconds in [*sent, *last]:
        try:
            wanted, session = send(message, tree, seconds)
            for name in wanted:
                push_object(message.metadata.run_id, session, name, contents[name])
            said = f"taken, {len(wanted)} objects wanted again"
        except Exception as error:
            said = f"refused: {type(error).__name__}"
        with open(os.environ["FSLORA_REPEATED"], "a", encoding="utf-8") as file:
            file.write(f"{'again' if (message, tree, seconds) in sent else 'late'} {said}\n")
    last[:] = sent


if __name__ == "__main__":
    start_client_internal._push_messages = push_messages
    flower_supernode()
