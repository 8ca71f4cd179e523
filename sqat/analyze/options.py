"""The words of `sqat analyze`: checked against the recipe before torch is imported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from sqat.checkpoint.manifest import load_manifest
from sqat.errors import SqatError
from sqat.recipe.cross_checks import suggest
from sqat.recipe.schema import Recipe
from sqat.recipe.stages import CalibrateConfig, PruneConfig

SPLITS = ("train", "dev")


@dataclass(frozen=True)
class Options:
    """Flags of `sqat analyze` as they were typed."""

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
    """The sections of the recipe that say how layers are treated, by the names of their stages."""

    prune: tuple[str, PruneConfig] | None
    calibrate: tuple[str, CalibrateConfig] | None

    def notes(self) -> list[str]:
        """What the analysis leaves out of them."""
        notes = ["nothing is trained after pruning or rounding: a stage's training wins most of the damage back"]
        if self.calibrate is not None and self.calibrate[1].placement != "linear":
            notes.append(f"int8 is that of placement linear: sites that {self.calibrate[1].placement} adds stay float")
        return notes


def check_options(options: Options, recipe: Recipe) -> None:
    """Refuse numbers and names that cannot be.

    Raises:
        SqatError: one of them, or a folder to start from that is no checkpoint.
    """
    if options.samples < 1:
        raise SqatError(f"must be at least 1, got {options.samples}", place="--samples")
    if options.budget is not None and not (options.budget >= 0 and math.isfinite(options.budget)):
        raise SqatError(f"must be a number of at least 0, got {options.budget:g}", place="--budget")
    if options.split not in SPLITS:
        raise SqatError(f"no split {options.split!r}", suggest(options.split, SPLITS), "--split")
    if options.start is not None and options.stage is not None:
        raise SqatError("--stage and --from both say where to start", "leave one of them out")
    if options.stage is not None and options.stage not in recipe.stages:
        raise SqatError(f"no stage {options.stage!r}", suggest(options.stage, recipe.stages), "--stage")
    if options.start is not None:
        load_manifest(options.start)
    choose_sections(recipe, options.stage, options)


def choose_sections(recipe: Recipe, start: str | None, options: Options) -> Sections:
    """The prune stage that grows from ``start`` and the calibrate stage after it, unless others are named.

    Raises:
        SqatError: a stage that is none of its kind, or neither kind in the recipe.
    """
    prune = choose_stage(recipe, "prune", options.prune, [start])
    calibrate = choose_stage(recipe, "calibrate", options.calibrate, [prune, start])
    if prune is None and calibrate is None:
        raise SqatError("the recipe has neither a prune nor a calibrate stage: there is nothing to analyze",
                        f"its stages: {', '.join(recipe.stages)}", recipe.name)  # fmt: skip
    return Sections(
        None if prune is None else (prune, cast("PruneConfig", recipe.stages[prune])),
        None if calibrate is None else (calibrate, cast("CalibrateConfig", recipe.stages[calibrate])),
    )


def choose_stage(recipe: Recipe, kind: str, wanted: str | None, after: Sequence[str | None]) -> str | None:
    """The stage called ``wanted``; else the first of its kind that grows from one of ``after``; else the first."""
    names = [name for name, config in recipe.stages.items() if config.type == kind]
    if wanted is not None and wanted not in names:
        raise SqatError(f"no {kind} stage {wanted!r}", suggest(wanted, names), f"--{kind}")
    grown = [name for before in after for name in names if before in recipe.ancestors_of(name)]
    return wanted or next(iter([*grown, *names]), None)
