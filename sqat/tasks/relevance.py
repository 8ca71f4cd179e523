"""Ranking passages for a query with a cross-encoder: one output, higher is more relevant.

Loss ``pairwise`` is RankNet over the passages of a query (Burges et al. 2005); ``pointwise`` is binary cross-entropy
against grade / highest grade.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from sqat.data.batch import Batch
from sqat.data.fields import check_repeated_passages, grade_of, grade_range, passages_of, query_of, text_of
from sqat.data.rows import Record, Rows, SplitName, column
from sqat.data.text_files import Placed
from sqat.errors import SqatError
from sqat.recipe.inputs import Columns
from sqat.recipe.tasks.relevance import RELEVANCE, RelevanceTask
from sqat.tasks import metrics
from sqat.tasks.task import Task, tie_margin


@dataclass(frozen=True)
class Relevance(Task):
    """Rank the passages of each query.

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
    architecture: ClassVar[str] = "texts"
    output_losses: ClassVar = RELEVANCE.output_losses

    @property
    def outputs(self) -> int:
        return 1

    @property
    def config_fields(self) -> dict[str, Any]:
        problem = "regression" if self.loss_name == "pairwise" else "multi_label_classification"
        return {"id2label": {0: "relevance"}, "label2id": {"relevance": 0}, "problem_type": problem}

    def training_groups(self, rows: Rows, seed: int, epoch: int) -> list[list[int]]:
        """Return the passages of one epoch: alone for pointwise, a query's together for pairwise.

        With ``candidates`` set, a query keeps at most that many: those above its lowest grade first (in all
        places but one), then a sample, new in every epoch, of the lowest. Pairwise leaves out queries of one
        grade.
        """
        queries = self.query_groups(rows, seed, epoch)
        kept = [*chain(*queries)]
        if self.loss_name == "pointwise":
            return [[row] for row in kept]
        lowest, highest = grade_range(column(rows, "label")[kept], column(rows, "group")[kept])
        return [query for query, mixed in zip(queries, lowest < highest, strict=True) if mixed]

    def query_groups(self, rows: Rows, seed: int, epoch: int) -> list[list[int]]:
        """Return the passages of one epoch, a query's together; ``candidates`` holds for them too."""
        labels, groups = column(rows, "label"), column(rows, "group")
        kept = (
            np.arange(len(rows))
            if self.candidates is None
            else sample_candidates(labels, groups, self.candidates, seed, epoch)
        )
        starts = np.flatnonzero(np.diff(groups[kept]))
        return [query.tolist() for query in np.split(kept, starts + 1)]

    def evaluation_rows(self, rows: Rows) -> Rows:
        """Return the rows of the queries whose passages differ in grade."""
        mixed = has_mixed_grades(column(rows, "label"), column(rows, "group"))
        return rows if mixed.all() else rows.select(np.flatnonzero(mixed))

    def data_warnings(self, rows: Rows) -> list[str]:
        if self.loss_name == "pointwise":
            return []
        lowest, highest = grade_range(column(rows, "label"), column(rows, "group"))
        same = int((lowest == highest).sum())
        return [f"{same} of {len(lowest)} queries have passages of one grade only: left out"] if same else []

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the pairwise or pointwise loss of outputs [B, 1]; pairwise is 0 in a batch without a pair."""
        scores = logits.squeeze(1).float()
        if self.loss_name == "pointwise":
            return binary_cross_entropy_with_logits(scores, (batch.labels / self.highest).clamp(max=1))
        pairs = (batch.groups[:, None] == batch.groups) & (batch.labels[:, None] > batch.labels)
        losses = softplus(scores[None, :] - scores[:, None])
        return (losses * pairs).sum() / pairs.sum().clamp(min=1)

    def unit_metrics(self, logits: Tensor, rows: Rows) -> metrics.UnitMetrics:
        grades, groups = column(rows, "label"), column(rows, "group")
        return metrics.ranking(grades, logits.squeeze(1), groups, self.relevant_from)

    def metrics(self, logits: Tensor, rows: Rows) -> dict[str, float]:
        values, grades, scores = super().metrics(logits, rows), column(rows, "label"), logits.squeeze(1)
        values["auc"] = metrics.pair_auc(grades >= self.relevant_from, scores)
        if self.loss_name == "pointwise":
            right = (grades >= self.highest / 2) == (scores.numpy() >= 0)
            values["pair-accuracy"] = float(right.mean())
        return values

    def decisions(self, logits: Tensor, rows: Rows) -> Tensor:
        """Return the row of each query's top passage (the first of equals), int64 [queries]."""
        groups = column(rows, "group")
        order = np.lexsort((-metrics.finite(logits.squeeze(1)), groups))
        return torch.from_numpy(order[np.flatnonzero(np.diff(groups, prepend=groups[:1] - 1))])

    def same_decision(self, reference: Tensor, other: Tensor, rows: Rows) -> Tensor:
        """Return bool [queries]: the same top passage, or one whose score in the reference is within the margin."""
        scores = reference.squeeze(1)
        return scores[self.decisions(reference, rows)] - scores[self.decisions(other, rows)] <= tie_margin(reference)


def read_records(
    source: Iterator[Placed], columns: Columns, settings: RelevanceTask, limit: int | None, folder: Path | None
) -> Iterator[Record]:
    """Yield a record for each passage of the first ``limit`` queries, which are numbered as they are first seen."""
    numbers: dict[str, int] = {}
    for place, row in source:  # to the end of the file: rows of a query may come back
        query, key = query_of(row, columns, place)
        if key not in numbers and len(numbers) == limit:
            continue
        group = numbers.setdefault(key, len(numbers))
        for passage, within in passages_of(row, columns, place):
            yield {
                "text": query,
                "text_pair": text_of(passage, columns.passage, "passage", place, within),
                "label": grade_of(passage, columns.label, "label", place, within, settings.highest),
                "group": group,
                "place": place,
            }


def check_rows(rows: Rows, split: SplitName, settings: RelevanceTask, place: str) -> None:
    """Refuse a split in which no query has passages that the loss (train) or the metrics can tell apart."""
    check_repeated_passages(rows, "text_pair")
    labels, groups = column(rows, "label"), column(rows, "group")
    lowest, highest = grade_range(labels, groups)
    queries, relevant_from = len(lowest), settings.relevant_from
    if len(labels) > 1 and labels.min() == labels.max():
        problem = f"all {len(labels)} passages of {queries} queries have the grade {labels[0]:g}"
        hint = "there must be two grades; is data.columns.label right, is limit too low?"
        raise SqatError(problem, hint, place, code="invalid-data")
    if split != "train" and highest.max() < relevant_from:
        problem = f"no passage of {queries} queries has a grade of at least {relevant_from:g}"
        hint = f"the highest is {highest.max():g}: lower task.relevant_from"
        raise SqatError(problem, hint, place, code="invalid-data")
    if split != "train":
        usable = bool(((lowest < relevant_from) & (highest >= relevant_from)).any())
        need = f"a grade of at least {relevant_from:g} (task.relevant_from) and one below it"
    elif settings.loss == "pairwise":
        usable, need = bool((lowest < highest).any()), "two different grades (task.loss pairwise)"
    else:
        usable, need = bool(labels.min() < labels.max()), "two different grades"
    if not usable:
        problem = f"none of the {queries} queries has passages of {need}"
        hint = "are data.columns.group and label right, is limit too low?"
        raise SqatError(problem, hint, place, code="invalid-data")


def build(settings: RelevanceTask, train_rows: Rows) -> Relevance:
    """Make the task; the highest grade is the recipe's, or that of the train rows."""
    highest = settings.highest or float(column(train_rows, "label").max())
    return Relevance(settings.loss, settings.relevant_from, settings.candidates, settings.metric, highest)


def has_mixed_grades(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return bool [N]: whether the passages of a row's query differ in grade."""
    lowest, highest = grade_range(labels, groups)
    _, query = np.unique(groups, return_inverse=True)
    mixed: np.ndarray = (lowest < highest)[query]
    return mixed


def sample_candidates(labels: np.ndarray, groups: np.ndarray, candidates: int, seed: int, epoch: int) -> np.ndarray:
    """Return the rows, in order, of at most ``candidates`` passages a query, as `Relevance.training_groups` says."""
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
