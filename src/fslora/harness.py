"""`fslora eval --harness`: tasks of EleutherAI's lm-evaluation-harness, on a run's base without and with its adapter.

The base is loaded once, and the adapter acts in its slots as it did while it was trained. Of the run's own data nothing
is read. lm-eval is an extra.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fslora.config import Experiment, load
from fslora.errors import ConfigError, DataError
from fslora.evaluation import chosen, opened
from fslora.models.base import Base
from fslora.models.load import load_base
from fslora.objectives import Causal
from fslora.rng import Rng
from fslora.runner import Stage, read_adapters
from fslora.types import Adapter

CAUSAL_TASKS = ("text", "instruct")
RESAMPLES = 100
"""Bootstrap draws behind standard errors that have no formula."""

Rows = dict[tuple[str, str, str], dict[str, Any]]
"""(task, metric, filter) → value, its standard error, number of examples, and whether higher is better."""


@dataclass(frozen=True)
class Harness:
    """What is to be evaluated."""

    tasks: tuple[str, ...]
    folder: Path | None = None
    """YAML files of tasks of one's own."""
    limit: int | None = None
    """Examples per task; None for all."""
    client: int | None = None
    """Whose adapter, where the method serves one model per client."""
    bars: bool = False
    """Whether lm-eval may show its progress on standard error."""


def evaluate_harness(path: Path, harness: Harness, stage: Stage) -> dict[str, Any]:
    """Returns each task's metrics on a run's base as it is ("before") and with the run's adapter ("after").

    Raises:
        ArtifactError: The path is no run folder, or no adapter was exported yet.
        ConfigError: lm-eval is not installed, the run's model is no causal language model, or there is no such task.
        DataError: A task or its data cannot be loaded.
    """
    opened(path)
    experiment = load(path / "experiment.toml")
    _check(experiment, harness)
    adapter = chosen(read_adapters(path / "adapter"), harness.client, experiment.method.name)
    stage.note(f"Loading {', '.join(harness.tasks)} of lm-eval {version('lm_eval')} ...")
    with _quiet(harness.bars):
        tasks = _tasks(harness)
    stage.note(f"Loading {experiment.model.name} ...")
    base = load_base(experiment.model, experiment.adapter, Causal(experiment.data), Rng(experiment.run.seed))
    scored = []
    for when, given in (("without the adapter", Adapter({})), ("with it", adapter)):
        stage.note(f"Evaluating the base {when} ...")
        with _quiet(harness.bars):
            scored.append(_scored(base, given, tasks, experiment.local.batch_size, harness.limit))
    before, after = scored
    return {
        "run": str(path),
        "lm_eval": version("lm_eval"),
        "limit": harness.limit,
        "client": harness.client,
        "rows": [_row(key, before[key], after[key]) for key in before if key in after],
    }


def table(result: dict[str, Any]) -> Table:
    """Returns the result of ``evaluate_harness`` for the terminal."""
    shown = Table(
        "task", "metric", "examples", "before", "after", title=f"lm-eval {result['lm_eval']}", title_justify="left"
    )
    for row in result["rows"]:
        arrow = {True: " ↑", False: " ↓", None: ""}[row["higher_is_better"]]
        metric = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
        examples = "" if row["examples"] is None else str(row["examples"])
        values = [_with_error(row[when], row[f"{when}_stderr"]) for when in ("before", "after")]
        shown.add_row(row["task"], metric + arrow, examples, *values)
    return shown


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _row(key: tuple[str, str, str], before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    task, metric, how = key
    return {
        "task": task,
        "metric": metric,
        "filter": how,
        "examples": before["examples"],
        "higher_is_better": before["higher_is_better"],
        "before": before["value"],
        "before_stderr": before["stderr"],
        "after": after["value"],
        "after_stderr": after["stderr"],
    }


def _check(experiment: Experiment, harness: Harness) -> None:
    """All that can be said before anything is loaded."""
    if experiment.data.task not in CAUSAL_TASKS:
        raise ConfigError(
            f"--harness needs a causal language model, and this run's data.task is {experiment.data.task!r}, which "
            f"trains no such model; give a run of {' or '.join(map(repr, CAUSAL_TASKS))}, or leave --harness out"
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--harness needs lm-eval, which is not installed; run `pip install 'fslora[harness]'`")
    if not harness.tasks:
        raise ConfigError("--harness names no task; give names with commas, e.g. --harness arc_easy,hellaswag")
    if harness.folder is not None and not harness.folder.is_dir():
        raise ConfigError(
            f"--harness-path {harness.folder} is no folder; name the one that holds the tasks' YAML files"
        )


def _tasks(harness: Harness) -> Any:
    """The tasks with their data, as lm-eval has them."""
    from lm_eval.tasks import TaskManager

    folder = None if harness.folder is None else str(harness.folder)
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not set(harness.tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)  # reads some 14,000 files
    _check_names(harness.tasks, manager.all_tasks)
    try:
        loaded = manager.load(list(harness.tasks))
    except Exception as error:  # whatever a hub, a data set or a task's own code raises
        raise DataError(_unloadable(harness.tasks, error)) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(f"--harness {name} runs what the model writes as a program, which is not done here")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=0)
    return loaded


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
            there = f"near it there are {', '.join(near)}" if near else "`lm_eval ls tasks` lists those there are"
            raise ConfigError(
                f"--harness names {name!r}, which is no task of lm-eval {version('lm_eval')} or --harness-path; {there}"
            )


def _unloadable(tasks: Sequence[str], error: Exception) -> str:
    reason = (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
    return (
        f"--harness {','.join(tasks)} cannot be loaded: {type(error).__name__}: {reason}. Most tasks fetch their data "
        "from a hub. Without a network, give a folder of your own with --harness-path: YAML files with "
        "`dataset_path: json` and the paths of JSONL files under `dataset_kwargs: data_files:`"
    )


def _scored(base: Base, adapter: Adapter, tasks: Any, batch_size: int, limit: int | None) -> Rows:
    """Every metric of every task, and of the groups they were asked for in, with an adapter attached."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    # The very model, with its own context length.
    model = HFLM(pretrained=base.model, tokenizer=base.tokenizer, backend="causal", batch_size=batch_size)
    with torch.no_grad(), base.using(adapter):
        found = evaluate(lm=model, task_dict=tasks, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False)
    rows: Rows = {}
    for task, entries in {**found["results"], **found.get("groups", {})}.items():
        counted = found["n-samples"].get(task, {}).get("effective")
        for key, value in entries.items():
            metric, _, how = key.partition(",")
            if not how or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = entries.get(f"{metric}_stderr,{how}")
            rows[task, metric, how] = {
                "value": float(value),
                "stderr": float(error) if isinstance(error, (int, float)) else None,
                "examples": counted,
                "higher_is_better": (found["higher_is_better"].get(task) or {}).get(metric),
            }
    return rows


@contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Keeps lm-eval's and its helpers' remarks to itself; its bars too, unless they are wanted."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "evaluate", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, nullcontext() if bars else redirect_stderr(nowhere):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
