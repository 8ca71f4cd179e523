"""Curves of a stage: losses from ``metrics.jsonl``, dev metrics from the manifest, sparsity from the schedule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqat.checkpoint.manifest import Manifest
from sqat.recipe.stages import PruneConfig, StageConfig
from sqat.sparsity.pattern import parse_pattern
from sqat.training.metrics_log import is_finite

MOST_POINTS = 400  # of one curve; more cannot be told apart in a figure
MOST_STEPS = 10**7  # of a schedule that is drawn; one may have a mask at every step
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Curves:
    """What happened along the steps of one stage; each a list of (step, value).

    Attributes:
        schedule: (step, sparsity from it on); empty for a stage that does not prune.
    """

    steps: int
    losses: Mapping[str, Points] = field(default_factory=dict)
    metrics: Mapping[str, Points] = field(default_factory=dict)
    schedule: Points = field(default_factory=list)

    @property
    def shares(self) -> dict[str, Points]:
        """Those metrics that stay between 0 and 1, which one axis can show."""
        return {name: points for name, points in self.metrics.items() if all(0 <= value <= 1 for _, value in points)}


def curves_of(manifest: Manifest, config: StageConfig, entries: Iterable[Mapping[str, Any]]) -> Curves:
    """Collect the curves of a stage that trained.

    Args:
        entries: of the run's ``metrics.jsonl``.
    """
    logged = read_losses(manifest, entries)
    losses = {name: logged.get(name, []) for name in manifest.losses}
    for name, value in manifest.losses.items():
        if not is_finite(value):
            continue
        if not losses[name] or losses[name][-1][0] < manifest.steps:
            losses[name] = [*losses[name], (manifest.steps, value)]
    metrics: dict[str, Points] = {}
    for entry in manifest.history:
        for name, value in entry.items() if is_finite(entry.get("step")) else ():
            if name != "step" and is_finite(value):
                metrics.setdefault(name, []).append((int(entry["step"]), value))
    losses = {name: points for name, points in losses.items() if points}
    return Curves(manifest.steps, losses, metrics, schedule_of(config, manifest.steps))


def read_losses(manifest: Manifest, entries: Iterable[Mapping[str, Any]]) -> dict[str, Points]:
    """Return the losses along the steps that made a checkpoint; of a step that was written twice, the last line."""
    made_by = (manifest.stage, manifest.fingerprint, manifest.attempt)
    steps: dict[int, Mapping[str, float]] = {}
    for entry in entries:
        if (entry.get("stage"), entry.get("fingerprint"), entry.get("attempt")) == made_by and entry[
            "step"
        ] <= manifest.steps:
            steps[entry["step"]] = entry["losses"]
    stride = max(1, -(-len(steps) // MOST_POINTS))
    kept = [step for step in sorted(steps) if step % stride == 0 or step == manifest.steps]
    names = dict.fromkeys(name for step in kept for name in steps[step])
    return {name: [(step, steps[step][name]) for step in kept if name in steps[step]] for name in names}


def schedule_of(config: StageConfig, steps: int) -> Points:
    """Steps and sparsities of a prune stage."""
    if not isinstance(config, PruneConfig) or not 0 < steps <= MOST_STEPS:
        return []
    sparsities = config.schedule.sparsities(parse_pattern(config.pattern))
    return [
        (step, sparsities[index])
        for step, index in sorted(config.schedule.mask_steps(steps, config.recovery_fraction).items())
    ]
