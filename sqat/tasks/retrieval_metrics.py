"""Search over a corpus of embeddings: what is found among the first, and what that is worth.

Every query is compared with every passage by one exact product, no index that guesses. Embeddings come in float32,
and the same text in another batch differs in the last bits; so scores are rounded to six decimals before they are
ranked, and ties never help the model: among passages of equal score the less relevant one comes first. Passages that
nobody judged for a query count as grade 0. Left out: an approximate index, cut-offs other than 1 and 10.

Shapes: Q queries, C passages, H width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sqat.tasks.metrics import finite

Floats = NDArray[np.float64]
DEPTH = 10
DECIMALS = 6
AT_ONCE = 256  # queries scored together: a block of 256 x 100,000 scores is 200 MB


def retrieval(
    queries: ArrayLike, corpus: ArrayLike, grades: Sequence[Mapping[int, float]], relevant_from: float
) -> dict[str, float]:
    """Quality of exact search by cosine, mean over the queries that have a relevant passage.

    - ``recall@1``, ``recall@10``: share of a query's relevant passages (grade >= ``relevant_from``) among the first.
    - ``mrr@10``: 1 / rank of the first relevant passage, 0 where it is not among the first ten.
    - ``ndcg@10``: gain 2^grade - 1, the ideal taken over all that was judged for the query.

    Args:
        queries: embeddings [Q, H].
        corpus: embeddings [C, H].
        grades: for each query the grade of the passages judged for it, by their number in the corpus.

    Raises:
        SqatError: an embedding is not finite.
        ValueError: no query has a relevant passage.
    """
    judged = [number for number, row in enumerate(grades) if max(row.values(), default=-1.0) >= relevant_from]
    if not judged:
        raise ValueError(f"none of {len(grades)} queries has a passage of grade {relevant_from:g} or more")
    figures = np.zeros((len(judged), len(NAMES)))
    scores = similarities(finite(queries)[judged], finite(corpus))
    for place, (number, row) in enumerate(zip(judged, scores, strict=True)):
        known = grades[number]
        all_grades = np.zeros(len(row))
        all_grades[list(known)] = list(known.values())
        found = all_grades[first(row, all_grades)]
        relevant = found >= relevant_from
        total = sum(grade >= relevant_from for grade in known.values())
        top = np.flatnonzero(relevant)
        ideal = np.sort(list(known.values()))[::-1][:DEPTH]
        figures[place] = (
            relevant[:1].sum() / total,
            relevant.sum() / total,
            1 / (1 + top[0]) if len(top) else 0.0,
            gain(found) / gain(ideal),
        )
    return dict(zip(NAMES, figures.mean(axis=0).tolist(), strict=True))


def similarities(queries: Floats, corpus: Floats) -> Iterator[Floats]:
    """Rounded cosines [C] of each query with every passage."""
    left, right = unit(queries), unit(corpus).T
    for start in range(0, len(left), AT_ONCE):
        yield from np.round(left[start : start + AT_ONCE] @ right, DECIMALS)


def unit(vectors: Floats) -> Floats:
    """Rows of length 1; a row of zeros stays one."""
    scaled: Floats = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return scaled


def first(scores: Floats, grades: Floats) -> NDArray[np.int64]:
    """Numbers of the ten best passages, best first; of equal scores the lower grade is taken."""
    depth = min(DEPTH, len(scores))
    lowest = np.partition(scores, -depth)[-depth]
    kept = np.flatnonzero(scores >= lowest)
    order = np.lexsort((grades[kept], -scores[kept]))
    return kept[order[:depth]]


def gain(grades: Floats) -> float:
    """Discounted cumulative gain of passages in this order."""
    return float(((2.0**grades - 1) / np.log2(2 + np.arange(len(grades)))).sum())


NAMES = ("recall@1", "recall@10", "mrr@10", "ndcg@10")
