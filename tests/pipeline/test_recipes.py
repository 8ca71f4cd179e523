"""Every shipped recipe runs on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.pipeline.shipped import RECIPES, ROOT, replace_model, replace_rows, run_shipped
from tests.tiny import relevance_rows

pytestmark = pytest.mark.pipeline


ELSEWHERE = {  # recipes of other tasks: their tests have the data
    "digits": "pipeline/test_image_recipes.py",
    "emoji-vit": "pipeline/test_image_recipes.py",
    "query-performance": "pipeline/test_performance_recipe.py",
    "retrieval": "pipeline/test_retrieval_recipe.py",
    "text-to-image": "models/test_diffusion.py",
}


def test_every_shipped_recipe_has_a_test() -> None:
    assert set(ELSEWHERE) <= set(RECIPES)
    for name, file in ELSEWHERE.items():
        assert f'"{name}' in (ROOT / "tests" / file).read_text()


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in ELSEWHERE])
def test_every_relevance_recipe_runs(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    overrides = replace_model(tmp_path, 32)
    overrides += replace_rows(tmp_path, [relevance_rows(24, seed) for seed in range(3)])
    rows = run_shipped(recipe, tmp_path, overrides, capsys)
    assert all(0 <= row["metrics"]["ndcg@10"] <= 1 for row in rows)


COMMANDS = {"init", "run", "analyze", "qat", "export", "inspect"}
COMMANDS |= {"engine", "evaluate", "schema", "doctor", "bench", "report"}
