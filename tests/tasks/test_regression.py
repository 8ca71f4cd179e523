"""Scores: the loss, the rounding a user sees, and the correlations."""

from __future__ import annotations

import datasets
import pytest
import torch

from sqat.data.batch import Batch
from sqat.data.rows import Rows
from sqat.recipe.tasks import RegressionTask
from sqat.tasks import build_task
from sqat.tasks.regression import Regression


def rows_of(*labels: float) -> Rows:
    return datasets.Dataset.from_dict({"text": ["t"] * len(labels), "label": list(labels)})


def test_the_recipe_makes_it() -> None:
    task = build_task(RegressionTask(metric="pearson"), rows_of(1.0, 2.0))
    assert task == Regression("pearson")
    assert task.outputs == 1
    assert task.config_fields["problem_type"] == "regression"


def test_the_loss_is_the_mean_squared_error_in_float32() -> None:
    logits = torch.tensor([[1.5], [2.0]], dtype=torch.bfloat16)
    batch = Batch({}, torch.tensor([1.0, 4.0]), torch.tensor([-1, -1]))
    loss = Regression().loss(logits, batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((0.25 + 4) / 2)


def test_scores_agree_within_a_hundredth_of_their_spread() -> None:
    wanted = torch.tensor([[0.0], [100.0], [200.0], [300.0]])  # standard deviation 111.8
    got = wanted + torch.tensor([[0.0], [1.1], [1.2], [-1.3]])
    assert Regression().same_decision(wanted, got, rows_of(0, 0, 0, 0)).tolist() == [True, True, False, False]
    assert Regression().same_decision(wanted / 1e3, got / 1e3, rows_of(0, 0, 0, 0)).tolist() == [
        True,
        True,
        False,
        False,
    ]


def test_metrics_see_order_and_line() -> None:
    found = Regression().metrics(torch.tensor([[1.0], [2.0], [9.0]]), rows_of(1.0, 2.0, 3.0))
    assert found["spearman"] == pytest.approx(1.0)
    assert 0.8 < found["pearson"] < 0.95


def test_every_row_is_a_unit_and_kept_as_it_is() -> None:
    rows = rows_of(1.0, 2.0)
    task = Regression()
    assert task.training_groups(rows, 3, 1) == [[0], [1]]
    assert task.encode(rows) is rows
    assert task.data_warnings(rows) == []
