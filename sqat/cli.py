"""The command line: thin commands over `sqat.pipeline`, and the one place that exits.

Heavy imports (torch, transformers, pydantic, Rich) are inside the bodies, so that ``--help`` is quick.
Exit codes: 0, 1 a fault of this program, 2 the user's mistake, 3 a missed quality gate, 130 interrupted.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from sqat import __version__
from sqat.errors import SqatError, near_files

if TYPE_CHECKING:
    from sqat.recipe import LoadedRecipe

app = typer.Typer(
    name="sqat",
    help="Sparse quantization-aware training: one recipe from a dense transformer to 2:4 int8 ONNX.",
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _set_verbosity(count: int) -> int:
    """-v shows the libraries' news and warnings, -vv also tracebacks."""
    if count:
        logging.basicConfig(level=logging.INFO if count == 1 else logging.DEBUG, stream=sys.stderr)
        warnings.simplefilter("default")
    if count > 1:
        os.environ["SQAT_DEBUG"] = "1"
    return count


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sqat {__version__}")
        raise typer.Exit


INTERRUPTED = 130

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="recipe file", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. stages.qat.epochs=2; repeatable"),
]
Force = Annotated[bool, typer.Option("--force", help="run even what is unchanged")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="only results and errors")]
Verbose = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        show_default=False,
        callback=_set_verbosity,
        help="libraries' messages; -vv: tracebacks too",
    ),
]
Stage = Annotated[
    str | None, typer.Option("--stage", metavar="NAME", help="which stage, if the recipe has several of the kind")
]
Parent = Annotated[
    Path | None,
    typer.Option("--from", metavar="CHECKPOINT", help="start from this folder, not from the recipe's run folder"),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="where to save; default: the run folder")
]
Distill = Annotated[
    bool | None,
    typer.Option("--distill/--no-distill", help="with or without MiniLM distillation, whatever the recipe says"),
]
Targets = Annotated[
    list[str] | None,
    typer.Option("--target", metavar="NAME", help="instead of the recipe's; auto: what fits this machine; repeatable"),
]


@app.callback()
def sqat(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def run(
    recipe: RecipeFile,
    first: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="first stage")] = None,
    last: Annotated[str | None, typer.Option("--to", metavar="STAGE", help="last stage")] = None,
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
    overrides: Set = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Run every stage of a recipe; unchanged ones are skipped."""
    loaded = load(recipe, overrides)
    from sqat import console, pipeline, tables

    if dry_run:
        plan = pipeline.make_plan(loaded, first=first, last=last, force=force)
        tables.print_plan(plan, as_json=json)
        return
    with console.open_display(quiet=quiet, log=log_of(loaded)) as display:
        results = pipeline.run(loaded, display, first=first, last=last, force=force)
    if console.is_first_process():
        tables.print_results(results, as_json=json)


@app.command()
def train(
    recipe: RecipeFile,
    parent: Parent = None,
    output: Output = None,
    stage: Stage = None,
    overrides: Set = None,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Fine-tune the dense model."""
    run_one("train", recipe, parent, output, stage, overrides, force, quiet)


@app.command()
def prune(
    recipe: RecipeFile,
    parent: Parent = None,
    output: Output = None,
    stage: Stage = None,
    distill: Distill = None,
    overrides: Set = None,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Prune to N:M step by step, fine-tuning between the steps."""
    run_one("prune", recipe, parent, output, stage, overrides, force, quiet, distill)


@app.command()
def calibrate(
    recipe: RecipeFile,
    parent: Parent = None,
    output: Output = None,
    stage: Stage = None,
    overrides: Set = None,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Find the scales of the activations."""
    run_one("calibrate", recipe, parent, output, stage, overrides, force, quiet)


@app.command()
def qat(
    recipe: RecipeFile,
    parent: Parent = None,
    output: Output = None,
    stage: Stage = None,
    distill: Distill = None,
    overrides: Set = None,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Fine-tune with masks, fake quantization and distillation."""
    run_one("qat", recipe, parent, output, stage, overrides, force, quiet, distill)


@app.command()
def export(
    recipe: RecipeFile,
    parent: Parent = None,
    output: Output = None,
    stage: Stage = None,
    targets: Targets = None,
    overrides: Set = None,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Write the files of the engines and check them."""
    if targets:
        overrides = [*(overrides or ()), *choose_targets(recipe, targets, stage, parent, overrides or ())]
    run_one("export", recipe, parent, output, stage, overrides, force, quiet)


@app.command()
def evaluate(
    recipe: RecipeFile,
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="checkpoint folder or .onnx file")],
    split: Annotated[str, typer.Option("--split", metavar="test|dev", help="which rows")] = "test",
    overrides: Set = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Measure a checkpoint, or a file or folder of an export."""
    if split not in ("test", "dev"):
        raise SqatError(f"no split {split!r}", "allowed: test, dev", "--split")
    name: Literal["test", "dev"] = "dev" if split == "dev" else "test"
    must_exist(artifact)
    loaded = load(recipe, overrides)
    if split == "test" and loaded.recipe.data.test is None:
        raise SqatError("the recipe has no test split", "add data.test or give --split dev", recipe.name)
    from sqat import console, pipeline, tables

    with console.open_display(quiet=quiet) as display:
        metrics = pipeline.evaluate(loaded, artifact, name, display)
    if console.is_first_process():
        tables.print_metrics(metrics, split, artifact, as_json=json)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="checkpoint folder or .onnx file")],
    target: Annotated[
        str | None, typer.Option("--target", metavar="NAME", help="hold an .onnx file against a target's rules")
    ] = None,
    fix: Annotated[bool, typer.Option("--fix", help="write a file with what can be repaired repaired")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="of --fix; default: NAME.fixed.onnx")
    ] = None,
    json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Show each layer, and what keeps it from running sparse."""
    must_exist(path)
    if not path.is_dir() and path.suffix != ".onnx":
        raise SqatError("is neither a checkpoint folder nor an .onnx file", place=str(path))
    if output is not None and not fix:
        raise SqatError("names a file for --fix, which was not given", place="--output")
    if fix or target is not None:
        inspect_for(target or "tensorrt", path, fix, output, json)
        return
    from sqat.tables import print_layers

    if path.is_dir():
        from sqat.inspection import inspect_checkpoint

        layers = inspect_checkpoint(path)
    else:
        from sqat.lint.inspection import inspect_onnx

        layers = inspect_onnx(path)
    print_layers(layers, path, as_json=json)


def inspect_for(target: str, path: Path, fix: bool, output: Path | None, json: bool) -> None:
    """Lint an ONNX file for a target, repaired first if asked for, and fail if errors remain."""
    if path.is_dir():
        raise SqatError(
            "a checkpoint folder has no graph to lint or fix", "name the .onnx file of an export", str(path)
        )
    from sqat.lint.checks import known_target
    from sqat.lint.repaired_file import lint_file, repair_file, require
    from sqat.tables import print_findings

    rules = known_target(target)
    lint, repair = repair_file(path, rules, output) if fix else (lint_file(path, rules), None)
    print_findings(lint, path, repair=repair, as_json=json)
    require(lint, path, fix)


@app.command()
def analyze(
    recipe: RecipeFile,
    stage: Annotated[
        str | None, typer.Option("--stage", metavar="NAME", help="start here; default: the last train stage that ran")
    ] = None,
    parent: Parent = None,
    prune_stage: Annotated[
        str | None, typer.Option("--prune", metavar="STAGE", help="whose pattern and criterion; default: the first")
    ] = None,
    calibrate_stage: Annotated[
        str | None, typer.Option("--calibrate", metavar="STAGE", help="whose method; default: the first after it")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", metavar="N", help="rows, at least; queries stay whole")] = 256,
    split: Annotated[str, typer.Option("--split", metavar="train|dev", help="which rows")] = "dev",
    metric: Annotated[
        str | None,
        typer.Option("--metric", metavar="NAME", help="what this loses; default: the output loss", show_default=False),
    ] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", metavar="X", help="choose layers so that the damage is at most this")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="write all figures", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="draw them (.png, .svg)", show_default=False)
    ] = None,
    overrides: Set = None,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Show what pruning and int8 harm in each layer, untrained."""
    loaded = load(recipe, overrides)
    from sqat import console
    from sqat.analysis import command
    from sqat.plots import check_plot
    from sqat.small_files import check_json

    options = command.Options(stage, parent, prune_stage, calibrate_stage, samples, split, metric, budget)
    check_json(json_file)
    check_plot(plot)
    with console.open_display(quiet=quiet) as display:
        findings = command.run_analysis(loaded, options, display)
    from sqat.machine_tables import print_sensitivity

    print_sensitivity(findings)  # first: a full disk does not take them from who waited for them
    command.write_findings(findings, json_file, plot)


@app.command()
def engine(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="file of the target tensorrt")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="ENGINE", show_default=False, help="default: beside the model"),
    ] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", metavar="MIN,OPT,MAX", help="default: as exported, or 1,8,32")
    ] = None,
    sequence: Annotated[
        str | None, typer.Option("--sequence", metavar="MIN,OPT,MAX", help="default: as exported, or 16,128,256")
    ] = None,
    backend: Annotated[str, typer.Option("--backend", metavar="NAME", help="auto, tensorrt or tensorrt-rtx")] = "auto",
    log: Annotated[
        Path | None, typer.Option("--log", metavar="FILE", help="read this build log, build nothing")
    ] = None,
    layers: Annotated[
        Path | None, typer.Option("--layers", metavar="FILE.json", help="read this layer information, build nothing")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Build a TensorRT engine; tell which layers run sparse."""
    must_exist(model)
    from sqat import console, tables
    from sqat.engine import command

    if log is not None or layers is not None:
        if output or batch or sequence:
            raise SqatError("nothing is built from --log or --layers", "leave out --output, --batch and --sequence")
        report = command.read_report(model, log, layers)
    else:
        with console.open_display(quiet=quiet) as display:
            report = command.build_report(
                model, output=output, batch=batch, sequence=sequence, backend=backend, say=display.say
            )
    tables.print_engine(report, as_json=json)
    report.require()


@app.command()
def doctor(json: Json = False, verbose: Verbose = 0) -> None:
    """Show what this machine has, and what targets and backends lack."""
    from sqat.doctor import diagnose
    from sqat.machine_tables import print_diagnosis

    print_diagnosis(diagnose(), as_json=json)


@app.command()
def bench(
    artifacts: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]PATH...", help="checkpoint folders and .onnx files", show_default=False),
    ],
    batch: Annotated[str, typer.Option("--batch", metavar="N,...", help="rows of a call")] = "1,8",
    sequence: Annotated[
        str, typer.Option("--sequence", metavar="N,...", help="tokens of a row; default: 128", show_default=False)
    ] = "",
    threads: Annotated[
        int, typer.Option("--threads", metavar="N", help="and cores; 0: all there are", show_default=True)
    ] = 1,
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="NAME", help="default: the first", show_default=False)
    ] = None,
    backends: Annotated[
        list[str] | None, typer.Option("--backend", metavar="NAME", help="only this one; repeatable")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", help="at least")] = 10,
    min_seconds: Annotated[
        float, typer.Option("--min-seconds", metavar="S", help="of a candidate's turn in a round")
    ] = 0.05,
    within: Annotated[
        float, typer.Option("--within", metavar="%", help="go on until each ratio's 95 % interval is as narrow")
    ] = 2.0,
    max_seconds: Annotated[float, typer.Option("--max-seconds", metavar="S", help="of one size, at most")] = 60.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="write all figures", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="draw them (.png, .svg)", show_default=False)
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Time checkpoints and ONNX files in every backend here."""
    from sqat import console
    from sqat.bench import command
    from sqat.plots import check_plot
    from sqat.small_files import check_json

    options = command.Options(
        artifacts, batch, sequence, threads, baseline, backends or [], rounds, min_seconds, within, max_seconds
    )
    check_json(json_file)
    check_plot(plot)
    with console.open_display(quiet=quiet) as display:
        report = command.run_bench(options, display)
    from sqat.machine_tables import print_bench

    print_bench(report)  # first: a full disk does not take them from who waited for them
    command.write_report(report, json_file, plot)


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run, e.g. runs/recipe")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="or folder; default: report.html in it", show_default=False
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Write one HTML page about a run."""
    from sqat import console
    from sqat.report.page import write_page

    with console.open_display(quiet=quiet) as display:
        path = write_page(run_folder, output, display)
    console.print_text(console.nearby(path))


@app.command()
def init(
    data: Annotated[Path, typer.Argument(metavar="DATA_FILE", help="JSONL, CSV or Parquet to train on")],
    task: Annotated[str | None, typer.Option("--task", metavar="NAME", help="instead of the guess")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="recipe to write")] = Path(
        "recipe.yaml"
    ),
    model: Annotated[
        str | None, typer.Option("--model", metavar="SOURCE", help="folder, hub name or package:...")
    ] = None,
    dev: Annotated[Path | None, typer.Option("--dev", metavar="FILE", help="rows to measure on")] = None,
    sparseml: Annotated[
        Path | None,
        typer.Option("--from-sparseml", metavar="FILE", help="take the stages from a recipe of SparseML"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite the recipe")] = False,
) -> None:
    """Guess task and columns of a data file and write a recipe; in a terminal the task is asked."""
    from sqat import console, starter

    def ask(guess: str) -> str:
        return str(typer.prompt(f"task: {', '.join(starter.TASKS)}?", default=guess, err=True))

    somebody = sys.stdin.isatty() and sys.stderr.isatty()
    for line in starter.write_starter(data, output, task=task, model=model, dev=dev, sparseml=sparseml, force=force,
                                      ask=ask if somebody else None):  # fmt: skip
        console.print_text(line)


@app.command()
def schema(
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="default: print it")] = None,
) -> None:
    """Print the JSON schema of recipes, for editors and for reading."""
    from sqat.console import print_text
    from sqat.recipe_schema import schema_text

    if output is None:
        print_text(schema_text().rstrip())
    else:
        from sqat.small_files import replace_file

        replace_file(output, schema_text().encode())


def load(recipe: Path, overrides: Sequence[str] | None) -> LoadedRecipe:
    """Read a recipe whose local files must be there, so that the last split is not missed hours later."""
    from sqat.recipe_file import load_recipe

    return load_recipe(recipe, overrides or (), check_files=True)


def log_of(loaded: LoadedRecipe) -> Path:
    """The log file of a recipe's run folder."""
    return loaded.run_directory / "sqat.log"


def must_exist(path: Path) -> None:
    """Tell early that a file or folder is not there."""
    if not path.exists():
        raise SqatError("no such file or folder", near_files(path), str(path))


def run_one(
    kind: str,
    recipe: Path,
    parent: Path | None,
    output: Path | None,
    stage: str | None,
    overrides: list[str] | None,
    force: bool,
    quiet: bool,
    distill: bool | None = None,
) -> None:
    """Run the one stage of ``kind`` that the recipe has, or the one called ``stage``."""
    from sqat.recipe_file import distill_override
    from sqat.recipe_rules import pick_stage

    if parent is not None:
        must_exist(parent)
    chosen = [*(overrides or ()), *distill_override(recipe, kind, stage, overrides or (), distill)]
    loaded = load(recipe, chosen)
    name = pick_stage(loaded.recipe, kind, stage)
    from sqat import console, pipeline

    with console.open_display(quiet=quiet, log=log_of(loaded)) as display:
        directory = pipeline.run_stage(loaded, name, display, parent=parent, output=output, force=force)
    if console.is_first_process():
        console.print_text(console.nearby(directory))


def choose_targets(
    recipe: Path, names: Sequence[str], stage: str | None, parent: Path | None, overrides: Sequence[str]
) -> list[str]:
    """What ``--target`` means, as a ``--set``; for auto the machine, the choice and the reasons are printed."""
    from typing import get_args

    from sqat.recipe import Target
    from sqat.recipe_file import targets_override
    from sqat.recipe_rules import pick_stage, suggest

    for name in names:
        if name not in (known := (*get_args(Target), "auto")):
            raise SqatError(f"no target {name!r}", suggest(name, known), "--target")
    if "auto" in names:
        from sqat import console, pipeline
        from sqat.choosing import choose_target, explain, facts_of
        from sqat.machine import describe_machine

        loaded = load(recipe, [*overrides, "results={}"])
        manifest = pipeline.parent_manifest(loaded, pick_stage(loaded.recipe, "export", stage), parent)
        machine, facts = describe_machine(), facts_of(manifest)
        choice = choose_target(machine, facts)
        for line in explain(machine, facts, choice):
            console.print_text(line)
        names = [choice.target if name == "auto" else name for name in names]
    return targets_override(recipe, stage, overrides, list(dict.fromkeys(names)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and turn every end into an exit code and at most one line."""
    signal.signal(signal.SIGTERM, _interrupt)
    warnings.simplefilter("ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of torch's own warnings, once in every process
    code = _run(argv)
    if code and _shares_work():
        _leave(code)
    return code


def _shares_work() -> bool:
    """Whether a launcher started this process together with others."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _run(argv: Sequence[str] | None) -> int:
    """Run a command and tell of an end that was not wished for; returns the exit code."""
    try:
        code: int = app(args=argv, prog_name="sqat", standalone_mode=False) or 0
    except (Exception, KeyboardInterrupt) as error:
        return error.exit_code if isinstance(error, typer.Exit) else _tell(error)
    return _tell(KeyboardInterrupt()) if code == INTERRUPTED else code  # new versions of Typer swallow it


def _leave(code: int) -> None:
    """End one process of a distributed run at once: what torch does at exit waits for processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


# UsageError, which old versions of Typer take from click and new ones from a copy of their own.
USAGE_ERROR = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])


def _tell(error: BaseException) -> int:
    """Print one line about an error and return its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM) if _shares_work() else ():
        signal.signal(number, signal.SIG_IGN)  # a launcher ends all processes once one has ended: this one is about to
    from sqat import console

    debug = os.environ.get("SQAT_DEBUG", "") not in ("", "0")
    if debug and not isinstance(error, USAGE_ERROR | KeyboardInterrupt):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, SqatError):
        if error.exit_code == INTERRUPTED:
            console.print_failure(str(error))
        else:
            console.print_error(error)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        console.print_failure("interrupted; the same command goes on from the last saved state")
        return INTERRUPTED
    if isinstance(error, USAGE_ERROR):
        console.print_error(SqatError(usage_line(error)))
        return 2
    return _tell_fault(error, debug)


def usage_line(error: typer.BadParameter) -> str:
    """A usage error in one line, with where to read more."""
    command = error.ctx.command_path if error.ctx is not None else "sqat"
    return f"{error.format_message().rstrip('.')} (see {command} --help)"


def _tell_fault(error: BaseException, debug: bool) -> int:
    """What nobody foresaw: a path that cannot be written is the user's to mend, all else is this program's fault."""
    from sqat import console

    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, OSError) and error.errno in (
        errno.EACCES,
        errno.EPERM,
        errno.ENOSPC,
        errno.EROFS,
        errno.EDQUOT,
        errno.EFBIG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
    ):
        console.print_error(SqatError(error.strerror or "not writable", place=error.filename or ""))
        return 2
    where = f" ({str(error).splitlines()[0]})" if str(error) else ""
    hint = "" if debug else "; run it again with -vv or SQAT_DEBUG=1 for the traceback"
    console.print_failure(f"internal error: {type(error).__name__}{where}{hint}")
    return 1
