"""`fslora plan`: what an experiment will cost, before anything is trained and without loading weights.

Bytes are counted on messages that the method really makes, tokens and operations on the batches that the run will draw,
memory on a step that the cohort engine really takes, on tensors without values. The time is an estimate: operations, by
the throughput of a matrix product of the model's own shape, times what a whole step reaches of it. That share was
measured once, on this project's machine with the embedded MiniLM, one thread, processor time: 0.41 to 0.46 in float32,
and 0.07 to 0.08 in bfloat16, where AMX makes large products ten times as fast and little else. See `efficiency`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fslora.config import Experiment
from fslora.cost import operations
from fslora.errors import ConfigError
from fslora.evaluate import untrained
from fslora.fleet import Fleet
from fslora.footprint import (
    KEPT_KERNELS,
    Tracked,
    evaluation_step,
    kernel_bytes,
    loading_bytes,
    local_step,
    machine_memory,
    weight_bytes,
)
from fslora.memory import Heap, release_memory, resident
from fslora.methods.base import initial_adapter
from fslora.models.base import Base
from fslora.models.load import Outline, device_of
from fslora.prepare import Federation
from fslora.report.text import byte_text, count, counted, duration, percent
from fslora.report.text import operations as flop_text
from fslora.rounds import wire_of
from fslora.traffic import Exchange, Rehearsal, rehearse
from fslora.types import Adapter, Batch
from fslora.workload import Certainty, Workload, outlined

EFFICIENCY = 0.4
"""Share of a matrix product's throughput that local steps reach."""
EFFICIENCY_BFLOAT16_CPU = 0.08
"""The same in bfloat16 on a processor; larger models than MiniLM do better."""
CUDA_CONTEXT = 500 * 2**20
"""Bytes of a GPU that are gone before the first tensor: the driver's context and the libraries' workspaces."""
PAGE = 3 * 2**20
"""About what page, tables and records of a run take on the disk."""

Section = dict[str, Any]


@dataclass(frozen=True)
class Planned:
    """What all sections of a plan are made from."""

    experiment: Experiment
    federation: Federation
    outline: Outline
    certainty: Certainty
    work: Workload
    rehearsal: Rehearsal
    resident: int
    """Bytes of this process once everything but the weights was there."""
    kernel: int
    """Bytes that the processor's library keeps for each shape of a matrix product."""
    teraflops: float
    measured: bool
    """Whether the throughput was measured here."""

    @property
    def base(self) -> Base:
        """The base without weights."""
        return self.federation.base

    @property
    def device(self) -> torch.device:
        """Where the run will be."""
        return device_of(self.experiment.model)

    @property
    def workers(self) -> tuple[str, ...]:
        """The device of each worker process; '' for that of the model."""
        return self.experiment.engine.devices(len(self.work.cohorts[0]))

    @property
    def efficiency(self) -> float:
        """Share of the throughput that local steps reach, about."""
        slow = self.measured and self.device.type == "cpu" and self.experiment.model.dtype == "bfloat16"
        return EFFICIENCY_BFLOAT16_CPU if slow else EFFICIENCY

    @property
    def counted(self) -> bool:
        """Whether the number of local steps is known: that of passes over unknown data is not."""
        return self.certainty != "assumed" or self.experiment.local.steps is not None


def plan(experiment: Experiment, with_data: bool = True, teraflops: float | None = None) -> dict[str, Any]:
    """Returns an experiment's plan: sections of plain numbers (bytes, counts, seconds), notes and warnings.

    Args:
        experiment: What is planned; its variants are runs of their own and are left out.
        with_data: Whether the data are read; otherwise every sequence counts as long as model.max_length.
        teraflops: Throughput of a matrix product on the machine that is meant, in 10^12 operations per second; by
            default it is measured on this one.

    Raises:
        FsloraError: Anything that a run would refuse before it trains.
    """
    federation, outline, certainty = outlined(experiment, with_data)
    _import_what_a_run_does(federation)
    device, dtype = device_of(experiment.model), experiment.model.dtype
    measured, before = throughput(federation.base, device, dtype), _settled()
    kernel, work = kernel_bytes(federation.base, dtype, device), Workload(federation)
    rehearsal = _rehearsed(work)
    given = teraflops if teraflops is not None else measured / 1e12
    planned = Planned(
        experiment, federation, outline, certainty, work, rehearsal, before, kernel, given, teraflops is None
    )
    result: dict[str, Any] = {
        "model": _model(planned),
        "traffic": _traffic(planned),
        "tokens": _tokens(planned),
        "compute": _compute(planned),
        "memory": _memory(planned),
        "disk": _disk(planned),
    }
    return {**result, "notes": _notes(planned), "warnings": _warnings(result["memory"])}


def largest_rank(experiment: Experiment, members: frozenset[int], budget: int) -> int:
    """Returns the largest rank at which these clients' training, in one process, is estimated to fit into memory.

    Args:
        experiment: What they train.
        members: Their ids; their data are here.
        budget: Bytes, of a GPU where the training is on one.

    Raises:
        ConfigError: Not even rank 1 fits.
    """
    federation, outline, certainty = outlined(experiment, True, members)
    device, dtype = device_of(experiment.model), experiment.model.dtype
    before, kernel = _settled(), kernel_bytes(federation.base, dtype, device)
    fleet = federation.sites.fleet
    theirs = np.isin(np.arange(len(fleet)), sorted(members))

    def peak(rank: int) -> int:
        alone = Fleet(np.full(len(fleet), rank), np.where(theirs, fleet.examples, 0))
        what_if = replace(federation, sites=replace(federation.sites, fleet=alone))
        work = Workload(what_if)
        planned = Planned(experiment, what_if, outline, certainty, work, _rehearsed(work), before, kernel, 0.0, False)
        memory = _memory(planned)
        return int(memory["peak"] if memory["gpu_peak"] is None else memory["gpu_peak"])

    least, most = 0, experiment.adapter.rank
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if peak(middle) <= budget else (least, middle - 1)
    if not least:
        raise ConfigError(
            f"memory is {byte_text(budget)}, but training at rank 1 takes about {byte_text(peak(1))} here; give more "
            "memory, or lower local.batch_size, model.max_length or engine.chunk in the experiment"
        )
    return least


def _rehearsed(work: Workload) -> Rehearsal:
    federation = work.federation
    experiment = federation.experiment
    return rehearse(
        experiment.method,
        federation.template,
        federation.trainers,
        work.cohorts,
        experiment.local,
        federation.rng,
        wire_of(federation),
    )


def _import_what_a_run_does(federation: Federation) -> None:
    """Brings this process to the size that a run's has before it trains."""
    import fslora.runner

    if federation.sites.dataset.kind == "classes":  # for the baseline
        import sklearn.linear_model
        import sklearn.pipeline
        import sklearn.preprocessing

        del sklearn
    del fslora


def _settled() -> int:
    """Returns the bytes that this process holds without what was freed."""
    release_memory()
    return resident()


def throughput(base: Base, device: torch.device, dtype: str, seconds: float = 0.4) -> float:
    """Returns the operations per second of a matrix product of the base's largest kind of adapted layer."""
    shapes = Counter(base.shape(path) for path in base.targets)
    d_in, d_out = max(shapes, key=lambda shape: shapes[shape] * shape[0] * shape[1])
    kind = getattr(torch, dtype)
    x, weight = (torch.ones(rows, d_in, dtype=kind, device=device) for rows in (1024, d_out))
    best, ends = 0.0, time.perf_counter() + seconds
    while not best or time.perf_counter() < ends:
        began = time.perf_counter()
        for _ in range(4 if device.type == "cuda" else 1):
            product = x @ weight.T
        product[0, 0].item()  # waits for a GPU
        times = 4 if device.type == "cuda" else 1
        best = max(best, times * 2.0 * 1024 * d_in * d_out / (time.perf_counter() - began))
    return best


def _model(planned: Planned) -> Section:
    base, template = planned.base, planned.federation.template
    shapes = Counter(template.layers.values())
    head = sum(tensor.numel() for tensor in template.dense.values())

    def names(shape: tuple[int, int]) -> list[str]:
        return sorted({path.rsplit(".", 1)[-1] for path, own in template.layers.items() if own == shape})

    return {
        "name": base.name,
        "device": str(planned.device),
        "dtype": planned.experiment.model.dtype,
        "quantize": planned.experiment.model.quantize,
        "base_parameters": base.parameters,
        "frozen_parameters": base.parameters - head,
        "adapter_parameters": sum(template.rank * (d_in + d_out) for d_in, d_out in template.layers.values()),
        "head_parameters": head,
        "head": list(base.head),
        "adapted_layers": len(template.layers),
        "layers": [
            {"names": names(shape), "count": count, "d_in": shape[0], "d_out": shape[1]}
            for shape, count in shapes.items()
        ],
    }


def _traffic(planned: Planned) -> Section:
    work, rehearsal = planned.work, planned.rehearsal
    pooled = planned.experiment.fleet.pooled
    first = rehearsal.rounds[0]
    fleet = Counter(client.rank for client in planned.federation.trainers)
    down, up = rehearsal.down(work.cohorts), rehearsal.up(work.cohorts)
    return {
        "method": planned.experiment.method.name,
        "clients": len(planned.federation.trainers),
        "cohort": len(work.cohorts[0]),
        "rounds": planned.experiment.run.rounds,
        "by_rank": [
            {
                "rank": rank,
                "clients": fleet[rank],
                "bytes_down": 0 if pooled else first[rank].down + sum(first[rank].changes.values()),
                "bytes_up": 0 if pooled else first[rank].up,
                "client_memory_bytes": first[rank].memory,
            }
            for rank in sorted(fleet)
        ],
        "first_round_down": 0 if pooled else down[0],
        "first_round_up": 0 if pooled else up[0],
        "change_of_base_bytes": rehearsal.change,
        "total_down": 0 if pooled else sum(down),
        "total_up": 0 if pooled else sum(up),
        "rehearsed_rounds": len(rehearsal.rounds),
    }


def _tokens(planned: Planned) -> Section:
    federation, work = planned.federation, planned.work
    counts = np.array([[work.counts(turn) for turn in turns] for turns in work.turns], dtype=np.float64).sum(axis=1)
    lengths, rounds = work.lengths, planned.experiment.run.rounds
    whole = {
        "per_round": round(float(counts[:, 0].mean())),
        "predicted_per_round": round(float(counts[:, 1].mean())),
        "total": round(float(counts[:, 0].mean() * rounds)),
        "predicted_total": round(float(counts[:, 1].mean() * rounds)),
    }
    known = planned.certainty != "assumed"
    return {
        "certainty": planned.certainty,
        "train_examples": len(lengths) if known else None,
        "mean": float(lengths.mean()),
        "percentile_95": float(np.percentile(lengths, 95)),
        "longest": int(lengths.max()),
        "truncated": federation.truncated if known else None,
        "shortened": federation.shortened if known else None,
        **(whole if planned.counted else dict.fromkeys(whole)),
    }


def _compute(planned: Planned) -> Section:
    per_round = [
        sum(
            operations(planned.base, planned.rehearsal.exchange(t, turn.client.rank).start, *planned.work.counts(turn))
            for turn in turns
        )
        for t, turns in enumerate(planned.work.turns)
    ]
    mean = float(np.mean(per_round))
    rounds = planned.experiment.run.rounds
    total, evaluated = mean * rounds, _evaluation_operations(planned)
    speed = planned.teraflops * 1e12 * planned.efficiency
    known = planned.counted
    return {
        "first_round_operations": per_round[0] if known else None,
        "operations_per_round": mean if known else None,
        "operations": total if known else None,
        "evaluation_operations": evaluated,
        "teraflops": planned.teraflops,
        "measured_here": planned.measured,
        "efficiency": planned.efficiency,
        "training_seconds": total / speed if known else None,
        "evaluation_seconds": evaluated / speed,
    }


def _evaluation_operations(planned: Planned) -> float:
    """Forward passes: what is scored between rounds as often as configured, and the rest before and after."""
    run, base = planned.experiment.run, planned.base
    often, once = (sum(int(data.lengths[own].sum()) for data, own in part) for part in planned.work.scored)
    times = 1 + -(-run.rounds // run.eval_every)
    return 2.0 * (base.linear_parameters + base.output_parameters) * (times * often + 2 * once)


def _memory(planned: Planned) -> Section:
    model, base = planned.experiment.model, planned.base
    step = _tracked(planned, planned.work.heaviest(planned.experiment.engine.together))
    batch, template = planned.work.heaviest_evaluation(), planned.federation.template
    evaluation = _evaluated(planned, initial_adapter(template, template.rank, planned.federation.rng), batch)
    weights, server = weight_bytes(base, model.quantize), _server_bytes(planned)
    loading = _loading_bytes(planned, weights)
    trains, evaluates = step.trained + step.activations, evaluation.activations
    on_gpu = planned.device.type == "cuda"
    training, finished = (planned.kernel * count for count in _kernels(planned, step, evaluation, batch))

    def libraries(messages: int, tensors: int, kernels: int) -> int:
        """Kernels, and what freed pieces between others come to before they are given back."""
        held = messages + (0 if on_gpu else tensors)
        kept = planned.resident + kernels + (0 if on_gpu else weights)
        return kernels + min(held, int((Heap.GROWTH - 1) * (kept + held)))

    def peak(messages: int, tensors: int, kernels: int) -> int:
        """Of one process with a base, and with these beside it."""
        held = messages + (0 if on_gpu else weights + tensors)
        return planned.resident + max(loading, held + libraries(messages, tensors, kernels))

    workers = planned.workers
    last = server, evaluates, finished
    moments = [last] if workers else [last, (server, trains, training)]
    fullest = max(moments, key=lambda moment: peak(*moment))
    worker = peak(_message_bytes(planned), trains, training) if workers else 0
    return {
        "process": planned.resident,
        "weights": weights,
        "loading": loading,
        "server": server,
        "trained": step.trained,
        "activations": step.activations,
        "evaluation": evaluates,
        "libraries": libraries(*fullest),
        "chunk": min(planned.experiment.engine.together, len(planned.work.cohorts[0])),
        "workers": len(workers),
        "worker": worker or None,
        "peak": peak(*fullest) + len(workers) * worker,
        "gpu_peak": _gpu_peak(workers, weights, trains, evaluates) if on_gpu else None,
        "machine": dict(machine_memory()),
    }


def _gpu_peak(workers: Sequence[str], weights: int, trains: int, evaluates: int) -> int:
    """Of the fullest GPU: this process evaluates there, and trains, or has workers train beside it."""
    if not workers:
        return CUDA_CONTEXT + weights + max(trains, evaluates)
    beside = max(Counter(workers).values())
    return CUDA_CONTEXT + weights + evaluates + beside * (CUDA_CONTEXT + weights + trains)


def _kernels(planned: Planned, step: Tracked, evaluation: Tracked, batch: Batch | None) -> tuple[int, int]:
    """How many kernels, made for one shape each, the processor's library keeps: while a run trains, and at its end."""
    if not planned.kernel:
        return 0, 0
    work, chunk = planned.work, planned.experiment.engine.together
    shapes = work.shapes(chunk)
    # Those of a head that reads one position of a text are the same at any width.
    same = step.products & _tracked(planned, work.lightest(chunk)).products if shapes.passes > 1 else frozenset()
    frozen = len(_evaluated(planned, untrained(planned.federation), batch).products)
    adapted = len(evaluation.products)
    training = len(same) + shapes.passes * len(step.products - same)
    training += shapes.during * adapted + (shapes.after + shapes.baseline) * frozen
    return min(KEPT_KERNELS, training), min(KEPT_KERNELS, training + shapes.after * max(0, adapted - frozen))


def _evaluated(planned: Planned, adapter: Adapter, batch: Batch | None) -> Tracked:
    return Tracked(0, 0, frozenset()) if batch is None else evaluation_step(planned.base, adapter, batch)


def _tracked(planned: Planned, parts: Sequence[np.ndarray]) -> Tracked:
    """One local step of the largest ranks over these examples, by client."""
    experiment, federation = planned.experiment, planned.federation
    ranks = sorted((client.rank for client in federation.trainers), reverse=True)
    exchanges = [planned.rehearsal.rounds[-1][rank] for rank in ranks[: len(parts)]]
    batches = [federation.train.batch(part) for part in parts]
    starts, p = [exchange.start for exchange in exchanges], experiment.adapter.dropout
    return local_step(planned.base, starts, batches, experiment.local, p, planned.device.type)


def _server_bytes(planned: Planned) -> int:
    """The state with the sum that replaces it, and the messages that are held at one time."""
    experiment, rehearsal = planned.experiment, planned.rehearsal
    cohort = len(planned.work.cohorts[0])
    chunk = min(experiment.engine.together, cohort)
    chunks = min(max(1, 2 * len(planned.workers)), -(-cohort // chunk))
    held = chunks * _message_bytes(planned)
    if not experiment.method.streams:
        held += max(0, cohort - chunks * chunk) * _largest(planned).up
    return 2 * rehearsal.state + held


def _message_bytes(planned: Planned) -> int:
    """What a chunk's clients get, start from and send."""
    largest, chunk = _largest(planned), min(planned.experiment.engine.together, len(planned.work.cohorts[0]))
    return chunk * (largest.down + largest.start.adapter.nbytes + largest.up)


def _largest(planned: Planned) -> Exchange:
    return max(planned.rehearsal.rounds[-1].values(), key=lambda exchange: exchange.up)


def _loading_bytes(planned: Planned, weights: int) -> int:
    model = planned.experiment.model
    sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
    kept = sizes[model.dtype]
    stored = sizes.get(planned.outline.stored or "float32", 4)
    if model.quantize != "none":
        return weights + planned.base.parameters * stored
    loaded = 4 if planned.base.objective.has_head else kept
    return loading_bytes(planned.base.parameters, stored, loaded, kept)


def _disk(planned: Planned) -> Section:
    rehearsal, fleet = planned.rehearsal, planned.federation.trainers
    kept = {rank: exchange.kept for rank, exchange in rehearsal.rounds[-1].items()}
    checkpoint = rehearsal.state + sum(kept[client.rank] for client in fleet)
    adapters = rehearsal.served * (len(fleet) if planned.experiment.method.personal else 1)
    # A new checkpoint is complete before the one before it is removed.
    return {"checkpoint": checkpoint, "adapter": adapters, "run_folder": 2 * checkpoint + adapters + PAGE}


def _notes(planned: Planned) -> list[str]:
    experiment, rehearsal, notes = planned.experiment, planned.rehearsal, []
    if planned.certainty == "assumed":
        notes.append("The data were not read: every sequence is as long as model.max_length, clients are equally large")
        if planned.base.objective.has_head:
            notes.append(f"and there are {len(planned.federation.sites.dataset.label_names) or 1} classes")
    if planned.certainty == "estimated":
        notes.append(f"{planned.base.name} has no tokenizer here: a token is taken to be 4 characters")
    if not planned.outline.checkpoint:
        notes.append(
            f"No weights of {planned.base.name} are at hand (as safetensors); `fslora run` needs them. All that is "
            "beside the backbone counts as a fresh head"
        )
    if not planned.counted:
        notes.append("local.epochs passes over data of unknown size: totals are left out; set data.max_train or steps")
    if rehearsal.change:
        notes.append(
            f"Each round changes the base: a client gets about {rehearsal.change} bytes for every round since its last "
            "one, at most the dense layers; totals count this"
        )
    if len(rehearsal.rounds) == 1 and experiment.run.rounds > 1:
        notes.append("The adapter is too large to rehearse more than one round: totals repeat the first")
    if experiment.run.budget:
        key, amount = experiment.run.budget
        notes.append(f"run.{key} = {amount:g} may end the run before its last round; totals are of all rounds")
    if experiment.variants:
        notes.append(f"{len(experiment.variants)} variants are further runs, which are left out here")
    return notes


def _warnings(memory: Mapping[str, Any]) -> list[str]:
    machine, found = memory["machine"], []
    if memory["peak"] > machine.get("host", float("inf")):
        found.append(
            f"the plan needs {memory['peak']} bytes of memory and this machine has {machine['host']}: lower "
            "engine.chunk, local.batch_size or model.max_length, or set model.gradient_checkpointing or model.dtype"
        )
    if (memory["gpu_peak"] or 0) > machine.get("gpu", float("inf")):
        found.append(
            f"the plan needs {memory['gpu_peak']} bytes of the GPU, which has {machine['gpu']}: lower engine.chunk, "
            "local.batch_size or model.max_length, or set model.gradient_checkpointing, model.dtype or model.quantize"
        )
    return found


def table(result: Mapping[str, Any]) -> Table:
    """Returns a plan for the terminal."""
    drawn = Table("", "", "", title="Plan", title_justify="left", show_header=False, box=SIMPLE_HEAD, pad_edge=False)
    for title, rows in (
        ("Model", _model_rows(result["model"])),
        ("Messages", _traffic_rows(result["traffic"])),
        ("Tokens", _token_rows(result["tokens"])),
        ("Computing", _compute_rows(result["compute"])),
        ("Memory", _memory_rows(result["memory"])),
        ("Disk", [(name.replace("_", " "), byte_text(value), "") for name, value in result["disk"].items()]),
    ):
        drawn.add_section()
        drawn.add_row(Text(title, style="bold"))
        for row in rows:
            drawn.add_row(*map(Text, row))
    return drawn


Rows = list[tuple[str, str, str]]


def _model_rows(model: Section) -> Rows:
    kept = model["dtype"] if model["quantize"] == "none" else f"{model['dtype']}, linear layers in {model['quantize']}"
    rows = [
        ("frozen parameters", count(model["frozen_parameters"]), f"{model['name']}, {kept}, on {model['device']}"),
        ("adapter parameters", count(model["adapter_parameters"]), counted(model["adapted_layers"], "adapted layer")),
        ("head parameters", count(model["head_parameters"]), ", ".join(model["head"])),
    ]
    shapes = [
        (f"  {entry['d_in']} × {entry['d_out']}", counted(entry["count"], "layer"), ", ".join(entry["names"]))
        for entry in model["layers"]
    ]
    return rows + shapes


def _traffic_rows(traffic: Section) -> Rows:
    rows = [
        (
            f"rank {entry['rank']}, a round",
            f"{byte_text(entry['bytes_down'])} down",
            f"{byte_text(entry['bytes_up'])} up ({counted(entry['clients'], 'client')})",
        )
        for entry in traffic["by_rank"]
    ]
    clients = f"{traffic['cohort']} of {counted(traffic['clients'], 'client')}, {traffic['method']}"
    return [
        *rows,
        ("first round", f"{byte_text(traffic['first_round_down'])} down", f"{byte_text(traffic['first_round_up'])} up"),
        ("all rounds", f"{byte_text(traffic['total_down'])} down", f"{byte_text(traffic['total_up'])} up"),
        ("rounds", count(traffic["rounds"]), clients),
    ]


def _token_rows(tokens: Section) -> Rows:
    spread = f"mean {tokens['mean']:.1f}, 95 % up to {tokens['percentile_95']:.0f}, longest {tokens['longest']}"
    rows = [
        ("training examples", count(tokens["train_examples"]), f"{spread} tokens ({tokens['certainty']})"),
        ("padded tokens, a round", count(tokens["per_round"]), f"{count(tokens['total'])} in all rounds"),
    ]
    if tokens["predicted_total"]:
        predicted = f"{count(tokens['predicted_total'])} in all rounds"
        rows.append(("predicted tokens, a round", count(tokens["predicted_per_round"]), predicted))
    if tokens["truncated"] or tokens["shortened"]:
        rows.append(("cut at model.max_length", count(tokens["truncated"]), f"{tokens['shortened']} at their end"))
    return rows


def _compute_rows(compute: Section) -> Rows:
    where = "measured here" if compute["measured_here"] else "as given"
    return [
        ("operations, a round", flop_text(compute["operations_per_round"]), "mean"),
        (
            "operations, all rounds",
            flop_text(compute["operations"]),
            f"{flop_text(compute['evaluation_operations'])} more for evaluations",
        ),
        (
            "time, about",
            duration(compute["training_seconds"]),
            f"and {duration(compute['evaluation_seconds'])} for evaluations; {compute['teraflops']:.3g} TFLOP/s "
            f"{where}, of which {percent(compute['efficiency'], 0)} count",
        ),
    ]


def _memory_rows(memory: Section) -> Rows:
    together = counted(memory["chunk"], "client") + " at a time"
    rows = [
        ("process and data", byte_text(memory["process"]), "before the weights"),
        ("weights", byte_text(memory["weights"]), f"{byte_text(memory['loading'])} while they are read"),
        ("server and messages", byte_text(memory["server"]), ""),
        ("what clients train", byte_text(memory["trained"]), f"with gradients and optimizer, {together}"),
        ("activations of a step", byte_text(memory["activations"]), "at its peak"),
        ("a batch of an evaluation", byte_text(memory["evaluation"]), "instead"),
        ("libraries", byte_text(memory["libraries"]), "kept kernels, and gaps between what is held"),
    ]
    if memory["workers"]:
        rows.append(("a worker process", byte_text(memory["worker"]), f"{memory['workers']} of them beside this one"))
    rows.append(("peak", byte_text(memory["peak"]), f"of {byte_text(memory['machine'].get('host'))} here"))
    if memory["gpu_peak"] is not None:
        rows.append(("peak on the GPU", byte_text(memory["gpu_peak"]), f"of {byte_text(memory['machine'].get('gpu'))}"))
    return rows
