"""`sqat init`: a first recipe from a data file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sqat.cli.options import check_exists


def init(
    data: Annotated[Path, typer.Argument(metavar="DATA_FILE", help="JSONL, CSV or Parquet file to train on")],
    task: Annotated[
        str | None, typer.Option("--task", metavar="NAME", help="task of the recipe; default: guessed from the data")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="recipe to write")] = Path(
        "recipe.yaml"
    ),
    model: Annotated[
        str | None, typer.Option("--model", metavar="SOURCE", help="folder, hub name or package:NAME/FOLDER")
    ] = None,
    dev: Annotated[Path | None, typer.Option("--dev", metavar="FILE", help="data file of the dev split")] = None,
    sparseml: Annotated[
        Path | None, typer.Option("--from-sparseml", metavar="FILE", help="take the stages from a SparseML recipe")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", metavar="N", help="how long the run may take on this machine")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", help="training steps of all stages; default: epochs")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite the recipe")] = False,
) -> None:
    """Write a recipe for a data file.

    Task and columns are guessed from the data; a terminal asks for the task.
    """
    if dev is not None:
        check_exists(dev)
    from sqat.cli.printing import print_text
    from sqat.init import starter

    def ask(guess: str) -> str:
        return str(typer.prompt(f"task: {', '.join(starter.TASKS)}?", default=guess, err=True))

    is_terminal = sys.stdin.isatty() and sys.stderr.isatty()
    for line in starter.write_starter(
        data,
        output,
        task=task,
        model=model,
        dev=dev,
        sparseml=sparseml,
        minutes=minutes,
        steps=steps,
        force=force,
        ask=ask if is_terminal else None,
    ):
        print_text(line)
