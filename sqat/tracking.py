"""Losses and metrics for TensorBoard, W&B, MLflow or trackio, through Accelerate's trackers; off unless a recipe asks.

A watched display: what a fit tells its watcher goes to the trackers too, as ``stage/loss part``, over steps that count
on from stage to stage, since some trackers refuse to go back. Metrics follow as ``stage/dev/metric`` and
``results/row/metric``. A tracker that fails on the way is told and given up; a training is worth more than its curves.
Left out: pictures, weights and system load, which the trackers' own tools have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from sqat.display import Display
from sqat.errors import SqatError, first_line
from sqat.processes import processes
from sqat.recipe import Recipe

FOLDER = "tracking"  # in the run's folder, for trackers that write files
LONGEST = 250  # characters of a value; MLflow takes no longer ones


@dataclass
class Tracked:
    """A display whose figures go to trackers as well.

    Attributes:
        steps: of the stages that are over.
    """

    display: Display
    trackers: list[Any] = field(default_factory=list)
    title: str = ""
    total: int = 0
    steps: int = 0

    def say(self, text: str) -> None:
        self.display.say(text)

    def begin(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.display.begin(title, total)

    def update(self, step: int, values: Mapping[str, float], rate: float) -> None:
        self.display.update(step, values, rate)
        figures = {**values, "samples per second": rate}
        self.log({f"{self.title}/{name}": value for name, value in figures.items()}, step)

    def end(self) -> None:
        self.steps, self.total = self.steps + self.total, 0
        self.display.end()

    def log(self, figures: Mapping[str, float], step: int = 0) -> None:
        """Hand figures to every tracker, at a step of the stage under way; curves take no infinity."""
        finite = {name: float(value) for name, value in figures.items() if math.isfinite(value)}
        for tracker in [*self.trackers]:
            try:
                tracker.log(finite, step=self.steps + step)
            except Exception as error:  # noqa: PERF203  # each library has classes of its own, and a network
                self.trackers.remove(tracker)
                self.say(f"{tracker.name} is given up, the run goes on: {first_line(error)}")


@contextmanager
def tracked(recipe: Recipe, directory: Path, display: Display) -> Iterator[Tracked]:
    """The display of a run, watched by the trackers that the recipe names; the first process alone has any.

    Args:
        directory: of the run.

    Raises:
        SqatError: a tracker is not installed, or cannot begin.
    """
    for name in recipe.trackers:
        if find_spec(name) is None:
            raise SqatError(f"the tracker {name} is not installed", f"pip install {name}, or leave it out", "trackers")
    watched = Tracked(display)
    if recipe.trackers:
        watched.trackers = start_trackers(recipe, directory)
    try:
        yield watched
    finally:
        for tracker in watched.trackers:
            try:
                tracker.finish()
            except Exception as error:  # noqa: PERF203  # what ended the run must not be hidden by it
                display.say(f"{tracker.name}: {first_line(error)}")


def start_trackers(recipe: Recipe, directory: Path) -> list[Any]:
    """Trackers of the first process, told what the recipe says."""
    processes()  # before Accelerator, which would not find gloo by itself
    try:
        accelerator = Accelerator(mixed_precision="no", log_with=[*recipe.trackers], project_dir=directory / FOLDER)
        accelerator.init_trackers(recipe.name or "sqat", config=flat(recipe.model_dump(mode="json", by_alias=True)))
    except Exception as error:
        raise SqatError(f"a tracker cannot begin: {first_line(error)}", "or leave it out", "trackers") from error
    return [*accelerator.trackers] if accelerator.is_main_process else []


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, str | float | bool]:
    """Nested values by dotted names, as trackers take them."""
    found: dict[str, str | float | bool] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{name}.")
        elif value is not None:
            found[f"{before}{name}"] = value if isinstance(value, (bool, int, float)) else str(value)[:LONGEST]
    return found
