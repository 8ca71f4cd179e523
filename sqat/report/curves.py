"""Losses of a fit as the run's log has them, dev metrics as the manifest has them, and the sparsity on the way.

The manifest keeps the last step's losses and the metrics of every evaluation; the steps between are in `sqat.log`
alone, a line every ten seconds or tenth of the fit, so a short fit has few points. Left out: smoothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sqat.checkpoint.manifest import Manifest
from sqat.recipe.stages import PruneConfig, StageConfig
from sqat.sparsity.pattern import parse_pattern

STEP = re.compile(r"(\d+)/(\d+), (.+), [\d.]+ samples/s, \S+ left$")
STAMP = len("2026-01-01 00:00:00 ")
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


def curves_of(manifest: Manifest, config: StageConfig, lines: Iterable[str]) -> Curves:
    """Curves of a stage that was fitted.

    Args:
        lines: of the run's log.
    """
    read = read_log(lines, manifest.stage)
    losses = {name: read.get(name, []) for name in manifest.losses}
    for name, value in manifest.losses.items():
        if not losses[name] or losses[name][-1][0] < manifest.steps:
            losses[name] = [*losses[name], (manifest.steps, value)]
    metrics: dict[str, Points] = {}
    for entry in manifest.history:
        for name, value in entry.items():
            if name != "step":
                metrics.setdefault(name, []).append((int(entry["step"]), value))
    return Curves(manifest.steps, losses, metrics, schedule_of(config, manifest.steps))


def read_log(lines: Iterable[str], stage: str) -> dict[str, Points]:
    """Values by name along a stage's last fit that came to its end; a resumed one goes on where the one before stopped.

    A fit that is under way, or was given up, is not the one that the checkpoint is of.
    """
    found: dict[str, Points] = {}
    finished: dict[str, Points] = {}
    resumed = False
    for line in lines:
        title, _, text = line[STAMP:].rstrip("\n").partition(": ")
        if title != stage:
            continue
        if re.fullmatch(r"\d+ steps", text):
            found = found if resumed else {}
        resumed = text.startswith("resumed at step ")
        if resumed:
            found = before(found, int(text.split()[3]))
        if match := STEP.fullmatch(text):
            for name, value in named_values(match[3]):
                found.setdefault(name, []).append((int(match[1]), value))
        if text.startswith("done in "):
            finished = found
    return finished


def before(found: Mapping[str, Points], step: int) -> dict[str, Points]:
    """What was seen up to a step."""
    return {name: [point for point in points if point[0] <= step] for name, points in found.items()}


def named_values(text: str) -> Iterable[tuple[str, float]]:
    """Names and numbers of ``task 0.3, minilm 0.2``."""
    for part in text.split(", "):
        name, _, number = part.rpartition(" ")
        if re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", number):
            yield name, float(number)


def schedule_of(config: StageConfig, steps: int) -> Points:
    """Steps and sparsities of a prune stage."""
    if not isinstance(config, PruneConfig) or not steps:
        return []
    sparsities = config.schedule.sparsities(parse_pattern(config.pattern))
    return [
        (step, sparsities[index])
        for step, index in sorted(config.schedule.mask_steps(steps, config.recovery_fraction).items())
    ]
