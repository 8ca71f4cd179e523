"""The text of a first recipe: every choice with its reason."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sqat.errors import escape_control
from sqat.init.budget import block_steps
from sqat.recipe.yaml_nodes import Place, resolve_scalar

if TYPE_CHECKING:
    from sqat.init.starter import Starter


def scalar(text: str) -> str:
    """Format a text for YAML, in quotes if YAML would read it as something else."""
    plain = re.fullmatch(r"[\w./][\w./ @+-]*", text, re.ASCII) and text == text.strip()
    if plain and isinstance(resolve_scalar(text, Place("")), str):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


def compose_recipe(starter: Starter, folder: Path) -> str:
    """Return the text of the recipe; paths are relative to ``folder``."""
    guess, translation = starter.guess, starter.translation
    columns = "\n".join(f"    {key}: {scalar(name)}" for key, name in guess.columns.items())
    settings = "".join(f", {name}: {value:.3g}" for name, value in starter.settings.items())
    head = TEMPLATE.format(
        task=f"{{name: {guess.task}{settings}}}" if settings else guess.task,
        reason=escape_control(guess.reason),
        model=scalar(starter.model),
        max_length=guess.max_length,
        columns=columns,
        **split_lines(starter, folder),
    )
    if translation is None:
        weights = "output_weight: 10, task_weight: 0" if guess.task == "retrieval" else "output_weight: 1"
        placement, target = ("cpu", "cpu-sparse") if starter.has_kernels else ("linear", "onnx-int8")
        stages = STAGES.format(distill=f"{{hidden_weight: 1, {weights}}}", placement=placement, target=target,
                               reconstruct=reconstruction(starter), **lengths(starter.steps))  # fmt: skip
        return head + stages + RESULTS.format(target=target)
    notes = "".join(f"# {note}\n" for note in translation.notes)
    results = TRANSLATED.format(sparse=translation.label, target=translation.stages["export"]["targets"][0])
    return f"{head}{notes}{translation.text()}\n{results}"


def reconstruction(starter: Starter) -> str:
    """Return the settings of reconstruction, for encoders in which it is known to work; else none."""
    if not starter.has_kernels:
        return "null"
    return f"{{steps_per_block: {block_steps(starter.steps['prune'])}}}" if starter.steps else "{}"


def split_lines(starter: Starter, folder: Path) -> dict[str, str]:
    """Return the lines of train, dev and test."""
    paths = {name: scalar(os.path.relpath(path, folder)) for name, path in starter.splits.items() if path is not None}
    lines = {"train": f"  train: {paths['train']}"}
    for name in ("dev", "test"):
        if name in paths and name in starter.limits:
            lines[name] = f"  {name}: {{path: {paths[name]}, limit: {starter.limits[name]}}}  # what the time allows"
        elif name in paths:
            lines[name] = f"  {name}: {paths[name]}"
    missing = {"dev": DEV_IS_TRAIN.format(train=paths["train"]), "test": "  # test: measured once, at the end"}
    return {**missing, **lines}


def lengths(steps: Mapping[str, int]) -> dict[str, str]:
    """Return how long each stage trains: the steps that were asked for, or epochs."""
    return {name: f"steps: {steps[name]}" if name in steps else f"epochs: {epochs}" for name, epochs in EPOCHS.items()}


EPOCHS = {"train": 2, "prune": 2, "qat": 1}
DEV_IS_TRAIN = """\
  # WARNING: no dev file was found, so dev is the training data. Name another file.
  dev: {{path: {train}, limit: 500}}"""

TEMPLATE = """\
# yaml-language-server: $schema=recipe.schema.json
# Written by `sqat init`. Every key with its default: `sqat schema`. What would run: `sqat run --dry-run`.
model:
  source: {model}  # a folder, a hub name, or package:NAME/FOLDER
  max_length: {max_length}  # tokens a text (or pair) is cut to

task: {task}  # {reason}

data:  # files relative to this one
{train}
{dev}
{test}
  columns:
{columns}

"""

STAGES = """\
stages:
  train:  # dense fine-tuning: what the others start from and learn from
    {train}
    learning_rate: 5e-5
  dense-calibrate:  # the dense model in int8 without training, to compare with
    type: calibrate
    method: auto
  dense:
    type: export
    targets: [onnx-fp32, onnx-int8]
  prune:  # 2 of each 4 weights go at once, the others make up for them and learn from the dense stage
    from: train
    pattern: 2:4
    criterion: sparsegpt
    schedule: {{name: per-group, num_masks: 1}}
    reconstruct: {reconstruct}  # first each block alone; then all of them:
    {prune}
    learning_rate: 1e-4
    distill: {distill}  # null: from the labels alone
  calibrate:  # scales of the activations
    method: auto
    placement: {placement}  # for GPUs: tensorrt
  qat:  # masks, fake quantization and distillation together
    {qat}
    learning_rate: 5e-5
    distill: {distill}
  export:  # checked against the model; for GPUs: [tensorrt], for any ONNX Runtime: [onnx-int8]
    targets: [{target}]

"""

RESULTS = """\
results:  # rows of the results table
  dense fp32: dense/onnx-fp32
  dense int8: dense/onnx-int8
  sparse int8: export/{target}
latency: {{}}  # time each of them on the test texts
"""

TRANSLATED = """\
results:  # rows of the results table
  dense fp32: train
  {sparse}: export/{target}
"""
