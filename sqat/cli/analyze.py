"""`sqat analyze`: the sensitivity of each layer to pruning and quantization."""

from __future__ import annotations

from typing import Annotated

import typer

from sqat.cli.options import JsonFile, Parent, PlotFile, Quiet, RecipeFile, Set, Verbose, load


def analyze(
    recipe: RecipeFile,
    stage: Annotated[
        str | None, typer.Option("--stage", metavar="NAME", help="stage to start from; default: the last train stage")
    ] = None,
    parent: Parent = None,
    prune_stage: Annotated[
        str | None,
        typer.Option("--prune", metavar="STAGE", help="stage whose pattern and criterion to use; default: the first"),
    ] = None,
    calibrate_stage: Annotated[
        str | None,
        typer.Option("--calibrate", metavar="STAGE", help="stage whose calibration to use; default: the first"),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", metavar="N", help="rows to measure on, at least; queries are not split")
    ] = 256,
    split: Annotated[str, typer.Option("--split", metavar="train|dev", help="split to measure on")] = "dev",
    metric: Annotated[
        str | None,
        typer.Option("--metric", metavar="NAME", help="metric whose loss to measure; default: the output loss"),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option("--budget", metavar="X", help="choose layers to skip until the sensitivity is at most this"),
    ] = None,
    json_file: JsonFile = None,
    plot: PlotFile = None,
    overrides: Set = None,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Measure the sensitivity of each layer, without training."""
    loaded = load(recipe, overrides)
    from sqat.analyze.options import Options, check_options
    from sqat.checkpoint.outputs import check_output
    from sqat.plots.figure import check_plot

    options = Options(stage, parent, prune_stage, calibrate_stage, samples, split, metric, budget)
    check_options(options, loaded.recipe)
    check_output(json_file, ".json")
    check_plot(plot)
    from sqat.analyze import command
    from sqat.cli.progress_bars import open_reporter
    from sqat.cli.tables.sensitivity import print_sensitivity

    with open_reporter(quiet=quiet) as reporter:
        findings = command.run_analysis(loaded, options, reporter)
    print_sensitivity(findings)  # before the files: a full disk must not lose the table
    command.write_findings(findings, json_file, plot)
