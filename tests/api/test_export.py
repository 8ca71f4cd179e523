"""`sqat.export_onnx`: the file is the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import sqat
from sqat.errors import ErrorCode
from sqat.quantization.fake_quant import quantize_weight
from sqat.runtime.sessions import session
from tests.api.conftest import Batches, copy_state, train
from tests.errors import raises_code
from tests.tiny import MakeModel


def integers_of(path: Path) -> list[Any]:
    graph = onnx.load(path).graph
    return [numpy_helper.to_array(t) for t in graph.initializer if t.name.endswith("weight_int8")]


@pytest.mark.parametrize("placement", ["linear", "tensorrt", "cpu"])
def test_an_exported_file_is_the_quantized_model(
    make_model: MakeModel, batches: Batches, tmp_path: Path, placement: Any
) -> None:
    model = make_model(num_hidden_layers=1)
    masks = sqat.prune(model)
    scales = sqat.calibrate(model, batches, placement=placement)
    with sqat.quantized(model, masks, scales):
        train(model, batches)
    before = copy_state(model)
    path = tmp_path / "model.onnx"
    difference = sqat.export_onnx(model, path, batches[0], masks, scales)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    integers = integers_of(path)
    assert len(integers) == 6
    expected, _ = quantize_weight(model.bert.encoder.layer[0].attention.self.query.weight.detach())
    assert any(np.array_equal(found, expected.numpy().T) for found in integers)
    assert all((found.T.reshape(-1, 4) != 0).sum(1).max() <= 2 for found in integers)
    inputs = {key: value.numpy() for key, value in batches[0].items() if key != "labels"}
    logits = session(path).run(None, inputs)[0]
    if placement != "cpu":  # whose bytes of the softmax only sqat.runtime has
        with torch.no_grad(), sqat.quantized(model, masks, scales):
            found = np.abs(logits - model(**batches[0]).logits.numpy()).max()
        assert difference == pytest.approx(found, abs=1e-2)
    assert difference < 0.05


def test_a_float_file_and_wrong_arguments_of_export(make_model: MakeModel, batches: Batches, tmp_path: Path) -> None:
    model = make_model(num_hidden_layers=1)
    assert sqat.export_onnx(model, tmp_path / "float.onnx", batches[0]) < 1e-4
    assert (tmp_path / "float.onnx").exists()
    refused = tmp_path / "refused.onnx"
    query = "bert.encoder.layer.0.attention.self.query"
    claimed = sqat.Masks({query: torch.ones(32, 32, dtype=torch.bool)}, {query: "2:4"}, {})
    with pytest.raises(sqat.GateError, match="breaks rule"):
        sqat.export_onnx(model, refused, batches[0], claimed)
    masks, scales = sqat.prune(model), sqat.calibrate(model, batches)
    wrong: list[tuple[ErrorCode, dict[str, Any]]] = [
        ("usage", {"scales": scales, "target": "onnx-fp32"}),
        ("usage", {"target": "onnx-int8"}),
        ("usage", {"scales": scales, "target": "tensorrt"}),
        ("unknown-name", {"scales": scales, "target": "onnx-int4"}),
    ]
    for code, more in wrong:
        with raises_code(code):
            sqat.export_onnx(model, refused, batches[0], masks, **more)
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "model.onnx"):
        with raises_code("unwritable-file"):
            sqat.export_onnx(model, path, batches[0], masks, scales)
    assert sqat.export_onnx(model, tmp_path / "new" / "folder" / "model.onnx", batches[0]) < 1e-4
    train(model, batches)  # without the masks
    with raises_code("model-mismatch"):
        sqat.export_onnx(model, refused, batches[0], masks, scales)
    assert not refused.exists()
