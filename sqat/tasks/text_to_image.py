"""Images from captions by rectified flow (`sqat.models.rectified_flow`): squared error of the velocity.

Metrics are measured on fixed noise and times, a function of each row's number. ``explained`` is 1 - velocity-mse /
variance of the velocity: 0 for a model that knows only the mean. Distillation is the squared error between images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor

from sqat.data.batch import Batch
from sqat.data.fields import read_pixels, text_of
from sqat.data.rows import Record, Rows, SplitName
from sqat.data.text_files import Placed
from sqat.models.rectified_flow import CUT, NUMBER, expand_times, fixed_draws, remaining, signals
from sqat.recipe.inputs import Columns
from sqat.recipe.tasks.text_to_image import TEXT_TO_IMAGE, TextToImageTask
from sqat.tasks import metrics
from sqat.tasks.task import Task, tie_margin


@dataclass(frozen=True)
class TextToImage(Task):
    """Predict the image from noise and a caption."""

    metric: Literal["explained"] = "explained"
    architecture: ClassVar[str] = "diffusion"
    output_losses: ClassVar = TEXT_TO_IMAGE.output_losses

    def evaluation_rows(self, rows: Rows) -> Rows:
        """Return all rows with their numbers, from which noise and time are drawn."""
        return rows.add_column(NUMBER, list(range(len(rows))))

    def data_warnings(self, rows: Rows) -> list[str]:
        cut = sum(rows[CUT])
        return [f"{cut} of {len(rows)} captions are longer than model.max_length: cut"] if cut else []

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return velocity_error(logits.float(), batch.labels, batch.inputs["timestep"].flatten())

    def unit_metrics(self, logits: Tensor, rows: Rows) -> metrics.UnitMetrics:
        metrics.finite(logits)
        columns = rows.select_columns(["pixels", "height", "width", "channels", NUMBER])[:]
        picture = signals(columns).double()
        noise, time = fixed_draws(columns[NUMBER], picture.shape[1:])
        velocity = (picture - noise).flatten(1)
        errors = squared_errors(logits.double(), picture, time.double()).flatten(1).mean(1).numpy()
        means, squares = velocity.mean(1).numpy(), velocity.square().mean(1).numpy()

        def measure(images: metrics.Integers) -> dict[str, float]:
            error, variance = errors[images].mean(), squares[images].mean() - means[images].mean() ** 2
            return {"explained": float(1 - error / variance), "velocity-mse": float(error)}

        return metrics.UnitMetrics(len(errors), measure)

    def same_decision(self, reference: Tensor, other: Tensor, rows: Rows) -> Tensor:
        """Return bool [N]: the root mean square difference is at most the `tie_margin`."""
        difference: Tensor = (reference - other).double().square().flatten(1).mean(dim=1).sqrt()
        return difference <= tie_margin(reference)


def read_records(
    source: Iterator[Placed], columns: Columns, settings: TextToImageTask, limit: int | None, folder: Path | None
) -> Iterator[Record]:
    """Yield images with a caption."""
    pixels = read_pixels(source, columns, folder)
    return islice(({**record, "text": text_of(row, columns.text, "text", place), "place": place}
                   for place, row, record in pixels), limit)  # fmt: skip


def check_rows(rows: Rows, split: SplitName, settings: TextToImageTask, place: str) -> None:
    """Take every split: there are no labels."""


def build(settings: TextToImageTask, train_rows: Rows) -> TextToImage:
    """Make the task."""
    return TextToImage(settings.metric)


def velocity_error(predicted: Tensor, picture: Tensor, time: Tensor) -> Tensor:
    """Return the mean squared error [] of the velocities to images [B, ...] at times [B]."""
    return squared_errors(predicted, picture, time).mean()


def squared_errors(predicted: Tensor, picture: Tensor, time: Tensor) -> Tensor:
    """Return the squared errors [B, ...] of the velocities to images at times [B]."""
    return ((predicted - picture) / expand_times(remaining(time), picture)).square()
