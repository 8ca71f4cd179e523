"""Commands that write a file for people: a page about a run, a first recipe, the schema of recipes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sqat.cli.options import Quiet, Verbose, must_exist


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
    from sqat.report.folder import newest_stage

    newest_stage(run_folder)
    from sqat.cli import console
    from sqat.report.page import write_page

    with console.open_reporter(quiet=quiet) as reporter:
        path = write_page(run_folder, output, reporter)
    console.print_text(console.nearby(path))


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
    if dev is not None:
        must_exist(dev)
    from sqat.cli import console
    from sqat.init import starter

    def ask(guess: str) -> str:
        return str(typer.prompt(f"task: {', '.join(starter.TASKS)}?", default=guess, err=True))

    somebody = sys.stdin.isatty() and sys.stderr.isatty()
    for line in starter.write_starter(data, output, task=task, model=model, dev=dev, sparseml=sparseml, force=force,
                                      ask=ask if somebody else None):  # fmt: skip
        console.print_text(line)


def schema(
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="default: print it")] = None,
) -> None:
    """Print the JSON schema of recipes, for editors and for reading."""
    from sqat.cli.console import print_text
    from sqat.recipe.json_schema import schema_text

    if output is None:
        print_text(schema_text().rstrip())
    else:
        from sqat.checkpoint.small_files import replace_file

        replace_file(output, schema_text().encode())
