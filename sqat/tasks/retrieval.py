"""Search with a bi-encoder: queries and passages become vectors of one space, near where a passage answers.

A row is one text. Its ``label`` is the grade of a passage for the query of its group, `QUERY` for the query itself
(which stands first in its group), or `LOOSE` for a text without a query: more to distil from in train, more to find
in dev and test. The loss is InfoNCE (multiple-negatives ranking, arXiv:1705.00652): a query must pick its positive
among all passages of the batch at a temperature; other positives of the query, and texts that the model reads as one
of them, are no negatives. Distillation is 1 - cosine between the embeddings, which needs no labels.

The metrics search all passages of the split (`sqat.tasks.retrieval_metrics`); ``rerank-ndcg@10`` and ``pnr`` put only
a query's own candidates in order, as a cross-encoder would (`sqat.tasks.metrics.ranking`), where some query has good
and bad ones. Left out: negatives of other processes, prompts before a text (write them into the data).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize, softplus

from sqat.data.dataset import Batch, Rows, column
from sqat.data.records import LOOSE as LOOSE
from sqat.data.records import QUERY as QUERY
from sqat.distillation.outputs import embedding_loss
from sqat.recipe.tasks import RetrievalTask
from sqat.tasks import metrics
from sqat.tasks.retrieval_metrics import Floats, retrieval, similarities
from sqat.tasks.slack import slack

Integers = NDArray[np.int64]
Metric = Literal["ndcg@10", "recall@1", "recall@10", "mrr@10", "rerank-ndcg@10", "pnr"]


@dataclass(frozen=True)
class Retrieval:
    """Bring queries and their passages together.

    Attributes:
        relevant_from: lowest grade that makes a passage a positive.
        negatives: passages below it that a query brings into its batch, drawn anew in every epoch.
        temperature: what cosines are divided by in the loss.
        pooling: how tokens become one vector; None is the model's own way, or mean.
    """

    relevant_from: float = 1.0
    negatives: int = 1
    temperature: float = 0.05
    pooling: Literal["mean", "cls", "max"] | None = None
    metric: Metric = "ndcg@10"

    architecture: ClassVar[str] = "sentences"

    @classmethod
    def of(cls, config: RetrievalTask) -> Retrieval:
        """Take the recipe's knobs."""
        return cls(config.relevant_from, config.negatives, config.temperature, config.pooling, config.metric)

    @property
    def outputs(self) -> int:
        return 0

    @property
    def config_fields(self) -> dict[str, Any]:
        return {} if self.pooling is None else {"pooling": self.pooling}

    def encode(self, rows: Rows) -> Rows:
        return rows

    def training_groups(self, rows: Rows, seed: int, epoch: int) -> list[list[int]]:
        """A query, one of its positives and some of its negatives, drawn by (seed, epoch); others stay out."""
        random = np.random.default_rng((seed, epoch, 1))  # 1: other numbers than plan_batches draws
        units = []
        for query, passages, grades in self.queries(rows):
            positives = passages[grades >= self.relevant_from]
            if len(positives):
                negatives = passages[grades < self.relevant_from]
                count = min(self.negatives, len(negatives))
                chosen = random.choice(negatives, count, replace=False).tolist()
                units.append([query, int(random.choice(positives)), *chosen])
        return units

    def queries(self, rows: Rows) -> Iterator[tuple[int, Integers, np.ndarray]]:
        """Row of each query, rows of its passages and their grades."""
        labels, groups = column(rows, "label"), column(rows, "group")
        starts = np.flatnonzero(labels == QUERY)
        ends = np.searchsorted(groups, groups[starts], side="right")
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            yield start, np.arange(start + 1, end), labels[start + 1 : end]

    def evaluation_rows(self, rows: Rows) -> Rows:
        """All passages, and the queries that have a positive: the others say nothing of a search."""
        unanswered = [query for query, _, grades in self.queries(rows) if not (grades >= self.relevant_from).any()]
        return rows.select(np.setdiff1d(np.arange(len(rows)), unanswered)) if unanswered else rows

    def data_warnings(self, rows: Rows) -> list[str]:
        """Queries without a positive, passages that stand twice under one query, texts without a query."""
        labels, groups, texts = column(rows, "label"), column(rows, "group"), rows["text"][:]
        queries = int((labels == QUERY).sum())
        unanswered = sum(not (grades >= self.relevant_from).any() for _, _, grades in self.queries(rows))
        rows_of_queries = np.flatnonzero(labels >= 0).tolist()
        twice = len(rows_of_queries) - len({(groups[row], texts[row]) for row in rows_of_queries})
        loose = int((labels == LOOSE).sum())
        found = {
            f"{unanswered} of {queries} queries have no positive: they train nothing and are not judged": unanswered,
            f"{twice} passages stand more than once under one query: they count once": twice,
            f"{loose} texts have no query: they serve distillation, and as passages to search": loose,
        }
        return [remark for remark, count in found.items() if count]

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """InfoNCE of embeddings [B, H], mean over (query, positive); 0, with a gradient, where a batch has none."""
        embeddings = normalize(logits.float(), dim=-1)
        is_query, is_passage = batch.labels == QUERY, batch.labels >= 0
        scores = embeddings[is_query] @ embeddings[is_passage].T / self.temperature
        own = batch.groups[is_query][:, None] == batch.groups[is_passage]
        positive = own & (batch.labels[is_passage] >= self.relevant_from)
        alike = same_texts(batch.inputs["input_ids"][is_passage])
        spared = (positive.float() @ alike.float()) > 0  # positives and whatever reads like one
        lowest = torch.finfo(scores.dtype).min
        others = scores.masked_fill(spared, lowest).logsumexp(dim=1, keepdim=True)
        losses = softplus(others - scores).masked_fill(~positive, 0.0)
        return losses.sum() / positive.sum().clamp(min=1)

    def output_loss(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """1 - cosine of embeddings [B, H], mean; the temperature has nothing to soften."""
        return embedding_loss(student, teacher)

    def metrics(self, logits: Tensor, rows: Rows) -> dict[str, float]:
        vectors = metrics.finite(logits)
        corpus, numbers = corpus_of(rows)
        queries, grades = [], []
        for query, passages, labels in self.queries(rows):
            queries.append(query)
            grades.append(dict(zip(numbers[passages].tolist(), labels.tolist(), strict=True)))
        found = retrieval(vectors[queries], vectors[corpus], grades, self.relevant_from)
        return found | self.reranked(vectors, rows)

    def reranked(self, vectors: Floats, rows: Rows) -> dict[str, float]:
        """Order of each query's own candidates; empty where no query has both good and bad ones."""
        numbers = corpus_of(rows)[1]
        scores, labels, groups = [], [], []
        for group, (query, passages, grades) in enumerate(self.queries(rows)):
            own = np.unique(numbers[passages], return_index=True)[1]
            if len(own) and grades.min() < self.relevant_from <= grades.max():
                scores += next(similarities(vectors[[query]], vectors[passages[own]])).tolist()
                labels += grades[own].tolist()
                groups += [group] * len(own)
        if not groups:
            return {}
        figures = metrics.ranking(labels, scores, groups, self.relevant_from)
        return {"rerank-ndcg@10": figures["ndcg@10"], "pnr": figures["pnr"]}

    def same_decision(self, wanted: Tensor, got: Tensor, rows: Rows) -> Tensor:
        """Bool [Q]: the same passage comes first, or one that the reference scores as high but for its `slack`."""
        labels = torch.from_numpy(column(rows, "label"))
        reference, scores = (cosines(logits, labels) for logits in (wanted, got))
        chosen = reference.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)
        return reference.amax(dim=1) - chosen <= slack(reference)


def cosines(logits: Tensor, labels: Tensor) -> Tensor:
    """Cosines [Q, P] of the queries among embeddings [N, H] with all other texts."""
    embeddings = normalize(logits.double(), dim=-1)
    return embeddings[labels == QUERY] @ embeddings[labels != QUERY].T


def corpus_of(rows: Rows) -> tuple[Integers, Integers]:
    """Row of each different passage [C], and for every row [N] the number of its passage in it; -1 for queries."""
    known: dict[str, int] = {}
    first: list[int] = []
    labels = column(rows, "label")
    numbers = np.full(len(rows), -1, np.int64)
    for row, text in enumerate(rows["text"][:]):
        if labels[row] == QUERY:
            continue
        numbers[row] = known.setdefault(text, len(known))
        if len(known) > len(first):
            first.append(row)
    return np.array(first), numbers


def same_texts(token_ids: Tensor) -> Tensor:
    """Bool [P, P]: which of the padded texts [P, T] the model reads as one."""
    alike: Tensor = (token_ids[:, None] == token_ids[None]).all(dim=-1)
    return alike
