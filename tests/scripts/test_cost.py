"""recipes/COST.md is what scripts/cost.py works out, and its sums are those of small cases done by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.script_loader import load_script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cost() -> Any:
    return load_script("cost")


def test_the_page_is_in_step(cost: Any) -> None:
    assert (ROOT / "recipes/COST.md").read_text(encoding="utf-8") == cost.page(), "run python scripts/cost.py"


def test_weights_are_those_of_the_shapes(cost: Any) -> None:
    """BERT-large: 4 w^2 + 2 w i a block; Llama 2 7B: 4 w^2 + 3 w i; both within a percent of what is said."""
    for model, squares, inner in ((cost.BERT, 4, 2), (cost.DECODER, 4, 3)):
        weights = model.layers * (squares * model.width**2 + inner * model.width * model.inner)
        assert model.treated == pytest.approx(weights, rel=0.01)
        assert model.matrices == squares + inner


def test_a_step_by_hand(cost: Any) -> None:
    """BERT-large, 32 x 128: six operations a weight and token, and attention's share."""
    dense = cost.stages(cost.BERT)[0]
    operations = 6 * 335e6 + 3 * 4 * 24 * 1024 * 128
    assert dense.operations == pytest.approx(operations)
    seconds = operations * 4096 / (0.4 * 312e12) + 30 * 335e6 / 2e12
    assert cost.step_seconds(cost.BERT, dense) == pytest.approx(seconds)
    assert cost.travel(cost.BERT, 1) == 0
    assert cost.travel(cost.BERT, 8) == pytest.approx(2 * 4 * 335e6 * 7 / 8 / 300e9)
    assert cost.seconds(cost.BERT, dense, 8) == pytest.approx(1e6 / 256 * (seconds + 2 * 4 * 335e6 * 7 / 8 / 300e9))


def test_more_gpus_never_take_longer_nor_distillation_less(cost: Any) -> None:
    for model in (cost.BERT, cost.DECODER):
        for each in cost.stages(model):
            times = [cost.seconds(model, each, count) for count in cost.COUNTS]
            assert times == sorted(times, reverse=True)
        *_, plain, distilled = cost.stages(model)
        assert distilled.operations > plain.operations
        assert distilled.kept - plain.kept == pytest.approx(4 * model.weights)
