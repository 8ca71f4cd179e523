"""Query performance prediction: from a query and its top passages, how well a ranker does on it. One logit.

The label is the ranker's own figure for the query, NDCG@k or any other from 0 to 1, so it costs no judgements beyond
those that measured the ranker. Two losses. ``mse``: the logit is the figure. ``pairwise``: softplus(-(s_i - s_j)) for
every two queries of a batch of which i has the higher label, weighted by the difference of the labels; it learns the
order only, so the logit has no unit, and the metric ``mse`` is not given. Left out: the features of classic predictors
(score distributions, query clarity), and the ranker itself: scripts/data/query_performance.py runs one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss, softplus

from sqat.data.dataset import Batch, Rows, column
from sqat.distillation.outputs import logit_loss
from sqat.tasks import metrics
from sqat.tasks.slack import slack


@dataclass(frozen=True)
class QueryPerformance:
    """Predict a ranker's quality on a query."""

    loss_name: Literal["mse", "pairwise"] = "mse"
    metric: Literal["ndcg", "kendall", "spearman"] = "ndcg"

    architecture: ClassVar[str] = "texts"

    @property
    def outputs(self) -> int:
        return 1

    @property
    def config_fields(self) -> dict[str, Any]:
        return {"id2label": {0: "performance"}, "label2id": {"performance": 0}, "problem_type": "regression"}

    def encode(self, rows: Rows) -> Rows:
        return rows

    def evaluation_rows(self, rows: Rows) -> Rows:
        return rows

    def training_groups(self, rows: Rows, seed: int, epoch: int) -> list[list[int]]:
        return [[row] for row in range(len(rows))]

    def data_warnings(self, rows: Rows) -> list[str]:
        return []

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Loss of logits [B, 1]; pairwise: 0, with a gradient of 0, where all labels of a batch are equal."""
        scores = logits.squeeze(1).float()
        if self.loss_name == "mse":
            return mse_loss(scores, batch.labels)
        weights = (batch.labels[:, None] - batch.labels).clamp(min=0)
        losses = softplus(scores[None, :] - scores[:, None])
        return (losses * weights).sum() / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)

    def output_loss(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return logit_loss(student, teacher, temperature)

    def metrics(self, logits: Tensor, rows: Rows) -> dict[str, float]:
        labels, predicted = column(rows, "label"), logits.squeeze(1).double().numpy()
        figures = metrics.performance(labels, predicted)
        if self.loss_name == "mse":
            figures["mse"] = float(np.square(predicted - labels).mean())
        return figures

    def same_decision(self, wanted: Tensor, got: Tensor, rows: Rows) -> Tensor:
        """Bool [N]: predictions that differ by the `slack` of the reference at most."""
        close: Tensor = (wanted - got).abs().squeeze(1) <= slack(wanted)
        return close
