"""From the process that Flower starts for one message to the process of the site that keeps the base loaded.

Flower's process only hands the letter on, and imports no torch. The worker (`fslora.deploy.worker`) is found by a
socket in ``STORAGE/.worker``, which only this user may enter, and started where there is none. It works for one run and
one configuration of the site, and ends by itself: when nothing has come for ``idle`` seconds, when it is asked for
something else, when an answer has failed, when Flower's process or the SuperNode is gone. Whoever asks finds out by the
connection: it is closed, and a new worker is started for the same letter.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fslora
from fslora import errors
from fslora.deploy.envelope import Record, receive, send
from fslora.errors import FsloraError, TrainingError

PROGRAM = "flwr-clientapp"
"""Flower's process for one message. In any other one, which lives on, no worker is needed."""
IDLE = 600.0
"""Seconds for which a worker waits for the next letter, unless the site says otherwise."""
TRIES = 3
"""How often a letter is given to a worker: it may end, or be another run's, just when it is asked."""
LONGEST = 100
"""Bytes that the path of a socket may have on every system."""


class UnavailableError(FsloraError):
    """There can be no worker here; the text says why."""


@dataclass(frozen=True)
class Question:
    """What a worker is asked, and all that its answer depends on."""

    kind: str
    letter: Record | None
    run_config: Mapping[str, Any]
    node_config: Mapping[str, Any]

    def head(self, watched: list[tuple[int, float]]) -> dict[str, Any]:
        """Returns what is said beside the letter; a worker serves one ``identity``."""
        told = {"run_config": dict(self.run_config), "node_config": dict(self.node_config)}
        everything = json.dumps([fslora.__version__, fslora.__file__, told, watched], sort_keys=True)
        return {"kind": self.kind, **told, "identity": hashlib.sha256(everything.encode()).hexdigest()}


def ask(kind: str, letter: Record | None, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> Record:
    """Returns a site's answer: of its worker, or of this process, where it lives on or there can be no worker."""
    storage, idle = node_config.get("storage"), node_config.get("idle", IDLE)
    complete = isinstance(storage, str) and storage and isinstance(idle, float | int)
    if Path(sys.argv[0]).name == PROGRAM and complete and idle > 0:
        try:
            return asked(Question(kind, letter, run_config, node_config), Path(str(storage)), float(idle), ancestors())
        except UnavailableError as error:
            print(f"fslora: {error}; the base is loaded for this letter alone", file=sys.stderr)  # noqa: T201
    from fslora.deploy import desk

    return desk.answer(kind, letter, run_config, node_config)


def asked(question: Question, storage: Path, idle: float, watched: list[tuple[int, float]]) -> Record:
    """Returns what the site's worker answers.

    Args:
        question: What it is asked.
        storage: The site's.
        idle: Seconds that a new worker waits for its next letter.
        watched: Processes, by number and the time of their start, without which a new worker is to end.

    Raises:
        UnavailableError: There can be no worker.
        FsloraError: What the worker says went wrong; or it was gone each time before it had answered.
    """
    folder = _folder(storage)
    head = question.head(watched)
    for _ in range(TRIES):
        with _connected(folder, idle, watched) as link:
            try:
                send(link, head, question.letter)
                said, record = receive(link)
            except OSError:
                continue
        if said.get("error"):
            raise _raised(said)
        if record is not None:
            return record
    raise TrainingError(
        f"the site's worker process ended {TRIES} times before it had answered; what it said is in {folder / 'log'}"
    )


def ancestors() -> list[tuple[int, float]]:
    """Returns the process that started this one, and the SuperNode that started that: number and time of the start."""
    import psutil

    try:
        parents = psutil.Process().parents()[:2]
        nodes = [parent for parent in parents[1:] if "flower-supernode" in " ".join(parent.cmdline())]
        return [(process.pid, process.create_time()) for process in [*parents[:1], *nodes]]
    except psutil.Error as error:
        raise UnavailableError(f"there can be no worker process: {error}") from None


def _folder(storage: Path) -> Path:
    """Returns the folder of a site's worker, which nobody else may enter."""
    folder = storage.absolute() / ".worker"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not hasattr(socket, "AF_UNIX"):
            raise OSError("this system has no Unix-domain sockets")
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise OSError(f"{folder} is another user's, or a link")
        folder.chmod(0o700)
    except OSError as error:
        raise UnavailableError(f"there can be no worker process: {error}") from None
    return folder


@contextmanager
def _connected(folder: Path, idle: float, watched: list[tuple[int, float]]) -> Iterator[socket.socket]:
    """Yields a connection to the worker; one is started where none listens."""
    import fcntl

    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with (folder / "lock").open("ab") as lock, _address(folder) as address:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
            try:
                link.connect(address)
            except (FileNotFoundError, ConnectionRefusedError):
                _start(link, folder, address, idle, watched)
    except OSError as error:
        link.close()
        raise UnavailableError(f"the site's worker process cannot be reached: {error}") from None
    with link:
        yield link


@contextmanager
def _address(folder: Path) -> Iterator[str]:
    """Yields the path of the socket, by way of the open folder where it is too long for the system."""
    path = str(folder / "socket")
    if len(os.fsencode(path)) <= LONGEST:
        yield path
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{number}/socket"
    finally:
        os.close(number)


def _start(link: socket.socket, folder: Path, address: str, idle: float, watched: list[tuple[int, float]]) -> None:
    """Starts a worker that this connection is for: here it waits for its first words, or sees that it has ended."""
    Path(address).unlink(missing_ok=True)
    words = [f"{number}:{began!r}" for number, began in watched]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door, (folder / "log").open("wb") as log:
        door.bind(address)
        door.listen()
        link.connect(address)
        subprocess.Popen(
            # -P: what lies in the working folder is not to be imported.
            [sys.executable, "-P", "-m", "fslora.deploy.worker", str(door.fileno()), repr(idle), *words],
            pass_fds=[door.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _raised(said: Mapping[str, Any]) -> FsloraError:
    """Returns the error that a worker met, as it would have been raised here."""
    kind = getattr(errors, str(said.get("type")), None)
    if isinstance(kind, type) and issubclass(kind, FsloraError):
        return kind(str(said["error"]))
    return TrainingError(f"{said.get('type')}: {said['error']}")
