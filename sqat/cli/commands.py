"""The program: every command, in the order that ``sqat --help`` shows them in."""

from __future__ import annotations

from typing import Annotated

import typer

from sqat import __version__
from sqat.cli.looking import analyze, evaluate, inspect
from sqat.cli.machine import bench, doctor, engine
from sqat.cli.running import calibrate, export, prune, qat, run, train
from sqat.cli.writing import init, report, schema

app = typer.Typer(
    name="sqat",
    help="Sparse quantization-aware training: one recipe from a dense transformer to 2:4 int8 ONNX.",
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sqat {__version__}")
        raise typer.Exit


@app.callback()
def sqat(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


COMMANDS = (
    run,
    train,
    prune,
    calibrate,
    qat,
    export,
    evaluate,
    inspect,
    analyze,
    engine,
    doctor,
    bench,
    report,
    init,
    schema,
)
for command in COMMANDS:
    app.command()(command)
