"""The figures of recipes/GUIDE.md show what sqat's own masks and schedules are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sqat.recipe.stages import PruneConfig
from sqat.sparsity.schedules.per_group import PerGroup

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def concepts() -> Any:
    from scripts.docs import concepts

    return concepts


def test_the_pattern_is_two_of_four_and_the_larger_ones(concepts: Any) -> None:
    weights, mask = concepts.pattern_parts()
    groups, kept = weights.abs().view(8, 4, 4), mask.view(8, 4, 4)
    assert torch.equal(kept.sum(2), torch.full((8, 4), 2))
    assert bool((groups.where(kept, torch.tensor(9.0)).amin(2) >= groups.where(~kept, torch.tensor(0.0)).amax(2)).all())


def test_growth_is_that_of_the_stage(concepts: Any) -> None:
    steps, sparsities = concepts.growth(PruneConfig(schedule=PerGroup(num_masks=2)))
    assert (steps, sparsities) == ([0, 0, 60, 300], [0.0, 0.25, 0.5, 0.5])


def test_every_figure_is_drawn_and_shown(concepts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = set(re.findall(r"\(figures/(\w+)\.svg\)", (ROOT / "recipes/GUIDE.md").read_text()))
    monkeypatch.setattr(concepts, "FOLDER", tmp_path)
    concepts.main()
    assert {path.stem for path in tmp_path.iterdir()} == shown
    assert {path.stem for path in (ROOT / "recipes/figures").glob("*.svg")} == shown
    assert all(path.read_text().lstrip().startswith("<?xml") for path in tmp_path.iterdir())
