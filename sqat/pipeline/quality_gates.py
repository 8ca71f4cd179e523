"""Quality gates: whether a stage's result may take its place, from the dev figures that checkpoints remember.

Nothing is measured here, so that a gate that is changed later is judged again without any work. A result that
misses a gate is kept beside the stage's folder, where no later stage looks for a parent. Left out: the test
split, which is measured once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from sqat.checkpoint.manifest import Manifest
from sqat.errors import GateError, SqatError
from sqat.pipeline.fingerprint import Keys
from sqat.recipe.stages import Gate

SLACK = 1e-12  # of a difference of two figures


class Limit(NamedTuple):
    """What a metric must reach, and in words why that much."""

    metric: str
    lowest: float
    why: str


def rejected_folder(directory: Path) -> Path:
    """Where a result that misses a gate is kept."""
    return directory.with_name(f"{directory.name}.rejected")


def limits_of(keys: Keys, name: str, parent: Manifest | None) -> list[Limit]:
    """The limits of a stage's gates, each the highest that the gate sets.

    Args:
        parent: of the checkpoint that the stage starts from.

    Raises:
        SqatError: what a gate compares with has not run with this recipe, or has no such figure, or NaN.
    """
    return [limit(keys, name, metric, gate, parent) for metric, gate in keys.loaded.recipe.stages[name].gates.items()]


def limit(keys: Keys, name: str, metric: str, gate: Gate, parent: Manifest | None) -> Limit:
    """The highest limit of one gate."""
    found = [] if gate.min is None else [Limit(metric, gate.min, "min")]
    if gate.max_drop is not None:
        other = parent if gate.against is None else compared(keys, name, gate.against)
        if other is None:
            raise SqatError(f"the gate {metric} of stage {name} has no parent to compare with", "give against or min")
        figures = other.metrics.get("dev", {})
        if metric not in figures:
            raise SqatError(f"the gate of stage {name} compares {metric} with {other.stage}, which has no such figure "
                            "on dev", f"it has {', '.join(figures) or 'none'}")  # fmt: skip
        if math.isnan(figures[metric]):
            raise SqatError(f"the gate of stage {name} compares {metric} with {other.stage}, whose {metric} on dev is "
                            "no number", "give min alone, or another stage in against")  # fmt: skip
        why = f"{other.stage} {figures[metric]:.4f} - {gate.max_drop:g}"
        found.append(Limit(metric, figures[metric] - gate.max_drop, why))
    return max(found, key=lambda each: each.lowest)


def compared(keys: Keys, name: str, against: str) -> Manifest:
    """What is known of the stage that a gate compares with."""
    manifest = keys.manifest(against)
    if manifest is None or manifest.key != keys.planned[against]:
        raise SqatError(f"a gate of stage {name} compares with {against}, which has not run with this recipe",
                        f"run it first: sqat run --to {against}", str(keys.directory(against)))  # fmt: skip
    return manifest


def missed(limits: list[Limit], metrics: Mapping[str, Mapping[str, float]]) -> str:
    """The first gate that a result misses, with what was got and what is allowed; empty where it passes all.

    Args:
        metrics: split -> metric -> figure; an export has one ``dev TARGET`` for each of its files.
    """
    for metric, lowest, why in limits:
        for split, figures in metrics.items():
            if split.partition(" ")[0] != "dev":
                continue
            if metric not in figures:
                return f"{split} {metric} was not measured"
            if not figures[metric] >= lowest - SLACK:
                return f"{split} {metric} {figures[metric]:.4f}, allowed from {lowest:.4f} ({why})"
    return ""


def show_limits(keys: Keys, name: str) -> list[str]:
    """A stage's gates in words, for the plan."""
    lines = []
    for metric, gate in keys.loaded.recipe.stages[name].gates.items():
        against = gate.against or keys.loaded.recipe.parent_of(name)
        parts = [] if gate.min is None else [f"at least {gate.min:g}"]
        parts += [] if gate.max_drop is None else [f"at most {gate.max_drop:g} below {against}"]
        lines.append(f"{metric} {', '.join(parts)}")
    return lines


def foreseen(keys: Keys, name: str) -> str:
    """The gate that the checkpoint that lies there misses; empty where it passes, or nothing can be said yet."""
    manifest = keys.manifest(name)
    try:
        limits = limits_of(keys, name, keys.manifest(keys.loaded.recipe.parent_of(name)))
    except SqatError:
        return ""
    return "" if manifest is None else missed(limits, manifest.metrics)


def refusal(name: str, miss: str, kept: Path, standing: bool) -> GateError:
    """The one line that a run ends with.

    Args:
        kept: folder of the result that misses the gate.
        standing: another result of this stage stays in place beside it.
    """
    where = f"kept in {kept}" + (", the older one stays in place" if standing else "")
    hint = f"train it better, or change stages.{name}.gates: then it is judged again, not trained"
    return GateError(f"stage {name} misses a gate: {miss}; {where}", hint)
