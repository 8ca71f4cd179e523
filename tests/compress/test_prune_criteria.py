"""Prune stages with every criterion and schedule on a tiny BERT: masks, killed runs, patterns, bad recipes."""

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
from sqat.compress.patterns import choose_patterns
from sqat.errors import SqatError
from sqat.pipeline.graph import resolve_graph
from sqat.pipeline.runner import run
from sqat.progress import SilentReporter
from sqat.recipe.loader import load_recipe
from sqat.recipe.stages import Layers, PruneConfig
from sqat.sparsity.masks import count_violations, nm_mask
from sqat.sparsity.pattern import Pattern, parse_pattern

pytestmark = pytest.mark.pipeline
FIT = {"steps": 4, "batch_size": 8, "learning_rate": 1e-3, "save_every": 0}
TEACHER = {"train": {"steps": 0}}
Write = Callable[..., Path]
TWO_STEPS = {"schedule": "per-group", "recovery_fraction": 0.25}  # masks at steps 0 and 3
CRITERIA: dict[str, Any] = {
    "wanda": "wanda",
    "taylor": {"name": "taylor", "samples": 16},
    "taylor-mean": {"name": "taylor", "average": "mean"},
    "sparsegpt": {"name": "sparsegpt", "damping": 0.1},
}
SR_STE = {"schedule": {"name": "sr-ste", "decay": 0.01}}


def pruned(write: Write, source: Path, name: str = "tiny", before: Mapping[str, Any] = {}, **prune: Any) -> Checkpoint:
    """The checkpoint of a prune stage of a tiny BERT."""
    path = write(source, {**before, "prune": {**FIT, **prune}}, name=name)
    run(load_recipe(path), SilentReporter())
    return load_checkpoint(next((path.parent / "runs" / name).glob("*-prune")))


def check_patterns(checkpoint: Checkpoint) -> None:
    """Every pruned layer keeps exactly N of each M, and its zeros are its mask."""
    for name, mask in checkpoint.masks.items():
        pattern = parse_pattern(checkpoint.manifest.layers[name].pattern)
        assert float(mask.float().mean()) == pattern.n / pattern.m, name
        assert count_violations(mask, pattern) == 0
        assert not checkpoint.weights[f"{name}.weight"][~mask].any()


@pytest.fixture(scope="module")
def source(make_source: Callable[..., Path]) -> Path:
    return make_source("bert")


@pytest.mark.parametrize("schedule", ["per-group", "group-fraction"])
def test_every_criterion_ends_at_the_pattern_with_masks_of_its_own(
    write_recipe: Write, source: Path, schedule: str
) -> None:
    masks = []
    for name, criterion in {"plain": "magnitude", **CRITERIA}.items():
        found = pruned(write_recipe, source, name=name, criterion=criterion, schedule=schedule, recovery_fraction=0.25)
        check_patterns(found)
        masks.append(torch.cat([mask.flatten() for mask in found.masks.values()]))
    assert len(torch.stack(masks).unique(dim=0)) == len(CRITERIA) + 1


def test_one_shot_judges_the_model_it_starts_from(write_recipe: Write, source: Path) -> None:
    one_shot = {"schedule": {"name": "per-group", "num_masks": 1}, "steps": 1, "learning_rate": 1e-30}
    found = pruned(write_recipe, source, criterion="sparsegpt", **one_shot)
    start, moved = load_file(source / "model.safetensors"), 0
    for name, mask in found.masks.items():
        before, after = start[f"{name}.weight"], found.weights[f"{name}.weight"]
        moved += int(((before != after) & mask).sum())
        corrected = float((after - before)[mask].norm() / before[mask].norm())
        assert corrected < 1, name
    assert moved > 0.5 * sum(int(mask.sum()) for mask in found.masks.values()), "weights that stay are corrected"
    plain = pruned(write_recipe, source, name="plain", **one_shot)
    for name, mask in plain.masks.items():
        assert torch.equal(mask, nm_mask(start[f"{name}.weight"].abs(), Pattern(2, 4)))


def test_distilling_without_labels_needs_none_for_gradients(write_recipe: Write, source: Path) -> None:
    distill = {"task_weight": 0, "output_weight": 1}
    check_patterns(pruned(write_recipe, source, before=TEACHER, criterion=CRITERIA["taylor"], distill=distill))


def test_what_no_gradient_reaches_is_told(write_recipe: Write, source: Path) -> None:
    """MiniLM's loss ends at q, k and v of the last block."""
    with pytest.raises(SqatError, match=r"taylor cannot score bert\.encoder\.layer\.1\.attention\.output\.dense"):
        pruned(write_recipe, source, before=TEACHER, criterion="taylor", distill={"task_weight": 0})


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


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("prune", [{**TWO_STEPS, "criterion": CRITERIA[name]} for name in ("taylor", "sparsegpt")]
                                  + [SR_STE], ids=["taylor", "sparsegpt", "sr-ste"])  # fmt: skip
def test_a_killed_run_goes_on_to_the_same_weights(
    write_recipe: Write, source: Path, prune: dict[str, Any], step: int
) -> None:
    whole = pruned(write_recipe, source, name="whole", **prune)
    killer = Killer(step)
    path = write_recipe(source, {"prune": {**FIT, **prune}}, name="killed")
    with pytest.raises(KilledError):
        run(load_recipe(path), killer)
    killer.kill_at = -1
    run(load_recipe(path), killer)
    assert f"prune: resumed at step {step - 1} of 4" in killer.lines
    resumed = load_checkpoint(path.parent / "runs" / "killed" / "01-prune")
    same(resumed.weights, whole.weights)
    same(resumed.masks, whole.masks)


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_sr_ste_changes_masks_while_it_trains(write_recipe: Write, source: Path) -> None:
    strong = {"schedule": {"name": "sr-ste", "decay": 0.1}, "learning_rate": 3e-2, "optimizer": "sgd"}
    found = pruned(write_recipe, source, **strong)
    check_patterns(found)
    start = load_file(source / "model.safetensors")
    first = {name: nm_mask(start[f"{name}.weight"].abs(), Pattern(2, 4)) for name in found.masks}
    assert any(not torch.equal(mask, first[name]) for name, mask in found.masks.items())
    assert found.manifest.losses.keys() == {"task", "decay"}
    frozen = {**strong, "schedule": {"name": "sr-ste", "decay": 0.0, "until": 0.25}}
    held = pruned(write_recipe, source, name="held", **frozen)
    same(held.masks, first)
    assert held.manifest.losses.keys() == {"task"}


def test_layers_follow_the_first_glob_that_matches(write_recipe: Write, source: Path) -> None:
    patterns = {"*.layer.0.attention.self.query": "dense", "*.attention.self.*": "1:4", "*.intermediate.dense": "2:8"}
    for criterion in ("magnitude", "sparsegpt"):
        found = pruned(write_recipe, source, name=criterion, patterns=patterns, criterion=criterion)
        check_patterns(found)
        layers = {name.removeprefix("bert.encoder.layer."): record for name, record in found.manifest.layers.items()}
        query = "0.attention.self.query"
        assert layers[query].dense_because == f"dense by the recipe's pattern '*.layer.{query}'"
        assert f"bert.encoder.layer.{query}" not in found.masks
        assert layers["1.attention.self.query"].pattern == layers["0.attention.self.key"].pattern == "1:4"
        assert layers["0.intermediate.dense"].pattern == "2:8"
        assert layers["1.output.dense"].pattern == "2:4"


def test_every_file_knows_each_layer_s_pattern(write_recipe: Write, source: Path) -> None:
    stages = {
        "prune": {**FIT, "patterns": {"*.query": "dense", "*.intermediate.dense": "1:4"}, "criterion": "wanda"},
        "calibrate": {"samples": 16},
        "export": {"targets": ["torch-semi-structured", "compressed-tensors"]},
    }
    path = write_recipe(source, stages)
    run(load_recipe(path), SilentReporter())
    folder = path.parent / "runs" / "tiny" / "03-export"
    records = load_checkpoint(folder).manifest.layers
    wanted = {"query": "", "key": "2:4", "intermediate.dense": "1:4"}
    packed = json.loads((folder / "semi-structured" / "sparse.json").read_text())
    for name, record in records.items():
        if name.startswith("bert.encoder"):
            assert record.pattern == next((p for end, p in wanted.items() if name.endswith(end)), "2:4")
            assert packed["layers"].get(name, {"pattern": ""})["pattern"] == record.pattern
            assert record.pattern or packed["dense"][name] == "dense by the recipe's pattern '*.query'"


def test_a_shared_weight_has_one_pattern(make_model: Callable[..., Any]) -> None:
    model = make_model("bert")
    block = model.bert.encoder.layer[0].attention.self
    block.key.weight = block.query.weight
    with pytest.raises(
        SqatError, match=r"query and bert.*key share one weight, which cannot be both 2:4 and 1:4; give both"
    ):
        choose_patterns(model, Layers(), "2:4", {"*.0.*.key": "1:4"})
    patterns, left = choose_patterns(model, Layers(), "2:4", {"*.0.*.key": "1:4", "*.0.*.query": "1:4"})
    assert sum(str(pattern) == "1:4" for pattern in patterns.values()) == 2
    assert set(left) == {"bert.pooler.dense", "classifier"}


BAD_PATTERNS = [
    ({"*.attn.*": "1:4"}, r"patterns: '\*\.attn\.\*' matches no layer; the model has bert\.encoder.* in all\)$"),
    ({"*": "1:4", "*.query": "2:8"}, r"patterns: '\*\.query' comes too late: an earlier glob matches each of"),
    ({"classifier": "1:4"}, r"patterns: 'classifier' matches only layers that are not pruned; "
                            r"classifier is skipped: outside the encoder blocks \(rule B8\); see layers\.include$"),
    ({"*": "dense"}, "patterns: every layer is dense, so no layer is pruned; give a layer a pattern N:M$"),
]  # fmt: skip


@pytest.mark.parametrize(("patterns", "complaint"), BAD_PATTERNS)
def test_globs_that_decide_nothing_are_told(
    write_recipe: Write, source: Path, patterns: dict[str, str], complaint: str
) -> None:
    with pytest.raises(SqatError, match=complaint):
        pruned(write_recipe, source, patterns=patterns)


BAD_STAGES = [
    ({"patterns": {"*": "4:2"}}, "stages.prune.patterns.*: pattern 4:2 must keep N of M with 1 <= N < M <= 32"),
    ({"patterns": {"*": "none"}},
     "stages.prune.patterns.*: pattern 'none' is neither N:M, for instance 2:4, nor dense"),
    ({"patterns": ["2:4"]}, "stages.prune.patterns needs a mapping, got a list"),
    ({"patterns": {"*": "1:4"}, "schedule": {"name": "per-group", "num_masks": [0.25, 0.5]}},
     "stages.prune.schedule: num_masks must end at 0.75, the sparsity of 1:4, got 0.5"),
    ({"criterion": "wandas"}, "stages.prune.criterion: unknown name 'wandas'; did you mean 'wanda'? "
                              "allowed: magnitude, sparsegpt, taylor, wanda"),
    ({"criterion": {"name": "wanda", "samples": 0}}, "stages.prune.criterion: samples must be at least 1, got 0"),
    ({"criterion": {"name": "wanda", "damping": 1}}, "unknown key 'damping' in stages.prune.criterion; "
                                                     "allowed: name, samples"),
    ({"criterion": {"name": "sparsegpt", "damping": 0}},
     "stages.prune.criterion: damping must be a number above 0, got 0"),
    ({"criterion": "wanda", "schedule": "sr-ste"},
     "stages.prune: schedule sr-ste chooses masks before every step, so wanda would observe anew each time; "
     "sr-ste takes the criterion magnitude"),
    ({"recovery_fraction": 0.5, "schedule": "sr-ste"},
     "stages.prune: recovery_fraction means nothing to schedule sr-ste; "
     "set schedule.until, the share of steps with new masks"),
    ({"schedule": {"name": "sr-ste", "steps": 3}},
     "unknown key 'steps' in stages.prune.schedule; allowed: name, decay, until"),
]  # fmt: skip


@pytest.mark.parametrize(("prune", "complaint"), BAD_STAGES, ids=[line for _, line in BAD_STAGES])
def test_bad_prune_stages_are_told_in_one_line(
    write_recipe: Write, tmp_path: Path, prune: dict[str, Any], complaint: str
) -> None:
    path = write_recipe(tmp_path, {"train": {}, "prune": prune})
    with pytest.raises(SqatError) as caught:
        load_recipe(path)
    place, _, line = str(caught.value).partition(": ")
    assert place.startswith("tiny.yaml:")
    assert line == complaint


def test_no_patterns_are_no_key(write_recipe: Write, source: Path) -> None:
    """Checkpoints of recipes that say nothing of patterns stay what these recipes make."""
    section = PruneConfig(pattern="2:4").model_dump(mode="json", exclude={"parent"})
    assert "patterns" not in section
    assert "parent" not in section

    def key(**prune: Any) -> str:
        return resolve_graph(load_recipe(write_recipe(source, {"prune": prune}))).nodes["prune"].fingerprint

    assert key() == key(patterns={})
    assert len({key(), key(patterns={"*.query": "1:4"}), key(patterns={"*.query": "2:8"})}) == 3
    orders = ({"*.key": "1:4", "*": "2:4"}, {"*": "2:4", "*.key": "1:4"})
    assert key(patterns=orders[0]) != key(patterns=orders[1]), "the first glob counts"


def test_masks_are_set_as_before_the_last_at_recovery_fraction() -> None:
    schedule = {"name": "per-group", "num_masks": (0.1, 0.3, 0.5)}
    config = PruneConfig.model_validate({"schedule": schedule, "recovery_fraction": 0.5})
    assert config.schedule.mask_steps(40, config.recovery_fraction) == {0: 0, 10: 1, 20: 2}
    one_shot = PruneConfig.model_validate({"schedule": {"name": "per-group", "num_masks": 1}})
    assert one_shot.schedule.mask_steps(40, one_shot.recovery_fraction) == {0: 0}
    assert PruneConfig.model_validate({"schedule": "sr-ste"}).schedule.mask_steps(3, 0.8) == {0: 0, 1: 0, 2: 0}
