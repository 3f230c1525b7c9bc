"""The run folder: everything a run leaves behind, written so that a crash never damages what is there.

experiment.toml  environment.json  data.json  baseline.json  metrics.jsonl  summary.json
checkpoints/round-000012/{state.safetensors, state.json}   checkpoints/clients/... (`fslora.clientstore`)
adapter/   report.html   variants/NAME/...
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fslora.clientstore import ClientStore
from fslora.errors import ArtifactError
from fslora.packing import pack, unpack
from fslora.types import ServerState, Tensor

FORMAT, BEFORE = 3, 2
"""Of checkpoints. Format 2 had the clients' memories in the state; without any, it is read as well."""
SLOT = "slot."
MOST_INDENTED = 2**20
"""Characters of JSON up to which a file is indented."""


@dataclass(frozen=True)
class RunFolder:
    """A folder for one run; its variants have folders of the same form inside it."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Returns a new, empty and writable run folder.

        Raises:
            ArtifactError: The folder exists with something in it, or cannot be written.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            occupied = any(path.iterdir())
            with tempfile.NamedTemporaryFile(dir=path):
                pass
        except OSError as error:
            raise ArtifactError(f"{path} cannot be written: {error}. Choose another folder with --out") from None
        if occupied:
            raise ArtifactError(f"{path} is not empty; `fslora resume {path}` continues it, --out starts elsewhere")
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Returns an existing run folder, or raises ArtifactError when this is none."""
        if not (path / "experiment.toml").is_file():
            raise ArtifactError(f"{path} is no run folder (it holds no experiment.toml); `fslora run` makes one")
        return cls(path)

    def variant(self, name: str) -> RunFolder:
        """Returns the folder of a variant, made if it is not there."""
        path = self.path / "variants" / name
        path.mkdir(parents=True, exist_ok=True)
        return RunFolder(path)

    def write_text(self, name: str, text: str) -> None:
        """Replaces a file as a whole."""
        target = self.path / name
        partial = self.path / f".partial-{name}"
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, target)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise ArtifactError(f"{target} cannot be written: {error}. What was written before is intact") from None

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Replaces a JSON file as a whole; one that is too large to be read by eye is one line."""
        text = json.dumps(value)
        # Indented, it would be some three times as long and go through Python's slow encoder.
        self.write_text(name, (text if len(text) > MOST_INDENTED else json.dumps(value, indent=2)) + "\n")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Returns a JSON file's content, or None when it is not there."""
        path = self.path / name
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} is damaged: {error}. Delete it to have it made again") from None
        assert isinstance(content, dict)
        return content

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Adds one line to metrics.jsonl."""
        try:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise ArtifactError(f"{self.path}/metrics.jsonl cannot be written: {error}") from None

    def metrics(self, up_to: int | None = None) -> list[dict[str, Any]]:
        """Returns the rows up to a round; a last line that a crash cut short is left out."""
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.is_file() else []
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                if number < len(lines):
                    raise ArtifactError(f"{path}, line {number} is damaged: {error}. Delete that line") from None
        return [row for row in rows if up_to is None or row["round"] <= up_to]

    def rewind(self, round_number: int) -> list[dict[str, Any]]:
        """Drops the rows, and what clients kept, after a round; returns the rows that stay."""
        self.clients(round_number).rewind()
        rows = self.metrics(round_number)
        self.write_text("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def clients(self, rounds: int) -> ClientStore:
        """Returns what clients kept after so many rounds."""
        return ClientStore(self.path / "checkpoints" / "clients", rounds)

    def save_checkpoint(self, round_number: int, state: ServerState) -> None:
        """Writes the server's state after ``round_number`` rounds, then removes older checkpoints.

        What clients keep is there already (`clients`).
        """
        folder = self.path / "checkpoints"
        final = folder / f"round-{round_number:06d}"
        partial = folder / f".partial-{round_number:06d}"
        tensors, description = flatten(state)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file(tensors, partial / "state.safetensors")
            (partial / "state.json").write_text(
                json.dumps({"format": FORMAT, "round": round_number, **description}, indent=1), encoding="utf-8"
            )
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise ArtifactError(
                f"{final} cannot be written: {error}. Earlier checkpoints are intact; make room, then "
                f"`fslora resume {self.path}`"
            ) from None
        for old in self._checkpoints():
            if old != final:
                shutil.rmtree(old, ignore_errors=True)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool((self.read_json("summary.json") or {}).get("finished"))

    @property
    def rounds_done(self) -> int:
        """Rounds that will not be run again: those in the newest checkpoint, or all of a finished run without one."""
        found = self._checkpoints()
        if found:
            return int(found[-1].name.removeprefix("round-"))
        return int((self.read_json("summary.json") or {}).get("rounds", 0)) if self.finished else 0

    def drop_checkpoints(self) -> None:
        """Removes all checkpoints: of a finished run that nobody will continue."""
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    def load_checkpoint(self) -> tuple[int, ServerState, ClientStore] | None:
        """Returns (rounds done, state, what clients keep) of the newest checkpoint, or None when there is none."""
        found = self._checkpoints()
        if not found:
            return None
        try:
            description = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
            rounds, written = int(description["round"]), description["format"]
            if written != FORMAT and (written != BEFORE or description["memories"]):
                raise ArtifactError(f"{found[-1]} has format {written}; this fslora reads format {FORMAT}")
            state = unflatten(load_file(found[-1] / "state.safetensors"), description)
            return rounds, state, self.clients(rounds)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(f"{found[-1]} is damaged: {error!r}. Delete it and run `fslora resume`") from None

    def _checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("round-*"))


def flatten(state: ServerState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns a state as (named tensors, JSON description); ``unflatten`` is its inverse."""
    slots = {f"{SLOT}{name}": slot for name, slot in state.slots.items()}
    tensors, description = pack({"adapter": state.adapter, **slots})
    return tensors, {**description, "scalars": dict(state.scalars)}


def unflatten(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> ServerState:
    """Returns the state that ``flatten`` took apart."""
    parts = unpack(tensors, description)
    slots = {name.removeprefix(SLOT): part for name, part in parts.items() if name.startswith(SLOT)}
    return ServerState(parts["adapter"], slots, description["scalars"])
