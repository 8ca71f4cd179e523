"""Losses and metrics for TensorBoard, W&B, MLflow or trackio, through Accelerate's trackers; off unless a recipe asks.

A watched reporter: what a fit tells its watcher goes to the trackers too, as ``stage/loss part``, over steps that count
on from stage to stage, since some trackers refuse to go back. Metrics follow as ``stage/dev/metric`` and
``results/row/metric``. A tracker that fails on the way is told and given up; a training is worth more than its curves.
What trackers print goes to standard error, for standard output is the results'. MLflow takes fewer characters in names
than recipes and metrics have (``recall@10``); there, and there alone, others become ``_``.
Left out: pictures, weights and system load, which the trackers' own tools have.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator

from sqat.distributed import process_state
from sqat.errors import SqatError, first_line
from sqat.progress import Reporter
from sqat.recipe.schema import Recipe

FOLDER = "tracking"  # in the run's folder, for trackers that write files
LONGEST = 250  # characters of a value; MLflow takes no longer ones
Value = TypeVar("Value")
REFUSED = re.compile(r"[^\w. :/-]")  # in names, by MLflow


@dataclass
class Tracked:
    """A reporter whose figures go to trackers as well.

    Attributes:
        steps: of the stages that are over.
    """

    reporter: Reporter
    trackers: list[Any] = field(default_factory=list)
    title: str = ""
    total: int = 0
    steps: int = 0

    def info(self, text: str) -> None:
        self.reporter.info(text)

    def start(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.reporter.start(title, total)

    def advance(self, step: int, values: Mapping[str, float], rate: float) -> None:
        self.reporter.advance(step, values, rate)
        figures = {**values, "samples per second": rate}
        self.log({f"{self.title}/{name}": value for name, value in figures.items()}, step)

    def finish(self) -> None:
        self.steps, self.total = self.steps + self.total, 0
        self.reporter.finish()

    def log(self, figures: Mapping[str, float], step: int = 0) -> None:
        """Hand figures to every tracker, at a step of the stage under way; curves take no infinity."""
        finite = {name: float(value) for name, value in figures.items() if math.isfinite(value)}
        for tracker in [*self.trackers]:
            try:
                tracker.log(names_for(tracker.name, finite), step=self.steps + step)
            except Exception as error:  # noqa: PERF203  # each library has classes of its own, and a network
                self.trackers.remove(tracker)
                self.info(f"{tracker.name} is given up, the run goes on: {first_line(error)}")


@contextmanager
def tracked(recipe: Recipe, directory: Path, reporter: Reporter) -> Iterator[Tracked]:
    """The reporter of a run, watched by the trackers that the recipe names; the first process alone has any.

    Args:
        directory: of the run.

    Raises:
        SqatError: a tracker is not installed, or cannot begin.
    """
    for name in recipe.trackers:
        if not is_installed(name):
            raise SqatError(
                f"the tracker {name} is not installed",
                f"pip install {name}, or leave it out",
                "trackers",
                code="missing-package",
            )
    watched = Tracked(reporter)
    try:
        for name in recipe.trackers:
            watched.trackers += start_tracker(name, recipe, directory)
        yield watched
    finally:
        for tracker in watched.trackers:
            try:
                with redirect_stdout(sys.stderr):
                    tracker.finish()
            except Exception as error:  # noqa: PERF203  # what ended the run must not be hidden by it
                reporter.info(f"{tracker.name}: {first_line(error)}")


def is_installed(name: str) -> bool:
    """Whether a package is there; a folder of its name, as W&B leaves where it ran, is none."""
    found = find_spec(name)
    return found is not None and found.origin is not None


def start_tracker(name: str, recipe: Recipe, directory: Path) -> list[Any]:
    """A tracker of the first process, told what the recipe says; none in the others.

    Raises:
        SqatError: it cannot begin.
    """
    process_state()  # before Accelerator, which would not find gloo by itself
    config = names_for(name, flat(recipe.model_dump(mode="json", by_alias=True)))
    try:
        with redirect_stdout(sys.stderr):
            accelerator = Accelerator(mixed_precision="no", log_with=name, project_dir=directory / FOLDER)
            accelerator.init_trackers(recipe.name or "sqat", config=config)
    except Exception as error:
        raise SqatError(
            f"{name} cannot begin: {first_sentence(error)}", "mend that or leave it out", "trackers", code="usage"
        ) from error
    return [*accelerator.trackers] if accelerator.is_main_process else []


def first_sentence(error: Exception) -> str:
    """The first sentence of a library's message, which may be a page."""
    return re.split(r"(?<=\w)[.;] ", first_line(error))[0]


def names_for(tracker: str, values: Mapping[str, Value]) -> dict[str, Value]:
    """The values under names that a tracker takes."""
    return {REFUSED.sub("_", name) if tracker == "mlflow" else name: value for name, value in values.items()}


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, str | float | bool]:
    """Nested values by dotted names, as trackers take them."""
    found: dict[str, str | float | bool] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{name}.")
        elif value is not None:
            found[f"{before}{name}"] = value if isinstance(value, (bool, int, float)) else str(value)[:LONGEST]
    return found
