"""Prune stages that permute first: masks and notes, a killed run, a second stage, a budget of layers, and the key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sqat.checkpoint.store import Checkpoint, load_checkpoint
from sqat.models.loading import build
from sqat.pipeline.graph import resolve_graph
from sqat.pipeline.runner import run
from sqat.progress import SilentReporter
from sqat.recipe.loader import load_recipe
from sqat.recipe.stages import PruneConfig
from sqat.sparsity.masks import count_violations
from sqat.sparsity.pattern import Pattern
from tests.compress.test_prune_criteria import FIT, TEACHER, TWO_STEPS, KilledError, Killer, same

pytestmark = pytest.mark.pipeline
Write = Callable[..., Path]
STILL = {"steps": 1, "learning_rate": 1e-30, "schedule": {"name": "per-group", "num_masks": 1}}


@pytest.fixture(scope="module")
def source(make_source: Callable[..., Path]) -> Path:
    return make_source("bert")


@pytest.fixture(autouse=True)
def quick_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """One start is enough here."""
    monkeypatch.setattr("sqat.sparsity.permutation.STARTS", 1)


def made(write: Write, source: Path, name: str, stages: dict[str, Any], stage: str) -> Checkpoint:
    path = write(source, stages, name=name)
    run(load_recipe(path), SilentReporter())
    return load_checkpoint(next((path.parent / "runs" / name).glob(f"*-{stage}")))


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "taylor", "sparsegpt"])
def test_every_criterion_keeps_more_and_says_so(write_recipe: Write, source: Path, criterion: str) -> None:
    prune = {**FIT, **STILL, "criterion": criterion, "permute": True}
    found = made(write_recipe, source, criterion, {"prune": prune}, "prune")
    note = found.manifest.notes[0]
    assert note.startswith("permuted the channels of 4 groups: the layers that read them keep ")
    assert note.endswith(f" of their {'wanda' if criterion == 'sparsegpt' else criterion} scores")
    old, new = (float(share.rstrip("%")) for share in note.split("keep ")[1].split(" of")[0].split(" -> "))
    assert new > old + 1
    assert found.manifest.notes[1].startswith("not permuted: the inputs of 8 layers, ")
    assert all(count_violations(mask, Pattern(2, 4)) == 0 for mask in found.masks.values())
    kept = found.weights["bert.encoder.layer.0.intermediate.dense.bias"]
    start = load_file(source / "model.safetensors")["bert.encoder.layer.0.intermediate.dense.bias"]
    assert not torch.equal(kept, start)
    assert torch.equal(kept.sort().values, start.sort().values)


def test_kept_magnitude_is_that_of_the_checkpoint(write_recipe: Write, source: Path) -> None:
    """What the note tells is in the weights, and pruning at once is nearer to the dense model."""
    sums = []
    for permute in (False, True):
        prune = {**FIT, **STILL, "permute": permute}
        found = made(write_recipe, source, f"kept-{permute}", {"prune": prune}, "prune")
        ends = ("attention.output.dense.weight", "output.dense.weight")
        sums.append(sum(float(w.double().abs().sum()) for name, w in found.weights.items() if name.endswith(ends)))
    start = load_file(source / "model.safetensors")
    whole = sum(float(w.double().abs().sum()) for name, w in start.items() if name.endswith("output.dense.weight"))
    assert f"keep {sums[0] / whole:.1%} -> {sums[1] / whole:.1%} of" in found.manifest.notes[0]


@pytest.mark.parametrize("step", [1, 3])
def test_a_killed_run_goes_on_to_the_same_weights(write_recipe: Write, source: Path, step: int) -> None:
    prune = {**FIT, **TWO_STEPS, "criterion": "wanda", "permute": True, "distill": {"output_weight": 1}}
    stages = {**TEACHER, "prune": prune}
    whole = made(write_recipe, source, "whole", stages, "prune")
    killer, path = Killer(step), write_recipe(source, stages, name="killed")
    with pytest.raises(KilledError):
        run(load_recipe(path), killer)
    killer.kill_at = -1
    run(load_recipe(path), killer)
    resumed = load_checkpoint(path.parent / "runs" / "killed" / "02-prune")
    same(resumed.weights, whole.weights)
    same(resumed.masks, whole.masks)
    assert resumed.manifest.notes == whole.manifest.notes


def test_distillation_begins_at_nothing(write_recipe: Write, source: Path) -> None:
    """The teacher is as it was, and the permuted student its equal in q, k and v of the last block."""
    prune = {**FIT, **STILL, "permute": True, "distill": {"task_weight": 0}}
    prune |= {"layers": {"include": ["*.layer.1.*output.dense"]}}
    model = {"source": str(source), "max_length": 16, "dropout": 0.0}
    path = write_recipe(source, {**TEACHER, "prune": prune}, name="taught", model=model)
    run(load_recipe(path), SilentReporter())
    found = load_checkpoint(path.parent / "runs" / "taught" / "02-prune")
    assert found.manifest.notes[0].startswith("permuted the channels of 2 groups")
    assert abs(found.manifest.losses["minilm"]) < 1e-6, "what is pruned comes behind them"


def test_a_second_stage_leaves_masked_layers_as_they_are(write_recipe: Write, source: Path) -> None:
    stages = {
        "first": {"type": "prune", **FIT, **STILL, "layers": {"include": ["*.attention.*"]}, "permute": True},
        "second": {"type": "prune", **FIT, **STILL, "layers": {"include": ["*.output.dense"]}, "permute": True},
    }
    second = made(write_recipe, source, "twice", stages, "second")
    notes = second.manifest.notes
    assert [note.partition(":")[0] for note in notes] == [
        "permuted the channels of 2 groups", "not permuted", "permuted the channels of 2 groups", "not permuted"
    ]  # fmt: skip
    assert notes[3].endswith("attention.output.dense: it has a mask already")
    model, _ = build(second)
    for name, mask in second.masks.items():
        assert count_violations(mask, Pattern(2, 4)) == 0
        assert not model.get_submodule(name).weight[~mask].any()


def test_not_to_permute_is_no_key(write_recipe: Write, source: Path) -> None:
    """Checkpoints of recipes that say nothing of it stay what these recipes make."""
    assert "permute" not in PruneConfig().model_dump(mode="json")

    def key(**prune: Any) -> str:
        return resolve_graph(load_recipe(write_recipe(source, {"prune": prune}))).nodes["prune"].fingerprint

    assert key() == key(permute=False) != key(permute=True)
