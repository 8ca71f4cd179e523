"""Retrieval: the loss against a loop, which rows an epoch takes, and what the metrics search."""

from __future__ import annotations

import math
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sqat.data.batch import Batch
from sqat.data.rows import Rows
from sqat.recipe.tasks import RetrievalTask
from sqat.tasks import build_task
from sqat.tasks.retrieval import LOOSE, QUERY, Retrieval

Queries = list[list[float]]


def rows_of(queries: Queries, loose: int = 0, same: bool = False) -> Rows:
    """Rows of queries given by the grades of their passages; ``same``: all passages are one text."""
    labels = [label for grades in queries for label in (QUERY, *grades)] + [LOOSE] * loose
    groups = [number for number, grades in enumerate(queries) for _ in (QUERY, *grades)]
    groups += range(len(queries), len(queries) + loose)
    texts = ["passage" if same and label != QUERY else f"text {i}" for i, label in enumerate(labels)]
    return datasets.Dataset.from_dict({"text": texts, "label": labels, "group": groups})


def batch_of(queries: Queries, tokens: list[int] | None = None) -> Batch:
    """A batch of whole queries; ``tokens`` gives the one token of each row, all different where it is not given."""
    rows = rows_of(queries)
    ids = torch.tensor(tokens if tokens is not None else range(len(rows)))
    labels = torch.tensor(rows["label"][:], dtype=torch.float32)
    return Batch({"input_ids": ids[:, None]}, labels, torch.tensor(rows["group"][:]))


def drawn(count: int, seed: int, width: int = 4) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def loss_by_loop(vectors: Tensor, batch: Batch, temperature: float) -> float:
    """InfoNCE in float64, one (query, positive) after the other."""
    units = torch.nn.functional.normalize(vectors.double(), dim=-1)
    tokens = batch.inputs["input_ids"].flatten().tolist()
    labels, groups = batch.labels.tolist(), batch.groups.tolist()
    passages = [row for row, label in enumerate(labels) if label >= 0]
    terms = []
    for query in [row for row, label in enumerate(labels) if label == QUERY]:
        positives = [row for row in passages if groups[row] == groups[query] and labels[row] >= 1]
        known = {tokens[row] for row in positives}
        negatives = [row for row in passages if tokens[row] not in known]
        score = {row: float(units[query] @ units[row]) / temperature for row in passages}
        for row in positives:
            total = math.exp(score[row]) + sum(math.exp(score[other]) for other in negatives)
            terms.append(math.log(total) - score[row])
    return sum(terms) / max(1, len(terms))


GRADES = st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=4), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(GRADES, st.integers(0, 1000), st.sampled_from([0.05, 1.0]), st.booleans())
def test_the_loss_is_infonce_by_a_loop(queries: Queries, seed: int, temperature: float, repeats: bool) -> None:
    count = len(batch_of(queries))
    tokens = torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(seed)).tolist() if repeats else None
    batch, vectors = batch_of(queries, tokens), drawn(count, seed).requires_grad_()
    loss = Retrieval(temperature=temperature).loss(vectors, batch)
    assert loss.item() == pytest.approx(loss_by_loop(vectors.detach(), batch, temperature), abs=1e-4)
    loss.backward()
    assert vectors.grad is not None
    assert bool(vectors.grad.isfinite().all())


def test_a_positive_twice_in_a_batch_is_no_negative_of_itself() -> None:
    vectors = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0]])
    other = batch_of([[1.0], [1.0]])
    same = batch_of([[1.0], [1.0]], [0, 7, 2, 7])
    task = Retrieval(temperature=1.0)
    assert task.loss(vectors, other).item() > 0.5
    assert task.loss(vectors, same).item() == 0


def test_texts_without_a_pair_give_zero_with_a_gradient() -> None:
    vectors = drawn(3, 0).requires_grad_()
    batch = Batch({"input_ids": torch.arange(3)[:, None]}, torch.tensor([LOOSE, QUERY, 0.0]), torch.tensor([5, 1, 1]))
    loss = Retrieval().loss(vectors, batch)
    loss.backward()
    assert loss.item() == 0
    assert vectors.grad is not None
    assert not vectors.grad.any()


def test_descending_the_loss_finds_the_passages() -> None:
    queries: Queries = [[1, 0], [0, 1], [1, 0, 0]]
    batch, rows = batch_of(queries), rows_of(queries)
    vectors = drawn(len(rows), 3).requires_grad_()
    task = Retrieval()
    optimizer = torch.optim.Adam([vectors], lr=0.1)
    before = task.metrics(vectors.detach(), rows)["mrr@10"]
    for _ in range(60):
        optimizer.zero_grad()
        task.loss(vectors, batch).backward()
        optimizer.step()
    found = task.metrics(vectors.detach(), rows)
    assert before < 1
    assert (found["ndcg@10"], found["recall@1"], found["pnr"]) == (1.0, 1.0, math.inf)


@settings(max_examples=80, deadline=None)
@given(GRADES, st.integers(0, 3), st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_a_unit_is_a_query_with_a_positive_and_some_negatives(
    queries: Queries, negatives: int, seed: int, epoch: int
) -> None:
    rows = rows_of(queries, loose=2)
    task = Retrieval(negatives=negatives)
    units = task.training_groups(rows, seed, epoch)
    labels, groups = rows["label"][:], rows["group"][:]
    assert [groups[unit[0]] for unit in units] == [n for n, grades in enumerate(queries) if 1.0 in grades]
    for query, positive, *others in units:
        assert (labels[query], labels[positive]) == (QUERY, 1.0)
        assert {groups[row] for row in (positive, *others)} == {groups[query]}
        assert [labels[row] for row in others] == [0.0] * min(negatives, queries[groups[query]].count(0.0))
        assert len(set(others)) == len(others)
    assert units == task.training_groups(rows, seed, epoch)


def test_every_epoch_draws_other_passages_evenly() -> None:
    rows = rows_of([[1.0, 0, 0, 0, 1.0, 0]])
    seen = Counter(row for epoch in range(300) for row in Retrieval(negatives=2).training_groups(rows, 0, epoch)[0])
    assert seen.pop(0) == 300
    assert all(120 < seen[row] < 180 for row in range(1, 7))


def test_queries_without_a_positive_are_not_judged_but_their_passages_are_searched() -> None:
    rows = rows_of([[1, 0], [0, 0], [0]])
    kept = Retrieval().evaluation_rows(rows)
    assert [row for row in range(len(rows)) if rows[row]["text"] not in set(kept["text"])] == [3, 6]
    assert Retrieval().evaluation_rows(kept) is kept
    vectors = drawn(len(rows), 1)
    inside = torch.tensor([0, 1, 2, 4, 5, 7])
    assert Retrieval().metrics(vectors[inside], kept) == Retrieval().metrics(vectors, rows)


def test_remarks_count_what_is_left_out() -> None:
    rows = datasets.concatenate_datasets([rows_of([[0, 0], [1, 0, 0]], loose=3)])
    texts = rows["text"][:]
    texts[6] = texts[5]
    rows = rows.remove_columns("text").add_column("text", texts)
    assert Retrieval().data_warnings(rows) == [
        "1 of 2 queries have no positive: they train nothing and are not judged",
        "1 passages stand more than once under one query: they count once",
        "3 texts have no query: they serve distillation, and as passages to search",
    ]
    assert Retrieval().data_warnings(rows_of([[1, 0]])) == []


def test_a_text_without_a_query_makes_the_search_harder() -> None:
    vectors = torch.tensor([[1.0, 0], [1, 1], [0, 1], [1, 0]])
    assert Retrieval().metrics(vectors[:3], rows_of([[1, 0]]))["recall@1"] == 1
    assert Retrieval().metrics(vectors, rows_of([[1, 0]], loose=1))["recall@1"] == 0


def test_a_passage_that_stands_under_two_queries_is_searched_once() -> None:
    rows = rows_of([[1], [1]], same=True)
    found = Retrieval().metrics(drawn(4, 0), rows)
    assert found == {"recall@1": 1.0, "recall@10": 1.0, "mrr@10": 1.0, "ndcg@10": 1.0}  # nothing to put in order


def test_reranking_sees_only_the_query_s_own_candidates() -> None:
    vectors = torch.tensor([[1.0, 0], [1, 0.5], [0, 1], [0, 1.0], [1, 0.1], [1, 0]])
    found = Retrieval().metrics(vectors, rows_of([[1, 0], [0, 1]]))
    assert found["rerank-ndcg@10"] == pytest.approx((1 + 1 / math.log2(3)) / 2)
    assert found["pnr"] == 1.0
    assert found["recall@1"] == 0


def test_another_top_passage_agrees_only_where_the_reference_sees_a_tie() -> None:
    rows = rows_of([[1, 0], [1, 0]])
    wanted = torch.tensor([[1.0, 0], [1, 0], [1, 1e-4], [0, 1], [0, 1], [-1, 0]])
    tie, other = wanted.clone(), wanted.clone()
    tie[1], other[3] = torch.tensor([0.9, 0.1]), torch.tensor([-1.0, 0])
    assert Retrieval().same_decision(wanted, wanted, rows).tolist() == [True, True]
    assert Retrieval().same_decision(wanted, tie, rows).tolist() == [True, True]
    assert Retrieval().same_decision(wanted, other, rows).tolist() == [True, False]


def test_the_recipe_makes_it() -> None:
    config = RetrievalTask(relevant_from=2, negatives=3, temperature=0.1, pooling="cls", metric="mrr@10")
    task = build_task(config, rows_of([[1]]))
    assert task == Retrieval(2.0, 3, 0.1, "cls", "mrr@10")
    assert (task.architecture, task.outputs, task.config_fields) == ("sentences", 0, {"pooling": "cls"})
    assert np.isclose(Retrieval().temperature, 0.05)
