"""Reconstruction in recipes: as a stage and within prune, interrupted, rehearsed, by two processes, and bad recipes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sqat.checkpoint.store import Checkpoint, load_checkpoint
from sqat.errors import StoppedError
from sqat.pipeline.runner import rehearse_alone, run
from sqat.progress import SilentReporter
from sqat.recipe.loader import load_recipe
from tests.errors import raises_code
from tests.tiny import Recorder

pytestmark = pytest.mark.pipeline
FIT = {"batch_size": 8, "learning_rate": 1e-3}
BLOCKS = {"steps_per_block": 6, "learning_rate": 3e-3, "batch_size": 8, "samples": 40}
ONE_SHOT = {**FIT, "steps": 2, "schedule": {"name": "per-group", "num_masks": 1}}
TWO_MASKS = {**FIT, "steps": 4, "recovery_fraction": 0.25}  # masks at steps 0 and 3
START = {"train": {"steps": 0}, "prune": ONE_SHOT}
STAGES: dict[str, dict[str, Any]] = {
    "after prune": {**START, "reconstruct": BLOCKS},
    "after calibrate": {**START, "calibrate": {"samples": 16, "placement": "cpu"}, "reconstruct": BLOCKS},
    "within prune": {"train": {"steps": 0}, "prune": {**ONE_SHOT, "reconstruct": BLOCKS}},
    "after the last mask": {"train": {"steps": 0}, "prune": {**TWO_MASKS, "reconstruct": BLOCKS}},
}
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def source(make_source: Callable[..., Path]) -> Path:
    return make_source("bert", id2label={0: "cold", 1: "warm"})


def last_checkpoint(path: Path, name: str) -> Checkpoint:
    return load_checkpoint(max((path.parent / "runs" / name).glob("*-*")))


def assert_same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


class Stopper(Recorder):
    """Presses Ctrl-C after a step of the blocks' training, where there is one."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def advance(self, step: int, values: Mapping[str, float], rate: float) -> None:
        super().advance(step, values, rate)
        if self.bars[-1][1] == 12 and step == self.step:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("name", ["after prune", "after the last mask"])
def test_a_stopped_run_resumes_to_the_same_checkpoint(write_recipe: Write, source: Path, name: str) -> None:
    run(load_recipe(path := write_recipe(source, STAGES[name], name="whole")), reporter := Recorder())
    within = "reconstruct" not in STAGES[name]
    assert ("prune: blocks" if within else "reconstruct", 12) in reporter.bars
    expected = last_checkpoint(path, "whole")
    stopped = load_recipe(write_recipe(source, STAGES[name], name="stopped"))
    for step in (4, 9):  # in the first block, in the second
        with pytest.raises(StoppedError):
            run(stopped, Stopper(step))
    run(stopped, last := Recorder())
    assert f"{'prune: blocks' if within else 'reconstruct'}: resumed at step 9 of 12" in last.lines
    found = last_checkpoint(path, "stopped")
    assert_same(found.weights, expected.weights)
    assert_same(found.masks, expected.masks)
    assert found.manifest.notes == expected.manifest.notes
    assert found.manifest.history == expected.manifest.history
    assert [line for line in found.manifest.notes if line.startswith("reconstructed 2 blocks: mean error of ")]
    assert not [*(path.parent / "runs" / "stopped").glob(".*.state")]


def test_the_stage_keeps_masks_and_scales_and_lowers_each_error(write_recipe: Write, source: Path) -> None:
    path = write_recipe(source, STAGES["after calibrate"], name="tiny")
    run(load_recipe(path), SilentReporter())
    before, after = (load_checkpoint(next((path.parent / "runs/tiny").glob(f"*-{stage}")))
                     for stage in ("calibrate", "reconstruct"))  # fmt: skip
    assert_same(after.masks, before.masks)
    assert_same(after.amax, before.amax)
    assert after.manifest.placement == "cpu"
    assert after.manifest.sites == before.manifest.sites
    changed = {name for name in before.weights if not torch.equal(before.weights[name], after.weights[name])}
    assert changed
    assert all(".encoder.layer." in name for name in changed)
    assert [entry["step"] for entry in after.manifest.history] == [6, 12]
    assert all(entry["error after"] < entry["error before"] for entry in after.manifest.history)


def test_after_a_killed_prune_stage_the_blocks_do_not_learn_again(write_recipe: Write, source: Path) -> None:
    class Killer(Recorder):
        def advance(self, step: int, values: Mapping[str, float], rate: float) -> None:
            if self.bars[-1][0] == "prune":
                raise KeyError("killed")

    path = write_recipe(source, STAGES["within prune"], name="killed")
    with pytest.raises(KeyError):
        run(load_recipe(path), Killer())
    run(load_recipe(path), again := Recorder())
    assert "prune: blocks: resumed at step 12 of 12" in again.lines
    whole = write_recipe(source, STAGES["within prune"], name="whole")
    run(load_recipe(whole), SilentReporter())
    assert_same(last_checkpoint(path, "killed").weights, last_checkpoint(whole, "whole").weights)


def test_training_after_the_blocks_draws_dropout_and_resumes_to_the_same_bits(
    write_recipe: Write, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Quitter(Recorder):
        def advance(self, step: int, values: Mapping[str, float], rate: float) -> None:
            super().advance(step, values, rate)
            if self.bars[-1][0] == "prune" and step == 2:
                signal.raise_signal(signal.SIGINT)

    stages = {"train": {"steps": 0}, "prune": {**ONE_SHOT, "steps": 4, "reconstruct": BLOCKS}}
    run(load_recipe(whole := write_recipe(source, stages, name="whole")), SilentReporter())
    stopped = write_recipe(source, stages, name="stopped")
    with pytest.raises(StoppedError):
        run(load_recipe(stopped), Quitter())
    modes: list[bool] = []
    observe = nn.Dropout.forward
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: (modes.append(self.training), observe(self, x))[1])
    run(load_recipe(stopped), again := Recorder())
    assert "prune: resumed at step 2 of 4" in again.lines
    assert True in modes, "the model has dropout"
    assert_same(last_checkpoint(stopped, "stopped").weights, last_checkpoint(whole, "whole").weights)


def test_a_rehearsal_takes_one_step_of_each_block(write_recipe: Write, source: Path) -> None:
    stages = {**STAGES["within prune"], "reconstruct": {"steps_per_block": 10**6}}
    path = write_recipe(source, stages, name="tiny")
    rehearse_alone(load_recipe(path), reporter := Recorder())
    assert "3 stages pass" in reporter.lines[-1]


def test_shards_are_refused(write_recipe: Write, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqat.stages.reconstruct.uses_fsdp", lambda: True)
    with raises_code("recipe-conflict", "start without --use_fsdp"):
        run(load_recipe(write_recipe(source, STAGES["within prune"], name="shards")), SilentReporter())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing to reconstruct": ({"train": {"steps": 0}, "reconstruct": {}}, "no prune or calibrate stage"),
    "no dense ancestor": ({"prune": {**ONE_SHOT, "reconstruct": {}}}, "no train stage among its ancestors"),
    "masks in every step": (
        {"train": {"steps": 0}, "prune": {**FIT, "schedule": "sr-ste", "reconstruct": {}}},
        "changes masks in every step",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_recipes_are_one_line(write_recipe: Write, source: Path, name: str) -> None:
    stages, words = BAD[name]
    with raises_code("recipe-conflict", words):
        load_recipe(write_recipe(source, stages, name="bad"))
