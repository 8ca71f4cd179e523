"""Commands about the machine that a model runs on: its engines, what it lacks, how fast it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sqat.cli.options import Json, JsonFile, PlotFile, Quiet, Verbose, must_exist
from sqat.errors import SqatError


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
    from sqat.cli import console, tables
    from sqat.tensorrt import command

    if log is not None or layers is not None:
        if output or batch or sequence:
            raise SqatError("nothing is built from --log or --layers", "leave out --output, --batch and --sequence")
        report = command.read_report(model, log, layers)
    else:
        with console.open_reporter(quiet=quiet) as reporter:
            report = command.build_report(
                model, output=output, batch=batch, sequence=sequence, backend=backend, say=reporter.info
            )
    tables.print_engine(report, as_json=json)
    report.require()


def doctor(json: Json = False, verbose: Verbose = 0) -> None:
    """Show what this machine has, and what targets and backends lack."""
    from sqat.cli.machine_tables import print_diagnosis
    from sqat.hardware.doctor import diagnose

    print_diagnosis(diagnose(), as_json=json)


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
    json_file: JsonFile = None,
    plot: PlotFile = None,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Time checkpoints and ONNX files in every backend here."""
    from sqat.bench import command
    from sqat.checkpoint.small_files import check_json
    from sqat.cli import console
    from sqat.plots.figure import check_plot

    options = command.Options(
        artifacts, batch, sequence, threads, baseline, backends or [], rounds, min_seconds, within, max_seconds
    )
    check_json(json_file)
    check_plot(plot)
    with console.open_reporter(quiet=quiet) as reporter:
        report = command.run_bench(options, reporter)
    from sqat.cli.machine_tables import print_bench

    print_bench(report)  # first: a full disk does not take them from who waited for them
    command.write_report(report, json_file, plot)
