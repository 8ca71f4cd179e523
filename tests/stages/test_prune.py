"""Prune stages on a tiny BERT: every criterion and schedule, permuted channels, killed runs, patterns, bad recipes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sqat.checkpoint.store import Checkpoint, load_checkpoint
from sqat.errors import SqatError
from sqat.models.loading import build
from sqat.pipeline.graph import resolve_graph
from sqat.pipeline.runner import run
from sqat.progress import SilentReporter
from sqat.recipe.loader import load_recipe
from sqat.recipe.stages import PruneConfig
from sqat.sparsity.masks import count_violations, nm_mask
from sqat.sparsity.pattern import Pattern, parse_pattern
from tests.errors import raises_code

pytestmark = pytest.mark.pipeline
TWO_OF_FOUR = Pattern(2, 4)
FIT = {"steps": 4, "batch_size": 8, "learning_rate": 1e-3, "save_every": 0}
TEACHER = {"train": {"steps": 0}}
TWO_STEPS = {"schedule": "per-group", "recovery_fraction": 0.25}  # masks at steps 0 and 3
ONE_SHOT = {"schedule": {"name": "per-group", "num_masks": 1}, "steps": 1, "learning_rate": 1e-30}
SR_STE = {"schedule": {"name": "sr-ste", "decay": 0.01}}
CRITERIA: dict[str, Any] = {
    "wanda": "wanda",
    "taylor": {"name": "taylor", "samples": 16},
    "taylor-mean": {"name": "taylor", "average": "mean"},
    "sparsegpt": {"name": "sparsegpt", "damping": 0.1},
}
Write = Callable[..., Path]
Prune = Callable[..., Checkpoint]


@pytest.fixture(scope="module")
def source(make_source: Callable[..., Path]) -> Path:
    return make_source("bert", id2label={0: "cold", 1: "warm"})


@pytest.fixture(autouse=True)
def quick_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """One start of the search for an order of channels is enough here."""
    monkeypatch.setattr("sqat.sparsity.permutation.COLUMNS_TRIED", 1)


@pytest.fixture
def prune(write_recipe: Write, source: Path) -> Prune:
    """`prune(name, before, **config)`: the checkpoint of a prune stage; `before` are earlier stages."""

    def call(name: str = "tiny", before: Mapping[str, Any] = {}, **config: Any) -> Checkpoint:
        path = write_recipe(source, {**before, "prune": {**FIT, **config}}, name=name)
        run(load_recipe(path), SilentReporter())
        return load_stage(path, name, "prune")

    return call


def load_stage(path: Path, name: str, stage: str) -> Checkpoint:
    return load_checkpoint(next((path.parent / "runs" / name).glob(f"*-{stage}")))


def check_patterns(checkpoint: Checkpoint) -> None:
    """Every pruned layer keeps exactly N of each M, and its zeros are its mask."""
    for name, mask in checkpoint.masks.items():
        pattern = parse_pattern(checkpoint.manifest.layers[name].pattern)
        assert float(mask.float().mean()) == pattern.n / pattern.m, name
        assert count_violations(mask, pattern) == 0
        assert not checkpoint.weights[f"{name}.weight"][~mask].any()


def assert_same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("schedule", ["per-group", "group-fraction"])
def test_every_criterion_ends_at_the_pattern_with_its_own_masks(prune: Prune, schedule: str) -> None:
    masks = []
    for name, criterion in {"plain": "magnitude", **CRITERIA}.items():
        found = prune(name, criterion=criterion, schedule=schedule, recovery_fraction=0.25)
        check_patterns(found)
        masks.append(torch.cat([mask.flatten() for mask in found.masks.values()]))
    assert len(torch.stack(masks).unique(dim=0)) == len(CRITERIA) + 1


def test_one_shot_scores_the_model_it_starts_from(prune: Prune, source: Path) -> None:
    found, start, moved = prune(criterion="sparsegpt", **ONE_SHOT), load_file(source / "model.safetensors"), 0
    for name, mask in found.masks.items():
        before, after = start[f"{name}.weight"], found.weights[f"{name}.weight"]
        moved += int(((before != after) & mask).sum())
        assert float((after - before)[mask].norm() / before[mask].norm()) < 1, name
    assert moved > 0.5 * sum(int(mask.sum()) for mask in found.masks.values()), "weights that stay are corrected"
    for name, mask in prune("plain", **ONE_SHOT).masks.items():
        assert torch.equal(mask, nm_mask(start[f"{name}.weight"].abs(), TWO_OF_FOUR))


def test_distillation_without_labels_gives_gradients_too(prune: Prune) -> None:
    distill = {"task_weight": 0, "output_weight": 1}
    check_patterns(prune(before=TEACHER, criterion=CRITERIA["taylor"], distill=distill))


def test_a_layer_without_gradient_is_an_error(prune: Prune) -> None:
    """MiniLM's loss ends at q, k and v of the last block."""
    with raises_code("unsupported-model", r"bert\.encoder\.layer\.1\.attention\.output\.dense"):
        prune(before=TEACHER, criterion="taylor", distill={"task_weight": 0})


class KilledError(Exception):
    """Stands for a kill."""


class Killer(SilentReporter):
    """Ends the run after a step of the prune stage."""

    def __init__(self, step: int) -> None:
        self.kill_at, self.title, self.lines = step, "", list[str]()

    def start(self, title: str, total: int) -> None:
        self.title = title

    def info(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, step: int, values: Mapping[str, float], rate: float) -> None:
        if self.title == "prune" and step == self.kill_at:
            raise KilledError


KILLED: dict[str, dict[str, Any]] = {
    "taylor": {**TWO_STEPS, "criterion": CRITERIA["taylor"]},
    "sparsegpt": {**TWO_STEPS, "criterion": CRITERIA["sparsegpt"]},
    "sr-ste": SR_STE,
    "permuted": {**TWO_STEPS, "criterion": "wanda", "permute": True, "distill": {"output_weight": 1}},
}


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("name", KILLED)
def test_a_killed_run_resumes_to_the_same_weights(
    write_recipe: Write, source: Path, prune: Prune, name: str, step: int
) -> None:
    before = TEACHER if "distill" in KILLED[name] else {}
    whole = prune("whole", before, **KILLED[name])
    killer = Killer(step)
    path = write_recipe(source, {**before, "prune": {**FIT, **KILLED[name]}}, name="killed")
    with pytest.raises(KilledError):
        run(load_recipe(path), killer)
    killer.kill_at = -1
    run(load_recipe(path), killer)
    assert f"prune: resumed at step {step - 1} of 4" in killer.lines
    resumed = load_stage(path, "killed", "prune")
    assert_same(resumed.weights, whole.weights)
    assert_same(resumed.masks, whole.masks)
    assert resumed.manifest.notes == whole.manifest.notes


def test_sr_ste_changes_masks_while_it_trains(prune: Prune, source: Path) -> None:
    strong = {"schedule": {"name": "sr-ste", "decay": 0.1}, "learning_rate": 3e-2, "optimizer": "sgd"}
    found = prune(**strong)
    check_patterns(found)
    start = load_file(source / "model.safetensors")
    first = {name: nm_mask(start[f"{name}.weight"].abs(), TWO_OF_FOUR) for name in found.masks}
    assert any(not torch.equal(mask, first[name]) for name, mask in found.masks.items())
    assert found.manifest.losses.keys() == {"task", "decay"}
    held = prune("held", **{**strong, "schedule": {"name": "sr-ste", "decay": 0.0, "until": 0.25}})
    assert_same(held.masks, first)
    assert held.manifest.losses.keys() == {"task"}


def test_layers_follow_the_first_glob_that_matches(prune: Prune) -> None:
    patterns = {"*.layer.0.attention.self.query": "dense", "*.attention.self.*": "1:4", "*.intermediate.dense": "2:8"}
    for criterion in ("magnitude", "sparsegpt"):
        found = prune(criterion, patterns=patterns, criterion=criterion)
        check_patterns(found)
        layers = {name.removeprefix("bert.encoder.layer."): record for name, record in found.manifest.layers.items()}
        query = "0.attention.self.query"
        assert layers[query].dense_because == f"dense by the recipe's pattern '*.layer.{query}'"
        assert f"bert.encoder.layer.{query}" not in found.masks
        assert layers["1.attention.self.query"].pattern == layers["0.attention.self.key"].pattern == "1:4"
        assert layers["0.intermediate.dense"].pattern == "2:8"
        assert layers["1.output.dense"].pattern == "2:4"


def test_every_exported_file_has_each_layers_pattern(write_recipe: Write, source: Path) -> None:
    stages = {
        "prune": {**FIT, "patterns": {"*.query": "dense", "*.intermediate.dense": "1:4"}, "criterion": "wanda"},
        "calibrate": {"samples": 16},
        "export": {"targets": ["torch-semi-structured", "compressed-tensors"]},
    }
    path = write_recipe(source, stages)
    run(load_recipe(path), SilentReporter())
    folder = path.parent / "runs" / "tiny" / "03-export"
    records = load_checkpoint(folder).manifest.layers
    expected = {"query": "", "key": "2:4", "intermediate.dense": "1:4"}
    packed = json.loads((folder / "semi-structured" / "sparse.json").read_text())
    for name, record in records.items():
        if name.startswith("bert.encoder"):
            assert record.pattern == next((p for end, p in expected.items() if name.endswith(end)), "2:4")
            assert packed["layers"].get(name, {"pattern": ""})["pattern"] == record.pattern
            assert record.pattern or packed["dense"][name] == "dense by the recipe's pattern '*.query'"


def test_a_second_stage_keeps_what_the_first_pruned(write_recipe: Write, source: Path) -> None:
    fit = {"type": "prune", "steps": 2, "batch_size": 8, "learning_rate": 1e-3}
    stages = {
        "train": {"steps": 1, "batch_size": 8},
        "attention": {**fit, "layers": {"include": ["*.attention.self.*"]}},
        "rest": {**fit, "pattern": "1:4", "layers": {"exclude": ["*.attention.self.*"]}},
    }
    path = write_recipe(source, stages, name="twice")
    run(load_recipe(path), SilentReporter())
    first, second = (load_stage(path, "twice", name) for name in ("attention", "rest"))
    query, dense = (f"bert.encoder.layer.0.{name}" for name in ("attention.self.query", "output.dense"))
    assert first.manifest.layers[query].pattern == "2:4"
    assert first.manifest.layers[dense].dense_because == "not included by the recipe"
    assert torch.equal(second.masks[query], first.masks[query])
    assert not torch.equal(second.weights[f"{query}.weight"], first.weights[f"{query}.weight"]), "it trains on"
    assert second.manifest.layers[query] == first.manifest.layers[query]
    assert second.manifest.layers[dense].pattern == "1:4"
    assert float((second.weights[f"{dense}.weight"] == 0).float().mean()) == 0.75


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "taylor", "sparsegpt"])
def test_permuted_channels_keep_more_of_every_criterions_scores(prune: Prune, source: Path, criterion: str) -> None:
    found = prune(criterion, criterion=criterion, permute=True, **ONE_SHOT)
    note = found.manifest.notes[0]
    assert note.startswith("permuted the channels of 4 groups: the layers that read them keep ")
    assert note.endswith(f" of their {'wanda' if criterion == 'sparsegpt' else criterion} scores")
    before, after = (float(share.rstrip("%")) for share in note.split("keep ")[1].split(" of")[0].split(" -> "))
    assert after > before + 1
    assert found.manifest.notes[1].startswith("not permuted: the inputs of 8 layers, ")
    check_patterns(found)
    bias = "bert.encoder.layer.0.intermediate.dense.bias"
    start = load_file(source / "model.safetensors")[bias]
    assert not torch.equal(found.weights[bias], start)
    assert torch.equal(found.weights[bias].sort().values, start.sort().values)


def test_the_note_tells_the_magnitude_that_the_checkpoint_keeps(prune: Prune, source: Path) -> None:
    sums = []
    for permute in (False, True):
        found = prune(f"kept-{permute}", permute=permute, **ONE_SHOT)
        ends = ("attention.output.dense.weight", "output.dense.weight")
        sums.append(sum(float(w.double().abs().sum()) for name, w in found.weights.items() if name.endswith(ends)))
    start = load_file(source / "model.safetensors")
    total = sum(float(w.double().abs().sum()) for name, w in start.items() if name.endswith("output.dense.weight"))
    assert f"keep {sums[0] / total:.1%} -> {sums[1] / total:.1%} of" in found.manifest.notes[0]


def test_a_permuted_student_starts_as_its_teacher(write_recipe: Write, source: Path) -> None:
    config = {**FIT, **ONE_SHOT, "permute": True, "distill": {"task_weight": 0}}
    config |= {"layers": {"include": ["*.layer.1.*output.dense"]}}  # behind q, k and v of the last block
    model = {"source": str(source), "max_length": 16, "dropout": 0.0}
    path = write_recipe(source, {**TEACHER, "prune": config}, name="taught", model=model)
    run(load_recipe(path), SilentReporter())
    found = load_stage(path, "taught", "prune")
    assert found.manifest.notes[0].startswith("permuted the channels of 2 groups")
    assert abs(found.manifest.losses["minilm"]) < 1e-6


def test_a_second_stage_does_not_permute_masked_layers(write_recipe: Write, source: Path) -> None:
    both = {"type": "prune", **FIT, **ONE_SHOT, "permute": True}
    stages = {
        "first": {**both, "layers": {"include": ["*.attention.*"]}},
        "second": {**both, "layers": {"include": ["*.output.dense"]}},
    }
    path = write_recipe(source, stages, name="twice")
    run(load_recipe(path), SilentReporter())
    second = load_stage(path, "twice", "second")
    notes = second.manifest.notes
    kinds = ["permuted the channels of 2 groups", "not permuted"]
    assert [note.partition(":")[0] for note in notes] == kinds * 2
    assert notes[3].endswith("attention.output.dense: it has a mask already")
    model, _ = build(second)
    for name, mask in second.masks.items():
        assert count_violations(mask, TWO_OF_FOUR) == 0
        assert not model.get_submodule(name).weight[~mask].any()


BAD_STAGES: list[tuple[dict[str, Any], str]] = [
    ({"patterns": {"*": "4:2"}}, "stages.prune.patterns"),
    ({"patterns": {"*": "none"}}, "stages.prune.patterns"),
    ({"patterns": ["2:4"]}, "stages.prune.patterns"),
    ({"patterns": {"*": "1:4"}, "schedule": {"name": "per-group", "num_masks": [0.25, 0.5]}}, "stages.prune.schedule"),
    ({"criterion": "wandas"}, "stages.prune.criterion.* did you mean 'wanda'"),
    ({"criterion": {"name": "wanda", "samples": 0}}, "stages.prune.criterion"),
    ({"criterion": {"name": "wanda", "damping": 1}}, "stages.prune.criterion"),
    ({"criterion": {"name": "sparsegpt", "damping": 0}}, "stages.prune.criterion"),
    ({"criterion": "wanda", "schedule": "sr-ste"}, "stages.prune"),
    ({"recovery_fraction": 0.5, "schedule": "sr-ste"}, "stages.prune"),
    ({"ema": 0.9, "schedule": "sr-ste"}, "stages.prune"),
    ({"ema": 0.9, "evaluate_every": 2, "keep_checkpoint": "best"}, "stages.prune"),
    ({"schedule": {"name": "sr-ste", "num_masks": 3}}, "stages.prune.schedule"),
]


@pytest.mark.parametrize(("config", "key"), BAD_STAGES)
def test_bad_prune_stages_are_refused_at_their_key(
    write_recipe: Write, tmp_path: Path, config: dict[str, Any], key: str
) -> None:
    with pytest.raises(SqatError, match=rf"^tiny.yaml:\d+: .*{key}"):
        load_recipe(write_recipe(tmp_path, {"train": {}, "prune": config}))


def test_a_prune_stage_is_another_where_patterns_or_permute_are(write_recipe: Write, source: Path) -> None:
    def key(**prune: Any) -> str:
        return resolve_graph(load_recipe(write_recipe(source, {"prune": prune}))).nodes["prune"].fingerprint

    assert key() == key(patterns={}) == key(permute=False) != key(permute=True)
    assert len({key(), key(patterns={"*.query": "1:4"}), key(patterns={"*.query": "2:8"})}) == 3
    orders = ({"*.key": "1:4", "*": "2:4"}, {"*": "2:4", "*.key": "1:4"})
    assert key(patterns=orders[0]) != key(patterns=orders[1]), "the first glob counts"


def test_masks_are_set_as_late_as_the_recovery_allows() -> None:
    config = PruneConfig.model_validate(
        {"schedule": {"name": "per-group", "num_masks": (0.1, 0.3, 0.5)}, "recovery_fraction": 0.5}
    )
    assert config.schedule.mask_steps(40, config.recovery_fraction) == {0: 0, 10: 1, 20: 2}
    one_shot = PruneConfig.model_validate({"schedule": {"name": "per-group", "num_masks": 1}})
    assert one_shot.schedule.mask_steps(40, one_shot.recovery_fraction) == {0: 0}
    assert PruneConfig.model_validate({"schedule": "sr-ste"}).schedule.mask_steps(3, 0.8) == {0: 0, 1: 0, 2: 0}
