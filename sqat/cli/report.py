"""`sqat report`: one HTML page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sqat.cli.options import Quiet, Verbose


def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run, e.g. runs/recipe")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="file or folder to write; default: report.html in the run folder"
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Write one HTML page about a run."""
    from sqat.report.folder import newest_stage

    newest_stage(run_folder)
    from sqat.cli.printing import print_text, relative_path
    from sqat.cli.progress_bars import open_reporter
    from sqat.report.page import write_page

    with open_reporter(quiet=quiet) as reporter:
        path = write_page(run_folder, output, reporter)
    print_text(relative_path(path))
