"""`sqat run`: every stage of a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from sqat.cli.options import Force, Json, Quiet, RecipeFile, Set, Verbose, load


def run(
    recipe: RecipeFile,
    first: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="first stage to run")] = None,
    last: Annotated[str | None, typer.Option("--to", metavar="STAGE", help="last stage to run")] = None,
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and run nothing")] = False,
    overrides: Set = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Run every stage of a recipe; unchanged stages are skipped."""
    loaded = load(recipe, overrides)
    from sqat.recipe.selection import stage_range

    stage_range(loaded.recipe, first, last)
    from sqat.cli.tables.results import print_plan, print_results

    if dry_run:
        from sqat.pipeline.plan import make_plan

        print_plan(make_plan(loaded, first=first, last=last, force=force), as_json=json)
        return
    from sqat.cli.progress_bars import is_rank0, open_reporter
    from sqat.pipeline import runner
    from sqat.pipeline.result_files import LOG_FILE

    with open_reporter(quiet=quiet, log=loaded.run_directory / LOG_FILE) as reporter:
        results = runner.run(loaded, reporter, first=first, last=last, force=force)
    if is_rank0():
        print_results(results, as_json=json)
