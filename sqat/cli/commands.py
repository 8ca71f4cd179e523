"""The Typer application: every command, in the order in which `sqat --help` shows them."""

from __future__ import annotations

from typing import Annotated

import typer

from sqat import __version__
from sqat.cli.analyze import analyze
from sqat.cli.bench import bench
from sqat.cli.doctor import doctor
from sqat.cli.engine import engine
from sqat.cli.evaluate import evaluate
from sqat.cli.init import init
from sqat.cli.inspect import inspect
from sqat.cli.report import report
from sqat.cli.run import run
from sqat.cli.schema import schema
from sqat.cli.stages import STAGE_COMMANDS

app = typer.Typer(
    name="sqat",
    help="Sparse quantization-aware training: one recipe from a dense transformer to 2:4 int8 ONNX.",
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(is_given: bool) -> None:
    """Print the version and exit."""
    if is_given:
        typer.echo(f"sqat {__version__}")
        raise typer.Exit


@app.callback()
def sqat(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for command in (run, *STAGE_COMMANDS, evaluate, inspect, analyze, engine, doctor, bench, report, init, schema):
    app.command()(command)
