"""Query performance prediction: from a query and its top passages, how well a ranker does on it. One output.

The label is the ranker's figure for the query, e.g. NDCG@k, from 0 to 1. Loss ``mse`` predicts the figure itself;
``pairwise`` learns only the order of a batch's queries, RankNet weighted by the difference of the labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss, softplus

from sqat.data.batch import Batch
from sqat.data.fields import check_two_labels, read_texts, share_of
from sqat.data.rows import Record, Rows, SplitName, column
from sqat.data.text_files import Placed
from sqat.recipe.inputs import Columns
from sqat.recipe.tasks.query_performance import QUERY_PERFORMANCE, QueryPerformanceTask
from sqat.tasks import metrics
from sqat.tasks.task import Task, tie_margin


@dataclass(frozen=True)
class QueryPerformance(Task):
    """Predict a ranker's quality on a query."""

    loss_name: Literal["mse", "pairwise"] = "mse"
    metric: Literal["ndcg", "kendall", "spearman"] = "ndcg"
    architecture: ClassVar[str] = "texts"
    output_losses: ClassVar = QUERY_PERFORMANCE.output_losses

    @property
    def outputs(self) -> int:
        return 1

    @property
    def config_fields(self) -> dict[str, Any]:
        return {"id2label": {0: "performance"}, "label2id": {"performance": 0}, "problem_type": "regression"}

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the loss of outputs [B, 1]; pairwise: 0 with a gradient of 0 where all labels are equal."""
        scores = logits.squeeze(1).float()
        if self.loss_name == "mse":
            return mse_loss(scores, batch.labels)
        weights = (batch.labels[:, None] - batch.labels).clamp(min=0)
        losses = softplus(scores[None, :] - scores[:, None])
        return (losses * weights).sum() / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)

    def unit_metrics(self, logits: Tensor, rows: Rows) -> metrics.UnitMetrics:
        return metrics.performance(column(rows, "label"), logits.squeeze(1))

    def metrics(self, logits: Tensor, rows: Rows) -> dict[str, float]:
        values = super().metrics(logits, rows)
        if self.loss_name == "mse":  # a pairwise loss fixes no unit
            values["mse"] = float(np.square(logits.squeeze(1).double().numpy() - column(rows, "label")).mean())
        return values

    def same_decision(self, reference: Tensor, other: Tensor, rows: Rows) -> Tensor:
        """Return bool [N]: the predictions differ by at most the `tie_margin`."""
        close: Tensor = (reference - other).abs().squeeze(1) <= tie_margin(reference)
        return close


def read_records(
    source: Iterator[Placed], columns: Columns, settings: QueryPerformanceTask, limit: int | None, folder: Path | None
) -> Iterator[Record]:
    """Yield texts with a number from 0 to 1."""
    return islice(read_texts(source, columns, share_of), limit)


def check_rows(rows: Rows, split: SplitName, settings: QueryPerformanceTask, place: str) -> None:
    """Refuse a split of one score, which has no order to learn or to measure."""
    check_two_labels(rows, split, place, "score")


def build(settings: QueryPerformanceTask, train_rows: Rows) -> QueryPerformance:
    """Make the task."""
    return QueryPerformance(settings.loss, settings.metric)
