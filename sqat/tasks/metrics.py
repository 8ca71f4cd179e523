"""Metrics of classification, regression and ranking, of all rows or of a sample of them.

AUC and correlations are scikit-learn's and SciPy's. Ties never help the model: among passages of
equal score the less relevant one ranks first.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sqat.errors import SqatError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class UnitMetrics:
    """Metrics as a function of units, the queries or rows that a split is a sample of.

    Attributes:
        num_units: U, how many there are.
        measure: returns the metrics of some units; a unit that stands twice counts twice.
    """

    num_units: int
    measure: Callable[[Integers], dict[str, float]]

    def values(self) -> dict[str, float]:
        """Return the metrics of all units."""
        return self.measure(np.arange(self.num_units))

    def resample(self, draws: int, seed: int = 0) -> dict[str, Floats]:
        """Return each metric of ``draws`` bootstrap samples, [draws].

        The samples depend on the seed and the number of units alone: those of two models on one split are paired.
        Those of a single unit are NaN: they would all be alike, and say nothing about others.
        """
        if self.num_units < 2:
            return {name: np.full(draws, np.nan) for name in self.values()}
        random = np.random.default_rng(seed)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # a sample may hold one class, or no pair in the wrong order
            found = [self.measure(random.integers(self.num_units, size=self.num_units)) for _ in range(draws)]
        return {name: np.array([values[name] for values in found]) for name in found[0]}


def mean_metrics(columns: Mapping[str, Floats]) -> UnitMetrics:
    """Make metrics that are means over units [U]; a unit that is NaN does not count."""

    def measure(units: Integers) -> dict[str, float]:
        return {name: mean_of_finite(values[units]) for name, values in columns.items()}

    return UnitMetrics(len(next(iter(columns.values()))), measure)


def mean_of_finite(values: Floats) -> float:
    """Return the mean of what is not NaN; NaN where nothing is left."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else math.nan


def ranking(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, relevant_from: float) -> UnitMetrics:
    """Measure the ranking of each query's passages; the units are the queries, by rising number.

    - ``ndcg@10``: gain 2^grade - 1, mean over the queries whose passages differ in grade.
    - ``pnr``: pairs of passages of one query with different grades, rightly ordered / wrongly ordered, over
      all queries together; a tie in score counts for neither; inf where none is wrong, 0 where none is right.
    - ``mrr``: 1 / rank of the first relevant passage (grade >= ``relevant_from``), mean over the queries with
      both relevant and other passages.
    - ``accuracy``: share of the same queries whose top passage is relevant (precision@1). A threshold on the
      score would mean nothing after a pairwise loss, which fixes differences only.

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
    means = mean_metrics({
        "ndcg@10": np.where(mixed, _ndcg(grade, starts, sizes, k=10), np.nan),
        "mrr": np.where(mixed_relevance, 1.0 / (1 + first), np.nan),
        "accuracy": np.where(mixed_relevance, first == 0, np.nan),
    })  # fmt: skip
    right, wrong = _ordered_pairs(grade, score, np.repeat(np.arange(len(starts)), sizes), int(sizes.max()))

    def measure(units: Integers) -> dict[str, float]:
        found = means.measure(units)
        return {"ndcg@10": found.pop("ndcg@10"), "pnr": _ratio(right[units].sum(), wrong[units].sum()), **found}

    return UnitMetrics(len(starts), measure)


def _ndcg(grade: Floats, starts: Integers, sizes: Integers, k: int) -> Floats:
    """NDCG@k [Q] of rankings laid end to end; 0 where no grade is above 0."""
    values = np.zeros(len(sizes))
    for size in np.unique(sizes):
        chosen = sizes == size
        gain = 2.0 ** grade[starts[chosen, None] + np.arange(size)] - 1
        discount = np.where(np.arange(size) < k, 1 / np.log2(np.arange(size) + 2), 0.0)
        best = np.sort(gain)[:, ::-1] @ discount
        values[chosen] = np.divide(gain @ discount, best, out=np.zeros(len(gain)), where=best > 0)
    return values


def _ordered_pairs(grade: Floats, score: Floats, query: Integers, largest: int) -> tuple[Integers, Integers]:
    """Pairs in the right and the wrong order [Q] of passages sorted by (query, falling score)."""
    counts = np.zeros((2, int(query.max()) + 1), np.int64)
    for distance in range(1, largest):
        paired = (query[distance:] == query[:-distance]) & (score[distance:] < score[:-distance])
        gain = np.sign(grade[:-distance] - grade[distance:])
        for place, sign in enumerate((1, -1)):
            counts[place] += np.bincount(query[distance:][paired & (gain == sign)], minlength=counts.shape[1])
    return counts[0], counts[1]


def _ratio(right: int, wrong: int) -> float:
    """Positive-negative ratio; inf where none is wrong, 0 where none is right."""
    if wrong == 0:
        return math.inf if right else 0.0
    return float(right / wrong)


def classification(labels: ArrayLike, predictions: ArrayLike) -> UnitMetrics:
    """``accuracy``, and ``f1``: mean over the classes that occur in either of [N] (macro); the units are the rows."""
    names, numbers = np.unique(np.stack([np.asarray(labels), np.asarray(predictions)]), return_inverse=True)
    true, predicted = numbers.reshape(2, -1)

    def measure(rows: Integers) -> dict[str, float]:
        right = true[rows] == predicted[rows]
        hits, of_class, as_class = (np.bincount(classes, minlength=len(names))
                                    for classes in (true[rows][right], true[rows], predicted[rows]))  # fmt: skip
        occurs = of_class + as_class > 0
        return {
            "accuracy": float(right.mean()),
            "f1": float((2 * hits[occurs] / (of_class + as_class)[occurs]).mean()),
        }

    return UnitMetrics(len(true), measure)


def regression(labels: ArrayLike, predictions: ArrayLike) -> UnitMetrics:
    """``spearman`` and ``pearson`` correlation of [N]; 0 where either side is constant; the units are the rows.

    Raises:
        SqatError: a prediction is not finite.
    """
    from scipy.stats import pearsonr, spearmanr

    true, predicted = np.asarray(labels, np.float64), finite(predictions)

    def measure(rows: Integers) -> dict[str, float]:
        pair = true[rows], predicted[rows]
        if min(map(np.ptp, pair)) == 0:
            return {"spearman": 0.0, "pearson": 0.0}
        return {"spearman": float(spearmanr(*pair).statistic), "pearson": float(pearsonr(*pair).statistic)}

    return UnitMetrics(len(true), measure)


def performance(labels: ArrayLike, predictions: ArrayLike) -> UnitMetrics:
    """Measure how well predictions order queries by a ranker's quality on them; the units are the queries.

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

    def measure(queries: Integers) -> dict[str, float]:
        labels, scores = true[queries], predicted[queries]
        reached, best = labels[np.lexsort((labels, -scores))] @ discount, np.sort(labels)[::-1] @ discount
        constant = np.ptp(labels) == 0 or np.ptp(scores) == 0
        return {
            "ndcg": float(reached / best) if best else math.nan,
            "kendall": 0.0 if constant else float(kendalltau(labels, scores).statistic),
            "spearman": 0.0 if constant else float(spearmanr(labels, scores).statistic),
        }

    return UnitMetrics(len(true), measure)


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
