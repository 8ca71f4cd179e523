"""Commands that run stages: of a recipe all of them, or one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sqat.cli.options import (
    Distill,
    Force,
    Json,
    Output,
    Parent,
    Quiet,
    RecipeFile,
    Set,
    Stage,
    Targets,
    Verbose,
    load,
    must_be_checkpoint,
)
from sqat.errors import SqatError

if TYPE_CHECKING:
    from sqat.recipe.schema import LoadedRecipe


def run(
    recipe: RecipeFile,
    first: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="first stage")] = None,
    last: Annotated[str | None, typer.Option("--to", metavar="STAGE", help="last stage")] = None,
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
    overrides: Set = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Run every stage of a recipe; unchanged ones are skipped."""
    loaded = load(recipe, overrides)
    from sqat.recipe.cross_checks import stage_range

    stage_range(loaded.recipe, first, last)
    if dry_run:
        print_plan(loaded, first, last, force, json)
        return
    from sqat.cli import console, tables
    from sqat.pipeline import runner as pipeline

    with console.open_reporter(quiet=quiet, log=log_of(loaded)) as reporter:
        results = pipeline.run(loaded, reporter, first=first, last=last, force=force)
    if console.is_first_process():
        tables.print_results(results, as_json=json)


def train(
    recipe: RecipeFile,
    parent: Parent = None,
    output: Output = None,
    stage: Stage = None,
    overrides: Set = None,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Fine-tune the dense model."""
    run_one("train", recipe, parent, output, stage, overrides, force, quiet)


def prune(
    recipe: RecipeFile,
    parent: Parent = None,
    output: Output = None,
    stage: Stage = None,
    distill: Distill = None,
    overrides: Set = None,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Prune to N:M step by step, fine-tuning between the steps."""
    run_one("prune", recipe, parent, output, stage, overrides, force, quiet, distill)


def calibrate(
    recipe: RecipeFile,
    parent: Parent = None,
    output: Output = None,
    stage: Stage = None,
    overrides: Set = None,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Find the scales of the activations."""
    run_one("calibrate", recipe, parent, output, stage, overrides, force, quiet)


def qat(
    recipe: RecipeFile,
    parent: Parent = None,
    output: Output = None,
    stage: Stage = None,
    distill: Distill = None,
    overrides: Set = None,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Fine-tune with masks, fake quantization and distillation."""
    run_one("qat", recipe, parent, output, stage, overrides, force, quiet, distill)


def export(
    recipe: RecipeFile,
    parent: Parent = None,
    output: Output = None,
    stage: Stage = None,
    targets: Targets = None,
    overrides: Set = None,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Write the files of the engines and check them."""
    if targets:
        overrides = [*(overrides or ()), *choose_targets(recipe, targets, stage, parent, overrides or ())]
    run_one("export", recipe, parent, output, stage, overrides, force, quiet)


def print_plan(loaded: LoadedRecipe, first: str | None, last: str | None, force: bool, json: bool) -> None:
    """Say what a run would do."""
    from sqat.cli import tables
    from sqat.pipeline import plan

    tables.print_plan(plan.make_plan(loaded, first=first, last=last, force=force), as_json=json)


def run_one(
    kind: str,
    recipe: Path,
    parent: Path | None,
    output: Path | None,
    stage: str | None,
    overrides: list[str] | None,
    force: bool,
    quiet: bool,
    distill: bool | None = None,
) -> None:
    """Run the one stage of ``kind`` that the recipe has, or the one called ``stage``."""
    from sqat.recipe.cross_checks import pick_stage
    from sqat.recipe.loader import distill_override

    if parent is not None:
        must_be_checkpoint(parent)
    chosen = [*(overrides or ()), *distill_override(recipe, kind, stage, overrides or (), distill)]
    loaded = load(recipe, chosen)
    name = pick_stage(loaded.recipe, kind, stage)
    from sqat.cli import console
    from sqat.pipeline import runner as pipeline

    with console.open_reporter(quiet=quiet, log=log_of(loaded)) as reporter:
        directory = pipeline.run_stage(loaded, name, reporter, parent=parent, output=output, force=force)
    if console.is_first_process():
        console.print_text(console.nearby(directory))


def choose_targets(
    recipe: Path, names: Sequence[str], stage: str | None, parent: Path | None, overrides: Sequence[str]
) -> list[str]:
    """What ``--target`` means, as a ``--set``; for auto the machine, the choice and the reasons are printed."""
    from sqat.recipe.cross_checks import pick_stage, suggest
    from sqat.recipe.loader import targets_override
    from sqat.recipe.targets import TARGETS

    for name in names:
        if name not in (known := (*TARGETS, "auto")):
            raise SqatError(f"no target {name!r}", suggest(name, known), "--target")
    if "auto" in names:
        from sqat.cli import console
        from sqat.hardware.choosing import choose_target, explain, facts_of
        from sqat.hardware.machine import describe_machine
        from sqat.pipeline import runner as pipeline

        loaded = load(recipe, [*overrides, "results={}"])
        manifest = pipeline.parent_manifest(loaded, pick_stage(loaded.recipe, "export", stage), parent)
        machine, facts = describe_machine(), facts_of(manifest)
        choice = choose_target(machine, facts)
        for line in explain(machine, facts, choice):
            console.print_text(line)
        names = [choice.target if name == "auto" else name for name in names]
    return targets_override(recipe, stage, overrides, list(dict.fromkeys(names)))


def log_of(loaded: LoadedRecipe) -> Path:
    """The log file of a recipe's run folder."""
    return loaded.run_directory / "sqat.log"
