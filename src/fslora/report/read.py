"""Reads a run folder into one frozen value. Every part may be missing: a run can be reported while it runs.

What is there must be sound, though: a damaged part is an `ArtifactError` that names the file. The one
exception is the last line of metrics.jsonl, which a crash may have cut; it is left out.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fslora.errors import ArtifactError
from fslora.metrics import Metric
from fslora.report.merit import ACCURACY, read_label
from fslora.types import Client

PARTS = ("experiment.toml", "environment.json", "data.json", "baseline.json", "metrics.jsonl", "summary.json")
"""The files that make a folder a run folder; any one of them is enough."""

Part = TypeVar("Part")
Scores = Mapping[str, float]
"""Mean loss and any metrics by name, on one set of examples; shares from 0 to 1. What is missing is not known."""


@dataclass(frozen=True)
class RoundRow:
    """One line of metrics.jsonl."""

    round: int
    """From 1; 0 holds only the evaluation before training."""
    loss: float | None = None
    """Mean local loss of the cohort; not finite when training diverged."""
    lr: float | None = None
    clients: tuple[int, ...] = ()
    bytes_down: int = 0
    """Server to clients, this round, whole cohort."""
    bytes_up: int = 0
    bytes_total: int = 0
    """Both ways, since the start."""
    client_bytes_down: Mapping[int, int] = field(default_factory=dict)
    client_bytes_up: Mapping[int, int] = field(default_factory=dict)
    client_loss: Mapping[int, float] = field(default_factory=dict)
    client_ranks: Mapping[int, int] = field(default_factory=dict)
    """The rank that each client of the cohort trained; empty in folders that do not record it."""
    seconds: float = 0.0
    coverage: tuple[float, ...] | None = None
    """Holders of each of the server's rank indices, summed over layers."""
    layers: int = 0
    unheld: int | None = None
    """Rank-one parts (layer, index) that no client held; None in folders that do not record it."""
    dropped: Mapping[int, str] = field(default_factory=dict)
    """Client → why its update was refused."""
    validation: Scores | None = None
    client_flops: Mapping[int, float] = field(default_factory=dict)
    """Floating-point operations that each client computed; empty in folders that do not record it."""
    flops_total: float | None = None
    """All clients, since the start."""
    client_memory: Mapping[int, float] = field(default_factory=dict)
    """Bytes that a client needs for its part of the adapter, without activations and the base."""
    simulated_seconds: float | None = None
    """How long the round would take on the fleet's own devices and links."""
    time_total: float | None = None
    """Simulated seconds since the start."""
    server_seconds: float | None = None
    server_bytes: float | None = None
    """Size of the server's state."""
    spectrum: tuple[float, ...] | None = None
    """Share of the global update's energy in each singular value, mean over layers, largest first."""
    effective_rank: float | None = None


@dataclass(frozen=True)
class Partition:
    """Who holds which training examples."""

    kind: str = "unknown"
    digest: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)
    label_counts: tuple[tuple[int, ...], ...] = ()
    """[clients][classes]."""
    holdout: tuple[int, ...] = ()
    """Examples that each client keeps for its own test."""

    @property
    def several(self) -> bool:
        """Whether examples are told apart: there is more than one class."""
        return max(map(len, self.label_counts), default=0) > 1


@dataclass(frozen=True)
class DataRecord:
    """What data.json says: the data, its partition and the fleet."""

    name: str = "unknown"
    metric: Metric = ACCURACY
    """What runs are judged by; folders that do not record it are of classes."""
    label_names: tuple[str, ...] = ()
    statistics: Mapping[str, Any] = field(default_factory=dict)
    examples: Mapping[str, int] = field(default_factory=dict)
    """Split → examples."""
    truncated: int | None = None
    """Texts longer than max_length."""
    partition: Partition = field(default_factory=Partition)
    fleet: tuple[Client, ...] = ()
    eval_on: str = "server"
    """Whose examples are validation and test: the server's, or the clients' own held-out ones."""


@dataclass(frozen=True)
class Baseline:
    """The reference without federated training."""

    name: str = "frozen base + linear head"
    validation: Scores = field(default_factory=dict)
    test: Scores = field(default_factory=dict)


@dataclass(frozen=True)
class BeforeAfter:
    """The same examples before the first round and after the last."""

    before: Scores = field(default_factory=dict)
    after: Scores = field(default_factory=dict)


@dataclass(frozen=True)
class ClientScores:
    """One client on its own held-out share."""

    id: int
    rank: int = 0
    examples: int = 0
    before: Scores | None = None
    after: Scores | None = None


@dataclass(frozen=True)
class Summary:
    """What is known when training ends."""

    method: str = ""
    rounds: int = 0
    finished: bool = False
    test: BeforeAfter = field(default_factory=BeforeAfter)
    by_label: Mapping[str, BeforeAfter] = field(default_factory=dict)
    """The test by task or stratum, where that is recorded."""
    clients: tuple[ClientScores, ...] = ()
    bytes_down: int | None = None
    bytes_up: int | None = None
    seconds: float | None = None
    train_seconds: float | None = None
    peak_memory_bytes: int | None = None
    adapter_parameters: int | None = None
    base_parameters: int | None = None
    personal: bool = False
    """Whether the method serves one model per client; ``test`` is then the mean over them."""
    flops: float | None = None
    """Floating-point operations of all clients together."""
    simulated_seconds: float | None = None
    server_seconds: float | None = None
    client_memory_bytes: float | None = None
    """The most over clients and rounds."""
    server_bytes: float | None = None
    """The most over rounds."""


@dataclass(frozen=True)
class RunRecord:
    """One run folder. Data and baseline of a variant are its parent's, unless it has its own."""

    path: Path
    name: str
    config: Mapping[str, Any]
    config_text: str
    environment: Mapping[str, Any]
    data: DataRecord | None
    baseline: Baseline | None
    rounds: tuple[RoundRow, ...]
    """By round, each once."""
    summary: Summary | None
    variants: tuple[RunRecord, ...] = ()
    main: bool = True
    """False for a variant."""

    @property
    def runs(self) -> tuple[RunRecord, ...]:
        """The main run and its variants, in the order in which all tables and figures show them."""
        return (self, *self.variants)

    @property
    def fleet(self) -> tuple[Client, ...]:
        """The clients; empty while data.json is not written."""
        return self.data.fleet if self.data else ()

    @property
    def metric(self) -> Metric:
        """What the run is judged by."""
        return self.data.metric if self.data else ACCURACY

    @property
    def method(self) -> str:
        """The method's registry name."""
        named = self.setting("method", "name")
        return (self.summary.method if self.summary else "") or (str(named) if named else "unknown")

    @property
    def label(self) -> str:
        """What tables and figures call this run: the main run by its method, a variant by its name."""
        taken = {variant.name for variant in self.variants} | {"unknown"}
        return self.name if not self.main or self.method in taken else self.method

    @property
    def rounds_done(self) -> int:
        """Rounds that were trained."""
        return max((row.round for row in self.rounds), default=self.summary.rounds if self.summary else 0)

    @property
    def rounds_planned(self) -> int | None:
        """Rounds that the experiment asks for."""
        planned = self.setting("run", "rounds")
        return planned if isinstance(planned, int) else None

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.summary is not None and self.summary.finished

    def setting(self, *keys: str) -> Any:
        """Returns one value of the resolved experiment, or None."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


def read_run(path: str | Path) -> RunRecord:
    """Returns what a run folder holds, variants included.

    Raises:
        ArtifactError: The path is no run folder, or a part of it is damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder; give the folder that `fslora run` wrote")
    if not _is_run(folder):
        raise ArtifactError(
            f"{folder} is no run folder: it holds none of {', '.join(PARTS)}; give the folder that `fslora run` wrote"
        )
    above = folder.resolve().parent
    is_variant = above.name == "variants" and _is_run(above.parent)
    record = _read_one(folder, above.parent if is_variant else folder, main=not is_variant)
    names = _variant_names(folder, record)
    variants = tuple(_read_one(folder / "variants" / name, folder, main=False) for name in names)
    return replace(record, variants=variants)


def parse_data(fields: Mapping[str, Any], source: str = "data.json") -> DataRecord:
    """Returns the record of a mapping in the form of data.json.

    Args:
        fields: The mapping; missing keys and nulls take defaults.
        source: What to name in errors.

    Raises:
        ArtifactError: A value has the wrong type, or clients and partition do not match.
    """
    data = validated(DataRecord, fields, source)
    data = replace(data, metric=read_label(data.metric))
    clients = len(data.fleet)
    for key, length in (
        ("label_counts", len(data.partition.label_counts)),
        ("holdout", len(data.partition.holdout)),
    ):
        if clients and length and length != clients:
            raise ArtifactError(
                f"{source}: partition.{key} has {length} entries but fleet has {clients} clients; "
                "the file is damaged, run the experiment again"
            )
    return data


def score(scores: Scores | None, name: str) -> float | None:
    """Returns one finite score, or None."""
    value = scores.get(name) if scores else None
    return value if value is not None and isfinite(value) else None


def parse_metric(fields: Mapping[str, Any] | None, source: str | Path) -> Metric:
    """Returns the ``metric`` of a mapping in the form of data.json; accuracy where there is none.

    Raises:
        ArtifactError: A value has the wrong type; the error names ``source``.
    """
    given = (fields or {}).get("metric")
    return ACCURACY if given is None else read_label(validated(Metric, given, f"{source}: metric"))


def validated(kind: type[Part], fields: object, source: str | Path) -> Part:
    """Returns the dataclass of a JSON object. Unknown keys are left out; null is the same as missing.

    Raises:
        ArtifactError: A value has the wrong type; the error names ``source``.
    """
    if kind not in _FORMS:
        _FORMS[kind] = TypeAdapter(kind)
    try:
        value: Part = _FORMS[kind].validate_python(_without_nulls(fields))
    except ValidationError as error:
        item = error.errors()[0]
        where = ".".join(str(part) for part in item["loc"]) or "the whole"
        given = repr(item["input"])[:80]
        raise ArtifactError(
            f"{source} is damaged: {where} is {given}: {item['msg']}; restore the file or run the experiment again"
        ) from None
    return value


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the object in a JSON file, or None when there is no file."""
    if not path.is_file():
        return None
    try:
        value = json.loads(_bytes(path))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: {error}; restore the file or delete it") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} is damaged: it holds no JSON object; restore the file or delete it")
    return value


def read_text(path: Path) -> str:
    """Returns a file's text; none when there is no file."""
    try:
        return _bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not UTF-8 text: {error}; restore the file") from None


def _read_one(folder: Path, parent: Path, *, main: bool) -> RunRecord:
    config_text = read_text(folder / "experiment.toml")
    # A variant has files of its own where it changes what they describe.
    data_path, baseline_path = (
        folder / part if (folder / part).is_file() else parent / part for part in ("data.json", "baseline.json")
    )
    data, baseline = read_json(data_path), read_json(baseline_path)
    summary, environment = read_json(folder / "summary.json"), read_json(folder / "environment.json")
    return RunRecord(
        path=folder,
        name=(folder.name or folder.resolve().name) or "run",
        config=_toml(folder / "experiment.toml", config_text),
        config_text=config_text,
        environment=environment or {},
        data=None if data is None else parse_data(data, str(data_path)),
        baseline=None if baseline is None else validated(Baseline, baseline, baseline_path),
        rounds=_rounds(folder / "metrics.jsonl"),
        summary=None if summary is None else validated(Summary, summary, folder / "summary.json"),
        main=main,
    )


def _is_run(folder: Path) -> bool:
    return any((folder / part).is_file() for part in PARTS)


def _variant_names(folder: Path, record: RunRecord) -> list[str]:
    """The variants that have a folder, in the experiment's order, then those it does not name."""
    parent = folder / "variants"
    if not parent.is_dir():
        return []
    there = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() and _is_run(entry))
    declared = record.setting("variants")
    order = list(declared) if isinstance(declared, Mapping) else []
    return sorted(there, key=lambda name: (order.index(name) if name in order else len(order), name))


def _rounds(path: Path) -> tuple[RoundRow, ...]:
    """The rows by round; of a round that a resumed run wrote again, the newest."""
    lines = [(number, line) for number, line in enumerate(_bytes(path).split(b"\n"), 1) if line.strip(b" \r\t\0")]
    rows: dict[int, RoundRow] = {}
    for position, (number, line) in enumerate(lines):
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            if position == len(lines) - 1:
                break
            raise ArtifactError(
                f"{path}, line {number}, is damaged (not JSON); restore the file or delete that line"
            ) from None
        row = validated(RoundRow, fields, f"{path}, line {number}")
        rows[row.round] = row
    return tuple(rows[number] for number in sorted(rows))


def _without_nulls(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _toml(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ArtifactError(f"{path} is not valid TOML: {error}; restore the file") from None


def _bytes(path: Path) -> bytes:
    """The file's bytes; none when there is no file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}; check its permissions") from None


_FORMS: dict[type, TypeAdapter[Any]] = {}
"""By dataclass; building one takes much longer than reading with it."""
