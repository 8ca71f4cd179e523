"""Target cpu-sparse through the command line: a whole recipe, what it is measured at, and what it is refused for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sqat import runtime
from sqat.checkpoint.manifest import LayerRecord
from sqat.checkpoint.store import Checkpoint, load_checkpoint
from sqat.cli import main
from sqat.errors import SqatError
from sqat.evaluation.artifacts import open_onnx
from sqat.export import names
from sqat.export.cpu.encoder import check_encoder, read_encoder
from sqat.export.quantized_model import QuantizedModel, quantize_model
from sqat.export.source import Source, input_sites_only
from sqat.export.targets import write_target
from sqat.export.targets.cpu_sparse import encoder_of
from sqat.models.loading import build
from sqat.pipeline.runner import evaluate, run_stage
from sqat.recipe.loader import load_recipe
from sqat.recipe.stages import ExportConfig
from tests.export.cpu_oracle import interpret
from tests.tiny import Project, Recorder, write_project

pytestmark = pytest.mark.pipeline
QUICK = ["stages.prune.epochs=0.5", "stages.qat.epochs=0.2", "stages.export.targets=[cpu-sparse]"]


class Interpreted:
    """What the code uses of an InferenceSession, by the numpy interpreter."""

    def __init__(self, path: Path) -> None:
        from sqat.onnx_files.read import read_onnx

        self.model = read_onnx(path)

    def get_inputs(self) -> Any:
        return self.model.graph.input

    def run(self, names: None, inputs: Any) -> Any:
        return interpret(self.model, inputs)


@pytest.fixture(autouse=True, scope="module")
def kernels() -> Any:
    """The compiled kernels; the interpreter where there are none."""
    try:
        runtime.library()
        yield
    except SqatError:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runtime, "instruction_set", lambda: "none")
            patch.setattr(runtime, "session", Interpreted)
            yield


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A tiny project that has run to its end by the command line."""
    torch.set_num_threads(1)
    made = write_project(tmp_path_factory.mktemp("cpu") / "project", placement="cpu")
    chosen = [part for override in QUICK for part in ("--set", override)]
    assert main(["run", str(made.recipe), *chosen, "-q"]) == 0
    return made


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "sqat.json").read_text())
    return found


def exported(project: Project, *overrides: str, output: Path | None = None) -> Path:
    loaded = load_recipe(project.recipe, [*QUICK, *overrides])
    return Path(run_stage(loaded, "export", Recorder(), output=output))


def test_the_served_metric_is_the_trained_one(project: Project) -> None:
    folder = project.stage("export")
    served, trained = manifest(folder), manifest(project.stage("qat"))
    assert trained["placement"] == "cpu"
    assert served["metrics"]["dev cpu-sparse"] == trained["metrics"]["dev"]
    assert any(note.startswith("cpu-sparse: 100.00% of 80 decisions equal") for note in served["notes"])
    assert 0.9 < served["metrics"]["dev"]["accuracy"] <= 1
    card = (folder / "README.md").read_text()
    assert "| cpu-sparse | model.cpu-sparse.onnx |" in card
    assert 'sqat.runtime.session("model.cpu-sparse.onnx")' in card


def test_the_file_is_evaluated_as_it_is_served(project: Project) -> None:
    folder = project.stage("export")
    found = evaluate(load_recipe(project.recipe, QUICK), folder / "model.cpu-sparse.onnx", "dev", Recorder())
    assert found == pytest.approx(manifest(folder)["metrics"]["dev cpu-sparse"], abs=1e-6)


def test_other_targets_of_the_same_checkpoint_and_int8_words(project: Project, tmp_path: Path) -> None:
    others = "[onnx-fp32, onnx-int8, cpu-sparse, torch-semi-structured, compressed-tensors]"
    made = exported(
        project, f"stages.export.targets={others}", "stages.export.embeddings=int8", output=tmp_path / "out"
    )
    sizes = {path.name: path.stat().st_size for path in made.glob("*.onnx")}
    assert sizes["model.cpu-sparse.onnx"] < sizes["model.int8.onnx"] < sizes["model.fp32.onnx"]
    notes = manifest(made)["notes"]
    assert sum("100.00% of 80 decisions equal" in note for note in notes) == 5
    assert any("attention product operands) stay float" in note for note in notes), notes


def test_auto_chooses_it_on_x86(project: Project, capfd: pytest.CaptureFixture[str]) -> None:
    chosen = [part for override in QUICK for part in ("--set", override)]
    output = project.folder / "auto"
    assert main(["export", str(project.recipe), *chosen, "--target", "auto", "-o", str(output), "-q"]) == 0
    assert "target" in capfd.readouterr().out
    assert list(output.glob("model.*.onnx"))


@pytest.mark.parametrize(("overrides", "line"), [
    (["stages.calibrate.placement=linear"],
     r"target cpu-sparse needs activation placement cpu, and the model is calibrated with linear"),
    (["stages.export.embeddings=fp16"], r"target cpu-sparse stores word embeddings as fp32 or int8, not as fp16"),
    (["stages.export.targets=[tensorrt]"],
     r"target tensorrt needs activation placement tensorrt or tensorrt-full, and the model is calibrated with cpu"),
])  # fmt: skip
def test_a_recipe_that_cannot_be_served_is_refused_at_once(project: Project, overrides: list[str], line: str) -> None:
    with pytest.raises(SqatError, match=line):
        load_recipe(project.recipe, [*QUICK, *overrides])


def source_of(checkpoint: Checkpoint) -> Source:
    model, _ = build(checkpoint)
    return Source(checkpoint, model, {}, ExportConfig(), (1, 8, 16))


@pytest.mark.parametrize("other", ["linear", "dense"])
def test_a_checkpoint_without_its_scales_is_refused(project: Project, other: str, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(project.stage("train" if other == "dense" else "qat"))
    checkpoint = input_sites_only(checkpoint) if other == "linear" else checkpoint
    with pytest.raises(SqatError) as error:
        write_target("cpu-sparse", source_of(checkpoint), tmp_path)
    assert error.value.code == "unsupported-target"
    assert ("is calibrated with linear" if other == "linear" else "needs activation scales") in str(error.value)


def test_a_float_layer_and_a_false_claim_are_errors(project: Project) -> None:
    checkpoint = load_checkpoint(project.stage("qat"))
    model, _ = build(checkpoint)
    layer = "bert.encoder.layer.1.output.dense"
    weights = {name: pair for name, pair in quantize_model(checkpoint).weights.items() if name != layer}
    with pytest.raises(SqatError) as error:
        read_encoder(model, QuantizedModel(weights, {}))
    assert error.value.code == "unsupported-model"
    claimed = dict(checkpoint.manifest.layers) | {layer: LayerRecord(pattern="1:4", quantized=True)}
    known = checkpoint.manifest.model_copy(update={"layers": claimed})
    with pytest.raises(SqatError) as error:
        encoder_of(source_of(replace(checkpoint, manifest=known)))
    assert error.value.code == "broken-rule"


@pytest.mark.parametrize(("family", "settings", "part"), [
    ("modernbert", {}, "this model is of type modernbert"),
    ("mpnet", {}, "this model is of type mpnet"),
    ("deberta-v2", {}, "this model is of type deberta-v2"),
    ("bert", {"hidden_act": "silu"}, "this model's is silu"),
    ("bert", {"is_decoder": True}, r"this model's is causal \(is_decoder\)"),
])  # fmt: skip
def test_a_model_that_the_kernels_do_not_compute_is_one_line_of_error(
    family: str, settings: dict[str, Any], part: str, make_model: Callable[..., Any]
) -> None:
    with pytest.raises(SqatError, match=part) as caught:
        check_encoder(make_model(family, **settings))
    assert str(caught.value).endswith("onnx-int8, which takes any encoder")
    assert "\n" not in str(caught.value)


def test_a_model_of_plain_modules_is_one_line_of_error() -> None:
    with pytest.raises(SqatError) as error:
        check_encoder(nn.Sequential(nn.Linear(16, 16)))
    assert error.value.code == "unsupported-model"


def test_calibrate_refuses_a_model_that_could_not_be_served(project: Project, tmp_path: Path) -> None:
    other = write_project(tmp_path / "modern", "modernbert", placement="cpu")
    head = other.recipe.read_text().partition("stages:")[0]
    other.recipe.write_text(f"{head}stages:\n  calibrate: {{placement: cpu, samples: 16}}\n")
    with pytest.raises(SqatError) as error:
        run_stage(load_recipe(other.recipe), "calibrate", Recorder())
    assert error.value.code == "unsupported-model"


def test_inspect_tells_where_to_look(project: Project, capfd: pytest.CaptureFixture[str]) -> None:
    folder = project.stage("export")
    for more in ([], ["--target", "onnx-int8"]):
        assert main(["inspect", str(folder / "model.cpu-sparse.onnx"), *more]) == 2
        assert "is of target cpu-sparse" in " ".join(capfd.readouterr().err.split())
    assert main(["inspect", str(project.stage("qat"))]) == 0
    assert "2:4" in capfd.readouterr().out


def test_a_damaged_file_is_one_line_of_error(project: Project, tmp_path: Path) -> None:
    path = tmp_path / "model.cpu-sparse.onnx"
    content = (project.stage("export") / path.name).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert not names.file_needs_kernels(path)
    with pytest.raises(SqatError) as error:
        open_onnx(path)
    assert error.value.code == "invalid-onnx"
