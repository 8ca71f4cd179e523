"""Relevance: losses, training groups, decisions and metrics."""

from __future__ import annotations

import math
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torchmetrics.functional.classification import binary_auroc

from sqat.data.batch import Batch
from sqat.data.rows import Rows
from sqat.recipe.tasks import RelevanceTask
from sqat.tasks import build_task, metrics
from sqat.tasks.relevance import Relevance

Queries = list[list[float]]


def rows_of(queries: Queries) -> Rows:
    """Rows of queries given by the grades of their passages."""
    return datasets.Dataset.from_dict(
        {
            "label": [grade for grades in queries for grade in grades],
            "group": [number for number, grades in enumerate(queries) for _ in grades],
        }
    )


def batch_of(queries: Queries) -> Batch:
    rows = rows_of(queries)
    return Batch({}, torch.tensor(rows["label"][:]), torch.tensor(rows["group"][:]))


GRADES = st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=8), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(GRADES, st.integers(0, 1000))
def test_the_pairwise_loss_is_ranknet_by_a_loop(queries: Queries, seed: int) -> None:
    batch = batch_of(queries)
    logits = torch.randn(len(batch), 1, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    scores, labels, groups = logits.detach().flatten().tolist(), batch.labels.tolist(), batch.groups.tolist()
    terms = [
        math.log1p(math.exp(-(scores[i] - scores[j])))
        for i in range(len(scores))
        for j in range(len(scores))
        if groups[i] == groups[j] and labels[i] > labels[j]
    ]
    loss = Relevance().loss(logits, batch)
    assert loss.item() == pytest.approx(sum(terms) / max(1, len(terms)), abs=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert bool((logits.grad != 0).any()) == bool(terms)


def test_a_batch_without_a_pair_gives_zero_with_a_gradient() -> None:
    logits = torch.randn(3, 1, requires_grad=True)
    loss = Relevance().loss(logits, batch_of([[1.0, 1.0], [0.0]]))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.0]] * 3


def test_large_scores_do_not_overflow() -> None:
    logits = torch.tensor([[-1e4], [1e4]], requires_grad=True)
    loss = Relevance().loss(logits, batch_of([[1.0, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == [-1.0, 1.0]


def test_the_pointwise_loss_is_cross_entropy_against_the_share_of_the_highest_grade() -> None:
    task = build_task(RelevanceTask(loss="pointwise"), rows_of([[0, 2, 4], [0]]))
    logits = torch.tensor([[0.3], [-1.0], [2.0], [0.5]], dtype=torch.float64)
    targets = [0.0, 0.5, 1.0, 0.0]
    chances = torch.sigmoid(logits).flatten().tolist()
    wanted = -sum(t * math.log(p) + (1 - t) * math.log(1 - p) for t, p in zip(targets, chances, strict=True))
    assert task.loss(logits, batch_of([[0.0, 2.0, 4.0], [0.0]])).item() == pytest.approx(wanted / 4, abs=1e-6)
    above = task.loss(logits, batch_of([[0.0, 2.0, 9.0], [0.0]])).item()
    assert above == pytest.approx(wanted / 4, abs=1e-6)


@pytest.mark.parametrize("loss", ["pairwise", "pointwise"])
def test_descending_the_loss_ranks_the_passages(loss: str) -> None:
    queries: Queries = [[0, 2, 1], [1, 0], [0, 0, 1, 2]]
    task = build_task(RelevanceTask.model_validate({"loss": loss}), rows_of(queries))
    logits = torch.zeros(9, 1, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        task.loss(logits, batch_of(queries)).backward()
        optimizer.step()
    found = task.metrics(logits.detach(), rows_of(queries))
    assert found["ndcg@10"] == pytest.approx(1.0)
    assert (found["pnr"], found["accuracy"]) == (math.inf, 1.0)


def test_pairwise_units_are_whole_queries_with_different_grades() -> None:
    task = Relevance()
    rows = rows_of([[1, 0], [0, 0, 0], [2, 1, 0]])
    assert task.training_groups(rows, 0, 0) == [[0, 1], [5, 6, 7]]
    assert task.data_warnings(rows) == ["1 of 3 queries have passages of one grade only: left out"]
    assert task.data_warnings(rows_of([[1, 0]])) == []


def test_pointwise_units_are_all_the_rows() -> None:
    task = Relevance("pointwise")
    assert task.training_groups(rows_of([[1, 0], [0]]), 0, 0) == [[0], [1], [2]]
    assert task.data_warnings(rows_of([[1, 0], [0]])) == []


@settings(max_examples=100, deadline=None)
@given(GRADES, st.integers(2, 5), st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_an_epoch_takes_few_passages_of_a_query_and_the_better_ones_first(
    queries: Queries, candidates: int, seed: int, epoch: int
) -> None:
    rows = rows_of(queries)
    units = Relevance(candidates=candidates).training_groups(rows, seed, epoch)
    labels, groups = np.array(rows["label"][:]), np.array(rows["group"][:])
    mixed = [number for number, grades in enumerate(queries) if len(set(grades)) > 1]
    assert [int(groups[unit[0]]) for unit in units] == mixed
    for unit, number in zip(units, mixed, strict=True):
        grades = queries[number]
        better = sum(grade > min(grades) for grade in grades)
        assert unit == sorted(set(unit))
        assert {int(groups[row]) for row in unit} == {number}
        assert len(unit) == min(candidates, len(grades), min(better, candidates - 1) + len(grades) - better)
        assert int((labels[unit] > min(grades)).sum()) == min(better, candidates - 1)
    assert units == Relevance(candidates=candidates).training_groups(rows, seed, epoch)


def test_every_epoch_draws_other_negatives_evenly() -> None:
    rows = rows_of([[0.0] * 5 + [1.0] + [0.0] * 5])
    task = Relevance(candidates=4)
    drawn = Counter(row for epoch in range(300) for row in task.training_groups(rows, 0, epoch)[0])
    assert drawn.pop(5) == 300
    assert set(drawn) == {0, 1, 2, 3, 4, 6, 7, 8, 9, 10}
    assert all(60 < count < 120 for count in drawn.values())


def test_pointwise_takes_a_sample_of_queries_of_one_grade_too() -> None:
    units = Relevance("pointwise", candidates=2).training_groups(rows_of([[0, 0, 0], [0, 1, 0]]), 0, 0)
    rows = [row for unit in units for row in unit]
    assert len(units) == 4
    assert 4 in rows


def test_the_recipe_makes_it_with_the_highest_grade_of_train() -> None:
    config = RelevanceTask(loss="pointwise", relevant_from=2, candidates=8, metric="pnr")
    task = build_task(config, rows_of([[0, 3], [1]]))
    assert task == Relevance("pointwise", 2, 8, "pnr", 3.0)
    assert build_task(RelevanceTask(highest=5), rows_of([[0, 3], [1]])) == Relevance(highest=5.0)
    assert task.outputs == 1
    assert task.metric == "pnr"
    assert task.config_fields["problem_type"] == "multi_label_classification"
    assert Relevance().config_fields["id2label"] == {0: "relevance"}


def test_decisions_are_the_top_passage_of_each_query() -> None:
    logits = torch.tensor([[0.1], [0.9], [0.5], [0.2], [0.7], [0.7]])
    found = Relevance().decisions(logits, rows_of([[0, 1], [1], [0, 0, 1]]))
    assert found.tolist() == [1, 2, 4]


def test_accuracy_is_the_share_of_right_decisions() -> None:
    rows = rows_of([[0, 1], [1, 0], [0, 0, 1]])
    logits = torch.tensor([[0.1], [0.9], [0.1], [0.5], [0.1], [0.2], [0.3]])
    task = Relevance()
    right = [rows["label"][row] >= 1 for row in task.decisions(logits, rows).tolist()]
    assert task.metrics(logits, rows)["accuracy"] == pytest.approx(sum(right) / len(right))


def test_another_top_passage_agrees_only_where_the_reference_sees_a_tie() -> None:
    wanted = torch.tensor([[1.0], [0.999], [2.0], [0.0]])
    got = torch.tensor([[0.9], [1.1], [0.1], [0.2]])
    assert Relevance().same_decision(wanted, got, rows_of([[0, 1], [0, 1]])).tolist() == [True, False]


@settings(max_examples=60, deadline=None)
@given(GRADES)
def test_judged_are_the_queries_that_differ_in_grade(queries: Queries) -> None:
    rows = rows_of(queries)
    kept = Relevance().evaluation_rows(rows)
    wanted = [number for number, grades in enumerate(queries) for _ in grades if len(set(grades)) > 1]
    assert kept["group"][:] == wanted
    assert (kept is rows) == (len(wanted) == len(rows))


def test_what_is_not_judged_changes_no_metric_of_order() -> None:
    rows = rows_of([[0, 1], [0, 0, 0], [1, 0, 0], [1]])
    logits = torch.tensor([[0.1], [0.9], [3.0], [2.0], [5.0], [0.3], [0.2], [0.4], [-9.0]])
    judged = torch.tensor([0, 1, 5, 6, 7])
    task = Relevance()
    every, some = task.metrics(logits, rows), task.metrics(logits[judged], task.evaluation_rows(rows))
    assert {name: every[name] for name in ("ndcg@10", "pnr", "mrr", "accuracy")} == {
        name: some[name] for name in ("ndcg@10", "pnr", "mrr", "accuracy")
    }


SCORED = st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=30)


@settings(max_examples=60, deadline=None)
@given(SCORED)
def test_auc_is_the_share_of_pairs_in_the_right_order(pairs: list[tuple[bool, int]]) -> None:
    high = [score for relevant, score in pairs if relevant]
    low = [score for relevant, score in pairs if not relevant]
    assume(high and low)
    share = sum((a > b) + 0.5 * (a == b) for a in high for b in low) / (len(high) * len(low))
    found = metrics.pair_auc([relevant for relevant, _ in pairs], [score for _, score in pairs])
    assert found == pytest.approx(share)
    truth = torch.tensor([relevant for relevant, _ in pairs])
    chances = torch.tensor([score / 8 + 0.5 for _, score in pairs])
    assert found == pytest.approx(binary_auroc(chances, truth.long()).item(), abs=1e-6)


def test_auc_compares_passages_of_different_queries() -> None:
    """Both queries are in order, but the second one's scores are all higher."""
    found = Relevance().metrics(torch.tensor([[1.0], [0.0], [9.0], [8.0]]), rows_of([[1, 0], [1, 0]]))
    assert (found["accuracy"], found["pnr"], found["auc"]) == (1.0, math.inf, 0.75)


def test_auc_of_one_kind_is_a_broken_contract() -> None:
    with pytest.raises(ValueError, match="2 of 2 passages are relevant"):
        metrics.pair_auc([True, True], [1.0, 2.0])


def test_pair_accuracy_is_the_share_on_the_right_side_of_zero_and_pointwise_alone() -> None:
    rows = rows_of([[0, 1, 2], [0, 4]])
    logits = torch.tensor([[-0.1], [0.2], [0.3], [0.1], [5.0]])  # sides: right, wrong, right, wrong, right
    assert Relevance("pointwise", highest=4.0).metrics(logits, rows)["pair-accuracy"] == pytest.approx(3 / 5)
    assert "pair-accuracy" not in Relevance("pairwise", highest=4.0).metrics(logits, rows)


def test_a_metric_without_a_meaning_is_refused() -> None:
    with pytest.raises(ValidationError, match="pair-accuracy needs loss pointwise"):
        RelevanceTask(metric="pair-accuracy")
    with pytest.raises(ValidationError, match="relevant_from is above highest"):
        RelevanceTask(relevant_from=3, highest=2)
    assert RelevanceTask(metric="pair-accuracy", loss="pointwise").metric == "pair-accuracy"
