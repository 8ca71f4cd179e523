"""Quality gates: whether a stage's result is good enough to take its place.

Gates read the dev metrics that manifests hold. So a gate that is changed later is checked again without any work. A
result that misses a gate goes beside the stage's folder, where no later stage looks for a parent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from sqat.checkpoint.manifest import Manifest
from sqat.errors import GateError, SqatError
from sqat.pipeline.graph import StageGraph, StageNode
from sqat.recipe.stages import Gate

ROUNDING = 1e-12  # of a difference of two figures


class Limit(NamedTuple):
    """The lowest value of a metric that passes, and where it comes from in words."""

    metric: str
    lowest: float
    reason: str


def rejected_folder(directory: Path) -> Path:
    """Return the folder for a result that misses a gate."""
    return directory.with_name(f"{directory.name}.rejected")


def gate_limits(graph: StageGraph, node: StageNode, parent: Manifest | None) -> list[Limit]:
    """Return the limit of each gate of a stage.

    Args:
        parent: of the checkpoint that the stage starts from.

    Raises:
        SqatError: the stage to compare with has not run with this recipe, or lacks the metric, or it is NaN.
    """
    return [gate_limit(graph, node, metric, gate, parent) for metric, gate in node.config.gates.items()]


def gate_limit(graph: StageGraph, node: StageNode, metric: str, gate: Gate, parent: Manifest | None) -> Limit:
    """Return the highest limit of one gate."""
    limits = [] if gate.min is None else [Limit(metric, gate.min, "min")]
    if gate.max_drop is not None:
        other = parent if gate.against is None else reference_manifest(node, graph.nodes[gate.against])
        where = f"gate {metric} of stage {node.name}"
        if other is None:
            raise SqatError(f"{where} has no parent to compare with", "give against or min", code="stage-order")
        figures = other.metrics.get("dev", {})
        if metric not in figures:
            raise SqatError(
                f"{where} compares with stage {other.stage}, which has no such dev metric",
                f"use one of its metrics: {', '.join(figures) or 'none'}",
                code="unknown-name",
            )
        if math.isnan(figures[metric]):
            problem = f"{where} compares with stage {other.stage}, whose dev {metric} is NaN"
            raise SqatError(problem, "give min alone, or another stage in against", code="non-finite")
        reason = f"{other.stage} {figures[metric]:.4f} - {gate.max_drop:g}"
        limits.append(Limit(metric, figures[metric] - gate.max_drop, reason))
    return max(limits, key=lambda limit: limit.lowest)


def reference_manifest(node: StageNode, other: StageNode) -> Manifest:
    """Return the manifest of the stage that a gate of ``node`` compares with."""
    if other.manifest is None or other.manifest.fingerprint != other.fingerprint:
        raise SqatError(
            f"a gate of stage {node.name} compares with stage {other.name}, which has not run with this recipe",
            f"run it first: sqat run --to {other.name}",
            str(other.directory),
            code="stage-order",
        )
    return other.manifest


def first_failed_gate(limits: list[Limit], metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Describe the first gate that a result misses; empty where it passes all.

    Args:
        metrics: split -> metric -> figure; an export has one ``dev TARGET`` for each of its files.
    """
    for metric, lowest, reason in limits:
        for split, figures in metrics.items():
            if split.partition(" ")[0] != "dev":
                continue
            if metric not in figures:
                return f"{split} {metric} was not measured"
            if not figures[metric] >= lowest - ROUNDING:
                return f"{split} {metric} {figures[metric]:.4f}, allowed from {lowest:.4f} ({reason})"
    return ""


def describe_gates(node: StageNode) -> list[str]:
    """Describe each gate of a stage, for the plan."""
    lines = []
    for metric, gate in node.config.gates.items():
        against = gate.against or (node.parent.name if node.parent else None)
        parts = [] if gate.min is None else [f"at least {gate.min:g}"]
        parts += [] if gate.max_drop is None else [f"at most {gate.max_drop:g} below {against}"]
        lines.append(f"{metric} {', '.join(parts)}")
    return lines


def predicted_failure(graph: StageGraph, node: StageNode) -> str:
    """Describe the gate that the checkpoint in the folder misses; empty where it passes or a figure is missing."""
    try:
        limits = gate_limits(graph, node, node.parent_manifest)
    except SqatError:
        return ""
    return "" if node.manifest is None else first_failed_gate(limits, node.manifest.metrics)


def gate_error(name: str, failure: str, folder: Path, *, keeps_older: bool) -> GateError:
    """Make the error with which a run ends.

    Args:
        folder: of the result that misses the gate.
        keeps_older: an older result of this stage stays in place.
    """
    where = f"kept in {folder}" + (", the older result stays in place" if keeps_older else "")
    hint = f"improve the stage, or change stages.{name}.gates: that only checks the result again"
    return GateError(f"stage {name} misses a gate: {failure}; {where}", hint, code="missed-gate")
