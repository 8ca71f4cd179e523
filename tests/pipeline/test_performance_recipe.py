"""The recipe of query performance prediction on a tiny model, and what the recipes of relevance promise beside it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import onnx.numpy_helper
import pytest
import torch

from sqat.recipe.loader import load_recipe
from sqat.recipe.schema import Recipe
from sqat.recipe.stages import PruneConfig, QatConfig, TrainConfig
from sqat.sparsity.pattern import parse_pattern
from tests.pipeline.shipped import RECIPES, replace_model, replace_rows, run_shipped
from tests.tiny import BAD, FILLER, GOOD

pytestmark = pytest.mark.pipeline


def performance_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Queries that do as well as the share of good words among what was found for them."""
    choose = random.Random(seed)
    rows = []
    for _ in range(count):
        good = choose.randrange(5)
        found = choose.choices(GOOD, k=good) + choose.choices(BAD, k=4 - good)
        rows.append({"query": " ".join(choose.sample(FILLER, 2)), "top": " | ".join(found), "label": good / 4})
    return rows


def test_the_query_performance_recipe_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    overrides = replace_model(tmp_path, 64)
    overrides += replace_rows(tmp_path, [performance_rows(24, seed) for seed in range(3)])
    # after three steps all predictions are nearly the same, and rounding is a large part of their spread
    rows = run_shipped("query-performance", tmp_path, overrides, capsys, max_disagreement=1)
    for row in rows:
        assert set(row["metrics"]) >= {"ndcg", "kendall", "spearman"}
        assert 0 < row["metrics"]["ndcg"] <= 1
        assert -1 <= row["metrics"]["kendall"] <= 1
        weights = [weight for weight in onnx.load(row["path"]).graph.initializer if set(weight.dims) <= {32, 64}]
        matrices = [onnx.numpy_helper.to_array(weight) for weight in weights if len(weight.dims) == 2]
        assert {matrix.dtype.itemsize for matrix in matrices} == {2 if "fp16" in row["label"] else 4}
        half_zero = [bool(((matrix == 0).reshape(-1, 4, matrix.shape[1]).sum(1) == 2).all()) for matrix in matrices]
        assert sum(half_zero) == (6 if row["label"].startswith("sparse") else 0)  # one layer of six linears


def students(recipe: Recipe) -> list[list[TrainConfig]]:
    """The trained stages after the dense model of every sparse row of the results table."""
    chains = []
    for label, row in recipe.results.items():
        name, chain = recipe.parent_of(row.partition("/")[0]), []
        while name is not None and name != "train":
            stage = recipe.stages[name]
            chain += [stage] if isinstance(stage, TrainConfig) else []
            name = recipe.parent_of(name)
        chains += [chain] if label.startswith("sparse") else []
    return chains


def learns_labels(config: TrainConfig) -> bool:
    """Whether a stage's loss has a part for the labels."""
    distill = config.distill if isinstance(config, PruneConfig | QatConfig) else None
    return distill is None or distill.task_weight > 0


@pytest.mark.parametrize("name", ["query-performance", "relevance-pnr", "relevance-accuracy"])
def test_the_students_have_equal_budgets(name: str) -> None:
    """Of steps and batches; a student without labels may have another rate."""
    recipe = load_recipe(RECIPES[name]).recipe
    chains = students(recipe)
    budgets = [[(s.type, s.steps, s.batch_size) for s in chain] for chain in chains]  # type: ignore[attr-defined]
    assert len(chains) == 3
    assert budgets[0] == budgets[1] == budgets[2]
    rates = [[s.learning_rate for s in chain] for chain in chains if all(learns_labels(s) for s in chain)]
    assert len(rates) == (2 if name == "query-performance" else 3)
    assert all(rate == rates[0] for rate in rates)
    prunes = [stage for chain in chains for stage in chain if isinstance(stage, PruneConfig)]
    assert [len(prune.schedule.sparsities(parse_pattern("2:4"))) > 1 for prune in prunes] == [False, True, True]
    assert [prune.distill is not None for prune in prunes] == [False, False, True]


@pytest.mark.parametrize(
    ("name", "kind"), [("query-performance", "fp16"), ("relevance-pnr", "int8"), ("relevance-accuracy", "int8")]
)
def test_the_rows_are_called_as_every_application_calls_them(name: str, kind: str) -> None:
    ways = ("one-shot", "progressive", "progressive + distillation")
    expected = ["dense fp32", f"dense {kind}", *(f"sparse {kind} ({way})" for way in ways)]
    assert list(load_recipe(RECIPES[name]).recipe.results) == expected
