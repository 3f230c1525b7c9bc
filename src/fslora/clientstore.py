"""What clients keep from round to round, on disk: a file for each client that keeps something, read when asked for.

    checkpoints/clients/0000042-000007.safetensors      client 42, as it was after 7 rounds

A file is written once, under the number of rounds done, and belongs to the checkpoints from that one on: a checkpoint
of round t is its own folder and, for each client, the newest file up to t. So a checkpoint writes no memory again, a
crash leaves nothing that a resumed run could take for its own past, and a client that was never sampled costs nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fslora.errors import ArtifactError
from fslora.packing import pack, unpack
from fslora.types import ClientMemory

SUFFIX = ".safetensors"


class ClientStore(Mapping[int, ClientMemory]):
    """Client → what it keeps, for the clients that keep something; nothing but the list of files is held in memory."""

    def __init__(self, folder: Path, rounds: int) -> None:
        """Opens what was kept after so many rounds; later files are left out, and nothing is written or removed."""
        self.folder = folder
        self.saved = rounds
        """The rounds of the newest checkpoint: what it needs is not removed."""
        self._newest: dict[int, int] = {}
        """Client → the rounds that its newest file is of."""
        self._superseded: list[Path] = []
        for client, written in self._files():
            if written <= rounds:
                self._newest[client] = max(written, self._newest.get(client, 0))

    def __len__(self) -> int:
        return len(self._newest)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._newest))

    def __contains__(self, client: object) -> bool:
        return client in self._newest

    def __getitem__(self, client: int) -> ClientMemory:
        """Returns what a client keeps, read from its file.

        Raises:
            KeyError: It keeps nothing.
            ArtifactError: Its file is missing or damaged.
        """
        path = self._path(client, self._newest[client])
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                description = json.loads(file.metadata()["memory"])
            return ClientMemory(unpack(tensors, description), description["scalars"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path}, what client {client} keeps between rounds, is damaged: {error!r}. Run the experiment again"
            ) from None

    def put(self, client: int, memory: ClientMemory, rounds: int) -> None:
        """Writes what a client keeps after so many rounds.

        Raises:
            ArtifactError: It cannot be written; what was written before is intact.
        """
        tensors, description = pack(memory.slots)
        target = self._path(client, rounds)
        partial = target.with_name(f".partial-{target.name}")
        text = json.dumps({**description, "scalars": dict(memory.scalars)})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata={"memory": text})
            os.replace(partial, target)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise ArtifactError(f"{target} cannot be written: {error}. Earlier checkpoints are intact") from None
        before = self._newest.get(client)
        self._newest[client] = rounds
        if before is not None and before != rounds:
            self._supersede(client, before)

    def _supersede(self, client: int, written: int) -> None:
        """Of two files the checkpoint needs the one that is not newer than itself, until it is replaced."""
        path = self._path(client, written)
        if written > self.saved:
            path.unlink(missing_ok=True)
        else:
            self._superseded.append(path)

    def checkpointed(self, rounds: int) -> None:
        """Removes the files that no checkpoint needs any more, now that there is one of so many rounds."""
        self.saved = rounds
        for path in self._superseded:
            path.unlink(missing_ok=True)
        self._superseded.clear()

    def prune(self, client: int) -> None:
        """Removes a client's files that are older than its newest in this store; later ones stay."""
        newest = self._newest.get(client, 0)
        for owner, written in self._files():
            if owner == client and written < newest:
                self._path(client, written).unlink(missing_ok=True)

    def rewind(self) -> None:
        """Removes every file but those of this store: what a run wrote after the checkpoint that it goes on from."""
        for client, written in self._files():
            if self._newest.get(client) != written:
                self._path(client, written).unlink(missing_ok=True)

    def _files(self) -> Iterator[tuple[int, int]]:
        """The client and the rounds of every file."""
        names = os.listdir(self.folder) if self.folder.is_dir() else ()
        for name in names:
            client, _, rounds = name.removesuffix(SUFFIX).partition("-")
            if name.endswith(SUFFIX) and client.isdigit() and rounds.isdigit():
                yield int(client), int(rounds)

    def _path(self, client: int, rounds: int) -> Path:
        return self.folder / f"{client:07d}-{rounds:06d}{SUFFIX}"
