"""`fslora eval` and `fslora export`: what one does with a run folder afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fslora.config import load
from fslora.errors import ArtifactError, ConfigError
from fslora.evaluate import by_label, client_scores, scored, untrained
from fslora.export import export_merged, lower_rank, rank_for_energy
from fslora.prepare import SERVER, Federation, Workshop
from fslora.report.merit import LOSS, value_text
from fslora.report.read import parse_metric, score
from fslora.report.tables import label_rows
from fslora.report.text import NONE
from fslora.rounds import served
from fslora.runfolder import RunFolder
from fslora.runner import Stage, read_adapters, write_adapter
from fslora.types import Adapter


def evaluate_run(path: Path, stage: Stage) -> dict[str, Any]:
    """Returns the scores of a run's exported adapter before and after training, on test and per client.

    Raises:
        ArtifactError: The path is no run folder, or no adapter was exported yet.
    """
    federation = _federation(path, stage)
    adapters = read_adapters(path / "adapter")
    for adapter in adapters:
        _check(adapter, federation)
    before, after = scored(federation, [untrained(federation)]), scored(federation, adapters)
    return {
        "run": str(path),
        "metric": federation.sites.metric.as_dict(),
        "test": {"before": before.test, "after": after.test},
        "by_label": by_label(before, after),
        "clients": client_scores(federation, before, after),
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """Returns the result of ``evaluate_run`` for the terminal."""
    metric = parse_metric(result, "the result")
    show, name, parts = partial(value_text, metric), metric.name, ("before", "after")
    whole = Table("", *parts, title="Global adapter on the test split", title_justify="left")
    whole.add_row(metric.label, *(show(score(result["test"][part], name)) for part in parts))
    if name != LOSS.name:
        whole.add_row("loss", *(_loss_text(score(result["test"][part], "loss")) for part in parts))
    by_label = {part: {label: entry[part] for label, entry in result.get("by_label", {}).items()} for part in parts}
    labels = Table("label", *parts, title=f"Test {metric.label} by label", title_justify="left")
    for row in label_rows(metric, by_label):
        labels.add_row(Text(row["label"]), *(show(row[part]) for part in parts))
    clients = Table("client", "rank", "examples", *parts, title="Global adapter on own examples", title_justify="left")
    for entry in result["clients"]:
        scores = [show(score(entry[part], name)) for part in parts]
        clients.add_row(str(entry["id"]), str(entry["rank"]), str(entry["examples"]), *scores)
    return [table for table in (whole, labels, clients) if table.row_count]


def _loss_text(loss: float | None) -> str:
    return NONE if loss is None else f"{loss:.4f}"


def export_run(
    path: Path, to: Path, rank: int | None, energy: float | None, merge: bool, client: int | None, stage: Stage
) -> dict[str, Any]:
    """Writes a run's newest adapter to a folder, and returns what was written.

    Args:
        path: A run folder.
        to: The folder to write.
        rank: Best approximation of this lower rank.
        energy: Or of the lowest rank that keeps this share of energy.
        merge: Write base and adapter as one model.
        client: Whose adapter, where the method serves one model per client.
        stage: Where notes go.

    Raises:
        ArtifactError: The run has no checkpoint yet, or the target exists or cannot be written.
        ConfigError: The rank asked for is larger than the adapter's, both rank and energy are given, or the method
            serves one model per client and none, or an unknown one, was named.
    """
    if rank is not None and energy is not None:
        raise ConfigError("--rank and --energy are both given; give one of them")
    if to.exists():
        raise ArtifactError(f"{to} exists already; name a new folder with --to")
    folder = opened(path)
    newest = folder.load_checkpoint()
    if newest is None and not folder.finished:
        raise ArtifactError(f"{path} holds no checkpoint yet; `fslora resume {path}` goes on with it")
    federation = _federation(path, stage)
    if newest:
        rounds, state, memories = newest
        adapters = served(federation, state, memories)
    else:
        rounds, adapters = folder.rounds_done, read_adapters(path / "adapter")
    adapter = chosen(adapters, client, federation.experiment.method.name)
    full = adapter.rank
    if rank is not None and rank > full:
        raise ConfigError(f"--rank is {rank}, but the adapter has rank {full}; give a lower one")
    kept = 1.0
    if energy is not None:
        rank = rank_for_energy(adapter, energy)
    if rank is not None and rank < full:
        adapter, kept = lower_rank(adapter, rank)
    if merge:
        export_merged(adapter, federation.base, to)
        kind = "merged model"
    else:
        write_adapter(federation, adapter, to, rounds)
        kind = "PEFT adapter"
    summary = f"{to}: {kind}, rank {rank or full} of {full}, {kept:.2%} of the update's energy, after {rounds} rounds"
    return {"folder": str(to), "rank": rank or full, "energy": kept, "rounds": rounds, "summary": summary}


def chosen(adapters: Sequence[Adapter], client: int | None, method: str) -> Adapter:
    """Returns the one adapter that all share, or one client's own.

    Raises:
        ConfigError: A client is named where there is one adapter for all, or none or an unknown one where there is not.
    """
    if len(adapters) == 1:
        if client is not None:
            raise ConfigError(f"--client is {client}, but {method} serves one model to all; leave it out")
        return adapters[0]
    if client is None or not 0 <= client < len(adapters):
        raise ConfigError(
            f"{method} serves one model per client, and --client is {client}; give one of 0 to {len(adapters) - 1}"
        )
    return adapters[client]


def opened(path: Path) -> RunFolder:
    """Returns an existing run folder.

    Raises:
        ArtifactError: The path is a comparison, or nothing of ours.
    """
    if (path / "comparison.json").is_file():
        cells = sorted(str(folder.parent) for folder in path.glob("cells/*/*/*/summary.json"))
        raise ArtifactError(f"{path} is a comparison, not a run; name one of its runs, e.g. {', '.join(cells[:1])}")
    return RunFolder.open(path)


def _federation(path: Path, stage: Stage) -> Federation:
    opened(path)
    stage.note(f"Preparing data and base of {path} ...")
    return Workshop().federation(load(path / "experiment.toml"), SERVER)


def _check(adapter: Adapter, federation: Federation) -> None:
    if set(adapter.layers) != set(federation.base.targets):
        raise ArtifactError("the adapter's layers are not those of the run's base; was adapter/ replaced by hand?")
