"""The order of stages: keys, what is unchanged, what runs; it knows no algorithm.

A stage's key is a digest of its own section, the model, the task, the data's content and its parent's key.
A folder whose manifest has the same key is unchanged and skipped. Stages return checkpoints; only this file saves
them, into ``<output>/<recipe>/<NN-stage>``. Mid-stage state lives beside the folder until the stage is saved.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from sqat.checkpoint import FORMAT, Checkpoint, load_checkpoint, load_manifest, save_checkpoint, write_synced
from sqat.data import digest
from sqat.display import Display
from sqat.errors import SqatError
from sqat.evaluation import evaluate_artifact
from sqat.job import Job, SplitName, Splits
from sqat.recipe import FitConfig, LoadedRecipe, Recipe, StageConfig
from sqat.stages import calibrate, export, prune, qat, train
from sqat.training import MidStage, total_steps

STAGES: dict[str, Callable[[Any, Checkpoint | None, Job], Checkpoint]] = {
    "train": train.run,
    "prune": prune.run,
    "calibrate": calibrate.run,
    "qat": qat.run,
    "export": export.run,
}
# Keys that change how a stage runs, not what comes out of it.
UNKEYED = {"parent", "save_every"}
RESULTS = "results.json"


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


@dataclass(frozen=True)
class ResultRow:
    """One line of the closing table."""

    label: str
    stage: str
    metrics: dict[str, float]
    size_bytes: int
    path: Path


@dataclass(frozen=True)
class Results:
    """The closing table: what was measured, on which split of which data."""

    rows: list[ResultRow]
    split: str
    data_digest: str
    directory: Path


def stage_key(config: StageConfig, recipe: Recipe, data: dict[str, str], parent: str, teacher: str) -> str:
    """Digest of all that decides what a stage returns."""
    facts = {
        "format": FORMAT,
        "stage": config.model_dump(mode="json", exclude=UNKEYED),
        "model": recipe.model.model_dump(mode="json"),
        "task": recipe.task.model_dump(mode="json"),
        "columns": recipe.data.columns.model_dump(mode="json"),
        "data": data,
        "seed": recipe.seed,
        "parent": parent,
        "teacher": teacher,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def key_of(loaded: LoadedRecipe, name: str, parent: str, teacher: str) -> str:
    """Key of one stage after a parent and a teacher of the given keys."""
    recipe = loaded.recipe
    data = {split: digest(getattr(recipe.data, split), loaded.path.parent) for split in ("train", "dev")}
    return stage_key(recipe.stages[name], recipe, data, parent, teacher)


def stage_keys(loaded: LoadedRecipe) -> dict[str, str]:
    """Key of every stage of a recipe, each after its parent's."""
    keys: dict[str, str] = {}
    for name in loaded.recipe.stages:
        parent, teacher = loaded.recipe.parent_of(name), teacher_name(loaded.recipe, name)
        keys[name] = key_of(loaded, name, keys.get(parent or "", ""), keys.get(teacher or "", ""))
    return keys


def teacher_name(recipe: Recipe, name: str) -> str | None:
    """The stage that teaches ``name``: the recipe's choice, or the nearest dense ancestor; None without one."""
    config = recipe.stages[name]
    distill = getattr(config, "distill", None)  # only stages that train a student have it
    if distill is None:
        return None
    if distill.teacher is not None:
        return str(distill.teacher)
    ancestor = recipe.parent_of(name)
    while ancestor is not None and recipe.stages[ancestor].stage != "train":
        ancestor = recipe.parent_of(ancestor)
    return ancestor


def make_plan(
    loaded: LoadedRecipe, *, first: str | None = None, last: str | None = None, force: bool = False
) -> list[PlannedStage]:
    """What `run` would do: stages between ``first`` and ``last``, their keys, and which are unchanged."""
    recipe = loaded.recipe
    names = list(recipe.stages)
    for flag, name in (("--from", first), ("--to", last)):
        if name is not None and name not in names:
            raise SqatError(f"{flag} {name}: the recipe has no such stage", f"stages: {', '.join(names)}")
    low = names.index(first) if first else 0
    high = names.index(last) + 1 if last else len(names)
    if low >= high:
        raise SqatError(f"--from {first} comes after --to {last}", f"order: {', '.join(names)}")
    keys = stage_keys(loaded)
    splits = Splits(recipe, loaded.path.parent)
    stale: set[str] = set()
    plan = []
    for number, name in enumerate(names, start=1):
        if low < number <= high:
            directory = stage_directory(loaded, name)
            known = manifest_key(directory)
            unchanged = known == keys[name] and not force and recipe.parent_of(name) not in stale
            if not unchanged:
                stale.add(name)
            plan.append(planned(loaded, name, keys[name], unchanged, splits))
    return plan


def planned(loaded: LoadedRecipe, name: str, key: str, unchanged: bool, splits: Splits) -> PlannedStage:
    """One stage with its steps, samples and the seconds it took before."""
    recipe, directory = loaded.recipe, stage_directory(loaded, name)
    config = recipe.stages[name]
    steps, samples = amount(config, recipe, splits)
    seconds = load_manifest(directory).seconds if manifest_key(directory) else None
    return PlannedStage(int(directory.name[:2]), name, config.stage, recipe.parent_of(name), key, directory, unchanged,
                        steps, samples, seconds or None)  # fmt: skip


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


def stage_directory(loaded: LoadedRecipe, name: str) -> Path:
    """Where a stage's checkpoint lies."""
    number = list(loaded.recipe.stages).index(name) + 1
    return loaded.run_directory / f"{number:02d}-{name}"


def manifest_key(directory: Path) -> str | None:
    """Key of the checkpoint in a folder; None where there is no sound one."""
    try:
        return load_manifest(directory).key
    except SqatError:
        return None


def run(
    loaded: LoadedRecipe,
    display: Display,
    *,
    first: str | None = None,
    last: str | None = None,
    force: bool = False,
) -> Results:
    """Run the plan, skip what is unchanged, and measure the results once on the test split."""
    splits = Splits(loaded.recipe, loaded.path.parent)
    plan = make_plan(loaded, first=first, last=last, force=force)
    for stage in plan:
        if stage.unchanged:
            display.say(f"{stage.name}: unchanged")
            continue
        parent = parent_checkpoint(loaded, stage.name, None)
        execute(loaded, stage.name, stage.directory, parent, splits, display, expected=stage.key)
    return closing_table(loaded, splits, display)


def run_stage(
    loaded: LoadedRecipe,
    name: str,
    display: Display,
    *,
    parent: Path | None = None,
    output: Path | None = None,
    force: bool = False,
) -> Path:
    """Run one stage from its parent in the run folder, or from ``parent``; returns the checkpoint's folder."""
    directory = output or stage_directory(loaded, name)
    if output is not None and output.exists() and manifest_key(output) is None:
        raise SqatError("the output exists and is no checkpoint of sqat", "choose another folder", str(output))
    start = parent_checkpoint(loaded, name, parent)
    execute(loaded, name, directory, start, Splits(loaded.recipe, loaded.path.parent), display, force=force)
    return directory


def parent_checkpoint(loaded: LoadedRecipe, name: str, given: Path | None) -> Checkpoint | None:
    """The checkpoint a stage starts from; None for the pretrained model."""
    if given is not None:
        return load_checkpoint(given)
    parent = loaded.recipe.parent_of(name)
    if parent is None:
        return None
    directory = stage_directory(loaded, parent)
    if not directory.is_dir():
        raise SqatError(f"stage {name} starts from {parent}, which has not run yet",
                        f"run `sqat run --to {name}`, or give --from CHECKPOINT",
                        str(directory))  # fmt: skip
    return load_checkpoint(directory)


def teacher_checkpoint(loaded: LoadedRecipe, name: str) -> Checkpoint:
    """The dense ancestor that teaches a stage."""
    teacher = teacher_name(loaded.recipe, name)
    if teacher is None:
        raise SqatError(f"stage {name} distils but has no dense ancestor", "add a train stage, or set distill.teacher")
    return load_checkpoint(stage_directory(loaded, teacher))


def execute(
    loaded: LoadedRecipe,
    name: str,
    directory: Path,
    parent: Checkpoint | None,
    splits: Splits,
    display: Display,
    *,
    expected: str | None = None,
    force: bool = True,
) -> None:
    """Run one stage and save what it returns; its mid-stage state goes once the checkpoint is on the disk.

    Args:
        expected: key the plan promised; another one means that the parent on the disk is of an older recipe.
        force: run it even where the folder already holds this very stage.
    """
    parent_key = "" if parent is None else parent.manifest.key
    teacher = teacher_name(loaded.recipe, name)
    key = key_of(loaded, name, parent_key, manifest_key(stage_directory(loaded, teacher)) or "" if teacher else "")
    if expected is not None and key != expected:
        raise SqatError(f"stage {name} starts from a checkpoint that this recipe would not make any more",
                        f"run from an earlier stage: sqat run --from {loaded.recipe.parent_of(name)}")  # fmt: skip
    if manifest_key(directory) == key and not force:
        display.say(f"{name}: unchanged")
        return
    state = MidStage(directory.with_name(f".{directory.name}.state"), key)
    job = Job(loaded.recipe, loaded.path.parent, name, key, parent_key, splits, display, state,
              partial(teacher_checkpoint, loaded, name))  # fmt: skip
    config = loaded.recipe.stages[name]
    begun = time.monotonic()
    checkpoint = STAGES[config.stage](config, parent, job)
    seconds = max(checkpoint.manifest.seconds, time.monotonic() - begun)  # a resumed fit knows its earlier part
    manifest = checkpoint.manifest.model_copy(update={"seconds": round(seconds, 3), "overrides": [*loaded.overrides]})
    save_checkpoint(replace(checkpoint, manifest=manifest, recipe=loaded.text), directory)
    shutil.rmtree(state.directory, ignore_errors=True)
    figures = checkpoint.manifest.metrics.get("dev", {})
    shown = ", ".join(f"{metric} {value:.4f}" for metric, value in figures.items())
    display.say(f"{name}: {f'dev {shown}' if shown else 'done'} -> {directory}")


def evaluate(loaded: LoadedRecipe, artifact: Path, split: SplitName, display: Display) -> dict[str, float]:
    """The task's metrics of a checkpoint folder or an ONNX file on a split."""
    display.say(f"evaluating {artifact} on {split}")
    return evaluate_artifact(artifact, Splits(loaded.recipe, loaded.path.parent), split)


def closing_table(loaded: LoadedRecipe, splits: Splits, display: Display) -> Results:
    """Measure every result that this recipe has made on the test split (dev where there is none), once per key."""
    recipe = loaded.recipe
    split: SplitName = "test" if recipe.data.test is not None else "dev"
    content = digest(getattr(recipe.data, split), loaded.path.parent)
    remembered, keys = read_results(loaded.run_directory / RESULTS), stage_keys(loaded)
    rows, record = [], {}
    for label, (stage, artifact) in result_artifacts(loaded).items():
        if manifest_key(stage_directory(loaded, stage)) != keys[stage]:
            display.say(f"{label}: left out of the table, since {stage} has not run with this recipe")
            continue
        key = f"{keys[stage]}/{artifact.name}/{content}"
        known = remembered.get(label, {})
        if known.get("key") != key:
            display.say(f"{label}: measuring on {split}")
            known = {"key": key, "metrics": evaluate_artifact(artifact, splits, split)}
        row = ResultRow(label, stage, {name: float(value) for name, value in known["metrics"].items()},
                        artifact_size(artifact), artifact)  # fmt: skip
        rows.append(row)
        metrics = {name: value if isfinite(value) else str(value) for name, value in row.metrics.items()}
        record[label] = {"key": key, "split": split, "data": content, "size_bytes": row.size_bytes,
                         "path": str(artifact), "metrics": metrics}  # fmt: skip
    if record:
        write_synced(loaded.run_directory / f".{RESULTS}.new", (json.dumps(record, indent=2) + "\n").encode())
        (loaded.run_directory / f".{RESULTS}.new").rename(loaded.run_directory / RESULTS)
    return Results(rows, split, content, loaded.run_directory)


def result_artifacts(loaded: LoadedRecipe) -> dict[str, tuple[str, Path]]:
    """Label -> stage and its checkpoint folder or ONNX file; the recipe's rows, or every last stage."""
    recipe = loaded.recipe
    parents = {recipe.parent_of(name) for name in recipe.stages}
    wanted = recipe.results or {name: name for name in recipe.stages if name not in parents}
    found: dict[str, tuple[str, Path]] = {}
    for label, row in wanted.items():
        name, _, target = row.partition("/")
        directory, config = stage_directory(loaded, name), recipe.stages[name]
        if config.stage != "export":
            found[label] = (name, directory)
            continue
        targets = (target,) if target else config.targets
        for each in targets:
            found[label if len(targets) == 1 else f"{label} {each}"] = (name, directory / export.file_name(each))
    return found


def artifact_size(artifact: Path) -> int:
    """Bytes of an ONNX file, or of a checkpoint's tensors."""
    files = [artifact] if artifact.is_file() else artifact.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def read_results(path: Path) -> dict[str, Any]:
    """What `closing_table` measured before; nothing where the file is absent or damaged."""
    try:
        parsed = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return parsed if isinstance(parsed, dict) else {}
