"""Every target of a real (tiny) chain: what is written, that it agrees with the model, and what it is refused for."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import onnx
import pytest
import torch

from sqat.checkpoint.store import Checkpoint
from sqat.cli import main
from sqat.errors import GateError, SqatError
from sqat.export import source
from sqat.export.quantized_model import QuantizedModel, quantize_model
from sqat.lint.apply_rules import list_findings
from sqat.pipeline.runner import evaluate, run, run_stage
from sqat.recipe.loader import load_recipe
from sqat.recipe.targets import TARGETS
from sqat.runtime.sessions import parity
from tests.tiny import Project, Recorder, write_project

pytestmark = pytest.mark.pipeline
QUICK = ["stages.qat.epochs=0.2", "stages.train.epochs=2", "stages.prune.epochs=0.5"]
ALL = ("onnx-int8", "onnx-fp32", "onnx-fp16", "tensorrt", "torch-semi-structured", "compressed-tensors")
FLAVOURS = [
    ("weights: qdq", "fp32"),
    ("weights: qdq, layers: conv1x1", "fp32"),
    ("precision: fp16", "fp16"),
    ("weights: qdq, layers: conv1x1, precision: fp16", "int8"),
    ("weights: dq", "int8"),
    ("weights: dq", "fp16"),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    torch.set_num_threads(1)
    made = write_project(tmp_path_factory.mktemp("targets") / "project", placement="tensorrt")
    run(load_recipe(made.recipe, QUICK), Recorder(), last="qat")
    return made


def exported(project: Project, *overrides: str, output: Path | None = None) -> tuple[Path, list[str]]:
    lines = Recorder()
    loaded = load_recipe(project.recipe, [*QUICK, *overrides])
    return run_stage(loaded, "export", lines, output=output), lines.lines


@pytest.fixture(scope="module")
def everything(project: Project) -> Path:
    return exported(project, f"stages.export.targets=[{', '.join(ALL)}]")[0]


def test_every_target_is_written_and_measured(everything: Path) -> None:
    names = {path.relative_to(everything).as_posix() for path in everything.rglob("*") if path.is_file()}
    assert {f"model.{name}.onnx" for name in ("int8", "fp32", "fp16", "tensorrt")} <= names
    assert {
        "build_engine.sh",
        "build_engine.py",
        "build_engine.json",
        "semi-structured/sparse.json",
        "compressed-tensors/config.json",
    } <= names
    manifest = json.loads((everything / "sqat.json").read_text())
    for target in ALL:
        assert manifest["metrics"][f"dev {target}"]["accuracy"] >= 0
        assert any(note.startswith(f"{target}: 100.00% of 80 decisions equal") for note in manifest["notes"])
    card = (everything / "README.md").read_text()
    assert all(f"| {target} | {TARGETS[target].file} |" in card for target in ALL)
    assert all(f"### {target}" in card for target in ALL)


@pytest.mark.parametrize("target", ALL)
def test_an_export_is_evaluated_as_it_is_served(project: Project, everything: Path, target: str) -> None:
    loaded = load_recipe(project.recipe, QUICK)
    found = evaluate(loaded, everything / TARGETS[target].file, "dev", Recorder())
    known = json.loads((everything / "sqat.json").read_text())["metrics"][f"dev {target}"]
    assert found == pytest.approx(known, abs=1e-6)


@pytest.mark.parametrize(("options", "embeddings"), FLAVOURS)
def test_every_form_of_the_engine_file(project: Project, tmp_path: Path, options: str, embeddings: str) -> None:
    made, _ = exported(project, "stages.export.targets=[tensorrt]", f"stages.export.tensorrt={{{options}}}",
                       f"stages.export.embeddings={embeddings}", output=tmp_path / "out")  # fmt: skip
    model = onnx.load(made / "model.tensorrt.onnx")
    kinds = {node.op_type for node in model.graph.node}
    assert ("Conv" in kinds) == ("conv1x1" in options)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    stored = {types[name] for name in types if "embeddings" in name and "LayerNorm" not in name and "scale" not in name}
    wanted = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "int8": onnx.TensorProto.INT8}
    assert wanted[embeddings] in stored
    assert onnx.TensorProto.FLOAT not in stored or embeddings == "fp32"
    version_8 = "conv1x1" in options
    assert model.opset_import[0].version == (17 if version_8 else 20)
    assert not (version_8 and kinds & {"Gelu"})
    target = "tensorrt-8" if version_8 else "tensorrt"
    assert not [finding for finding in list_findings(model, target=target) if not finding.warning]
    script = (made / "build_engine.sh").read_text()
    assert "--sparsity=enable" in script


def test_ranges_reach_the_build_files(project: Project, tmp_path: Path) -> None:
    made, _ = exported(project, "stages.export.targets=[tensorrt]", "stages.export.batch_range=[2, 3, 5]",
                       "stages.export.sequence_range=[7, 11, 13]", output=tmp_path / "out")  # fmt: skip
    script = (made / "build_engine.sh").read_text()
    assert all(shape in script for shape in ("input_ids:2x7", "attention_mask:3x11", "token_type_ids:5x13"))


def test_a_wrong_packed_weight_misses_parity(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def negated(checkpoint: Checkpoint) -> QuantizedModel:
        quantized = quantize_model(checkpoint)
        layer = next(iter(checkpoint.masks))
        integers, scale = quantized.weights[layer]
        return QuantizedModel({**quantized.weights, layer: (-integers, scale)}, quantized.amax)

    monkeypatch.setattr(source, "quantize_model", negated)
    with pytest.raises(GateError, match=r"^semi-structured is off by .*nothing was written$") as error:
        exported(project, "stages.export.targets=[torch-semi-structured]")
    assert error.value.code == "parity"


def test_tensorrt_asks_for_its_placement(project: Project, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SqatError) as error:
        exported(project, "stages.export.targets=[tensorrt]", "stages.calibrate.placement=linear")
    assert error.value.code == "recipe-conflict"
    other = write_project(project.folder / "linear")
    run(load_recipe(other.recipe, QUICK), Recorder(), last="calibrate")
    code = main(["export", str(project.recipe), "--target", "tensorrt", "--from", str(other.stage("calibrate")),
                 "-o", str(project.folder / "never"), "-q"])  # fmt: skip
    assert code == 2
    assert "target tensorrt needs activation placement tensorrt" in " ".join(capfd.readouterr().err.split())
    assert not (project.folder / "never").exists()


def test_auto_explains_and_exports(project: Project, capfd: pytest.CaptureFixture[str]) -> None:
    chosen = [part for override in QUICK for part in ("--set", override)]
    assert (
        main(["export", str(project.recipe), *chosen, "--target", "auto", "-o", str(project.folder / "auto"), "-q"])
        == 0
    )
    out = capfd.readouterr().out
    assert "target" in out
    assert "others" in out
    assert all(len(line) <= 80 for line in out.splitlines() if os.sep not in line)
    assert list((project.folder / "auto").glob("model.*.onnx"))


@pytest.mark.parametrize(("name", "line"), [
    ("onnx-int4", "--target: no target 'onnx-int4'; did you mean 'onnx-int8'? allowed: onnx-int8, onnx-fp32, "),
    ("tensort", "--target: no target 'tensort'; did you mean 'tensorrt'?"),
])  # fmt: skip
def test_an_unknown_target_is_one_line_of_error(
    project: Project, capfd: pytest.CaptureFixture[str], name: str, line: str
) -> None:
    assert main(["export", str(project.recipe), "--target", name]) == 2
    assert line in " ".join(capfd.readouterr().err.split())


def test_a_target_of_the_command_line_replaces_the_recipes(project: Project, tmp_path: Path) -> None:
    recipe = project.folder / "results.yaml"
    recipe.write_text(project.recipe.read_text() + "results: {ours: export/onnx-int8}\n")
    loaded = load_recipe(recipe, QUICK)
    made = project.stage("qat")
    chosen = [part for override in QUICK for part in ("--set", override)]
    assert loaded.recipe.results
    code = main(["export", str(recipe), *chosen, "--target", "onnx-fp32", "--target", "onnx-fp16", "--from", str(made),
                 "-o", str(tmp_path / "out"), "-q"])  # fmt: skip
    assert code == 0
    assert {path.name for path in (tmp_path / "out").glob("*.onnx")} == {"model.fp32.onnx", "model.fp16.onnx"}


def test_parity_counts_what_is_not_a_number_as_infinite() -> None:
    logits = torch.tensor([[1.0, float("nan")]]).numpy()
    assert parity(logits, logits) == float("inf")


def test_a_damaged_compressed_folder_is_one_line_of_error(project: Project, everything: Path, tmp_path: Path) -> None:
    folder = tmp_path / "compressed-tensors"
    shutil.copytree(everything / "compressed-tensors", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format"] = "pack-quantized"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SqatError) as error:
        evaluate(load_recipe(project.recipe, QUICK), folder, "dev", Recorder())
    assert error.value.code == "broken-rule"
