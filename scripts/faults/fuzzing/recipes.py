"""Recipes with tags, anchors, broken YAML, odd numbers and swapped keys."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from scripts.faults.fuzzing.case import Action, flip_bytes
from sqat.recipe.loader import load_recipe

RECIPES = (
    """\
model: {source: x}
task: relevance
data: {train: a.csv, dev: b.csv}
stages:
  train: {steps: 2}
  prune:
    pattern: '2:4'
    schedule: {name: per-group, num_masks: 2}
  calibrate: {method: mse}
  qat:
    epochs: 1.5
""",
    """\
name: a
seed: 3
model:
  source: package:m/f
  max_length: 64
task: {name: classification, labels: [x, y]}
data:
  train: {path: 's/*.parquet', streaming: true}
  dev: {hub: h, split: s}
stages:
  train: &a {epochs: 1}
  again: {type: train, <<: *a}
  export: {targets: [onnx-fp32], gates: {f1: {min: 0.5}}}
results: {r: train}
""",
)
PIECES = (
    *("&a ", "*a", "*b", "<<: *a", "!!python/object/apply:os.system [id]", "!x ", "!!binary ", "{", "}", "[", "]"),
    *(": ", "- ", "? ", "\n", "\t", "'", '"', "|\n", ">-\n", "---\n", "...\n", "%YAML 1.1\n", "%TAG ! x\n", "\x00"),
    *("\x85", "\u2028", "\ud800", "\ufeff", "\uffff", "𝄞", "é", "null", "~", "1e999", "-1", ".nan", ".inf", "#", "\r"),
    *("0o7", "0x" + "f" * 400, "9" * 400, "1" * 5000, "[" * 60, "{a: " * 60, "- " * 60, "  ", "true", "yes", "2:4"),
    *("stages", "train", "prune", "distill: {}", "gates: {f1: {min: ", "retry: {times: 3}", "from: train", "path: /"),
    *("../../x", "a: [&b [*b]]", "x: &x [" + "*x, " * 9 + "]", "streaming: true", "buffer: 0", "task: ", "[1]", "''"),
)


def make_case(draw: random.Random, folder: Path) -> Sequence[Action]:
    """Write a recipe with up to five pieces put in or cut out."""
    path = folder / "recipe.yaml"
    path.write_bytes(change_recipe(draw))
    return [partial(load_recipe, path)]


def change_recipe(draw: random.Random) -> bytes:
    """Return a recipe with up to five pieces put in or cut out."""
    text = draw.choice(RECIPES) if draw.random() < 0.95 else ""
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3, 5))):
        start = draw.randint(0, len(text))
        new = draw.choice(PIECES) if draw.random() < 0.7 else copy_part(draw, text)
        text = text[:start] + new + text[start + draw.choice((0, 0, 1, 3, 30)) :]
    raw = text.encode("utf-8", "surrogatepass")
    return raw if draw.random() < 0.9 else flip_bytes(draw, raw)


def copy_part(draw: random.Random, text: str) -> str:
    """Return a part of the text itself."""
    start = draw.randint(0, len(text))
    return text[start : start + draw.randint(0, 40)]
