"""The plan: which stages there are, how much work each is, which must run; nothing is run here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sqat.pipeline.fingerprint import Keys
from sqat.pipeline.quality_gates import foreseen, show_limits
from sqat.recipe.cross_checks import stage_range
from sqat.recipe.schema import LoadedRecipe, Recipe
from sqat.recipe.stages import StageConfig, TrainConfig
from sqat.tasks.splits import Splits


@dataclass(frozen=True)
class PlannedStage:
    """One stage as the plan shows it; seconds are those an earlier run of the stage took."""

    number: int
    name: str
    type: str
    parent: str | None
    key: str
    directory: Path
    unchanged: bool
    steps: int | None
    samples: int | None
    seconds: float | None
    gates: list[str] = field(default_factory=list)
    missed: str = ""


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
            plan.append(PlannedStage(number, name, config.type, loaded.recipe.parent_of(name), keys.planned[name],
                                     keys.directory(name), name not in due, steps, samples, seconds,
                                     show_limits(keys, name), "" if name in due else foreseen(keys, name)))  # fmt: skip
    return plan


def due_stages(keys: Keys, first: str | None, last: str | None, force: bool) -> list[str]:
    """Stages of the range that must run: forced, not current, or after one that runs."""
    recipe, due = keys.loaded.recipe, list[str]()
    for name in stage_range(recipe, first, last):
        before = {recipe.parent_of(name), recipe.teacher_of(name)}
        if force or before & set(due) or not keys.is_current(name):
            due.append(name)
    return due


def amount(config: StageConfig, recipe: Recipe, splits: Splits) -> tuple[int | None, int | None]:
    """Optimizer steps and samples of a stage; a batch is taken as full, which queries of many sizes may not fill."""
    if isinstance(config, TrainConfig):
        steps = config.total_steps(-(-splits.epoch_rows() // config.batch_size), config.gradient_accumulation)
        return steps, steps * config.batch_size * config.gradient_accumulation
    if config.type == "calibrate":
        return None, min(config.samples, len(splits.rows(config.split)))
    return None, min(config.parity_samples, len(splits.rows("dev")))
