"""The proof of an exported file: a wrong one is told and nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sqat.errors import GateError
from sqat.evaluation.parity import perturb_outputs
from sqat.export.quantized_model import QuantizedModel
from sqat.export.targets import onnx_int8
from sqat.pipeline.runner import run, run_stage
from sqat.recipe.loader import load_recipe
from sqat.tasks.classification import Classification
from tests.tiny import Project, Recorder, write_project

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    torch.set_num_threads(1)
    made = write_project(tmp_path_factory.mktemp("export") / "project")
    run(load_recipe(made.recipe, ["stages.qat.epochs=0.2"]), Recorder(), last="qat")
    return made


def export_wrong(project: Project, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> str:
    """Message of an export whose writer is given another quantization than the checkpoint's."""
    original = onnx_int8.insert_qdq

    def wrong(graph: Any, quantization: QuantizedModel, **options: Any) -> Any:
        changed = {name: change(quantization) for name, change in changes.items()}
        return original(graph, QuantizedModel(**{**vars(quantization), **changed}), **options)

    monkeypatch.setattr(onnx_int8, "insert_qdq", wrong)
    with pytest.raises(GateError) as caught:
        run_stage(load_recipe(project.recipe, ["stages.qat.epochs=0.2"]), "export", Recorder())
    assert not list((project.folder / "runs" / "tiny").glob("*export*"))
    return str(caught.value)


def test_a_wrong_activation_scale_is_an_error(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    message = export_wrong(project, monkeypatch, amax=lambda q: {site: 0.7 * amax for site, amax in q.amax.items()})
    assert message.startswith("model.int8.onnx is off by ")
    assert message.endswith("; nothing was written")


def test_a_dense_weight_is_an_error_with_its_node(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = "bert.encoder.layer.1.output.dense"

    def filled(quantization: QuantizedModel) -> dict[str, Any]:
        integers, scale = quantization.weights[layer]
        return {**quantization.weights, layer: (torch.where(integers == 0, 1, integers).to(torch.int8), scale)}

    message = export_wrong(project, monkeypatch, weights=filled)
    assert "B6" in message
    assert "/bert/encoder/layer.1/output/dense" in message


def test_a_perturbation_moves_a_norm_by_its_last_bits_and_leaves_nothing_behind() -> None:
    norm = nn.Sequential(nn.LayerNorm(64))
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    plain = norm(x)
    with perturb_outputs(norm):
        moved = norm(x)
    assert 0 < float(((moved - plain) / plain).abs().max().detach()) < 2e-6
    assert torch.equal(norm(x), plain)


def test_card_and_tokenizer_lie_beside_the_file(project: Project) -> None:
    made = run_stage(load_recipe(project.recipe, ["stages.qat.epochs=0.2"]), "export", Recorder())
    names = {path.name for path in Path(made).iterdir()}
    assert {"model.int8.onnx", "README.md", "config.json", "tokenizer.json", "sqat.json", "recipe.yaml"} <= names
    card = (made / "README.md").read_text()
    assert "12 of 14 linear layers and convolutions are pruned, 12 are int8" in card
    assert "decisions equal" in card


def export_deciding(project: Project, monkeypatch: pytest.MonkeyPatch, perturbed: bool) -> None:
    """Export where the file takes row 0 otherwise than torch does, and perturbed torch as ``perturbed`` says."""
    answers = [False]  # of the file, which is asked first

    def same_decision(task: Classification, wanted: Tensor, got: Tensor, rows: Any) -> Tensor:
        equal = torch.ones(len(rows), dtype=torch.bool)
        equal[0] = answers.pop() if answers else perturbed
        return equal

    monkeypatch.setattr(Classification, "same_decision", same_decision)
    run_stage(load_recipe(project.recipe, ["stages.qat.epochs=0.2"]), "export", Recorder(), force=True)


def test_a_decision_within_the_noise_floor_is_no_fault(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    export_deciding(project, monkeypatch, perturbed=False)
    folder = next((project.folder / "runs" / "tiny").glob("*export*"))
    assert "(1 more differ within the noise floor)" in (folder / "sqat.json").read_text()


def test_a_decision_that_torch_never_takes_is_a_fault(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GateError, match=r"^model.int8.onnx decides differently from the torch model in .*nothing was "):
        export_deciding(project, monkeypatch, perturbed=True)
