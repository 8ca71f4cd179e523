"""Regression from one or two texts: one output, the score in the data's own unit; mean squared error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sqat.data.batch import Batch
from sqat.data.fields import check_two_labels, number_of, read_texts
from sqat.data.rows import Record, Rows, SplitName, column
from sqat.data.text_files import Placed
from sqat.recipe.inputs import Columns
from sqat.recipe.tasks.regression import REGRESSION, RegressionTask
from sqat.tasks import metrics
from sqat.tasks.task import Task, tie_margin


@dataclass(frozen=True)
class Regression(Task):
    """Predict a number."""

    metric: Literal["spearman", "pearson"] = "spearman"
    architecture: ClassVar[str] = "texts"
    output_losses: ClassVar = REGRESSION.output_losses

    @property
    def outputs(self) -> int:
        return 1

    @property
    def config_fields(self) -> dict[str, Any]:
        return {"id2label": {0: "score"}, "label2id": {"score": 0}, "problem_type": "regression"}

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return torch.nn.functional.mse_loss(logits.squeeze(1).float(), batch.labels)

    def unit_metrics(self, logits: Tensor, rows: Rows) -> metrics.UnitMetrics:
        return metrics.regression(column(rows, "label"), logits.squeeze(1))

    def same_decision(self, reference: Tensor, other: Tensor, rows: Rows) -> Tensor:
        """Return bool [N]: the scores differ by at most the `tie_margin`."""
        close: Tensor = (reference - other).abs().squeeze(1) <= tie_margin(reference)
        return close


def read_records(
    source: Iterator[Placed], columns: Columns, settings: RegressionTask, limit: int | None, folder: Path | None
) -> Iterator[Record]:
    """Yield texts with a number."""
    return islice(read_texts(source, columns, number_of), limit)


def check_rows(rows: Rows, split: SplitName, settings: RegressionTask, place: str) -> None:
    """Refuse a train split of one score."""
    if split == "train":
        check_two_labels(rows, split, place, "score")


def build(settings: RegressionTask, train_rows: Rows) -> Regression:
    """Make the task."""
    return Regression(settings.metric)
