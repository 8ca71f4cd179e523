"""Commands that look at what was made, and change nothing: how good it is, what it is, what harms it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sqat.cli.options import (
    Json,
    JsonFile,
    Parent,
    PlotFile,
    Quiet,
    RecipeFile,
    Set,
    Verbose,
    load,
    must_be_artifact,
    must_be_checkpoint,
)
from sqat.errors import SqatError


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
    must_be_artifact(artifact)
    loaded = load(recipe, overrides)
    if split == "test" and loaded.recipe.data.test is None:
        raise SqatError("the recipe has no test split", "add data.test or give --split dev", recipe.name)
    from sqat.cli import console, tables
    from sqat.pipeline import runner as pipeline

    with console.open_reporter(quiet=quiet) as reporter:
        metrics = pipeline.evaluate(loaded, artifact, name, reporter)
    if console.is_first_process():
        tables.print_metrics(metrics, split, artifact, as_json=json)


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
    must_be_artifact(path)
    if output is not None and not fix:
        raise SqatError("names a file for --fix, which was not given", place="--output")
    if fix or target is not None:
        inspect_for(target or "tensorrt", path, fix, output, json)
        return
    from sqat.cli.tables import print_layers

    if path.is_dir():
        must_be_checkpoint(path)
        from sqat.evaluation.inspection import inspect_checkpoint

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
    from sqat.cli.tables import print_findings
    from sqat.lint.checks import known_target
    from sqat.lint.repaired_file import lint_file, repair_file, require

    rules = known_target(target)
    lint, repair = repair_file(path, rules, output) if fix else (lint_file(path, rules), None)
    print_findings(lint, path, repair=repair, as_json=json)
    require(lint, path, fix)


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
    json_file: JsonFile = None,
    plot: PlotFile = None,
    overrides: Set = None,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Show what pruning and int8 harm in each layer, untrained."""
    loaded = load(recipe, overrides)
    from sqat.analyze.options import Options, check_options
    from sqat.checkpoint.small_files import check_json
    from sqat.plots.figure import check_plot

    options = Options(stage, parent, prune_stage, calibrate_stage, samples, split, metric, budget)
    check_options(options, loaded.recipe)
    check_json(json_file)
    check_plot(plot)
    from sqat.analyze import command
    from sqat.cli import console

    with console.open_reporter(quiet=quiet) as reporter:
        findings = command.run_analysis(loaded, options, reporter)
    from sqat.cli.machine_tables import print_sensitivity

    print_sensitivity(findings)  # first: a full disk does not take them from who waited for them
    command.write_findings(findings, json_file, plot)
