"""`sqat engine`: a TensorRT engine, and which of its layers run sparse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sqat.cli.options import Json, Quiet, Verbose, check_exists
from sqat.errors import SqatError


def engine(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="file of export target tensorrt")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="ENGINE", help="engine file to write; default: beside the model"),
    ] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", metavar="MIN,OPT,MAX", help="batch sizes; default: as exported, or 1,8,32")
    ] = None,
    sequence: Annotated[
        str | None,
        typer.Option("--sequence", metavar="MIN,OPT,MAX", help="sequence lengths; default: as exported, or 16,128,256"),
    ] = None,
    backend: Annotated[str, typer.Option("--backend", metavar="NAME", help="auto, tensorrt or tensorrt-rtx")] = "auto",
    log: Annotated[
        Path | None, typer.Option("--log", metavar="FILE", help="read this build log and build nothing")
    ] = None,
    layers: Annotated[
        Path | None, typer.Option("--layers", metavar="FILE.json", help="read this layer information and build nothing")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Build a TensorRT engine and show which layers run sparse."""
    check_exists(model)
    from sqat.cli.progress_bars import open_reporter
    from sqat.cli.tables.layers import print_engine
    from sqat.tensorrt import command

    if log is not None or layers is not None:
        if output or batch or sequence:
            hint = "leave out --output, --batch and --sequence"
            raise SqatError("--log and --layers build nothing", hint, code="usage")
        report = command.read_report(model, log, layers)
    else:
        with open_reporter(quiet=quiet) as reporter:
            report = command.build_report(
                model, output=output, batch=batch, sequence=sequence, backend=backend, say=reporter.info
            )
    print_engine(report, as_json=json)
    report.require()
