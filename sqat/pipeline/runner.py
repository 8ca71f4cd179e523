"""The order of stages: what is unchanged, what runs, what is saved; it knows no algorithm.

A stage whose checkpoint is what the recipe would make (`sqat.pipeline.fingerprint`) is skipped. Stages return
checkpoints; only this file saves them, into ``<output>/<recipe>/<NN-stage>``. Mid-stage state lives beside it until
the stage is saved. A result that misses its gates (`sqat.pipeline.quality_gates`) is saved beside and ends the run,
unless the stage may try again. Every process of a distributed run goes through the stages; the first one writes, and
its verdicts hold for all.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sqat.checkpoint.manifest import Manifest, load_manifest, verify_files
from sqat.checkpoint.store import Checkpoint, load_checkpoint, save_checkpoint
from sqat.data.rows import SplitName
from sqat.distributed import broadcast_from_rank0, process_state, raise_on_lost_peer, run_on_rank0
from sqat.errors import SqatError
from sqat.evaluation.evaluate import evaluate_artifact
from sqat.pipeline.fingerprint import Keys, is_attempt, known_manifest, made_from
from sqat.pipeline.lock import FILE, run_lock
from sqat.pipeline.plan import due_stages
from sqat.pipeline.quality_gates import Limit, limits_of, missed, refusal, rejected_folder
from sqat.pipeline.results import ResultRow as ResultRow
from sqat.pipeline.results import Results as Results
from sqat.pipeline.results import closing_table
from sqat.progress import Reporter
from sqat.recipe.cross_checks import stage_range
from sqat.recipe.schema import LoadedRecipe
from sqat.recipe.stages import TrainConfig
from sqat.stages import calibrate, export, prune, qat, train
from sqat.stages.context import StageContext
from sqat.tasks.splits import Splits
from sqat.training.health import saturation
from sqat.training.resume_state import ResumeState
from sqat.training.tracking import Tracked, tracked

STAGE_FOLDER = re.compile(r"\d{2,}-")
STAGES: dict[str, Callable[[Any, Checkpoint | None, StageContext], Checkpoint]] = {
    "train": train.run,
    "prune": prune.run,
    "calibrate": calibrate.run,
    "qat": qat.run,
    "export": export.run,
}


def run(
    loaded: LoadedRecipe,
    reporter: Reporter,
    *,
    first: str | None = None,
    last: str | None = None,
    force: bool = False,
) -> Results:
    """Run the plan, skip what is unchanged, and measure the results once on the test split."""
    place = loaded.run_directory
    with raise_on_lost_peer(), run_lock(place, reporter), tracked(loaded.recipe, place, reporter) as watched:
        return run_range(loaded, watched, first, last, force)


def run_range(loaded: LoadedRecipe, reporter: Tracked, first: str | None, last: str | None, force: bool) -> Results:
    """Run what is due between two stages, and measure the results."""
    keys, splits = Keys(loaded), Splits(loaded.recipe, loaded.path.parent)
    due = due_stages(keys, first, last, force)
    for name in stage_range(loaded.recipe, first, last):
        if name not in due and keys.is_current(name) and stands(keys, name, reporter):
            continue
        if keys.directory(name).exists() and keys.manifest(name) is None:
            reporter.info(f"{name}: what is in {keys.directory(name)} is no sound checkpoint: it is made again")
        parent = parent_checkpoint(keys, name)
        execute(keys, name, keys.directory(name), parent, splits, reporter, force)
    results = closing_table(keys, splits, reporter)
    reporter.log({f"results/{row.label}/{name}": value for row in results.rows for name, value in row.metrics.items()})
    return results


def run_stage(
    loaded: LoadedRecipe,
    name: str,
    reporter: Reporter,
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
    place, file = lock_of(loaded.run_directory, directory)
    with raise_on_lost_peer(), run_lock(place, reporter, file), tracked(loaded.recipe, place, reporter) as watched:
        if parent is None and output is None and not force and keys.is_current(name) and stands(keys, name, reporter):
            return directory
        start = parent_checkpoint(keys, name) if parent is None else load_checkpoint(parent)
        execute(keys, name, directory, start, Splits(loaded.recipe, loaded.path.parent), watched, force)
    return directory


def lock_of(runs: Path, directory: Path) -> tuple[Path, str]:
    """Folder and file to lock for one stage: the run folder that it is in, or for a checkpoint elsewhere beside that.

    The folder of another run's stage is known by its name, for that run may be about to begin.
    """
    place = directory.resolve()
    if runs.resolve() in place.parents:
        return runs, FILE
    return place.parent, FILE if STAGE_FOLDER.match(place.name) else f".{place.name}{FILE}"


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
    teacher = keys.loaded.recipe.teacher_of(name)
    if teacher is None:
        raise SqatError(f"stage {name} distils but has no dense ancestor", "add a train stage, or set distill.teacher")
    return load_checkpoint(keys.directory(teacher))


def stands(keys: Keys, name: str, reporter: Reporter) -> bool:
    """Whether an unchanged stage passes its gates as they are now; one that may try again is said to, and does not.

    Raises:
        GateError: it misses one and may not try again.
        SqatError: a file of its checkpoint was damaged.
    """
    manifest = keys.manifest(name)
    assert manifest is not None  # it is unchanged
    verify_files(keys.directory(name), manifest)
    limits = limits_of(keys, name, keys.manifest(keys.loaded.recipe.parent_of(name)))
    miss = broadcast_from_rank0(missed(limits, manifest.metrics))
    if miss and manifest.attempt >= keys.loaded.recipe.stages[name].max_attempts:
        raise refusal(name, miss, keys.directory(name), standing=False)
    reporter.info(f"{name}: unchanged" + (f", but it misses a gate: {miss}" if miss else ""))
    return not miss


@dataclass(frozen=True)
class Trial:
    """One stage about to run: where its result goes, what it is made from, and the limits of its gates."""

    keys: Keys
    name: str
    directory: Path
    parent: Checkpoint | None
    splits: Splits
    reporter: Tracked
    key: str
    origin: dict[str, str]
    limits: list[Limit]

    @property
    def state(self) -> Path:
        """Folder of the mid-stage state."""
        return self.directory.with_name(f".{self.directory.name}.state")

    def earlier(self) -> tuple[Path, Manifest] | None:
        """The last attempt of this very stage that there is: set aside for missing a gate, or in its place."""
        folders = (rejected_folder(self.directory), self.directory)
        known = [(folder, manifest) for folder in folders if (manifest := known_manifest(folder)) is not None]
        return max(filter(self.made, known), key=lambda each: each[1].attempt, default=None)

    def made(self, known: tuple[Path, Manifest]) -> bool:
        """Whether a checkpoint is what an attempt of this very stage makes."""
        manifest = known[1]
        config = self.keys.loaded.recipe.stages[self.name]
        return (manifest.key, manifest.input_digests) == (self.key, self.origin) and is_attempt(manifest, config)


def execute(
    keys: Keys,
    name: str,
    directory: Path,
    parent: Checkpoint | None,
    splits: Splits,
    reporter: Tracked,
    force: bool,
) -> None:
    """Run one stage until it passes its gates, and save what it returns.

    Args:
        force: start afresh, whatever mid-stage state and earlier result there is.

    Raises:
        GateError: the result of the last attempt misses a gate; it is kept beside, and what was in place stays.
    """
    teacher = keys.manifest(keys.loaded.recipe.teacher_of(name))
    origin = made_from(None if parent is None else parent.manifest, teacher)
    key = keys.after(name, "" if parent is None else parent.manifest.key, "" if teacher is None else teacher.key)
    limits = limits_of(keys, name, None if parent is None else parent.manifest)
    trial = Trial(keys, name, directory, parent, splits, reporter, key, origin, limits)
    process = process_state()
    if force and process.is_main_process:
        shutil.rmtree(trial.state, ignore_errors=True)
    process.wait_for_everyone()
    known = None if force else trial.earlier()
    process.wait_for_everyone()  # all have looked before the first changes anything
    attempt = 1 if known is None else next_attempt(trial, *known)
    if attempt:
        try_to_pass(trial, attempt)


def next_attempt(trial: Trial, folder: Path, known: Manifest) -> int:
    """Which attempt follows an earlier one; 0 where it was set aside and passes the gates as they are now.

    Raises:
        GateError: it still misses one, and was the last attempt.
    """
    miss = broadcast_from_rank0(missed(trial.limits, known.metrics))
    if miss and known.attempt >= trial.keys.loaded.recipe.stages[trial.name].max_attempts:
        raise refusal(trial.name, miss, folder, trial.directory.exists() and folder != trial.directory)
    if miss or folder == trial.directory:
        return known.attempt + 1 if miss else 1

    def put_in_place() -> None:
        save_checkpoint(load_checkpoint(folder), trial.directory)
        shutil.rmtree(folder, ignore_errors=True)

    run_on_rank0(put_in_place)
    trial.reporter.info(f"{trial.name}: what was set aside passes the gates now -> {trial.directory}")
    return 0


def try_to_pass(trial: Trial, attempt: int) -> None:
    """Run a stage from an attempt on until its result passes, and put that in place."""
    config = trial.keys.loaded.recipe.stages[trial.name]
    for number in range(attempt, config.max_attempts + 1):
        if number > 1:
            trial.reporter.info(f"{trial.name}: attempt {number} of {config.max_attempts}, with more steps")
        checkpoint = run_once(trial, number)
        for line in saturation(checkpoint.manifest) if checkpoint.manifest.type == "calibrate" else ():
            trial.reporter.info(f"{trial.name}: {line}")
        miss = broadcast_from_rank0(missed(trial.limits, checkpoint.manifest.metrics))
        goal = rejected_folder(trial.directory) if miss else trial.directory
        run_on_rank0(partial(keep, checkpoint, goal, trial.state))
        figures = checkpoint.manifest.metrics.get("dev", {})
        shown = ", ".join(f"{metric} {value:.4f}" for metric, value in figures.items())
        trial.reporter.log({f"{trial.name}/dev/{metric}": value for metric, value in figures.items()})
        trial.reporter.info(f"{trial.name}: {f'dev {shown}' if shown else 'done'} -> {goal}")
        if not miss:
            return
        trial.reporter.info(f"{trial.name}: misses a gate: {miss}")
    raise refusal(trial.name, miss, goal, trial.directory.exists())


def keep(checkpoint: Checkpoint, goal: Path, state: Path) -> None:
    """Save what a stage has made; its mid-stage state goes only once that is on the disk."""
    save_checkpoint(checkpoint, goal)
    shutil.rmtree(state, ignore_errors=True)


def run_once(trial: Trial, attempt: int) -> Checkpoint:
    """One attempt of a stage, its manifest completed."""
    loaded = trial.keys.loaded
    given, begun = loaded.recipe.stages[trial.name], time.monotonic()
    config = given.for_attempt(attempt) if isinstance(given, TrainConfig) else given
    factor = given.retry_multiplier(attempt)
    which = f"{trial.key} {trial.origin} steps x{factor:g}"
    context = StageContext(
        loaded.recipe, loaded.path.parent, trial.name, trial.key, trial.origin, trial.splits, trial.reporter,
        ResumeState(trial.state, which), partial(teacher_checkpoint, trial.keys, trial.name),
    )  # fmt: skip
    checkpoint = STAGES[given.type](config, trial.parent, context)
    seconds = max(checkpoint.manifest.seconds, time.monotonic() - begun)  # a resumed fit knows its earlier part
    facts = {"seconds": round(seconds, 3), "overrides": [*loaded.overrides], "attempt": attempt,
             "retry_multiplier": factor}  # fmt: skip
    return replace(checkpoint, manifest=checkpoint.manifest.model_copy(update=facts), recipe=loaded.text)


def evaluate(loaded: LoadedRecipe, artifact: Path, split: SplitName, reporter: Reporter) -> dict[str, float]:
    """The task's metrics of a checkpoint folder or an ONNX file on a split."""
    reporter.info(f"evaluating {artifact} on {split}")
    return evaluate_artifact(artifact, Splits(loaded.recipe, loaded.path.parent), split)
