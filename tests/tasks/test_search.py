"""Search over a corpus: figures against loops and scikit-learn, and ties that never help."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from sqat.errors import SqatError
from sqat.tasks.retrieval_metrics import QUERIES_AT_ONCE, retrieval

SEEDS = st.integers(0, 2**32 - 1)


def drawn(seed: int, queries: int, passages: int) -> tuple[np.ndarray, np.ndarray, list[dict[int, float]]]:
    random = np.random.default_rng(seed)
    grades = [
        {int(p): float(random.integers(0, 3)) for p in random.choice(passages, min(4, passages), replace=False)}
        for _ in range(queries)
    ]
    grades[0][0] = 2.0
    return random.normal(size=(queries, 5)), random.normal(size=(passages, 5)), grades


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 6), st.integers(2, 30))
def test_the_figures_are_those_of_a_loop(seed: int, queries: int, passages: int) -> None:
    left, right, grades = drawn(seed, queries, passages)
    wanted: dict[str, list[float]] = {"recall@1": [], "recall@10": [], "mrr@10": [], "ndcg@10": []}
    for query, known in zip(left, grades, strict=True):
        relevant = {number for number, grade in known.items() if grade >= 1}
        if not relevant:
            continue
        score = [float(query @ p / np.linalg.norm(query) / np.linalg.norm(p)) for p in right]
        order = sorted(range(passages), key=lambda i, score=score: -score[i])[:10]
        gains = np.array([[2.0 ** known.get(number, 0.0) - 1 for number in range(passages)]])
        wanted["recall@1"].append(len(relevant & {order[0]}) / len(relevant))
        wanted["recall@10"].append(len(relevant & set(order)) / len(relevant))
        wanted["mrr@10"].append(next((1 / (1 + i) for i, number in enumerate(order) if number in relevant), 0.0))
        wanted["ndcg@10"].append(float(ndcg_score(gains, [score], k=10)))
    found = retrieval(left, right, grades, 1.0).values()
    assert found == {name: pytest.approx(np.mean(values)) for name, values in wanted.items()}


def test_a_tie_goes_to_the_passage_of_the_lower_grade() -> None:
    corpus = np.array([[1.0, 0], [1 + 1e-9, 0], [0, 1]])  # the last bits of a float are no difference
    for good in (0, 1):
        found = retrieval([[1.0, 0]], corpus, [{good: 1.0}], 1.0).values()
        assert (found["recall@1"], found["mrr@10"]) == (0.0, 0.5)
        assert found["ndcg@10"] == pytest.approx(1 / math.log2(3))


def test_a_model_that_gives_one_vector_for_all_finds_nothing() -> None:
    found = retrieval(np.ones((3, 4)), np.ones((50, 4)), [{7: 1.0}, {8: 1.0}, {9: 1.0}], 1.0).values()
    assert set(found.values()) == {0.0}


def test_queries_without_a_relevant_passage_stay_out_of_the_mean() -> None:
    queries, corpus = [[1.0, 0], [0, 1.0], [1.0, 1]], [[1.0, 0], [0, 1.0]]
    assert retrieval(queries, corpus, [{0: 1.0}, {1: 0.0}, {}], 1.0).values()["recall@1"] == 1
    with pytest.raises(ValueError, match="none of 1 queries"):
        retrieval(queries[:1], corpus, [{0: 0.5}], 1.0).values()


def test_the_length_of_a_vector_means_nothing() -> None:
    left, right, grades = drawn(3, 4, 20)
    stretched = right * np.random.default_rng(0).uniform(0.1, 9, size=(20, 1))
    assert retrieval(left * 7, stretched, grades, 1.0).values() == retrieval(left, right, grades, 1.0).values()


def test_more_queries_than_are_scored_at_once() -> None:
    count = QUERIES_AT_ONCE + 3
    vectors = np.random.default_rng(0).normal(size=(count, 16))
    found = retrieval(vectors, vectors, [{number: 1.0} for number in range(count)], 1.0).values()
    assert set(found.values()) == {1.0}


def test_a_vector_of_zeros_ranks_behind() -> None:
    assert retrieval([[1.0, 0]], [[0.0, 0], [1, 1]], [{1: 1.0}], 1.0).values()["recall@1"] == 1


def test_an_output_that_is_no_number_is_told() -> None:
    with pytest.raises(SqatError, match="not finite"):
        retrieval([[math.nan, 0]], [[1.0, 0]], [{0: 1.0}], 1.0).values()
