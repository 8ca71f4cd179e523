"""Metrics of classification, regression and ranking.

Accuracy, F1, NDCG, AUC and correlations are scikit-learn's and SciPy's. Ties never help the model: among passages of
equal score the less relevant one ranks first.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sqat.errors import SqatError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def ranking(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, relevant_from: float) -> dict[str, float]:
    """Measure the ranking of each query's passages.

    - ``ndcg@10``: gain 2^grade - 1, mean over the queries whose passages differ in grade.
    - ``pnr``: pairs of passages of one query with different grades, rightly ordered / wrongly ordered, over
      all queries together; a tie in score counts for neither; inf where none is wrong, 0 where none is right.
    - ``mrr``: 1 / rank of the first relevant passage (grade >= ``relevant_from``), mean over the queries with
      both relevant and other passages.
    - ``accuracy``: share of the same queries whose top passage is relevant (precision@1). A threshold on the
      score would mean nothing after a pairwise loss, which fixes differences only.
    - ``queries``: how many ndcg@10 is a mean of; ``queries_skipped``: those of one grade only.

    Args:
        labels: grades [N], 0 or more.
        scores: [N], higher is more relevant.
        groups: number of the query [N], in any order.

    Raises:
        SqatError: a score is not finite.
        ValueError: no query has both relevant and other passages.
    """
    grade, score, query = np.asarray(labels, np.float64), finite(scores), np.asarray(groups, np.int64)
    order = np.lexsort((grade, -score, query))  # ties in score: the lower grade first
    grade, score, query = grade[order], score[order], query[order]
    starts = np.flatnonzero(np.diff(query, prepend=query[:1] - 1))
    sizes = np.diff(starts, append=len(query))
    position = np.arange(len(query)) - np.repeat(starts, sizes)
    mixed = np.minimum.reduceat(grade, starts) < np.maximum.reduceat(grade, starts)
    relevant = grade >= relevant_from
    first = np.minimum.reduceat(np.where(relevant, position, len(query)), starts)
    mixed_relevance = np.logical_or.reduceat(relevant, starts) & ~np.logical_and.reduceat(relevant, starts)
    if not mixed_relevance.any():
        raise ValueError(f"none of {len(starts)} queries has grades on both sides of {relevant_from}")
    return {
        "ndcg@10": _ndcg(grade, starts[mixed], sizes[mixed], k=10),
        "pnr": _positive_negative_ratio(grade, score, query, int(sizes.max())),
        "mrr": float((1.0 / (1 + first[mixed_relevance])).mean()),
        "accuracy": float((first[mixed_relevance] == 0).mean()),
        "queries": float(mixed.sum()),
        "queries_skipped": float((~mixed).sum()),
    }


def _ndcg(grade: Floats, starts: Integers, sizes: Integers, k: int) -> float:
    """Mean NDCG@k of rankings laid end to end; scikit-learn's, called once for every number of passages."""
    from sklearn.metrics import ndcg_score

    total = 0.0
    for size in np.unique(sizes):
        ranked = grade[starts[sizes == size, None] + np.arange(size)]
        gain = 2.0**ranked - 1  # ndcg_score takes its input as the gain
        best_first = np.broadcast_to(-np.arange(size, dtype=np.float64), ranked.shape)
        total += len(ranked) * float(ndcg_score(gain, best_first, k=k, ignore_ties=True))
    return total / len(sizes)


def _positive_negative_ratio(grade: Floats, score: Floats, query: Integers, largest: int) -> float:
    """PNR of passages sorted by (query, falling score), every distance between two passages in one step."""
    right = wrong = 0
    for distance in range(1, largest):
        counts = (query[distance:] == query[:-distance]) & (score[distance:] < score[:-distance])
        gain = np.sign(grade[:-distance] - grade[distance:])[counts]
        right += int((gain > 0).sum())
        wrong += int((gain < 0).sum())
    if wrong == 0:
        return math.inf if right else 0.0
    return right / wrong


def classification(labels: ArrayLike, predictions: ArrayLike) -> dict[str, float]:
    """``accuracy``, and ``f1``: mean over the classes that occur in either of [N] (macro)."""
    from sklearn.metrics import accuracy_score, f1_score

    true, predicted = np.asarray(labels), np.asarray(predictions)
    return {
        "accuracy": float(accuracy_score(true, predicted)),
        "f1": float(f1_score(true, predicted, average="macro", zero_division=0.0)),
    }


def regression(labels: ArrayLike, predictions: ArrayLike) -> dict[str, float]:
    """``spearman`` and ``pearson`` correlation of [N]; 0 where either side is constant.

    Raises:
        SqatError: a prediction is not finite.
    """
    from scipy.stats import pearsonr, spearmanr

    true, predicted = np.asarray(labels, np.float64), finite(predictions)
    if np.ptp(true) == 0 or np.ptp(predicted) == 0:
        return {"spearman": 0.0, "pearson": 0.0}
    return {
        "spearman": float(spearmanr(true, predicted).statistic),
        "pearson": float(pearsonr(true, predicted).statistic),
    }


def performance(labels: ArrayLike, predictions: ArrayLike) -> dict[str, float]:
    """Measure how well predictions order queries by a ranker's quality on them.

    - ``ndcg``: all N queries as one ranking by prediction, no cut-off; a query's gain is its label itself, its discount
      log2(rank + 1), and 1 is the order of the labels. Among equal predictions the lower label comes first.
    - ``kendall`` (tau-b) and ``spearman``: rank correlation; 0 where the predictions are constant.

    Args:
        labels: [N], 0 or more, not all of them equal.
        predictions: [N], higher is a query on which the ranker does better.

    Raises:
        SqatError: a prediction is not finite.
        ValueError: the labels are constant.
    """
    from scipy.stats import kendalltau, spearmanr

    true, predicted = np.asarray(labels, np.float64), finite(predictions)
    if np.ptp(true) == 0:
        raise ValueError(f"all {len(true)} labels are {true[0]:g}: there is no order to predict")
    discount = 1 / np.log2(np.arange(len(true)) + 2)
    reached = true[np.lexsort((true, -predicted))] @ discount
    constant = np.ptp(predicted) == 0
    return {
        "ndcg": float(reached / (np.sort(true)[::-1] @ discount)),
        "kendall": 0.0 if constant else float(kendalltau(true, predicted).statistic),
        "spearman": 0.0 if constant else float(spearmanr(true, predicted).statistic),
    }


def pair_auc(relevant: ArrayLike, scores: ArrayLike) -> float:
    """Return the area under the ROC curve over the passages of all queries: bool [N] against scores [N].

    The chance that a relevant passage of any query scores above an irrelevant one of any query, a tie counting half:
    unlike PNR it asks whether scores mean the same from query to query.

    Raises:
        SqatError: a score is not finite.
        ValueError: all passages are relevant, or none.
    """
    from sklearn.metrics import roc_auc_score

    truth = np.asarray(relevant, bool)
    if truth.all() or not truth.any():
        raise ValueError(f"{int(truth.sum())} of {len(truth)} passages are relevant: there is nothing to tell apart")
    return float(roc_auc_score(truth, finite(scores)))


def finite(scores: ArrayLike) -> Floats:
    """Return scores as float64.

    Raises:
        SqatError: a score is NaN or Inf, since training has diverged.
    """
    values = np.asarray(scores, np.float64)
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise SqatError(
            f"{bad} of {values.size} outputs of the model are not finite",
            "training diverged; lower learning_rate",
            code="non-finite",
        )
    return values
