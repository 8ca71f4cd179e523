"""Ranking, classification and regression metrics against loops and other libraries."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score
from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.retrieval import retrieval_normalized_dcg, retrieval_reciprocal_rank

from sqat.errors import SqatError
from sqat.tasks import metrics

Ranked = tuple[list[float], list[float], list[int]]


@st.composite
def rankings(draw: st.DrawFn) -> Ranked:
    """Grades, scores (few values, so many ties) and groups (apart, of any size) of up to 40 passages."""
    size = draw(st.integers(2, 40))
    grades = draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=size, max_size=size))
    scores = draw(st.lists(st.integers(-4, 4).map(float), min_size=size, max_size=size))
    groups = draw(st.lists(st.integers(0, 5), min_size=size, max_size=size))
    return grades, scores, groups


def by_query(ranked: Ranked) -> list[list[tuple[float, float]]]:
    """(score, grade) of each query, best first; among equal scores the lowest grade first."""
    grades, scores, groups = ranked
    return [
        sorted(
            ((scores[i], grades[i]) for i in range(len(groups)) if groups[i] == group),
            key=lambda pair: (-pair[0], pair[1]),
        )
        for group in sorted(set(groups))
    ]


def looped(ranked: Ranked, relevant_from: float) -> dict[str, float]:
    """Every ranking metric, written from its definition with loops over queries and pairs."""
    ndcg: list[float] = []
    reciprocal: list[float] = []
    top: list[float] = []
    right = wrong = 0
    for query in by_query(ranked):
        grades = [grade for _, grade in query]
        for i, (score, grade) in enumerate(query):
            for other_score, other_grade in query[:i]:
                right += (score - other_score) * (grade - other_grade) > 0
                wrong += (score - other_score) * (grade - other_grade) < 0
        if len(set(grades)) > 1:
            gains = [(2**grade - 1) / math.log2(place + 2) for place, grade in enumerate(grades[:10])]
            best = sorted(grades, reverse=True)[:10]
            ndcg.append(sum(gains) / sum((2**grade - 1) / math.log2(place + 2) for place, grade in enumerate(best)))
        relevant = [grade >= relevant_from for grade in grades]
        if any(relevant) and not all(relevant):
            reciprocal.append(1 / (1 + relevant.index(True)))
            top.append(float(relevant[0]))
    return {
        "ndcg@10": sum(ndcg) / len(ndcg),
        "pnr": right / wrong if wrong else (math.inf if right else 0.0),
        "mrr": sum(reciprocal) / len(reciprocal),
        "accuracy": sum(top) / len(top),
    }


@settings(max_examples=150, deadline=None)
@given(rankings(), st.sampled_from([1.0, 2.0]))
def test_ranking_is_the_loop_over_queries_and_pairs(ranked: Ranked, relevant_from: float) -> None:
    sides = [{grade >= relevant_from for _, grade in query} for query in by_query(ranked)]
    assume(any(len(side) == 2 for side in sides))
    assert metrics.ranking(*ranked, relevant_from).values() == pytest.approx(looped(ranked, relevant_from))


def test_ndcg_and_mrr_agree_with_torchmetrics_where_no_score_is_tied() -> None:
    random = np.random.default_rng(0)
    grades, scores = random.integers(0, 4, (50, 12)), random.permuted(np.arange(600.0)).reshape(50, 12)
    found = metrics.ranking(grades.ravel(), scores.ravel(), np.repeat(np.arange(50), 12), 2.0).values()
    ndcg, mrr = [], []
    for grade, score in zip(torch.from_numpy(grades), torch.from_numpy(scores), strict=True):
        if grade.min() < grade.max():
            ndcg.append(retrieval_normalized_dcg(score, 2**grade - 1, top_k=10).item())
        if (grade >= 2).any() and (grade < 2).any():
            mrr.append(retrieval_reciprocal_rank(score, grade >= 2).item())
    assert found["ndcg@10"] == pytest.approx(np.mean(ndcg), abs=1e-6)
    assert found["mrr"] == pytest.approx(np.mean(mrr), abs=1e-6)


def test_the_gain_is_exponential() -> None:
    """Grades 3 and 1 swapped: (1 + 7/log2 3) / (7 + 1/log2 3), not the linear (1 + 3/log2 3) / (3 + 1/log2 3)."""
    found = metrics.ranking([3, 1, 0], [1, 2, 0], [0, 0, 0], 1.0).values()
    assert found["ndcg@10"] == pytest.approx((1 + 7 / math.log2(3)) / (7 + 1 / math.log2(3)))


def test_equal_scores_give_the_worst_ranking_and_no_pnr() -> None:
    found = metrics.ranking([1, 0, 0, 0], [0.5] * 4, [7] * 4, 1.0).values()
    assert found["pnr"] == 0.0
    assert found["accuracy"] == 0.0
    assert found["mrr"] == 0.25
    assert found["ndcg@10"] == pytest.approx(1 / math.log2(5))


def test_a_perfect_ranking_and_its_reverse() -> None:
    labels, groups = [2, 1, 0, 1, 0], [0, 0, 0, 1, 1]
    best = metrics.ranking(labels, [3, 2, 1, 9, 8], groups, 1.0).values()
    assert (best["ndcg@10"], best["mrr"], best["accuracy"], best["pnr"]) == (1.0, 1.0, 1.0, math.inf)
    worst = metrics.ranking(labels, [1, 2, 3, 8, 9], groups, 1.0).values()
    assert worst["pnr"] == 0.0
    assert worst["accuracy"] == 0.0


def test_queries_of_one_grade_do_not_count() -> None:
    found = metrics.ranking([1, 0, 1, 1, 0], [1, 2, 5, 4, 3], [0, 0, 1, 1, 2], 1.0).values()
    assert (found["mrr"], found["ndcg@10"]) == (0.5, pytest.approx(1 / math.log2(3)))


def test_no_query_to_judge_is_a_broken_contract() -> None:
    with pytest.raises(ValueError, match=r"none of 2 queries has grades on both sides of 2\.0"):
        metrics.ranking([1, 0, 1], [1, 2, 3], [0, 0, 1], 2.0).values()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_say_that_training_diverged(bad: float) -> None:
    with pytest.raises(SqatError, match="1 of 2 outputs of the model are not finite"):
        metrics.ranking([1, 0], [bad, 0.0], [0, 0], 1.0).values()
    with pytest.raises(SqatError, match="1 of 2 outputs"):
        metrics.regression([1, 0], [bad, 0.0]).values()


def test_ten_thousand_pairs_take_well_under_a_second() -> None:
    random = np.random.default_rng(0)
    groups = np.sort(random.integers(0, 1000, 10_000))
    labels, scores = random.integers(0, 3, 10_000), random.normal(size=10_000)
    metrics.ranking(labels[:100], scores[:100], groups[:100], 1.0).values()  # imports
    start = time.process_time()
    metrics.ranking(labels, scores, groups, 1.0).values()
    assert time.process_time() - start < 0.8


def test_classification_agrees_with_torchmetrics() -> None:
    random = np.random.default_rng(1)
    true, predicted = torch.from_numpy(random.integers(0, 5, (2, 300)))
    found = metrics.classification(true, predicted).values()
    assert found["accuracy"] == pytest.approx(
        multiclass_accuracy(predicted, true, num_classes=5, average="micro").item()
    )
    assert found["f1"] == pytest.approx(multiclass_f1_score(predicted, true, num_classes=5, average="macro").item())


def test_macro_f1_by_hand() -> None:
    """Class 0: precision 1, recall 1/2; class 1: precision 1/2, recall 1."""
    assert metrics.classification([0, 0, 1], [0, 1, 1]).values()["f1"] == pytest.approx(2 / 3)
    assert metrics.classification([0, 0, 1], [0, 0, 0]).values()["f1"] == pytest.approx(0.4)


def test_regression_agrees_with_torchmetrics() -> None:
    random = np.random.default_rng(2)
    true = random.integers(0, 20, 200) / 4
    predicted = true + random.normal(size=200)
    found = metrics.regression(true, predicted).values()
    pair = torch.from_numpy(predicted), torch.from_numpy(true)
    assert found["spearman"] == pytest.approx(spearman_corrcoef(*pair).item(), abs=1e-6)
    assert found["pearson"] == pytest.approx(pearson_corrcoef(*pair).item(), abs=1e-6)


def test_a_constant_prediction_has_no_correlation() -> None:
    assert metrics.regression([1, 2, 3], [2, 2, 2]).values() == {"spearman": 0.0, "pearson": 0.0}


SAMPLED = {
    "ranking": lambda rows: metrics.ranking(rows % 3, rows * 7919 % 101, rows // 5, 1.0),
    "classification": lambda rows: metrics.classification(rows % 4, (rows * 7919 % 101) % 4),
    "regression": lambda rows: metrics.regression(rows % 11, rows * 7919 % 101),
    "performance": lambda rows: metrics.performance((rows % 11) / 10, rows * 7919 % 101),
}


@pytest.mark.parametrize("kind", SAMPLED)
def test_a_sample_has_the_metrics_of_its_rows(kind: str) -> None:
    """The oracle measures the drawn units as data of their own; a query that is drawn twice is two queries."""
    whole = SAMPLED[kind](np.arange(60))
    for draw in np.random.default_rng(0).integers(0, whole.num_units, (5, whole.num_units)):
        if kind == "ranking":
            rows = np.concatenate([np.arange(5 * query, 5 * query + 5) for query in draw])
            groups = np.repeat(np.arange(len(draw)), 5)
            alone = metrics.ranking(rows % 3, rows * 7919 % 101, groups, 1.0)
        else:
            alone = SAMPLED[kind](draw)
        assert whole.measure(draw) == pytest.approx(alone.values())


def test_samples_of_two_models_are_paired_and_cover_the_true_difference() -> None:
    random = np.random.default_rng(3)
    true = random.integers(0, 2, 4000)
    worse, better = (np.where(random.random(4000) < share, true, 1 - true) for share in (0.7, 0.75))
    found = [metrics.classification(true, predicted).resample(400)["accuracy"] for predicted in (better, worse, better)]
    assert (found[0] == found[2]).all()
    difference = found[0] - found[1]
    expected = math.sqrt(np.var((better == true).astype(float) - (worse == true)) / 4000)
    assert difference.std() == pytest.approx(expected, rel=0.15)
    assert abs(difference.mean() - ((better == true).mean() - (worse == true).mean())) < expected / 5


def test_samples_of_one_query_say_nothing() -> None:
    found = metrics.ranking([1, 0], [0.2, 0.1], [7, 7], 1.0).resample(5)
    assert found.keys() == {"ndcg@10", "pnr", "mrr", "accuracy"}
    assert all(len(values) == 5 and np.isnan(values).all() for values in found.values())
