"""`sqat run`: every stage of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sqat.cli.options import Force, Json, Quiet, RecipeFile, Set, Verbose, load
from sqat.errors import SqatError

if TYPE_CHECKING:
    from sqat.bench.report import Report
    from sqat.pipeline.results import Results
    from sqat.progress import Reporter
    from sqat.recipe.schema import LoadedRecipe


def run(
    recipe: RecipeFile,
    first: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="first stage to run")] = None,
    last: Annotated[str | None, typer.Option("--to", metavar="STAGE", help="last stage to run")] = None,
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and run nothing")] = False,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="try every stage on a few rows and stop")] = False,
    no_rehearsal: Annotated[bool, typer.Option("--no-rehearsal", help="do not try the stages first")] = False,
    overrides: Set = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Run every stage of a recipe; unchanged stages are skipped."""
    if rehearse and no_rehearsal:
        raise SqatError("--rehearse and --no-rehearsal exclude each other", "give one of them", code="usage")
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

    if loaded.recipe.latency is not None:
        from sqat.bench.results import check_latency

        check_latency(loaded)
    log = loaded.run_directory / LOG_FILE
    with open_reporter(quiet=quiet) as screen, open_reporter(quiet=quiet, log=log) as reporter:
        if rehearse:
            runner.rehearse_alone(loaded, screen, first=first, last=last, force=force)
            return
        rehearsal = None if no_rehearsal else screen
        results = runner.run(loaded, reporter, first=first, last=last, force=force, rehearsal=rehearsal)
        latencies, failure = try_timing(loaded, results, reporter) if is_rank0() else (None, None)
    if is_rank0():
        print_results(results, latencies, as_json=json)
    if failure is not None:
        raise failure


def try_timing(loaded: LoadedRecipe, results: Results, reporter: Reporter) -> tuple[Report | None, SqatError | None]:
    """Time the results as the recipe's ``latency`` says; an error is returned, so that it does not take the results."""
    if loaded.recipe.latency is None:
        return None, None
    from sqat.bench.results import time_results

    try:
        return time_results(loaded, results, reporter), None
    except SqatError as error:
        return None, error
