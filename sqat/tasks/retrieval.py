"""Search with a bi-encoder: queries and passages become vectors, near where a passage answers.

A row is one text. Its label is the grade of a passage for the query of its group, `QUERY` for the query, or `LOOSE`
for a text without a query. The loss is InfoNCE (arXiv:1705.00652).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize, softplus

from sqat.data.batch import Batch
from sqat.data.fields import check_repeated_passages, grade_of, passages_of, query_of, text_of
from sqat.data.rows import Record, Rows, SplitName, column
from sqat.data.text_files import Placed
from sqat.errors import SqatError
from sqat.recipe.inputs import Columns
from sqat.recipe.tasks.retrieval import RETRIEVAL, RetrievalTask
from sqat.tasks import metrics
from sqat.tasks.retrieval_metrics import Floats, retrieval, similarities
from sqat.tasks.task import Task, tie_margin

Integers = NDArray[np.int64]
Metric = Literal["ndcg@10", "recall@1", "recall@10", "mrr@10", "rerank-ndcg@10", "pnr"]
QUERY, LOOSE = -1.0, -2.0  # labels of rows that are no passage of a query


@dataclass(frozen=True)
class Retrieval(Task):
    """Bring queries and their passages together.

    Attributes:
        relevant_from: lowest grade that makes a passage a positive.
        negatives: passages below it that a query brings into its batch, drawn anew in every epoch.
        temperature: divisor of the cosines in the loss.
        pooling: how tokens become one vector; None is the model's own way, or mean.
    """

    relevant_from: float = 1.0
    negatives: int = 1
    temperature: float = 0.05
    pooling: Literal["mean", "cls", "max"] | None = None
    metric: Metric = "ndcg@10"
    architecture: ClassVar[str] = "sentences"
    output_losses: ClassVar = RETRIEVAL.output_losses

    @property
    def config_fields(self) -> dict[str, Any]:
        return {} if self.pooling is None else {"pooling": self.pooling}

    def training_groups(self, rows: Rows, seed: int, epoch: int) -> list[list[int]]:
        """Return groups of a query, one positive and some negatives, drawn by (seed, epoch)."""
        random = np.random.default_rng((seed, epoch, 1))  # 1: other numbers than plan_batches draws
        groups = []
        for query, passages, grades in self.queries(rows):
            positives = passages[grades >= self.relevant_from]
            if len(positives):
                negatives = passages[grades < self.relevant_from]
                count = min(self.negatives, len(negatives))
                chosen = random.choice(negatives, count, replace=False).tolist()
                groups.append([query, int(random.choice(positives)), *chosen])
        return groups

    def queries(self, rows: Rows) -> Iterator[tuple[int, Integers, np.ndarray]]:
        """Yield the row of each query, the rows of its passages and their grades."""
        labels, groups = column(rows, "label"), column(rows, "group")
        starts = np.flatnonzero(labels == QUERY)
        ends = np.searchsorted(groups, groups[starts], side="right")
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            yield start, np.arange(start + 1, end), labels[start + 1 : end]

    def evaluation_rows(self, rows: Rows) -> Rows:
        """Return all passages, and the queries that have a positive."""
        unanswered = [query for query, _, grades in self.queries(rows) if not (grades >= self.relevant_from).any()]
        return rows.select(np.setdiff1d(np.arange(len(rows)), unanswered)) if unanswered else rows

    def data_warnings(self, rows: Rows) -> list[str]:
        """Report queries without a positive, passages twice under one query, texts without a query."""
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
        return [line for line, count in found.items() if count]

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return InfoNCE of embeddings [B, H], mean over (query, positive); 0 with a gradient where there is none."""
        embeddings = normalize(logits.float(), dim=-1)
        is_query, is_passage = batch.labels == QUERY, batch.labels >= 0
        scores = embeddings[is_query] @ embeddings[is_passage].T / self.temperature
        own = batch.groups[is_query][:, None] == batch.groups[is_passage]
        positive = own & (batch.labels[is_passage] >= self.relevant_from)
        same = same_texts(batch.inputs["input_ids"][is_passage])
        excluded = (positive.float() @ same.float()) > 0  # positives, and texts that the model reads as one
        lowest = torch.finfo(scores.dtype).min
        others = scores.masked_fill(excluded, lowest).logsumexp(dim=1, keepdim=True)
        losses = softplus(others - scores).masked_fill(~positive, 0.0)
        return losses.sum() / positive.sum().clamp(min=1)

    def unit_metrics(self, logits: Tensor, rows: Rows) -> metrics.UnitMetrics:
        vectors = metrics.finite(logits)
        corpus, numbers = corpus_of(rows)
        queries, grades = [], []
        for query, passages, labels in self.queries(rows):
            queries.append(query)
            grades.append(dict(zip(numbers[passages].tolist(), labels.tolist(), strict=True)))
        found = retrieval(vectors[queries], vectors[corpus], grades, self.relevant_from)
        judged, reranking = self.rerank(vectors, rows)
        if reranking is None:
            return found
        place = np.full(found.num_units, -1)
        place[judged] = np.arange(len(judged))

        def measure(units: Integers) -> dict[str, float]:
            own = place[units]
            values = reranking.measure(own[own >= 0])
            return {**found.measure(units), "rerank-ndcg@10": values["ndcg@10"], "pnr": values["pnr"]}

        return metrics.UnitMetrics(found.num_units, measure)

    def rerank(self, vectors: Floats, rows: Rows) -> tuple[list[int], metrics.UnitMetrics | None]:
        """Measure the order of each query's own candidates.

        Returns:
            the queries with both good and bad candidates, and the metrics over them; None where there is no query.
        """
        numbers = corpus_of(rows)[1]
        scores, labels, groups = [], [], []
        for group, (query, passages, grades) in enumerate(self.queries(rows)):
            own = np.unique(numbers[passages], return_index=True)[1]
            if len(own) and grades.min() < self.relevant_from <= grades.max():
                scores += next(similarities(vectors[[query]], vectors[passages[own]])).tolist()
                labels += grades[own].tolist()
                groups += [group] * len(own)
        judged = sorted(set(groups))
        return judged, metrics.ranking(labels, scores, groups, self.relevant_from) if judged else None

    def same_decision(self, reference: Tensor, other: Tensor, rows: Rows) -> Tensor:
        """Bool [Q]: the same passage comes first, or one that the reference scores as high but for its `tie_margin`."""
        labels = torch.from_numpy(column(rows, "label"))
        expected, scores = (cosines(logits, labels) for logits in (reference, other))
        chosen = expected.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)
        return expected.amax(dim=1) - chosen <= tie_margin(expected)


def read_records(
    source: Iterator[Placed], columns: Columns, settings: RetrievalTask, limit: int | None, folder: Path | None
) -> Iterator[Record]:
    """Yield a record for each text: a query before its passages, and at the end the texts without a query.

    A row with neither a query nor a label is a text without a query. Queries are numbered as they are first seen,
    and the first ``limit`` are kept.
    """
    seen: dict[str, tuple[int, str, str]] = {}
    loose: list[Record] = []
    for place, row in source:
        if columns.query not in row and columns.label not in row and columns.passage in row:
            loose.append({"text": text_of(row, columns.passage, "passage", place), "label": LOOSE, "place": place})
            continue
        query, key = query_of(row, columns, place)
        if key not in seen:
            if len(seen) == limit:
                continue
            seen[key] = (len(seen), query, place)
            yield {"text": query, "label": QUERY, "group": seen[key][0], "place": place}
        group, first_query, first_place = seen[key]
        if query != first_query:
            problem = f'"{columns.group}" is "{key}", which is another query at {first_place}'
            raise SqatError(problem, "give each query its own", place, code="invalid-data")
        for passage, within in passages_of(row, columns, place):
            text = text_of(passage, columns.passage, "passage", place, within)
            grade = grade_of(passage, columns.label, "label", place, within)
            yield {"text": text, "label": grade, "group": group, "place": place}
    for group, record in enumerate(loose, len(seen)):
        yield record | {"group": group}


def check_rows(rows: Rows, split: SplitName, settings: RetrievalTask, place: str) -> None:
    """Refuse a split without a query that has a positive; train may hold only texts, for distillation."""
    check_repeated_passages(rows, "text")
    labels, relevant_from = column(rows, "label"), settings.relevant_from
    queries, highest = int((labels == QUERY).sum()), float(labels.max())
    problem = ""
    if queries == 0 and split != "train":
        problem, hint = "no row has a query", "is data.columns.query right?"
    elif split != "train" and settings.metric in RERANKING and not (labels[labels >= 0] < relevant_from).any():
        problem = f"task.metric {settings.metric} compares a query's own passages, and all of them are relevant"
        hint = "add passages of grade 0, or take another metric"
    elif queries and highest < relevant_from:
        problem = f"none of {queries} queries has a passage of grade {relevant_from:g} or more"
        hint = (f"the highest grade is {highest:g}: " if highest >= 0 else "") + "is task.relevant_from or limit right?"
    if problem:
        raise SqatError(problem, hint, place, code="invalid-data")


def build(settings: RetrievalTask, train_rows: Rows) -> Retrieval:
    """Make the task."""
    return Retrieval(
        settings.relevant_from, settings.negatives, settings.temperature, settings.pooling, settings.metric
    )


def cosines(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cosines [Q, P] of the queries among embeddings [N, H] with all other texts."""
    embeddings = normalize(logits.double(), dim=-1)
    return embeddings[labels == QUERY] @ embeddings[labels != QUERY].T


def corpus_of(rows: Rows) -> tuple[Integers, Integers]:
    """Return the row of each different passage [C], and for every row [N] its number in that; -1 for queries."""
    number_of: dict[str, int] = {}
    first: list[int] = []
    labels = column(rows, "label")
    numbers = np.full(len(rows), -1, np.int64)
    for row, text in enumerate(rows["text"][:]):
        if labels[row] == QUERY:
            continue
        numbers[row] = number_of.setdefault(text, len(number_of))
        if len(number_of) > len(first):
            first.append(row)
    return np.array(first), numbers


def same_texts(token_ids: Tensor) -> Tensor:
    """Return bool [P, P]: which padded texts [P, T] have the same tokens."""
    same: Tensor = (token_ids[:, None] == token_ids[None]).all(dim=-1)
    return same


RERANKING = ("rerank-ndcg@10", "pnr")
