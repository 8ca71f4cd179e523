"""Metrics of exact search over a corpus of embeddings.

Every query is compared with every passage. Scores are rounded to six decimals, since float32 embeddings differ in
their last bits from batch to batch. Of equal scores the less relevant passage ranks first. Passages without a label
count as grade 0. Shapes: Q queries, C passages, H width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sqat.tasks.metrics import UnitMetrics, finite, mean_metrics

Floats = NDArray[np.float64]
DEPTH = 10
DECIMALS = 6
QUERIES_AT_ONCE = 256  # queries scored together: a block of 256 x 100,000 scores is 200 MB


def retrieval(
    queries: ArrayLike, corpus: ArrayLike, grades: Sequence[Mapping[int, float]], relevant_from: float
) -> UnitMetrics:
    """Quality of exact search by cosine, mean over the queries that have a relevant passage; the units are the queries.

    - ``recall@1``, ``recall@10``: share of a query's relevant passages (grade >= ``relevant_from``) among the first.
    - ``mrr@10``: 1 / rank of the first relevant passage, 0 where it is not among the first ten.
    - ``ndcg@10``: gain 2^grade - 1, the ideal taken over all labelled passages of the query.

    Args:
        queries: embeddings [Q, H].
        corpus: embeddings [C, H].
        grades: for each query the grade of the passages labelled for it, by their number in the corpus.

    Raises:
        SqatError: an embedding is not finite.
        ValueError: no query has a relevant passage.
    """
    answered = [number for number, row in enumerate(grades) if max(row.values(), default=-1.0) >= relevant_from]
    if not answered:
        raise ValueError(f"none of {len(grades)} queries has a passage of grade {relevant_from:g} or more")
    values = np.full((len(NAMES), len(grades)), np.nan)
    scores = similarities(finite(queries)[answered], finite(corpus))
    for number, row in zip(answered, scores, strict=True):
        labels = grades[number]
        all_grades = np.zeros(len(row))
        all_grades[list(labels)] = list(labels.values())
        ranked = all_grades[best_passages(row, all_grades)]
        relevant = ranked >= relevant_from
        total = sum(grade >= relevant_from for grade in labels.values())
        top = np.flatnonzero(relevant)
        ideal = np.sort(list(labels.values()))[::-1][:DEPTH]
        values[:, number] = (
            relevant[:1].sum() / total,
            relevant.sum() / total,
            1 / (1 + top[0]) if len(top) else 0.0,
            discounted_gain(ranked) / discounted_gain(ideal),
        )
    return mean_metrics(dict(zip(NAMES, values, strict=True)))


def similarities(queries: Floats, corpus: Floats) -> Iterator[Floats]:
    """Yield the rounded cosines [C] of each query with every passage."""
    rows, columns = normalize_rows(queries), normalize_rows(corpus).T
    for start in range(0, len(rows), QUERIES_AT_ONCE):
        yield from np.round(rows[start : start + QUERIES_AT_ONCE] @ columns, DECIMALS)


def normalize_rows(vectors: Floats) -> Floats:
    """Scale rows to length 1; a row of zeros stays zero."""
    scaled: Floats = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return scaled


def best_passages(scores: Floats, grades: Floats) -> NDArray[np.int64]:
    """Return the numbers of the ten best passages, best first; of equal scores the lower grade is first."""
    depth = min(DEPTH, len(scores))
    lowest = np.partition(scores, -depth)[-depth]
    kept = np.flatnonzero(scores >= lowest)
    order = np.lexsort((grades[kept], -scores[kept]))
    return kept[order[:depth]]


def discounted_gain(grades: Floats) -> float:
    """Return the discounted cumulative gain of passages in this order."""
    return float(((2.0**grades - 1) / np.log2(2 + np.arange(len(grades)))).sum())


NAMES = ("recall@1", "recall@10", "mrr@10", "ndcg@10")
