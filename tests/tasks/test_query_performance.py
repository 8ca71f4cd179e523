"""Query performance prediction: both losses against loops, the metrics against libraries, and labels out of range."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score
from torchmetrics.functional.regression import kendall_rank_corrcoef, spearman_corrcoef

from sqat.data.batch import Batch
from sqat.data.rows import Rows, SplitName
from sqat.errors import SqatError
from sqat.recipe.inputs import Columns, SplitConfig
from sqat.recipe.tasks import QueryPerformanceTask
from sqat.tasks import build_task, metrics
from sqat.tasks.query_performance import QueryPerformance
from sqat.tasks.splits import load_rows

LABELS = st.lists(st.sampled_from([0.0, 0.25, 0.3, 1.0]), min_size=1, max_size=12)


def rows_of(*labels: float) -> Rows:
    return datasets.Dataset.from_dict({"text": ["t"] * len(labels), "label": list(labels)})


def batch_of(labels: list[float]) -> Batch:
    return Batch({}, torch.tensor(labels), torch.full((len(labels),), -1))


def test_the_recipe_makes_it() -> None:
    task = build_task(QueryPerformanceTask(loss="pairwise", metric="kendall"), rows_of(0.0, 1.0))
    assert task == QueryPerformance("pairwise", "kendall")
    assert (task.outputs, task.architecture, task.metric) == (1, "texts", "kendall")
    assert task.config_fields["problem_type"] == "regression"


def test_mse_is_the_mean_squared_error_in_float32() -> None:
    loss = QueryPerformance("mse").loss(torch.tensor([[0.5], [1.0]], dtype=torch.bfloat16), batch_of([1.0, 0.25]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((0.25 + 0.5625) / 2)


@settings(max_examples=60, deadline=None)
@given(LABELS, st.integers(0, 1000))
def test_pairwise_is_ranknet_weighted_by_the_difference_of_labels(labels: list[float], seed: int) -> None:
    logits = torch.randn(len(labels), 1, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    scores = logits.detach().flatten().tolist()
    total = weights = 0.0
    for i, better in enumerate(labels):
        for j, worse in enumerate(labels):
            if better > worse:
                weights += better - worse
                total += (better - worse) * math.log1p(math.exp(scores[j] - scores[i]))
    loss = QueryPerformance("pairwise").loss(logits, batch_of(labels))
    assert loss.item() == pytest.approx(total / weights if weights else 0.0, abs=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
    assert bool((logits.grad != 0).any()) == bool(weights)


@pytest.mark.parametrize("loss", ["mse", "pairwise"])
def test_descending_the_loss_orders_the_queries(loss: str) -> None:
    labels = [0.0, 0.6, 1.0, 0.3, 0.0]
    task = build_task(QueryPerformanceTask.model_validate({"loss": loss}), rows_of(*labels))
    logits = torch.zeros(5, 1, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        task.loss(logits, batch_of(labels)).backward()
        optimizer.step()
    found = task.metrics(logits.detach(), rows_of(*labels))
    assert found["ndcg"] == pytest.approx(1.0)
    assert found["kendall"] > 0.9
    assert ("mse" in found) == (loss == "mse")


def test_mse_is_among_the_metrics_where_the_logit_has_a_unit() -> None:
    logits = torch.tensor([[0.5], [0.0]])
    assert QueryPerformance("mse").metrics(logits, rows_of(1.0, 0.0))["mse"] == pytest.approx(0.125)
    assert "mse" not in QueryPerformance("pairwise").metrics(logits, rows_of(1.0, 0.0))


@settings(max_examples=100, deadline=None)
@given(LABELS, st.integers(0, 1000))
def test_metrics_are_those_of_the_libraries(labels: list[float], seed: int) -> None:
    assume(len(set(labels)) > 1)
    predicted = np.random.default_rng(seed).permutation(len(labels)).astype(float)  # no ties
    found = metrics.performance(labels, predicted).values()
    assert found["ndcg"] == pytest.approx(ndcg_score([labels], [predicted]))
    pair = torch.tensor(predicted), torch.tensor(labels, dtype=torch.float64)
    assert found["kendall"] == pytest.approx(kendall_rank_corrcoef(*pair, variant="b").item(), abs=1e-6)
    assert found["spearman"] == pytest.approx(spearman_corrcoef(*pair).item(), abs=1e-4)


def test_equal_predictions_give_the_worst_order_and_no_correlation() -> None:
    found = metrics.performance([1.0, 0.0, 0.5], [2.0, 2.0, 2.0]).values()
    worst = (0.5 / math.log2(3) + 1.0 / math.log2(4)) / (1.0 + 0.5 / math.log2(3))
    assert found == {"ndcg": pytest.approx(worst), "kendall": 0.0, "spearman": 0.0}


def test_metrics_refuse_what_has_no_order() -> None:
    with pytest.raises(ValueError, match=r"all 2 labels are 0: there is no order to predict"):
        metrics.performance([0.0, 0.0], [1.0, 2.0]).values()
    with pytest.raises(SqatError, match="1 of 2 outputs of the model are not finite"):
        metrics.performance([0.0, 1.0], [math.nan, 2.0]).values()


def test_predictions_agree_within_a_hundredth_of_their_spread() -> None:
    wanted = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # standard deviation 1.118
    got = wanted + torch.tensor([[0.0], [0.011], [0.012], [-0.013]])
    assert QueryPerformance().same_decision(wanted, got, rows_of(0, 0, 0, 0)).tolist() == [True, True, False, False]


def test_every_row_is_a_unit_measured_and_kept_as_it_is() -> None:
    rows, task = rows_of(0.0, 1.0), QueryPerformance()
    assert task.training_groups(rows, 3, 1) == [[0], [1]]
    assert task.encode(rows) is rows
    assert task.evaluation_rows(rows) is rows
    assert task.data_warnings(rows) == []


GOOD = {"query": "who", "top": "them", "label": 0.5}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "above": (
        {"label": 1.2},
        'a.jsonl:2: "label" is 1.2, but how well a query does is a number from 0 to 1; '
        "divide it by its highest value, or set data.columns.label",
    ),
    "below": (
        {"label": -0.1},
        'a.jsonl:2: "label" is -0.1, but how well a query does is a number from 0 to 1; '
        "divide it by its highest value, or set data.columns.label",
    ),
    "nan": (
        {"label": math.nan},
        'a.jsonl:2: "label" must be a finite number, got the number nan; mend the row or set data.columns.label',
    ),
    "word": (
        {"label": "good"},
        'a.jsonl:2: "label" must be a finite number, got the text "good"; mend the row or set data.columns.label',
    ),
    "no query": ({"query": " "}, 'a.jsonl:2: "query" is empty; give it a text or leave the row out'),
    "nothing found": ({"top": ""}, 'a.jsonl:2: "top" is empty; give it a text or leave the row out'),
}


def load(folder: Path, *rows: dict[str, Any], name: SplitName = "train") -> Rows:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = Columns(text="query", text_pair="top")
    return load_rows(SplitConfig(path="a.jsonl"), name, columns, QueryPerformanceTask(), folder)


@pytest.mark.parametrize("mistake", BAD)
def test_a_bad_row_is_told_with_its_place(tmp_path: Path, mistake: str) -> None:
    change, line = BAD[mistake]
    with pytest.raises(SqatError) as caught:
        load(tmp_path, GOOD, {**GOOD, **change})
    assert str(caught.value) == line


@pytest.mark.parametrize("name", ["train", "dev", "test"])
def test_queries_that_all_do_equally_well_teach_and_measure_nothing(tmp_path: Path, name: SplitName) -> None:
    with pytest.raises(SqatError, match=rf'all 2 rows have the same score "0.5"; {name} needs at least two'):
        load(tmp_path, GOOD, GOOD, name=name)


def test_labels_from_0_to_1_are_read(tmp_path: Path) -> None:
    rows = load(tmp_path, {**GOOD, "label": 0}, {**GOOD, "label": 1})
    assert rows["label"][:] == [0.0, 1.0]
    assert rows["text_pair"][0] == "them"
