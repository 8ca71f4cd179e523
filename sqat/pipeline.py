"""The order of stages: what is unchanged, what runs, what is saved; it knows no algorithm.

A stage whose checkpoint is what the recipe would make (`sqat.keys`) is skipped. Stages return checkpoints; only this
file saves them, into ``<output>/<recipe>/<NN-stage>``. Mid-stage state lives beside it until the stage is saved.
Every process of a distributed run goes through the stages; the first one writes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sqat.checkpoint import Checkpoint, Manifest, load_checkpoint, load_manifest, save_checkpoint
from sqat.data import SplitName
from sqat.display import Display
from sqat.errors import SqatError
from sqat.evaluation import evaluate_artifact
from sqat.job import Job, Splits
from sqat.keys import Keys, known_manifest, made_from, teacher_name
from sqat.recipe import FitConfig, LoadedRecipe, Recipe, StageConfig
from sqat.results import ResultRow as ResultRow
from sqat.results import Results as Results
from sqat.results import closing_table
from sqat.stages import calibrate, export, prune, qat, train
from sqat.training import MidStage, processes, total_steps

STAGES: dict[str, Callable[[Any, Checkpoint | None, Job], Checkpoint]] = {
    "train": train.run,
    "prune": prune.run,
    "calibrate": calibrate.run,
    "qat": qat.run,
    "export": export.run,
}


@dataclass(frozen=True)
class PlannedStage:
    """One stage as the plan shows it; seconds are those an earlier run of the stage took."""

    number: int
    name: str
    kind: str
    parent: str | None
    key: str
    directory: Path
    unchanged: bool
    steps: int | None
    samples: int | None
    seconds: float | None


def make_plan(
    loaded: LoadedRecipe, *, first: str | None = None, last: str | None = None, force: bool = False
) -> list[PlannedStage]:
    """What `run` would do: stages between ``first`` and ``last``, how much work each is, which are unchanged."""
    keys, splits = Keys(loaded), Splits(loaded.recipe, loaded.path.parent)
    due = set(due_stages(keys, first, last, force))
    plan = []
    for number, (name, config) in enumerate(loaded.recipe.stages.items(), start=1):
        if name in stage_range(loaded.recipe, first, last):
            steps, samples = amount(config, loaded.recipe, splits)
            manifest = keys.manifest(name)
            seconds = manifest.seconds if manifest is not None else None
            plan.append(PlannedStage(number, name, config.stage, loaded.recipe.parent_of(name), keys.planned[name],
                                     keys.directory(name), name not in due, steps, samples, seconds))  # fmt: skip
    return plan


def stage_range(recipe: Recipe, first: str | None, last: str | None) -> list[str]:
    """Names of the stages from ``first`` to ``last``."""
    names = list(recipe.stages)
    for flag, name in (("--from", first), ("--to", last)):
        if name is not None and name not in names:
            raise SqatError(f"{flag} {name}: the recipe has no such stage", f"stages: {', '.join(names)}")
    low = names.index(first) if first else 0
    high = names.index(last) + 1 if last else len(names)
    if low >= high:
        raise SqatError(f"--from {first} comes after --to {last}", f"order: {', '.join(names)}")
    return names[low:high]


def due_stages(keys: Keys, first: str | None, last: str | None, force: bool) -> list[str]:
    """Stages of the range that must run: forced, not current, or after one that runs."""
    recipe, due = keys.loaded.recipe, list[str]()
    for name in stage_range(recipe, first, last):
        before = {recipe.parent_of(name), teacher_name(recipe, name)}
        if force or before & set(due) or not keys.is_current(name):
            due.append(name)
    return due


def amount(config: StageConfig, recipe: Recipe, splits: Splits) -> tuple[int | None, int | None]:
    """Optimizer steps and samples of a stage; a batch is taken as full, which queries of many sizes may not fill."""
    if isinstance(config, FitConfig):
        rows = splits.task.encode(splits.rows("train"))
        epoch = sum(len(unit) for unit in splits.task.units(rows, recipe.seed, 0))
        steps = total_steps(config, -(-epoch // config.batch_size))
        return steps, steps * config.batch_size * config.gradient_accumulation
    if config.stage == "calibrate":
        return None, min(config.samples, len(splits.rows(config.split)))
    return None, min(config.parity_samples, len(splits.rows("dev")))


def run(
    loaded: LoadedRecipe,
    display: Display,
    *,
    first: str | None = None,
    last: str | None = None,
    force: bool = False,
) -> Results:
    """Run the plan, skip what is unchanged, and measure the results once on the test split."""
    keys, splits = Keys(loaded), Splits(loaded.recipe, loaded.path.parent)
    due = due_stages(keys, first, last, force)
    for name in stage_range(loaded.recipe, first, last):
        if name not in due:
            display.say(f"{name}: unchanged")
            continue
        parent = parent_checkpoint(keys, name)
        execute(keys, name, keys.directory(name), parent, splits, display, force)
    return closing_table(keys, splits, display)


def run_stage(
    loaded: LoadedRecipe,
    name: str,
    display: Display,
    *,
    parent: Path | None = None,
    output: Path | None = None,
    force: bool = False,
) -> Path:
    """Run one stage from its parent in the run folder, or from ``parent``; returns the checkpoint's folder.

    Raises:
        SqatError: ``output`` holds something else than this stage's checkpoint, and there is no ``force``.
    """
    keys = Keys(loaded)
    directory = output or keys.directory(name)
    if output is not None and output.exists() and not force:
        there = known_manifest(output)
        if there is None or there.stage != name:
            what = "no checkpoint of sqat" if there is None else f"the checkpoint of stage {there.stage!r}"
            raise SqatError(f"the output exists and is {what}", "choose another folder or add --force", str(output))
    if parent is None and output is None and not force and keys.is_current(name):
        display.say(f"{name}: unchanged")
        return directory
    start = parent_checkpoint(keys, name) if parent is None else load_checkpoint(parent)
    splits = Splits(loaded.recipe, loaded.path.parent)
    execute(keys, name, directory, start, splits, display, force)
    return directory


def parent_manifest(loaded: LoadedRecipe, name: str, parent: Path | None) -> Manifest:
    """What is known of the checkpoint that a stage starts from: the run folder's, or the one in ``parent``."""
    if parent is not None:
        return load_manifest(parent)
    before = loaded.recipe.parent_of(name)
    if before is None:
        raise SqatError(f"stage {name} has nothing to start from", "give --from CHECKPOINT", loaded.recipe.name)
    return load_manifest(Keys(loaded).directory(before))


def parent_checkpoint(keys: Keys, name: str) -> Checkpoint | None:
    """The checkpoint in the run folder that a stage starts from; None for the pretrained model."""
    parent = keys.loaded.recipe.parent_of(name)
    if parent is None:
        return None
    directory = keys.directory(parent)
    if not directory.is_dir():
        raise SqatError(f"stage {name} starts from {parent}, which has not run yet",
                        f"run `sqat run --to {name}`, or give --from CHECKPOINT", str(directory))  # fmt: skip
    checkpoint = load_checkpoint(directory)
    if checkpoint.manifest.key != keys.planned[parent]:
        raise SqatError(f"stage {name} starts from {parent}, whose checkpoint this recipe would not make any more",
                        f"run from an earlier stage: sqat run --from {parent}, or give --from CHECKPOINT",
                        str(directory))  # fmt: skip
    return checkpoint


def teacher_checkpoint(keys: Keys, name: str) -> Checkpoint:
    """The dense ancestor that teaches a stage."""
    teacher = teacher_name(keys.loaded.recipe, name)
    if teacher is None:
        raise SqatError(f"stage {name} distils but has no dense ancestor", "add a train stage, or set distill.teacher")
    return load_checkpoint(keys.directory(teacher))


def execute(
    keys: Keys,
    name: str,
    directory: Path,
    parent: Checkpoint | None,
    splits: Splits,
    display: Display,
    force: bool,
) -> None:
    """Run one stage and save what it returns; its mid-stage state goes once the checkpoint is on the disk.

    Args:
        force: start afresh, whatever mid-stage state there is.
    """
    loaded, process = keys.loaded, processes()
    teacher = keys.manifest(teacher_name(loaded.recipe, name))
    origin = made_from(None if parent is None else parent.manifest, teacher)
    key = keys.after(name, "" if parent is None else parent.manifest.key, "" if teacher is None else teacher.key)
    state = MidStage(directory.with_name(f".{directory.name}.state"), f"{key} {origin}")
    if force and process.is_main_process:
        shutil.rmtree(state.directory, ignore_errors=True)
    process.wait_for_everyone()
    job = Job(loaded.recipe, loaded.path.parent, name, key, origin, splits, display, state,
              partial(teacher_checkpoint, keys, name))  # fmt: skip
    config, begun = loaded.recipe.stages[name], time.monotonic()
    checkpoint = STAGES[config.stage](config, parent, job)
    seconds = max(checkpoint.manifest.seconds, time.monotonic() - begun)  # a resumed fit knows its earlier part
    facts = {"seconds": round(seconds, 3), "overrides": [*loaded.overrides]}
    manifest = checkpoint.manifest.model_copy(update=facts)
    if process.is_main_process:
        save_checkpoint(replace(checkpoint, manifest=manifest, recipe=loaded.text), directory)
        shutil.rmtree(state.directory, ignore_errors=True)
    process.wait_for_everyone()
    figures = manifest.metrics.get("dev", {})
    shown = ", ".join(f"{metric} {value:.4f}" for metric, value in figures.items())
    display.say(f"{name}: {f'dev {shown}' if shown else 'done'} -> {directory}")


def evaluate(loaded: LoadedRecipe, artifact: Path, split: SplitName, display: Display) -> dict[str, float]:
    """The task's metrics of a checkpoint folder or an ONNX file on a split."""
    display.say(f"evaluating {artifact} on {split}")
    return evaluate_artifact(artifact, Splits(loaded.recipe, loaded.path.parent), split)
