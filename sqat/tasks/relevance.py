"""Ranking passages for a query with a cross-encoder: one logit, higher is more relevant.

Two losses. ``pairwise``: RankNet (Burges et al. 2005), softplus(-(s_i - s_j)) for every two passages of a
query of which i has the higher grade, mean over the pairs of a batch; only differences within a query count,
so the logit has no natural zero. ``pointwise``: binary cross-entropy of each passage against grade / highest
grade: the usual one for grades 0 and 1, and sigmoid(logit) is a share of the highest grade for more.

Four metrics look at the order within a query only and mean the same for both losses: ndcg@10, pnr, mrr and accuracy
(share of queries whose top passage is relevant). ``auc`` compares passages of all queries. ``pair-accuracy`` is the
accuracy of a classifier of (query, passage) pairs, right where grade and sigmoid(logit) are on the same side of half
the highest grade; it is given for pointwise alone, and the share of the commoner side is reached without a model. All
are over queries whose passages differ in grade: the others of dev and test are not computed.
Left out: LambdaRank weights, in-batch negatives (a passage may suit two queries).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from sqat.data.dataset import Batch, Rows, column, grade_range
from sqat.distillation.outputs import logit_loss
from sqat.recipe.tasks import RelevanceTask
from sqat.tasks import metrics
from sqat.tasks.slack import slack


@dataclass(frozen=True)
class Relevance:
    """Put the passages of each query in order.

    Attributes:
        relevant_from: lowest grade that counts as relevant, in mrr, accuracy and auc.
        candidates: most passages of a query in one epoch; None takes all.
        highest: highest grade there can be, by the recipe or the train rows.
    """

    loss_name: Literal["pointwise", "pairwise"] = "pairwise"
    relevant_from: float = 1.0
    candidates: int | None = None
    metric: Literal["ndcg@10", "pnr", "mrr", "accuracy", "auc", "pair-accuracy"] = "ndcg@10"
    highest: float = 1.0

    @classmethod
    def of(cls, config: RelevanceTask, train_rows: Rows) -> Relevance:
        """Take the recipe's knobs, and where it does not say the highest grade that of the train rows."""
        highest = config.highest or float(column(train_rows, "label").max())
        return cls(config.loss, config.relevant_from, config.candidates, config.metric, highest)

    architecture: ClassVar[str] = "texts"

    @property
    def outputs(self) -> int:
        return 1

    @property
    def config_fields(self) -> dict[str, Any]:
        problem = "regression" if self.loss_name == "pairwise" else "multi_label_classification"
        return {"id2label": {0: "relevance"}, "label2id": {"relevance": 0}, "problem_type": problem}

    def encode(self, rows: Rows) -> Rows:
        return rows

    def training_groups(self, rows: Rows, seed: int, epoch: int) -> list[list[int]]:
        """Passages of one epoch: alone for pointwise, a query's together for pairwise.

        With ``candidates`` set, a query keeps at most that many: those above its lowest grade first (in all
        places but one), then a sample, new in every epoch, of the lowest. Pairwise leaves out queries of one
        grade.
        """
        labels, groups = column(rows, "label"), column(rows, "group")
        kept = (
            np.arange(len(rows)) if self.candidates is None else _sample(labels, groups, self.candidates, seed, epoch)
        )
        if self.loss_name == "pointwise":
            return [[int(row)] for row in kept]
        lowest, highest = grade_range(labels[kept], groups[kept])
        starts = np.flatnonzero(np.diff(groups[kept]))
        queries = np.split(kept, starts + 1)
        return [query.tolist() for query, mixed in zip(queries, lowest < highest, strict=True) if mixed]

    def evaluation_rows(self, rows: Rows) -> Rows:
        """Rows of the queries whose passages differ in grade; in a ranking of the others nothing can be wrong."""
        mixed = _mixed(column(rows, "label"), column(rows, "group"))
        return rows if mixed.all() else rows.select(np.flatnonzero(mixed))

    def data_warnings(self, rows: Rows) -> list[str]:
        if self.loss_name == "pointwise":
            return []
        lowest, highest = grade_range(column(rows, "label"), column(rows, "group"))
        same = int((lowest == highest).sum())
        return [f"{same} of {len(lowest)} queries have passages of one grade only: left out"] if same else []

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Loss of logits [B, 1]; 0, with a gradient of 0, where a batch has no pair to compare."""
        scores = logits.squeeze(1).float()
        if self.loss_name == "pointwise":
            return binary_cross_entropy_with_logits(scores, (batch.labels / self.highest).clamp(max=1))
        pairs = (batch.groups[:, None] == batch.groups) & (batch.labels[:, None] > batch.labels)
        losses = softplus(scores[None, :] - scores[:, None])
        return (losses * pairs).sum() / pairs.sum().clamp(min=1)

    def output_loss(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return logit_loss(student, teacher, temperature)

    def metrics(self, logits: Tensor, rows: Rows) -> dict[str, float]:
        grades, groups, scores = column(rows, "label"), column(rows, "group"), logits.squeeze(1)
        ranked = metrics.ranking(grades, scores, groups, self.relevant_from)
        figures = {name: ranked[name] for name in ("ndcg@10", "pnr", "mrr", "accuracy")}  # without the query counts
        figures["auc"] = metrics.pair_auc(grades >= self.relevant_from, scores)
        if self.loss_name == "pointwise":
            right = (grades >= self.highest / 2) == (scores.numpy() >= 0)
            figures["pair-accuracy"] = float(right.mean())
        return figures

    def decisions(self, logits: Tensor, rows: Rows) -> Tensor:
        """Row of each query's top passage (the first of equals), int64 [queries]."""
        groups = column(rows, "group")
        order = np.lexsort((-metrics.finite(logits.squeeze(1)), groups))
        return torch.from_numpy(order[np.flatnonzero(np.diff(groups, prepend=groups[:1] - 1))])

    def same_decision(self, wanted: Tensor, got: Tensor, rows: Rows) -> Tensor:
        """Bool [queries]: the same top passage, or one that the reference scores as high but for its `slack`."""
        scores = wanted.squeeze(1)
        return scores[self.decisions(wanted, rows)] - scores[self.decisions(got, rows)] <= slack(wanted)


def _mixed(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Bool [N]: whether the passages of a row's query differ in grade."""
    lowest, highest = grade_range(labels, groups)
    _, query = np.unique(groups, return_inverse=True)
    mixed: np.ndarray = (lowest < highest)[query]
    return mixed


def _sample(labels: np.ndarray, groups: np.ndarray, candidates: int, seed: int, epoch: int) -> np.ndarray:
    """Rows, in order, of at most ``candidates`` passages a query, as `Relevance.training_groups` says."""
    _, query = np.unique(groups, return_inverse=True)
    lowest, _ = grade_range(labels, groups)
    better = labels > lowest[query]
    draw = np.random.default_rng((seed, epoch, 1)).random(len(labels))  # 1: other numbers than plan_batches draws
    order = np.lexsort((draw, ~better, query))
    kind = 2 * query[order] + ~better[order]
    starts = np.flatnonzero(np.diff(kind, prepend=-1))
    rank = np.arange(len(labels)) - np.repeat(starts, np.diff(starts, append=len(labels)))
    chosen = np.minimum(np.bincount(query, better), candidates - 1)  # better ones kept, by query
    room = np.where(better[order], candidates - 1, candidates - chosen[query[order]])
    return np.sort(order[rank < room])
