"""Options of `sqat analyze`, checked against the recipe without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqat.checkpoint.manifest import load_manifest
from sqat.errors import SqatError, suggest
from sqat.recipe.schema import Recipe
from sqat.recipe.stages import CalibrateConfig, PruneConfig

SPLITS = ("train", "dev")


@dataclass(frozen=True)
class Options:
    """Flags of `sqat analyze`."""

    stage: str | None = None
    start: Path | None = None
    prune: str | None = None
    calibrate: str | None = None
    samples: int = 256
    split: str = "dev"
    metric: str | None = None
    budget: float | None = None


@dataclass(frozen=True)
class Sections:
    """The stages of the recipe that say how layers are pruned and quantized; None where there is none."""

    prune_stage: str | None
    prune: PruneConfig | None
    calibrate_stage: str | None
    calibrate: CalibrateConfig | None

    def notes(self) -> list[str]:
        """What the analysis ignores of them."""
        notes = ["nothing is trained after pruning or quantizing: a stage's training recovers most of the loss"]
        if self.calibrate is not None and self.calibrate.placement != "linear":
            notes.append(f"int8 is that of placement linear: sites that {self.calibrate.placement} adds stay float")
        return notes


def check_options(options: Options, recipe: Recipe) -> None:
    """Raise for impossible numbers, unknown names, and a folder to start from that is no checkpoint."""
    if options.samples < 1:
        raise SqatError(f"must be at least 1, got {options.samples}", place="--samples", code="usage")
    if options.budget is not None and not (options.budget >= 0 and math.isfinite(options.budget)):
        raise SqatError(f"must be a number of at least 0, got {options.budget:g}", place="--budget", code="usage")
    if options.split not in SPLITS:
        raise SqatError(f"no split {options.split!r}", suggest(options.split, SPLITS), "--split", code="unknown-name")
    if options.start is not None and options.stage is not None:
        raise SqatError("--stage and --from both say where to start", "remove one of them", code="usage")
    if options.stage is not None and options.stage not in recipe.stages:
        raise SqatError(f"no stage {options.stage!r}", suggest(options.stage, recipe.stages), "--stage",
                        code="unknown-name")  # fmt: skip
    if options.start is not None:
        load_manifest(options.start)
    choose_sections(recipe, options.stage, options)


def choose_sections(recipe: Recipe, start: str | None, options: Options) -> Sections:
    """Choose the prune stage that follows ``start`` and the calibrate stage that follows it, unless they are named.

    Raises:
        SqatError: a stage of another type, or a recipe with neither type.
    """
    prune = choose_stage(recipe, "prune", options.prune, [start])
    calibrate = choose_stage(recipe, "calibrate", options.calibrate, [prune, start])
    if prune is None and calibrate is None:
        raise SqatError("the recipe has neither a prune nor a calibrate stage: there is nothing to analyze",
                        f"its stages: {', '.join(recipe.stages)}", recipe.name, code="stage-order")  # fmt: skip
    prune_config = recipe.stages[prune] if prune else None
    calibrate_config = recipe.stages[calibrate] if calibrate else None
    assert prune_config is None or isinstance(prune_config, PruneConfig)
    assert calibrate_config is None or isinstance(calibrate_config, CalibrateConfig)
    return Sections(prune, prune_config, calibrate, calibrate_config)


def choose_stage(recipe: Recipe, kind: str, name: str | None, after: Sequence[str | None]) -> str | None:
    """Return the named stage, else the first of its type that follows one of ``after``, else the first of its type."""
    names = [stage for stage, config in recipe.stages.items() if config.type == kind]
    if name is not None and name not in names:
        raise SqatError(f"no {kind} stage {name!r}", suggest(name, names), f"--{kind}", code="unknown-name")
    following = [stage for before in after for stage in names if before in recipe.ancestors_of(stage)]
    return name or next(iter([*following, *names]), None)
