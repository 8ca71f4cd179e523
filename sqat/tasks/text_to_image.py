"""Pictures from captions by rectified flow (`sqat.models.rectified_flow`): squared error of the picture, weighted by
1 / (1 - t)^2, which makes it that of the velocity.

Measured on fixed noise and times, a function of each row's number, so that two models, and two runs, see the same:
``velocity-mse`` is the loss there (lower is better), ``explained`` is 1 - velocity-mse / variance of the velocity,
which picks the best step: 0 for a model that knows the mean only, 1 for one that foresees the picture in the noise,
which none can. Neither says how good drawn pictures are: scripts/results/pictures.py draws them and measures that.
Distillation is the plain squared error between the pictures of student and teacher. Left out: weights learned by time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn.functional import mse_loss

from sqat.data.dataset import Batch, Rows
from sqat.models.rectified_flow import CUT, NUMBER, along, fixed_draws, remaining, signals
from sqat.tasks import metrics
from sqat.tasks.slack import slack


@dataclass(frozen=True)
class TextToImage:
    """Say, from noise and a caption, what the picture will be."""

    metric: Literal["explained"] = "explained"

    architecture: ClassVar[str] = "diffusion"

    @property
    def outputs(self) -> int:
        return 0

    @property
    def config_fields(self) -> dict[str, Any]:
        return {}

    def encode(self, rows: Rows) -> Rows:
        return rows

    def training_groups(self, rows: Rows, seed: int, epoch: int) -> list[list[int]]:
        return [[row] for row in range(len(rows))]

    def evaluation_rows(self, rows: Rows) -> Rows:
        """All rows, numbered: their noise and time are drawn from it, and no caption is dropped."""
        return rows.add_column(NUMBER, list(range(len(rows))))

    def data_warnings(self, rows: Rows) -> list[str]:
        cut = sum(rows[CUT])
        return [f"{cut} of {len(rows)} captions are longer than model.max_length: cut"] if cut else []

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return velocity_error(logits.float(), batch.labels, batch.inputs["timestep"].flatten())

    def output_loss(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Mean squared error; a picture has no temperature."""
        return mse_loss(student.float(), teacher.float())

    def metrics(self, logits: Tensor, rows: Rows) -> dict[str, float]:
        metrics.finite(logits)
        known = rows.select_columns(["pixels", "height", "width", "channels", NUMBER])[:]
        picture = signals(known).double()
        noise, time = fixed_draws(known[NUMBER], picture.shape[1:])
        error = float(velocity_error(logits.double(), picture, time.double()))
        variance = float((picture - noise).var(unbiased=False))
        return {"explained": 1 - error / variance, "velocity-mse": error}

    def same_decision(self, wanted: Tensor, got: Tensor, rows: Rows) -> Tensor:
        """Bool [N]: pictures whose root mean square difference is at most the reference's `slack`."""
        difference: Tensor = (wanted - got).double().square().flatten(1).mean(dim=1).sqrt()
        return difference <= slack(wanted)


def velocity_error(drawn: Tensor, picture: Tensor, time: Tensor) -> Tensor:
    """Mean squared error [] of the velocities that pictures [B, ...] stand for at times [B]."""
    return ((drawn - picture) / along(remaining(time), picture)).square().mean()
