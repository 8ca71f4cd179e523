"""Quality gates: a result that misses one is set aside, a better one stays, and nothing is trained twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sqat.checkpoint.manifest import load_manifest
from sqat.checkpoint.store import load_checkpoint, save_checkpoint
from sqat.cli import main
from sqat.errors import GateError, SqatError
from sqat.pipeline import runner as pipeline
from sqat.pipeline.graph import resolve_graph
from sqat.pipeline.quality_gates import gate_limit
from sqat.pipeline.stage_run import STAGES
from sqat.recipe.loader import load_recipe
from sqat.recipe.stages import Gate
from tests.errors import raises_code
from tests.tiny import Project, Recorder

pytestmark = pytest.mark.pipeline
WRECK = "stages.prune.learning_rate=1"  # no model survives it
DROP = "stages.prune.gates={accuracy: {max_drop: 0.01}}"


def run(project: Project, *overrides: str, last: str = "prune", **options: Any) -> list[str]:
    reporter = Recorder()
    pipeline.run(load_recipe(project.recipe, overrides), reporter, last=last, **options)
    return reporter.lines


def rejected(project: Project) -> Path:
    return project.stage("train").with_name("02-prune.rejected")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_gates_change_no_fingerprint_and_read_the_recorded_metrics(copy: Project) -> None:
    assert run(copy, DROP)[:2] == ["train: unchanged", "prune: unchanged"]
    before = content(copy.stage("prune"))
    with pytest.raises(GateError, match=r"prune misses a gate: dev accuracy 1\.0000, allowed from 1\.1000 \(min\)"):
        run(copy, "stages.prune.gates={accuracy: {min: 1.1}}")
    assert content(copy.stage("prune")) == before
    assert not rejected(copy).exists()


def test_a_worse_result_does_not_replace_a_better_one(copy: Project) -> None:
    before = content(copy.stage("prune"))
    with pytest.raises(GateError) as caught:
        run(copy, WRECK, DROP, last="calibrate")
    got = load_manifest(rejected(copy)).metrics["dev"]["accuracy"]
    assert got < 0.9
    assert str(rejected(copy)) in str(caught.value)
    assert f"{got:.4f}, allowed from 0.9900 (train 1.0000 - 0.01)" in str(caught.value)
    assert content(copy.stage("prune")) == before, "the better one is as it was"
    assert not list(copy.stage("prune").parent.glob(".*"))


def test_a_rejected_result_is_neither_trained_again_nor_a_parent(
    copy: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(GateError):
        run(copy, WRECK, DROP)
    worse = content(rejected(copy))
    with raises_code("stale-checkpoint"):
        run(copy, WRECK, DROP, first="calibrate", last="calibrate")
    monkeypatch.setitem(STAGES, "prune", lambda *_: pytest.fail("trained"))
    with pytest.raises(GateError):
        run(copy, WRECK, DROP)
    lines = run(copy, WRECK, "stages.prune.gates={accuracy: {max_drop: 1}}")
    assert str(copy.stage("prune")) in lines[1]
    assert content(copy.stage("prune")) == worse
    assert not rejected(copy).exists()


def test_a_later_rejection_replaces_the_first(copy: Project) -> None:
    with pytest.raises(GateError):
        run(copy, WRECK, DROP)
    first = load_manifest(rejected(copy)).fingerprint
    with pytest.raises(GateError):
        run(copy, "stages.prune.learning_rate=2", DROP)
    assert load_manifest(rejected(copy)).fingerprint != first


RETRY = "stages.prune.retry={times: 1, steps_multiplier: 2}"
SHORT = "stages.prune.steps=3"
FEW = ("stages.prune.epochs=null", SHORT, "stages.prune.gates={accuracy: {min: 1.1}}", RETRY)


def test_a_retry_takes_more_steps_and_is_recorded(copy: Project) -> None:
    reporter = Recorder()
    with pytest.raises(GateError):
        pipeline.run(load_recipe(copy.recipe, FEW), reporter, last="prune")
    assert "prune: misses a gate: dev accuracy 1.0000, allowed from 1.1000 (min)" in reporter.lines
    assert "prune: attempt 2 of 2, with more steps" in reporter.lines
    manifest = load_manifest(rejected(copy))
    assert (manifest.attempt, manifest.steps) == (2, 6)
    with pytest.raises(GateError):
        pipeline.run(load_recipe(copy.recipe, FEW), again := Recorder(), last="prune")
    assert again.lines == ["train: unchanged"], "both attempts are remembered"


def test_a_retry_goes_on_where_only_the_first_attempt_was_made(copy: Project) -> None:
    with pytest.raises(GateError):
        run(copy, *FEW[:3])
    assert load_manifest(rejected(copy)).attempt == 1
    with pytest.raises(GateError):
        run(copy, *FEW)
    assert load_manifest(rejected(copy)).attempt == 2
    run(copy, *FEW[:2], RETRY, "stages.prune.gates={accuracy: {min: 0.1}}")
    assert load_manifest(copy.stage("prune")).attempt == 2
    lines = run(copy, *FEW[:2])
    assert lines[1] != "prune: unchanged", "without retry the recipe does not make the longer attempt"


def test_an_attempt_with_another_steps_multiplier_does_not_count(copy: Project) -> None:
    with pytest.raises(GateError):
        run(copy, *FEW)
    manifest = load_manifest(rejected(copy))
    assert (manifest.attempt, manifest.retry_multiplier, manifest.steps) == (2, 2, 6)
    three = "stages.prune.retry={times: 1, steps_multiplier: 3}"
    with pytest.raises(GateError):
        run(copy, *FEW[:3], three)
    manifest = load_manifest(rejected(copy))
    assert (manifest.attempt, manifest.retry_multiplier, manifest.steps) == (2, 3, 9)
    passing = "stages.prune.gates={accuracy: {min: 0.1}}"
    run(copy, *FEW[:2], three, passing)
    assert load_manifest(copy.stage("prune")).steps == 9
    assert run(copy, *FEW[:2], three, passing)[1] == "prune: unchanged"
    run(copy, *FEW[:2], RETRY, passing)
    assert load_manifest(copy.stage("prune")).steps == 3


def test_every_file_of_an_export_must_pass(copy: Project) -> None:
    checkpoint = load_checkpoint(copy.stage("export"))
    metrics = {**checkpoint.manifest.metrics, "dev onnx-int8": {"accuracy": 0.5}}
    spoiled = checkpoint.manifest.model_copy(update={"metrics": metrics})
    save_checkpoint(checkpoint.__class__(**{**vars(checkpoint), "manifest": spoiled}), copy.stage("export"))
    with pytest.raises(GateError, match=r"onnx-int8 accuracy 0\.5000, allowed from 0\.9000 \(train 1\.0000 - 0\.1\)"):
        run(copy, "stages.export.gates={accuracy: {max_drop: 0.1, against: train}}", last="export")


def test_the_plan_and_the_exit_code(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    high = ["--set", "stages.prune.gates={accuracy: {min: 1.1, max_drop: 0.2}}", "--to", "prune"]
    assert main(["run", str(copy.recipe), "--dry-run", *high]) == 0
    shown = capsys.readouterr().out
    assert "gate of prune: accuracy at least 1.1, at most 0.2 below train\n" in shown
    assert "prune misses a gate: dev accuracy 1.0000, allowed from 1.1000 (min)\n" in shown
    assert main(["run", str(copy.recipe), "--dry-run", "--json", *high]) == 0
    assert json.loads(capsys.readouterr().out)[1]["gates"] == ["accuracy at least 1.1, at most 0.2 below train"]
    assert main(["run", str(copy.recipe), "--quiet", *high]) == 3
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("limits", [{"max_drop": 0.1}, {"min": 0.5, "max_drop": 0.1}])
def test_nan_is_nothing_to_compare_with(copy: Project, limits: dict[str, float]) -> None:
    parent = load_manifest(copy.stage("train")).model_copy(update={"metrics": {"dev": {"accuracy": float("nan")}}})
    graph = resolve_graph(load_recipe(copy.recipe))
    with pytest.raises(
        SqatError, match="gate accuracy of stage prune compares with stage train, whose dev accuracy is NaN"
    ):
        gate_limit(graph, graph.nodes["prune"], "accuracy", Gate(**limits), parent)  # type: ignore[arg-type]


def test_the_stage_that_a_gate_compares_with_must_have_run(copy: Project) -> None:
    gate = "stages.calibrate.gates={accuracy: {max_drop: 0.1, against: prune}}"
    changed = ("stages.calibrate.samples=32", "stages.calibrate.from=train", "stages.prune.epochs=1", gate)
    with raises_code("stage-order", "prune"):
        run(copy, *changed, first="calibrate", last="calibrate")


def test_a_result_set_aside_goes_once_one_of_its_stage_is_in_place(copy: Project) -> None:
    with pytest.raises(GateError):
        run(copy, *FEW[:3])
    assert rejected(copy).exists()
    run(copy, *FEW[:2], "stages.prune.gates={accuracy: {min: 0.1}}")
    assert not rejected(copy).exists()
    with pytest.raises(GateError):
        run(copy, WRECK, DROP)
    run(copy, *FEW[:2], "stages.prune.gates={accuracy: {min: 0.1}}")
    assert rejected(copy).exists(), "it is of another recipe, whose gates may be changed yet"


def test_equal_inputs_make_no_child_run_again(copy: Project) -> None:
    before = load_manifest(copy.stage("calibrate")).sha256
    run(copy, first="calibrate", last="calibrate", force=True)
    assert load_manifest(copy.stage("calibrate")).sha256 != before, "it took another time"
    assert run(copy, last="qat")[-1] == "qat: unchanged"
