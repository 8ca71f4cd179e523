"""The rehearsal refuses what a run would refuse in its last stage, leaves nothing behind, and changes no bit."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from sqat.cli import main
from sqat.errors import SqatError, StoppedError
from sqat.pipeline import rehearsal, runner
from sqat.pipeline.result_files import REHEARSED_FILE
from sqat.recipe.loader import load_recipe
from sqat.stages import calibrate
from sqat.training import loop
from tests.errors import raises_code
from tests.tiny import Project, Recorder, build_model, write_model, write_project, write_rows

pytestmark = pytest.mark.pipeline
Change = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that has not run; copy it."""
    return write_project(tmp_path_factory.mktemp("template"), placement="tensorrt")


@pytest.fixture
def project(template: Project, tmp_path: Path) -> Project:
    return template.copy(tmp_path / "project")


@pytest.fixture
def no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a stage of the run itself begins."""

    def run(self: object, force: bool) -> None:
        raise AssertionError("a stage began")

    monkeypatch.setattr("sqat.pipeline.stage_run.StageRun.run", run)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def with_huge_weight(folder: Path) -> list[str]:
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["embeddings.word_embeddings.weight"][-1] = 1e6  # of a word that no row has
    save_file(tensors, path, metadata={"format": "pt"})
    return ["stages.export.targets=[onnx-fp16]"]


def without_kernels(folder: Path) -> list[str]:
    write_model(folder / "model", "modernbert")
    return ["stages.calibrate.placement=cpu"]


def with_token_beyond_the_table(folder: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.add_tokens(["beyond"])
    tokenizer.save_pretrained(folder / "model")
    return []


def with_other_labels(folder: Path) -> list[str]:
    model = build_model(vocab_size=len(AutoTokenizer.from_pretrained(folder / "model")))
    model.config.id2label, model.config.label2id = {0: "negative", 1: "neutral"}, {"negative": 0, "neutral": 1}
    model.save_pretrained(folder / "model")
    return ["stages.train={steps: 0}"]


def with_test_row(row: dict[str, Any]) -> Change:
    def change(folder: Path) -> list[str]:
        write_rows(folder / "test.jsonl", [{"text": "good film", "label": "positive"}, row])
        return []

    return change


def with_settings(*settings: str) -> Change:
    return lambda folder: [*settings]


RELEVANCE = (
    "task={name: relevance, loss: pairwise}",
    *(f"data.{split}={split}-relevance.jsonl" for split in ("train", "dev", "test")),
    "data.columns={passage: text, candidates: candidates, group: qid}",
)
LATE: dict[str, tuple[Change, str, int, str]] = {
    "a target cannot express the model": (with_huge_weight, "unsupported-model", 2, "export"),
    "the kernels cannot compute the model": (without_kernels, "unsupported-model", 2, "calibrate"),
    "distillation finds no q, k and v": (with_settings("stages.qat.distill.qkv=[query]"), "no-layer", 2, "qat"),
    "the width is no multiple of the relation heads": (
        with_settings("stages.qat.distill.loss={name: minilm-v2, relation_heads: 5}"), "unsupported-model", 2, "qat"),
    "a token lies beyond the table": (with_token_beyond_the_table, "model-mismatch", 2, "train"),
    "the source has other labels": (with_other_labels, "model-mismatch", 2, "train"),
    "a test row has an unknown label": (with_test_row({"text": "a film", "label": "other"}), "invalid-data", 2, ""),
    "a test row has no text": (with_test_row({"label": "positive"}), "invalid-data", 2, ""),
    "a query does not fit a later batch": (
        with_settings(*RELEVANCE, "stages.qat.batch_size=3"), "recipe-conflict", 2, "qat"),
    "no layer is left to quantize": (
        with_settings("stages.calibrate.layers.include=[nothing.*]"), "no-layer", 2, "calibrate"),
}  # fmt: skip


@pytest.mark.parametrize("fault", LATE)
@pytest.mark.usefixtures("no_step")
def test_a_late_fault_is_told_before_the_first_step(fault: str, project: Project, scratch: Path) -> None:
    change, code, exit_code, stage = LATE[fault]
    loaded = load_recipe(project.recipe, change(project.folder))
    before = contents(project.folder)
    with pytest.raises(SqatError) as error:
        runner.run(loaded, Recorder(), rehearsal=Recorder())
    assert (error.value.code, error.value.exit_code) == (code, exit_code)
    assert not stage or error.value.place.startswith(f"rehearsal of stage {stage}")
    assert contents(project.folder) == before
    assert not [*scratch.iterdir()]


@pytest.mark.usefixtures("no_step")
def test_the_command_tells_one_line_and_leaves_nothing(
    project: Project, capsys: pytest.CaptureFixture[str], scratch: Path
) -> None:
    before = contents(project.folder)
    refused = ["--set", "stages.qat.distill.qkv=[query]"]
    for flags in (refused, [*refused, "--rehearse"]):
        assert main(["run", str(project.recipe), *flags]) == 2
        start, line = capsys.readouterr().err.splitlines()
        assert start.startswith("rehearsal: 5 stages")
        assert line.startswith("error: rehearsal of stage qat: ")
    assert main(["run", str(project.recipe), "--rehearse"]) == 0
    assert "rehearsal: 5 stages pass" in capsys.readouterr().err
    assert contents(project.folder) == before
    assert not [*scratch.iterdir()]


def test_a_fault_that_is_no_refusal_names_the_stage(
    project: Project, capsys: pytest.CaptureFixture[str], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(project.folder)
    monkeypatch.setattr("sqat.stages.calibrate.choose_layers", lambda *_, **__: {}["gone"])
    assert main(["run", str(project.recipe), "--quiet"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "rehearsal of stage calibrate: KeyError: 'gone'; the run has made no training step" in line
    assert contents(project.folder) == before
    assert not [*scratch.iterdir()]


def weights(project: Project, stage: str) -> dict[str, Tensor]:
    return load_file(project.stage(stage) / "model.safetensors")


def test_training_gives_the_same_bits_with_and_without(project: Project, tmp_path: Path) -> None:
    other, drawn = project.copy(tmp_path / "other"), torch.get_rng_state()
    few = ["stages.train.steps=2", "stages.train.epochs=null", "stages.prune.steps=2", "stages.prune.epochs=null"]
    said = Recorder()
    runner.rehearse_alone(load_recipe(project.recipe, few), said)
    assert torch.equal(torch.get_rng_state(), drawn)
    runner.run(load_recipe(project.recipe, few), said, last="prune", rehearsal=said)
    runner.run(load_recipe(other.recipe, few), Recorder(), last="prune")
    assert sum(line.startswith("rehearsal: ") for line in said.lines) == 4
    for stage in ("train", "prune"):
        with_one, without = weights(project, stage), weights(other, stage)
        assert all(torch.equal(without[name], tensor) for name, tensor in with_one.items())
    logs = [(each.folder / "runs/tiny/metrics.jsonl").read_text().splitlines() for each in (project, other)]
    assert [json.loads(line)["losses"] for line in logs[0]] == [json.loads(line)["losses"] for line in logs[1]]
    assert not (other.folder / "runs/tiny" / REHEARSED_FILE).exists()


def test_what_was_rehearsed_is_not_rehearsed_again(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: object, force: bool) -> None:
        raise StoppedError("stopped", code="stopped")

    def rehearsed(*overrides: str, **options: Any) -> bool:
        said = Recorder()
        with raises_code("stopped"):
            runner.run(load_recipe(project.recipe, overrides), Recorder(), rehearsal=said, **options)
        return bool(said.lines)

    monkeypatch.setattr("sqat.pipeline.stage_run.StageRun.run", stop)
    assert rehearsed(last="qat")
    assert not rehearsed(last="qat")  # a run that resumes
    assert not rehearsed(last="prune", force=True)
    assert not rehearsed("stages.qat.gates={accuracy: {min: 0.5}}", last="qat")
    assert rehearsed("stages.qat.distill=null", last="qat")


@pytest.mark.parametrize("stage", ["train", "calibrate"])
def test_ctrl_c_ends_a_rehearsal(stage: str, project: Project, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return work(*arguments, **options)

    place = {"train": "sqat.training.loop.take_step", "calibrate": "sqat.stages.calibrate.choose_layers"}[stage]
    work = {"train": loop.take_step, "calibrate": calibrate.choose_layers}[stage]
    monkeypatch.setattr(place, interrupted)
    before = contents(project.folder)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores the signal
    try:
        assert main(["run", str(project.recipe), "--quiet"]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert contents(project.folder) == before
    assert not [*scratch.iterdir()]


def test_equal_work_is_done_once(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    run_with = rehearsal.Rehearsal.run_with

    def counted(self: Any, graphs: Any, node: Any, few: Any) -> Any:
        done.append(node.name)
        return run_with(self, graphs, node, few)

    monkeypatch.setattr(rehearsal.Rehearsal, "run_with", counted)
    twins = "stages={train: {}, one: {type: calibrate, samples: 32}, two: {type: calibrate, from: train, samples: 32}, "
    twins += "three: {type: calibrate, from: train, samples: 64}, after: {type: prune, from: train, distill: {}}}"
    runner.rehearse_alone(load_recipe(project.recipe, [twins]), Recorder())
    assert done == ["train", "one", "three", "after"]
