"""`sqat train`, `prune`, `reconstruct`, `calibrate`, `qat` and `export`: one stage of a recipe."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

from sqat.cli.options import (
    Distill,
    Force,
    Output,
    Parent,
    Quiet,
    RecipeFile,
    Set,
    Stage,
    Targets,
    Verbose,
    check_checkpoint,
    load,
)
from sqat.errors import SqatError


def stage_command(stage_type: str, summary: str, special: Sequence[str] = ()) -> Callable[..., None]:
    """Build the command that runs one stage.

    Args:
        summary: its help text.
        special: those of the options ``distill`` and ``targets`` that this stage type has.
    """

    def command(
        recipe: RecipeFile,
        parent: Parent = None,
        output: Output = None,
        stage: Stage = None,
        distill: Distill = None,
        targets: Targets = None,
        overrides: Set = None,
        force: Force = False,
        quiet: Quiet = False,
        verbose: Verbose = 0,
    ) -> None:
        settings = list(overrides or ())
        if targets:
            settings += target_settings(recipe, targets, stage, parent, settings)
        run_stage(stage_type, recipe, parent, output, stage, settings, force=force, quiet=quiet, distill=distill)

    # Typer reads the options from the signature, so those that this stage type does not have are removed from it.
    signature = inspect.signature(command, eval_str=True)
    absent = {"distill", "targets"} - set(special)
    parameters = [each for name, each in signature.parameters.items() if name not in absent]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__name__, command.__doc__ = stage_type, summary
    return command


def run_stage(
    stage_type: str,
    recipe: Path,
    parent: Path | None,
    output: Path | None,
    stage: str | None,
    overrides: Sequence[str],
    *,
    force: bool,
    quiet: bool,
    distill: bool | None,
) -> None:
    """Run the stage named ``stage``, or the recipe's only one of this type, and print its folder."""
    from sqat.recipe.loader import distill_override
    from sqat.recipe.selection import pick_stage

    if parent is not None:
        check_checkpoint(parent)
    loaded = load(recipe, [*overrides, *distill_override(recipe, stage_type, stage, overrides, distill)])
    name = pick_stage(loaded.recipe, stage_type, stage)
    from sqat.cli.printing import print_text, relative_path
    from sqat.cli.progress_bars import is_rank0, open_reporter
    from sqat.pipeline import runner
    from sqat.pipeline.result_files import LOG_FILE

    with open_reporter(quiet=quiet, log=loaded.run_directory / LOG_FILE) as reporter:
        directory = runner.run_stage(loaded, name, reporter, parent=parent, output=output, force=force)
    if is_rank0():
        print_text(relative_path(directory))


def target_settings(
    recipe: Path, names: Sequence[str], stage: str | None, parent: Path | None, overrides: Sequence[str]
) -> list[str]:
    """Translate ``--target`` into a ``--set``; for ``auto``, print the machine, the choice and the reasons."""
    from sqat.errors import suggest
    from sqat.recipe.loader import targets_override
    from sqat.recipe.selection import pick_stage
    from sqat.recipe.targets import TARGETS

    allowed = (*TARGETS, "auto")
    for name in names:
        if name not in allowed:
            raise SqatError(f"no target {name!r}", suggest(name, allowed), "--target", code="unknown-name")
    if "auto" in names:
        from sqat.cli.printing import result_console
        from sqat.cli.tables.layout import print_paragraph
        from sqat.hardware.auto_target import choose_target, explain, facts_of
        from sqat.hardware.machine import describe_machine
        from sqat.pipeline import runner

        loaded = load(recipe, [*overrides, "results={}"])
        manifest = runner.parent_manifest(loaded, pick_stage(loaded.recipe, "export", stage), parent)
        machine, facts = describe_machine(), facts_of(manifest)
        choice = choose_target(machine, facts)
        for label, text in explain(machine, facts, choice):
            print_paragraph(result_console(), label, text)
        names = [choice.target if name == "auto" else name for name in names]
    return targets_override(recipe, stage, overrides, list(dict.fromkeys(names)))


STAGE_COMMANDS = (
    stage_command("train", "Fine-tune the dense model."),
    stage_command("prune", "Prune to N:M step by step, fine-tuning between the steps.", ["distill"]),
    stage_command("reconstruct", "Let each block learn the dense block's output."),
    stage_command("calibrate", "Choose the scales of the activations."),
    stage_command("qat", "Fine-tune with masks, fake quantization and distillation.", ["distill"]),
    stage_command("export", "Write the files of the export targets and check them.", ["targets"]),
)
