"""The command line: thin, typed, and the only place that prints results."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as RichTable

from fslora import __version__
from fslora.deploy.patience import Patience
from fslora.deploy.relay import IDLE
from fslora.errors import ArtifactError, ConfigError, FsloraError

if TYPE_CHECKING:
    from fslora.compare import Ledger
    from fslora.runfolder import RunFolder

app = typer.Typer(
    name="fslora",
    help="Federated LoRA fine-tuning of language models across unequal clients.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

deploy = typer.Typer(
    help="Carry out an experiment at sites that keep their data, through Flower.", no_args_is_help=True
)
app.add_typer(deploy, name="deploy")

ExperimentFile = Annotated[
    Path | None, typer.Argument(help="TOML file; without one, the embedded default.", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one key; may be repeated.")
]
RunPath = Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]
AnyPath = Annotated[Path, typer.Argument(help="The folder of a run or of a comparison.", show_default=False)]
Jobs = Annotated[int, typer.Option(min=1, help="Comparisons: runs side by side, each in a process of its own.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes; only the result.")]


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def run(
    experiment: ExperimentFile = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder [default: runs/TIME-METHOD].", show_default=False)
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune one model over unequal clients, and write a run folder with adapter and page."""
    from fslora import config

    chosen = config.load(experiment, overrides or ())
    path = out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{chosen.method.name}"
    from fslora import runner

    with _interruptible(path):
        runner.start(chosen, path, _terminal(quiet))
    _print_closing(path, as_json, quiet)


@app.command()
def compare(
    experiment: ExperimentFile = None,
    methods: Annotated[
        str | None, typer.Option(help="Names of methods or entries, with commas, or 'all'.", show_default=False)
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds.", show_default=False)] = None,
    reference: Annotated[
        str | None, typer.Option(help="What the others are compared with.", show_default=False)
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="KIND=AMOUNT", help="Where every run ends: rounds=40, bytes=50e6, flops=1e13 or seconds=600."
        ),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="Values to try with the first seed; may be repeated."),
    ] = None,
    jobs: Jobs = 1,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the comparison [default: runs/TIME-compare].", show_default=False)
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run methods and baselines on the same model, data, fleet, seeds and budget, and compare them seed by seed."""
    from fslora import compare, config

    asked = {
        "methods": methods and [name.strip() for name in methods.split(",")],
        "seeds": seeds,
        "reference": reference,
        "grid": compare.parse_grid(grid or ()) or None,
    }
    # Without any option there is no table either: an empty one would clear the file's.
    table = {key: value for key, value in asked.items() if value is not None}
    options: dict[str, Any] = {"compare": table} if table else {}
    if budget is not None:
        options["run"] = compare.parse_budget(budget)
    chosen = compare.with_options(config.load(experiment, overrides or ()), options)
    path = out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-compare"
    with _interruptible(path):
        ledger = compare.start(chosen, path, jobs, _terminal(quiet))
    _print_comparison(path, as_json, quiet)
    _exit_with(ledger)


@app.command()
def resume(path: AnyPath, jobs: Jobs = 1, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Continue a stopped run or comparison; it ends as if it had never stopped."""
    from fslora import compare, runner

    if compare.is_comparison(path):
        with _interruptible(path):
            ledger = compare.resume(path, jobs, _terminal(quiet))
        _print_comparison(path, as_json, quiet)
        _exit_with(ledger)
        return
    if jobs != 1:
        raise ConfigError(f"--jobs is {jobs}, but {path} is no comparison; leave it out")
    with _interruptible(path):
        runner.resume(path, _terminal(quiet))
    _print_closing(path, as_json, quiet)


@app.command()
def data(
    experiment: ExperimentFile = None,
    overrides: Overrides = None,
    plot: Annotated[Path, typer.Option(help="Where the plot goes (.png, .svg or .pdf).")] = Path("partition.png"),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show who holds what: statistics, clients by class, ranks; no model is loaded."""
    from fslora import config
    from fslora.prepare import prepare_sites
    from fslora.report import class_table, fleet_table, parse_data, partition_figure, statistics_table

    described = prepare_sites(config.load(experiment, overrides or ())).describe()
    record = parse_data(described)
    try:
        partition_figure(record).savefig(plot, dpi=150)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"--plot {plot} cannot be written: {error}") from None
    if as_json:
        _print_json({**described, "plot": str(plot)})
        return
    console = Console(highlight=False)
    tables = (fleet_table(record),) if quiet else (statistics_table(record), class_table(record), fleet_table(record))
    for table in tables:
        if table.rows:
            console.print(table.rich())
    console.print(f"partition digest {described['partition']['digest']}\nplot: {plot}", soft_wrap=True)


@app.command()
def plan(
    experiment: ExperimentFile = None,
    overrides: Overrides = None,
    no_data: Annotated[
        bool, typer.Option("--no-data", help="Read no data: every sequence counts as long as model.max_length.")
    ] = False,
    teraflops: Annotated[
        float | None,
        typer.Option(
            help="Matrix products of the machine that is meant, in 10^12 operations per second "
            "[default: measured here].",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show what an experiment will cost (bytes, operations, memory, time, disk); no weights are loaded."""
    from fslora import config, planning

    if teraflops is not None and not teraflops > 0:
        raise ConfigError(f"--teraflops is {teraflops}; give a positive number")
    result = planning.plan(config.load(experiment, overrides or ()), not no_data, teraflops)
    if as_json:
        _print_json(result)
        return
    console = Console(highlight=False)
    console.print(planning.table(result))
    for kind in ("warnings",) if quiet else ("notes", "warnings"):
        for text in result[kind]:
            console.print(f"{kind.removesuffix('s')}: {text}", soft_wrap=True, markup=False)


@app.command("eval")
def evaluate(
    path: RunPath,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--harness",
            metavar="TASK,...",
            help="Score a causal run on these tasks of lm-eval instead.",
            show_default=False,
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--harness-path", help="A folder of task files for --harness.", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--harness-limit", min=1, help="Examples per task of --harness.", show_default=False)
    ] = None,
    client: Annotated[
        int | None, typer.Option(min=0, help="Whose adapter --harness scores, where every client has its own.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Score a run's adapter before and after training: its own test, each client's examples, or tasks of lm-eval."""
    if tasks is not None:
        _print_harness(path, tasks, folder, limit, client, as_json, quiet)
        return
    if (folder, limit, client) != (None, None, None):
        raise ConfigError("--harness-path, --harness-limit and --client belong to --harness; name its tasks there")
    from fslora import evaluation

    result = evaluation.evaluate_run(path, _terminal(quiet or as_json))
    if as_json:
        _print_json(result)
        return
    console = Console(highlight=False)
    for table in evaluation.tables(result):
        console.print(table)


@app.command()
def export(
    path: RunPath,
    to: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Best approximation of this lower rank.")] = None,
    energy: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Lowest rank that keeps this share of energy.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write base and adapter as one ordinary model.")] = False,
    client: Annotated[
        int | None, typer.Option(min=0, help="Whose adapter, where the method serves one model per client.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a run's newest adapter as a PEFT folder (optionally of lower rank), or merged into the base."""
    from fslora import evaluation

    result = evaluation.export_run(path, to, rank, energy, merge, client, _terminal(quiet or as_json))
    if as_json:
        _print_json(result)
    else:
        print(result["summary"])


@app.command("pretrain-tiny")
def pretrain_tiny(
    to: Annotated[Path, typer.Option(help="Folder to write; it must not exist.", show_default=False)],
    source: Annotated[
        str, typer.Option(help="A text file, a folder of them, or 'stdlib': half of Python's own library.")
    ] = "stdlib",
    steps: Annotated[int, typer.Option(help="Training steps of 1,024 tokens.")] = 2400,
    minutes: Annotated[
        float | None, typer.Option(help="Train so long instead; not reproducible.", show_default=False)
    ] = None,
    hidden: Annotated[int, typer.Option(help="Size of a token's vector.")] = 192,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 4,
    vocabulary: Annotated[int, typer.Option(help="Tokens, at most.")] = 3072,
    seed: Annotated[int, typer.Option(help="Of the weights and the order of the text.")] = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train a small base model from nothing on text of this machine, and write it as a transformers folder."""
    from fslora.pretrain import PretrainConfig, pretrain

    config = PretrainConfig(
        source=source, steps=steps, minutes=minutes, hidden=hidden, layers=layers, vocabulary=vocabulary, seed=seed
    )
    with _nothing_left(to), _terminal(quiet).steps("pretraining", None if minutes else steps) as bar:
        result = pretrain(config, to, bar)
    if as_json:
        _print_json(asdict(result))
    else:
        print(to if quiet else result.summary())


@app.command()
def report(path: AnyPath, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Write the page, figures and tables of a run or comparison again; works for unfinished ones too."""
    from fslora import compare
    from fslora.runfolder import RunFolder
    from fslora.runner import write_report

    if compare.is_comparison(path):
        compare.write_report(path)
        _print_comparison(path, as_json, quiet)
        return
    write_report(RunFolder.open(path))
    _print_closing(path, as_json, quiet)


@app.command()
def init(
    to: Annotated[Path, typer.Argument(help="The file to write.")] = Path("experiment.toml"),
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write the embedded default as a commented TOML file to start from."""
    from fslora import config

    text = config.commented_toml(config.load(None, overrides or ()))
    try:
        with to.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{to} exists already; name another file") from None
    except OSError as error:
        raise ArtifactError(f"{to} cannot be written: {error}") from None
    if as_json:
        _print_json({"file": str(to)})
    else:
        print(to if quiet else f"{to} written; run it with `fslora run {to}`")


Deadline = Annotated[float, typer.Option(help="Seconds that a round waits for its clients' answers.")]
Quorum = Annotated[float, typer.Option(help="Share of a round's clients that is enough once the deadline has passed.")]
Wait = Annotated[float, typer.Option(help="Seconds to wait for the sites before the first round.")]
OverSelect = Annotated[
    float, typer.Option(help="Ask this many times the cohort, and go on with the answers that come first.")
]
Resume = Annotated[
    Path | None,
    typer.Option(metavar="RUN", help="Continue the deployed run of this folder.", show_default=False),
]
DeployOut = Annotated[Path | None, typer.Option(help="Run folder [default: runs/TIME-METHOD].", show_default=False)]


@deploy.command("local")
def deploy_local(
    experiment: ExperimentFile = None,
    sites: Annotated[int, typer.Option(min=1, help="Number of sites; clients are dealt to them in turn.")] = 3,
    secure: Annotated[bool, typer.Option(help="TLS, and a key for each site.")] = True,
    deadline: Deadline = Patience.deadline,
    quorum: Quorum = Patience.quorum,
    wait: Wait = Patience.wait,
    over_select: OverSelect = Patience.over_select,
    resume: Resume = None,
    overrides: Overrides = None,
    out: DeployOut = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Bring up a server and sites as processes on this machine, run, and end them: to try it in one command."""
    from fslora.deploy import launch

    patience = _patience(deadline, quorum, wait, over_select)
    folder = _deployed_folder(experiment, overrides, resume, out)
    with _deploy_interruptible(folder.path, "fslora deploy local"):
        launch.local(folder, sites, secure, patience, _terminal(quiet or as_json))
    _print_closing(folder.path, as_json, quiet)


@deploy.command("run")
def deploy_run(
    federation: Annotated[
        str, typer.Option(metavar="NAME", help="Of a SuperLink in Flower's config.toml.", show_default=False)
    ],
    experiment: ExperimentFile = None,
    deadline: Deadline = Patience.deadline,
    quorum: Quorum = Patience.quorum,
    wait: Wait = Patience.wait,
    over_select: OverSelect = Patience.over_select,
    resume: Resume = None,
    overrides: Overrides = None,
    out: DeployOut = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Start a run on an existing SuperLink on this machine, and follow it."""
    from fslora.deploy import launch

    patience = _patience(deadline, quorum, wait, over_select)
    folder = _deployed_folder(experiment, overrides, resume, out)
    with _deploy_interruptible(folder.path, f"fslora deploy run --federation {federation}"):
        launch.remote(folder, federation, patience, _terminal(quiet or as_json))
    _print_closing(folder.path, as_json, quiet)


@deploy.command("client-config")
def deploy_client_config(
    site: Annotated[str, typer.Option(help="The site's name, by which the server knows it.")],
    clients: Annotated[str, typer.Option(help="The ids of its clients, with commas.")],
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the server is.")],
    data: Annotated[
        str,
        typer.Option(
            help="The site's data: a file, or a folder or pattern with a file (images: a folder) for each client; "
            "or 'experiment': read what the experiment names."
        ),
    ],
    storage: Annotated[Path, typer.Option(help="Folder for what its clients keep from round to round.")],
    root_certificates: Annotated[
        Path | None, typer.Option(help="Certificate of the CA that signed the server's; without it, no TLS.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="The site's own key, which the server has registered.")] = None,
    model: Annotated[str, typer.Option(help="Folder of the base model, where it lies elsewhere here.")] = "",
    device: Annotated[str, typer.Option(help="Where to train, e.g. 'cuda:0'.")] = "",
    rank: Annotated[
        int, typer.Option(min=0, help="Rank of its clients, in the place of the experiment's; 0: the experiment's.")
    ] = 0,
    memory: Annotated[
        str, typer.Option(help="Or what training may take, e.g. '2GB': the largest rank whose estimate fits.")
    ] = "",
    idle: Annotated[
        float, typer.Option(help="Seconds for which the base stays loaded after a letter; 0: only for one letter.")
    ] = IDLE,
    port: Annotated[int, typer.Option(help="The SuperNode's own port on loopback.")] = 9094,
    out: Annotated[Path | None, typer.Option(help="Script [default: SITE.sh].", show_default=False)] = None,
) -> None:
    """Write the script with which a site starts its SuperNode."""
    from fslora.deploy.clientconfig import Link, write_script
    from fslora.deploy.settings import SiteSettings

    path = out or Path(f"{site}.sh")
    data = str(Path(data).resolve()) if Path(data).exists() else data  # SuperNodes work in folders of their own
    values = {"site": site, "clients": clients, "storage": str(storage.resolve()), "data": data}
    options = {"model": model, "device": device, "rank": rank, "memory": memory, "idle": idle}
    settings = SiteSettings.of({**values, **options})
    write_script(settings, Link(superlink, root_certificates, key, port), path)
    print(path)


@deploy.command("test-keys")
def deploy_test_keys(
    folder: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)],
    site: Annotated[list[str], typer.Option(help="A site to make a key for; may be repeated.")],
    host: Annotated[list[str] | None, typer.Option(help="Name or address of the server; may be repeated.")] = None,
) -> None:
    """Make a CA, a server's certificate and a key for each site: for trials, never for a real federation."""
    from fslora.deploy import bundle

    bundle.require_flower()  # it brings what keys are made with
    from fslora.deploy.certificates import write_authority, write_site_key

    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ArtifactError(f"{folder} is there already, or cannot be made: {error}") from None
    # Loopback always: Flower's process beside the SuperLink, which starts server processes, reaches it there.
    write_authority(folder, tuple(dict.fromkeys([*(host or ()), "localhost", "127.0.0.1"])))
    for name in site:
        write_site_key(folder / name)
    print("\n".join(str(path) for path in sorted(folder.iterdir())))


def _patience(deadline: float, quorum: float, wait: float, over_select: float) -> Patience:
    try:
        return Patience(deadline, quorum, wait, over_select)
    except ValueError as error:
        raise ConfigError(f"--{error}") from None


def _deployed_folder(
    experiment: Path | None, overrides: list[str] | None, resume: Path | None, out: Path | None
) -> RunFolder:
    """Returns the folder of a new run, or of the one to continue."""
    from fslora import config
    from fslora.deploy import bundle, launch
    from fslora.runfolder import RunFolder

    bundle.require_flower()
    if resume is not None:
        if experiment or overrides or out:
            raise ConfigError("--resume takes the experiment from its folder; leave the file, --set and --out away")
        return RunFolder.open(resume)
    chosen = config.load(experiment, overrides or ())
    path = out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{chosen.method.name}"
    return launch.prepare(chosen, path)


@contextmanager
def _deploy_interruptible(path: Path, command: str) -> Iterator[None]:
    """Says how to go on when following a run is stopped; other signals that end a process are taken as Ctrl-C."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nstopped; {path} holds what was done. Go on with: {command} --resume {path}", file=sys.stderr)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@app.command()
def methods(as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List the methods: paper, what differs from client to client, what travels."""
    from fslora.methods import registered

    facts = ("name", "paper", "differs", "travels", "streams", "personal")
    rows = [{fact: getattr(method, fact) for fact in facts} for method in registered().values()]
    if as_json:
        _print_json(rows)
        return
    if quiet:
        print("\n".join(row["name"] for row in rows))
        return
    table = RichTable("name", "paper", "differs per client", "travels", "notes", show_lines=True)
    for row in rows:
        notes = (
            "streaming" if row["streams"] else "needs all updates",
            "one model per client" if row["personal"] else "one global model",
        )
        table.add_row(*(row[fact] for fact in facts[:4]), "; ".join(notes))
    Console(highlight=False).print(table)


@app.command()
def doctor(as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Show versions, devices, extras and whether hubs are switched off; exit 1 when the main job cannot run."""
    from fslora import diagnosis

    findings = diagnosis.examine()
    if as_json:
        _print_json({"healthy": diagnosis.healthy(findings), "findings": [finding.as_dict() for finding in findings]})
    elif not quiet:
        table = RichTable("", "what", "found", "remedy")
        for finding in findings:
            table.add_row(finding.mark, finding.what, finding.found, finding.remedy)
        Console(highlight=False).print(table)
    if not diagnosis.healthy(findings):
        raise typer.Exit(1)


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 1 failed, 2 wrong input, 130 stopped."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Where it is installed, PEFT imports it, and it then speaks of kernels on a hub that we make no use of.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except FsloraError as error:
        print(f"fslora: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def _interruptible(path: Path) -> Iterator[None]:
    """Says how to go on when a run is stopped; what it had done is in its folder."""
    try:
        yield
    except KeyboardInterrupt:
        if (path / "experiment.toml").is_file():
            print(f"\nstopped; {path} holds what was done. Go on with: fslora resume {path}", file=sys.stderr)
        raise


@contextmanager
def _nothing_left(path: Path) -> Iterator[None]:
    """Says that a stopped command wrote nothing."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nstopped; nothing was written to {path}", file=sys.stderr)
        raise


def _terminal(quiet: bool) -> Any:
    from fslora.console import Terminal

    return Terminal(quiet)


def _print_harness(
    path: Path, tasks: str, folder: Path | None, limit: int | None, client: int | None, as_json: bool, quiet: bool
) -> None:
    from fslora import harness

    silent = quiet or as_json
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    asked = harness.Harness(names, folder, limit, client, bars=not silent and sys.stderr.isatty())
    result = harness.evaluate_harness(path, asked, _terminal(silent))
    if as_json:
        _print_json(result)
    else:
        Console(highlight=False).print(harness.table(result))


def _print_closing(path: Path, as_json: bool, quiet: bool) -> None:
    from fslora.report import closing_table, read_run

    record = read_run(path)
    table = closing_table(record.runs)
    if as_json:
        _print_json({"run": str(path), "page": str(path / "report.html"), "runs": table.dicts()})
        return
    console = Console(highlight=False)
    console.print(table.rich())
    lines = [f"page     {path / 'report.html'}", f"adapter  {path / 'adapter'}"]
    print(path if quiet else "\n".join(lines))


def _print_comparison(path: Path, as_json: bool, quiet: bool) -> None:
    from fslora.report import comparison_table

    table = comparison_table(path)
    page = path / "report.html"
    if as_json:
        _print_json({"comparison": str(path), "page": str(page), "rows": table.dicts()})
        return
    Console(highlight=False).print(table.rich())
    results = ", ".join(str(path / f"results.{kind}") for kind in ("csv", "json", "md", "tex"))
    print(path if quiet else f"page     {page}\nresults  {results}")


def _exit_with(ledger: Ledger) -> None:
    """Names what is missing from a comparison, and exits with 1 if anything is."""
    failures = ledger.failures()
    for cell, error in failures:
        print(f"fslora: {cell.folder} failed: {error}", file=sys.stderr)
    if failures:
        raise typer.Exit(1)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))
