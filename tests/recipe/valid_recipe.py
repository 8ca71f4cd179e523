"""A valid recipe that tests break in one place, and how they load it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sqat.errors import SqatError
from sqat.recipe.loader import load_recipe
from sqat.recipe.schema import LoadedRecipe

GOOD = """\
model: {source: tiny}
task: classification
data:
  train: train.jsonl
  dev: dev.jsonl
  columns: {text: body}
stages:
  train: {learning_rate: 1e-5}
  prune:
    pattern: 2:4
    schedule: {name: group-fraction, num_masks: [0.2, 0.5]}
  calibrate:
    method: percentile
  qat:
  export:
    targets: [onnx-int8, onnx-fp32]
results:
  ours: export/onnx-int8
"""


def load(folder: Path, text: str, *overrides: str) -> LoadedRecipe:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def error_of(folder: Path, text: str, *overrides: str) -> SqatError:
    with pytest.raises(SqatError) as caught:
        load(folder, text, *overrides)
    return caught.value


def break_once(old: str, new: str) -> str:
    """Replace a text that occurs once (the first for ``model:``)."""
    assert GOOD.count(old) == 1 or old == "model:"
    return GOOD.replace(old, new, 1)
