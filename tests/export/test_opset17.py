"""The form for TensorRT 8.x: the same numbers at opset 17, and no operator younger than that."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, helper, numpy_helper
from scipy.special import erf

from sqat.errors import SqatError
from sqat.export.conv1x1 import to_conv1x1
from sqat.export.opset17 import to_opset17
from sqat.export.qdq import insert_qdq
from sqat.runtime.sessions import parity, run_batches, session
from tests.onnx_models import ATTENTION, Family


def one_gelu(approximate: str) -> ModelProto:
    text = f"""<ir_version: 9, opset_import: ["" : 20]>
    g (float[n] x) => (float[n] y) {{ h = Gelu<approximate="{approximate}">(x) y = Identity(h) }}"""
    model = onnx.parser.parse_model(text)
    for node in model.graph.node:
        node.name = f"/layer/{node.op_type}"
    return model


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_an_expanded_gelu_is_gelu(approximate: str) -> None:
    model = to_opset17(one_gelu(approximate))
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 17
    assert not {node.op_type for node in model.graph.node} & {"Gelu"}
    assert all(node.name.startswith("/layer/") for node in model.graph.node)
    x = np.linspace(-6, 6, 401, dtype=np.float32)
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    wide = x.astype(np.float64)
    exact = wide / 2 * (1 + erf(wide / np.sqrt(2)))
    approximation = wide / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
    assert np.abs(found - (exact if approximate == "none" else approximation)).max() < 2e-6


def test_every_family_at_opset_17(family: Family) -> None:
    model = insert_qdq(family.graph, family.quantization(*family.roles("output", *ATTENTION, "add")), "qdq")
    older = to_opset17(to_conv1x1(model))
    onnx.checker.check_model(older, full_check=True)
    onnx.shape_inference.infer_shapes(older, check_type=True, strict_mode=True, data_prop=True)
    assert older.opset_import[0].version == 17
    inputs = {name: tensor.numpy() for name, tensor in family.inputs(3, 9).items()}
    expected = run_batches(session(to_conv1x1(model).SerializeToString(), threads=1), [inputs])
    assert parity(expected, run_batches(session(older.SerializeToString(), threads=1), [inputs])) < 2e-2


def test_the_original_stays_unchanged_and_other_operators_are_refused() -> None:
    model = one_gelu("none")
    before = model.SerializeToString()
    to_opset17(model)
    assert model.SerializeToString() == before
    axes = numpy_helper.from_array(np.array([0], np.int64), "axes")
    model.graph.initializer.append(axes)
    model.graph.node.append(helper.make_node("ReduceMean", ["y", "axes"], ["z"], name="/pool/ReduceMean"))
    model.graph.output.append(helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [1]))
    with pytest.raises(SqatError) as error:
        to_opset17(model)
    assert error.value.code == "unsupported-target"
