"""A recipe with a streamed train split, killed within an epoch of each stage that trains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sqat.checkpoint.store import Checkpoint, load_checkpoint
from sqat.pipeline import runner as pipeline
from sqat.recipe.loader import load_recipe
from tests.tiny import Recorder, classification_rows, write_project, write_rows

pytestmark = pytest.mark.pipeline
ROWS, BUFFER, BATCH = 132, 40, 8  # 17 batches an epoch, of 5 and at last 2 to a window
STAGES = f"""stages:
  train: {{steps: 24, batch_size: {BATCH}, learning_rate: 3.0e-3, save_every: 0}}
  prune: {{steps: 21, batch_size: {BATCH}, save_every: 0, criterion: {{name: wanda, samples: 24}},
          distill: {{loss: minilm-v1}}}}
  calibrate: {{samples: 32}}
  qat: {{epochs: 1.5, batch_size: {BATCH}, save_every: 0}}
"""
STOPS = {"train": 19, "prune": 8, "qat": 20}  # in the second epoch, within a window; in the first; in the second


class KilledError(Exception):
    """Stands for the end of the process."""


class Stopping(Recorder):
    """Raises at one step of a stage."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage, self.now = stage, ""

    def start(self, title: str, total: int) -> None:
        self.now = title

    def advance(self, step: int, values: object, rate: float) -> None:
        if self.now == self.stage and step == STOPS[self.stage]:
            raise KilledError


def write_streamed(folder: Path) -> Path:
    """Write a project whose train split is three shards; return its recipe."""
    project = write_project(folder)
    rows = classification_rows(ROWS, 0)
    for number, (start, end) in enumerate(((0, 50), (50, 53), (53, ROWS))):
        write_rows(folder / f"part-{number}.jsonl", rows[start:end])
    head = project.recipe.read_text().partition("stages:")[0].replace("task: classification", "task: {name: "
        "classification, labels: [negative, positive]}")  # fmt: skip
    head = head.replace("train: train.jsonl", f'train: {{path: "part-*.jsonl", streaming: true, buffer: {BUFFER}}}')
    project.recipe.write_text(head + STAGES)
    return project.recipe


def checkpoints(folder: Path) -> dict[str, Checkpoint]:
    return {path.name: load_checkpoint(path) for path in sorted((folder / "runs/tiny").glob("??-*"))}


def test_a_run_killed_within_an_epoch_resumes_to_the_same_bits(tmp_path: Path) -> None:
    recipe = write_streamed(tmp_path)
    pipeline.run(load_recipe(recipe), Recorder())
    expected = checkpoints(tmp_path)
    shutil.rmtree(tmp_path / "runs")

    for stage, step in STOPS.items():
        with pytest.raises(KilledError):
            pipeline.run(load_recipe(recipe), Stopping(stage))
        state = next((tmp_path / "runs/tiny").glob(f".??-{stage}.state/state.json"))
        assert json.loads(state.read_bytes())["progress"]["step"] == step - 1
    pipeline.run(load_recipe(recipe), reporter := Recorder())
    assert "qat: resumed at step 19 of 26" in reporter.lines
    again = checkpoints(tmp_path)
    assert list(again) == list(expected) == ["01-train", "02-prune", "03-calibrate", "04-qat"]
    for name, checkpoint in expected.items():
        resumed = again[name]
        for part, tensors in (
            (resumed.weights, checkpoint.weights),
            (resumed.masks, checkpoint.masks),
            (resumed.amax, checkpoint.amax),
        ):
            assert part.keys() == tensors.keys()
            assert all(torch.equal(part[key], value) for key, value in tensors.items()), name
        assert resumed.manifest.metrics == checkpoint.manifest.metrics
        assert resumed.manifest.samples == checkpoint.manifest.samples
    assert expected["02-prune"].masks
    assert expected["01-train"].manifest.samples == ROWS + 7 * BATCH


def test_epochs_are_counted_in_the_rows_of_all_shards(tmp_path: Path) -> None:
    recipe = write_streamed(tmp_path)
    pipeline.run(load_recipe(recipe, ["stages.train.steps=null", "stages.train.epochs=1"]), Recorder(), last="train")
    manifest = checkpoints(tmp_path)["01-train"].manifest
    assert (manifest.steps, manifest.samples) == (17, ROWS)
