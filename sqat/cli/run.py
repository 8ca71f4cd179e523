"""`sqat run`: every stage of a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from sqat.cli.options import Force, Json, Quiet, RecipeFile, Set, Verbose, load
from sqat.errors import SqatError


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

    is_timed = loaded.recipe.latency is not None
    if is_timed:
        from sqat.bench.results import check_latency, time_results

        check_latency(loaded)
    log = loaded.run_directory / LOG_FILE
    with open_reporter(quiet=quiet) as screen, open_reporter(quiet=quiet, log=log) as reporter:
        if rehearse:
            runner.rehearse_alone(loaded, screen, first=first, last=last, force=force)
            return
        rehearsal = None if no_rehearsal else screen
        results = runner.run(loaded, reporter, first=first, last=last, force=force, rehearsal=rehearsal)
        latencies, failure = None, None
        try:
            latencies = time_results(loaded, results, reporter) if is_timed and is_rank0() else None
        except SqatError as error:  # it does not take the results with it
            failure = error
    if is_rank0():
        print_results(results, latencies, as_json=json)
    if failure is not None:
        raise failure
