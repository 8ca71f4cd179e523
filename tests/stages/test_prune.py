"""Pruning twice: what an earlier stage pruned keeps its mask, and its record says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from sqat.checkpoint.store import load_checkpoint
from sqat.pipeline.runner import run
from sqat.progress import SilentReporter
from sqat.recipe.loader import load_recipe


def test_a_second_stage_keeps_what_the_first_pruned(make_source: Callable[..., Path], data_folder: Path) -> None:
    fit = {"type": "prune", "steps": 2, "batch_size": 8, "learning_rate": 1e-3}
    stages = {
        "train": {"steps": 1, "batch_size": 8},
        "attention": {**fit, "layers": {"include": ["*.attention.self.*"]}},
        "rest": {**fit, "pattern": "1:4", "layers": {"exclude": ["*.attention.self.*"]}},
    }
    recipe = {
        "model": {"source": str(make_source("bert")), "max_length": 16},
        "task": "classification",
        "data": {"train": "train.jsonl", "dev": "dev.jsonl"},
        "output": str(data_folder / "runs"),
        "stages": stages,
    }
    path = data_folder / "twice.yaml"
    path.write_text(json.dumps(recipe))
    run(load_recipe(path), SilentReporter())
    first, second = (load_checkpoint(data_folder / "runs" / "twice" / name) for name in ("02-attention", "03-rest"))
    query, dense = (f"bert.encoder.layer.0.{name}" for name in ("attention.self.query", "output.dense"))
    assert first.manifest.layers[query].pattern == "2:4"
    assert first.manifest.layers[dense].dense_because == "not included by the recipe"
    assert torch.equal(second.masks[query], first.masks[query])
    assert not torch.equal(second.weights[f"{query}.weight"], first.weights[f"{query}.weight"]), "it is trained on"
    assert second.manifest.layers[query] == first.manifest.layers[query]
    assert second.manifest.layers[dense].pattern == "1:4"
    assert float((second.weights[f"{dense}.weight"] == 0).float().mean()) == 0.75
