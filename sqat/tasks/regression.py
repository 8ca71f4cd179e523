"""Text regression, one or two texts: one logit, the score itself, mean squared error.

The scores are taken as they are, so that the exported model puts out the user's unit. Left out: scaling;
scores far outside -10 to 10 learn slowly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sqat.data.dataset import Batch, Rows, column
from sqat.distillation.outputs import logit_loss
from sqat.tasks import metrics
from sqat.tasks.slack import slack


@dataclass(frozen=True)
class Regression:
    """Predict a number."""

    metric: Literal["spearman", "pearson"] = "spearman"

    architecture: ClassVar[str] = "texts"

    @property
    def outputs(self) -> int:
        return 1

    @property
    def config_fields(self) -> dict[str, Any]:
        return {"id2label": {0: "score"}, "label2id": {"score": 0}, "problem_type": "regression"}

    def encode(self, rows: Rows) -> Rows:
        return rows

    def training_groups(self, rows: Rows, seed: int, epoch: int) -> list[list[int]]:
        return [[row] for row in range(len(rows))]

    def evaluation_rows(self, rows: Rows) -> Rows:
        return rows

    def data_warnings(self, rows: Rows) -> list[str]:
        return []

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return torch.nn.functional.mse_loss(logits.squeeze(1).float(), batch.labels)

    def output_loss(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return logit_loss(student, teacher, temperature)

    def metrics(self, logits: Tensor, rows: Rows) -> dict[str, float]:
        return metrics.regression(column(rows, "label"), logits.squeeze(1))

    def same_decision(self, wanted: Tensor, got: Tensor, rows: Rows) -> Tensor:
        """Bool [N]: scores that differ by the `slack` of the reference at most."""
        close: Tensor = (wanted - got).abs().squeeze(1) <= slack(wanted)
        return close
