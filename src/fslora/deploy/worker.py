"""The process of a site that keeps its base loaded from letter to letter. `fslora.deploy.relay` starts it.

    python -m fslora.deploy.worker SOCKET IDLE PROCESS:STARTED ...

It answers one letter after the other. Whatever is not as usual ends it: the next letter starts another one.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time
from typing import Any

import psutil

from fslora.deploy.envelope import Record, receive, send
from fslora.errors import FsloraError

LOOK = 0.5
"""Seconds between looks whether it is still needed."""
PATIENCE = 300.0
"""Seconds within which whoever asks has to go on with what it sends or takes."""


class Watch(threading.Thread):
    """Ends this process at once when it is of no more use, whatever it is doing: files are written atomically."""

    def __init__(self, processes: list[tuple[int, float]]) -> None:
        super().__init__(daemon=True)
        self.processes = processes
        self.link: socket.socket | None = None
        """Who waits for an answer."""

    def run(self) -> None:
        """Looks until there is a reason."""
        while True:
            for number, began in self.processes:
                if not alive(number, began):
                    end(f"process {number} is gone")
            link = self.link
            if link is not None and hung_up(link):
                end("nobody waits for the answer any more")
            time.sleep(LOOK)


def alive(number: int, began: float) -> bool:
    """Returns whether a process is still there, and is still the same one."""
    try:
        process = psutil.Process(number)
        return bool(process.create_time() == began and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def hung_up(link: socket.socket) -> bool:
    """Returns whether the other end is gone; it sends nothing more while it waits."""
    try:
        readable, _, _ = select.select([link], [], [], 0)
        return bool(readable) and not link.recv(1, socket.MSG_PEEK)
    except (OSError, ValueError):
        return False  # closed at this end, because the answer is out


def end(reason: str) -> None:
    """Ends this process, and says why in its log."""
    print(f"ended: {reason}", flush=True)  # noqa: T201
    os._exit(0)


def main() -> None:
    """Answers letters until nothing has come for a while, or there is a reason to end."""
    number, idle, *words = sys.argv[1:]
    pairs = [word.split(":") for word in words]
    watch = Watch([(int(process), float(began)) for process, began in pairs])
    watch.start()
    door = socket.socket(fileno=int(number))
    door.set_inheritable(False)
    identity = ""
    while True:
        door.settimeout(float(idle))
        try:
            link, _ = door.accept()
        except TimeoutError:
            end(f"nothing came for {idle} s")
        with link:
            link.settimeout(PATIENCE)
            try:
                head, letter = receive(link)
            except (OSError, FsloraError) as error:
                print(f"not understood: {error}", flush=True)  # noqa: T201
                continue
            identity = identity or str(head["identity"])
            if head["identity"] != identity:
                door.close()
                end("asked for another run, or by another SuperNode")
            link.settimeout(None)
            watch.link = link
            said, record = answered(head, letter)
            watch.link = None
            link.settimeout(PATIENCE)
            if record is None:
                door.close()  # first, so that nobody is sent here any more
            deliver(link, said, record)
        if record is None:
            end("an answer has failed")


def answered(head: dict[str, Any], letter: Record | None) -> tuple[dict[str, str], Record | None]:
    """Returns the answer to a letter; or what went wrong, and None."""
    from fslora.deploy import desk
    from fslora.memory import release_memory

    try:
        record = desk.answer(head["kind"], letter, head["run_config"], head["node_config"])
        release_memory()
        return {}, record
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)  # noqa: T201
        return {"type": type(error).__name__, "error": str(error) or "no reason given"}, None


def deliver(link: socket.socket, said: dict[str, str], record: Record | None) -> None:
    """Sends an answer; that nobody waits for it any more is no error of this process."""
    try:
        send(link, said, record)
    except OSError as error:
        print(f"not delivered: {error}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
