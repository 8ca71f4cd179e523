"""Run a shipped recipe on tiny data: what tests change of it, and what must hold of its results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sqat.cli import main
from sqat.recipe.loader import load_recipe
from sqat.recipe.stages import TrainConfig
from tests.tiny import write_model, write_rows

ROOT = Path(__file__).parents[2]
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.yaml"))}


def replace_model(folder: Path, max_length: int) -> list[str]:
    """Write a model of one layer; return the overrides that put it into a recipe."""
    write_model(folder / "model", num_hidden_layers=1)
    return [f"model.source={folder / 'model'}", "model.sha256=null", f"model.max_length={max_length}"]


def replace_rows(folder: Path, splits: Sequence[list[dict[str, Any]]]) -> list[str]:
    """Write the rows of train, dev and test; return the overrides that put them into a recipe."""
    overrides = []
    for split, rows in zip(("train", "dev", "test"), splits, strict=True):
        write_rows(folder / f"{split}.jsonl", rows)
        overrides.append(f"data.{split}.path={folder / f'{split}.jsonl'}")
    return overrides


def run_shipped(
    name: str,
    folder: Path,
    overrides: Sequence[str],
    capsys: pytest.CaptureFixture[str],
    *,
    steps: int = 3,
    max_disagreement: float | None = None,
) -> list[dict[str, Any]]:
    """Run a recipe with a few steps a stage; return its rows, which are labelled as the recipe labels them."""
    recipe = load_recipe(RECIPES[name]).recipe
    overrides = [f"output={folder / 'runs'}", *overrides]
    if recipe.latency is not None:
        overrides.append("latency.max_seconds=0.1")
    for stage, config in recipe.stages.items():
        if getattr(config, "reconstruct", None) is not None:
            overrides.append(f"stages.{stage}.reconstruct.steps_per_block={steps}")
        if isinstance(config, TrainConfig):
            overrides += [f"stages.{stage}.epochs=null", f"stages.{stage}.steps={steps}"]
        if config.type == "export" and max_disagreement is not None:
            overrides.append(f"stages.{stage}.max_disagreement={max_disagreement}")
    arguments = [part for override in overrides for part in ("--set", override)]
    assert main(["run", str(RECIPES[name]), "--json", "--quiet", *arguments]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["rows"]
    assert [row["label"] for row in rows] == list(recipe.results)
    assert all(Path(row["path"]).exists() for row in rows)
    return rows
