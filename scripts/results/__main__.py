"""The commands of `scripts/results/make`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.results import __doc__ as about
from scripts.results.applications import APPLICATIONS
from scripts.results.collecting import Run, collect, runs_of
from scripts.results.page import render
from scripts.results.running import report, run_all, status_of
from scripts.results.schema import Application, ResultsFile, read, write
from scripts.results.tries import add_try, read_tries, try_of
from sqat.errors import SqatError
from sqat.files.replace import replace_file

RECIPES = Path("recipes")
FAILED, MISTAKE = 1, 2


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 1 where a seed failed, 2 for a user's mistake."""
    arguments = parser().parse_args(words)
    try:
        return int(arguments.command(arguments))
    except SqatError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    whole = argparse.ArgumentParser(
        "scripts/results", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run recipes over seeds")
    run.add_argument("recipes", type=Path, nargs="+")
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run.add_argument("--processes", type=int, default=1, help="seeds at a time, which share the cores")
    run.add_argument("--again", action="store_true", help="let sqat look at seeds that seem done, too")
    status = commands.add_parser("status", help="which seeds are done, running, missing")
    latency = commands.add_parser("latency", help="time the exported files of one seed")
    latency.add_argument("recipes", type=Path, nargs="+")
    latency.add_argument("--seed", type=int, default=0)
    latency.add_argument("--rounds", type=int, default=60)
    page = commands.add_parser("page", help="write results.json and RESULTS.md")
    page.add_argument("--render", action="store_true", help="only RESULTS.md, from results.json as it is")
    for command in (status, page):
        command.add_argument("recipes", type=Path, nargs="*", help="default: every application's")
    tried = commands.add_parser("tried", help="add a finished run to the log of what was tried")
    tried.add_argument("run", type=Path, help="the run's folder")
    tried.add_argument("--recipe", type=Path, required=True, help="the recipe it was to better")
    tried.add_argument("--stage", help="whose dev figures count; default: the last that has some")
    tried.add_argument("--verdict", required=True, help="what came of it, in a few words")
    for command in (run, status, latency, page):
        command.add_argument("--output", help="folder of the runs; default: the recipe's")
    for command in (page, tried):
        command.add_argument("--folder", type=Path, default=RECIPES, help="of RESULTS.md, results.json and tried.jsonl")
    for command, function in ((run, do_run), (status, do_status), (latency, do_latency), (page, do_page),
                              (tried, do_tried)):  # fmt: skip
        command.set_defaults(command=function)
    return whole


def do_run(arguments: argparse.Namespace) -> int:
    runs = [Run(recipe, seed, arguments.output) for recipe in arguments.recipes for seed in arguments.seeds]
    return FAILED if run_all(runs, arguments.processes, arguments.again) else 0


def do_status(arguments: argparse.Namespace) -> int:
    for recipe in chosen(arguments.recipes):
        seeds = {run.seed: run for run in runs_of(recipe, arguments.output)}
        for seed in sorted({0, 1, 2, *seeds}):
            run = seeds.get(seed, Run(recipe, seed, arguments.output))
            report(run, status_of(run))
    return 0


def do_latency(arguments: argparse.Namespace) -> int:
    from scripts.results.timing import measure  # ONNX Runtime, which the others do not need

    for recipe in arguments.recipes:
        run = Run(recipe, arguments.seed, arguments.output)
        report(run, measure(run, arguments.rounds))
    return 0


def do_page(arguments: argparse.Namespace) -> int:
    path = arguments.folder / "results.json"
    results = read(ResultsFile, path)
    if not arguments.render:
        results = collect_all(arguments.recipes, arguments.output, results)
        write(results, path)
    if results is None:
        raise SqatError("no such file", "run without --render where the runs are", str(path), code="missing-file")
    tries = read_tries(arguments.folder / "tried.jsonl")
    replace_file(arguments.folder / "RESULTS.md", render(results, tries).encode())
    for name, application in results.applications.items():
        print(f"{name}: seeds {', '.join(map(str, application.seeds)) or 'none'}; {len(application.missing)} missing")
    return 0


def collect_all(recipes: list[Path], output: str | None, before: ResultsFile | None) -> ResultsFile:
    """Every application that has runs here; those without any stay as they were."""
    found = dict[str, Application]()
    for recipe in chosen(recipes):
        if runs := runs_of(recipe, output):
            found[recipe.stem] = collect(runs)
    kept = {} if before is None else before.applications
    names = [*APPLICATIONS, *(name for name in {**kept, **found} if name not in APPLICATIONS)]
    return ResultsFile(applications={name: {**kept, **found}[name] for name in names if name in {**kept, **found}})


def do_tried(arguments: argparse.Namespace) -> int:
    entry = try_of(arguments.run, arguments.recipe, arguments.verdict, arguments.stage)
    add_try(entry, arguments.folder / "tried.jsonl")
    print(entry.model_dump_json())
    return 0


def chosen(recipes: list[Path]) -> list[Path]:
    """The recipes named, or those of all applications that are there."""
    return recipes or [path for name in APPLICATIONS if (path := RECIPES / f"{name}.yaml").is_file()]


if __name__ == "__main__":
    sys.exit(main())
