"""`sqat bench`: the latency of artifacts in every backend of this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from sqat.cli.options import JsonFile, PlotFile, Quiet, Verbose


def bench(
    artifacts: Annotated[
        list[str], typer.Argument(metavar="[NAME=]PATH...", help="checkpoint folders and .onnx files")
    ],
    batch: Annotated[str, typer.Option("--batch", metavar="N,...", help="batch sizes")] = "1,8",
    sequence: Annotated[
        str, typer.Option("--sequence", metavar="N,...", help="sequence lengths; default: 128", show_default=False)
    ] = "",
    threads: Annotated[
        int, typer.Option("--threads", metavar="N", help="threads, each on its own core; 0: all cores")
    ] = 1,
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="NAME", help="candidate to compare with; default: the first")
    ] = None,
    backends: Annotated[
        list[str] | None, typer.Option("--backend", metavar="NAME", help="measure only this backend; repeatable")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", help="rounds, at least")] = 10,
    min_seconds: Annotated[
        float, typer.Option("--min-seconds", metavar="S", help="seconds per candidate and round, at least")
    ] = 0.05,
    within: Annotated[
        float, typer.Option("--within", metavar="%", help="stop when every 95 % interval is this narrow")
    ] = 2.0,
    max_seconds: Annotated[
        float, typer.Option("--max-seconds", metavar="S", help="seconds per input size, at most")
    ] = 60.0,
    json_file: JsonFile = None,
    plot: PlotFile = None,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Time checkpoints and ONNX files in every backend."""
    from sqat.bench import command
    from sqat.checkpoint.outputs import check_output
    from sqat.cli.progress_bars import open_reporter
    from sqat.plots.figure import check_plot

    options = command.Options(
        artifacts, batch, sequence, threads, baseline, backends or [], rounds, min_seconds, within, max_seconds
    )
    check_output(json_file, ".json")
    check_plot(plot)
    with open_reporter(quiet=quiet) as reporter:
        report = command.run_bench(options, reporter)
    from sqat.cli.tables.bench import print_bench

    print_bench(report)  # before the files: a full disk must not lose the table
    command.write_report(report, json_file, plot)
