"""Losses and metrics for TensorBoard, W&B, MLflow or trackio, through Accelerate's trackers, where a recipe asks.

Names are ``stage/loss``, ``stage/dev/metric`` and ``results/row/metric``. Steps count on from stage to stage. A
tracker that fails is dropped and the run goes on.
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
class TrackedReporter:
    """A reporter that also logs losses and metrics to trackers.

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
        logged = {**values, "samples per second": rate}
        self.log({f"{self.title}/{name}": value for name, value in logged.items()}, step)

    def finish(self) -> None:
        self.steps, self.total = self.steps + self.total, 0
        self.reporter.finish()

    def log(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log finite values to every tracker, at a step of the running stage."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        for tracker in [*self.trackers]:
            try:
                tracker.log(names_for(tracker.name, finite), step=self.steps + step)
            except Exception as error:  # noqa: PERF203  # each library has classes of its own, and a network
                self.trackers.remove(tracker)
                self.info(f"{tracker.name} failed and is dropped, the run goes on: {first_line(error)}")


def check_installed(recipe: Recipe) -> None:
    """Raise SqatError if a tracker that the recipe names is not installed."""
    for name in recipe.trackers:
        if not is_installed(name):
            raise SqatError(
                f"the tracker {name} is not installed",
                f"pip install {name}, or leave it out",
                "trackers",
                code="missing-package",
            )


@contextmanager
def open_trackers(recipe: Recipe, directory: Path, reporter: Reporter) -> Iterator[TrackedReporter]:
    """Open the trackers that the recipe names, on rank 0, and yield a reporter that logs to them.

    Args:
        directory: of the run.

    Raises:
        SqatError: a tracker is not installed, or cannot begin.
    """
    check_installed(recipe)
    watched = TrackedReporter(reporter)
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
    """Say whether a package is installed; a folder of its name, as W&B leaves, does not count."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


def start_tracker(name: str, recipe: Recipe, directory: Path) -> list[Any]:
    """Start a tracker on rank 0 with the recipe as its config; returns none on other ranks.

    Raises:
        SqatError: it cannot begin.
    """
    process_state()  # before Accelerator, which would not find gloo by itself
    config = names_for(name, flatten(recipe.model_dump(mode="json", by_alias=True)))
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
    """Return the first sentence of a library's message."""
    return re.split(r"(?<=\w)[.;] ", first_line(error))[0]


def names_for(tracker: str, values: Mapping[str, Value]) -> dict[str, Value]:
    """Replace the characters in names that a tracker refuses."""
    return {REFUSED.sub("_", name) if tracker == "mlflow" else name: value for name, value in values.items()}


def flatten(values: Mapping[str, Any], before: str = "") -> dict[str, str | float | bool]:
    """Flatten nested values to dotted names."""
    flat: dict[str, str | float | bool] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{before}{name}.")
        elif value is not None:
            flat[f"{before}{name}"] = value if isinstance(value, (bool, int, float)) else str(value)[:LONGEST]
    return flat
