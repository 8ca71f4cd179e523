"""Int8 convolutions in a file: the rules about them, and ONNX Runtime agrees which of them are int8."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from graph_edits import findings_of, parsed, sparse, verdicts
from onnx import ModelProto, numpy_helper

from sqat.export.qdq import insert_qdq
from sqat.export.quantized_model import QuantizedModel
from sqat.runtime.sessions import find_float_products, optimized_graph, run_batches, session
from tests.onnx_graphs import count_operators

CHAIN = """agraph (float[batch, 32, 8, 8] x) => (float[batch, 32, 8, 8] y)
<float s = {0.01}, int8 z1 = {0}, int8 z2 = {0}, int8 z3 = {0}, int8 z4 = {0}> {
    q1 = QuantizeLinear(x, s, z1)
    d1 = DequantizeLinear(q1, s, z1)
    w1 = DequantizeLinear<axis = 0>(first, scales, zeros)
    one = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(d1, w1)
    %s
    q3 = QuantizeLinear(two, s, z3)
    d3 = DequantizeLinear(q3, s, z3)
    w2 = DequantizeLinear<axis = 0>(second, scales2, zeros2)
    three = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(d3, w2)
    q4 = QuantizeLinear(three, s, z4)
    y = DequantizeLinear(q4, s, z4)
}"""
QUANTIZED = "q2 = QuantizeLinear(one, s, z2)\n    d2 = DequantizeLinear(q2, s, z2)\n    two = Relu(d2)"
FLOATING = "two = Relu(one)"


def weights(groups: int = 1) -> dict[str, np.ndarray]:
    """Two 3x3 kernels of 32 channels, 2:4 along the input channels, with scales per output channel."""
    kernel = np.stack([sparse(32 // groups, 32, seed).T for seed in range(9)], axis=-1).reshape(32, -1, 3, 3)
    arrays = {}
    for name, number in (("first", ""), ("second", "2")):
        arrays[name] = np.ascontiguousarray(kernel)
        arrays[f"scales{number}"] = np.linspace(0.001, 0.002, 32, dtype=np.float32)
        arrays[f"zeros{number}"] = np.zeros(32, np.int8)
    return arrays


def chain(middle: str) -> ModelProto:
    model = parsed(CHAIN % middle, **weights())
    onnx.checker.check_model(model, full_check=True)
    return model


def test_an_int8_output_makes_an_int8_convolution() -> None:
    model = chain(QUANTIZED)
    assert [finding for finding in findings_of(model, "onnx-int8") if not finding.warning] == []
    assert verdicts(model, "onnx-int8") == {"first": ("sparse int8", ""), "second": ("sparse int8", "")}
    graph = optimized_graph(model.SerializeToString())
    assert count_operators(graph)["QLinearConv"] == 2
    assert find_float_products(graph) == []


def test_a_float_output_leaves_the_convolution_in_float() -> None:
    model = chain(FLOATING)
    assert verdicts(model, "onnx-int8")["first"] == ("float", "breaks O21 (int8 out right behind a convolution)")
    assert verdicts(model, "onnx-int8")["second"] == ("sparse int8", "")
    assert count_operators(optimized_graph(model.SerializeToString()))["QLinearConv"] == 1  # the runtime agrees
    assert [finding.node for finding in findings_of(model, "onnx-int8") if finding.rule == "O21"] == ["one"]
    assert "O21" not in {finding.rule for finding in findings_of(model, "tensorrt")}


def test_a_float_convolution_may_read_the_int8_output_of_another() -> None:
    """Such as a depthwise one behind one without an activation function; rule B9 is about pairs meant for its input."""
    graph = (CHAIN % "").replace("DequantizeLinear<axis = 0>(second, scales2, zeros2)", "Relu(second)")
    graph = graph.replace("(two, s, z3)", "(one, s, z3)")
    arrays = weights() | {"second": np.ones((32, 32, 3, 3), np.float32)}
    model = parsed(graph, **{name: array for name, array in arrays.items() if name not in ("scales2", "zeros2")})
    assert "B9" not in {finding.rule for finding in findings_of(model, "onnx-int8")}


@pytest.mark.parametrize("form", ["dq", "qdq"])
def test_the_writer_puts_scales_along_the_output_channels(form: str) -> None:
    """A plain graph in, Q/DQ out; the numbers against torch's fake quantizers and convolution."""
    text = """agraph (float[batch, 32, 8, 8] x) => (float[batch, 32, 4, 4] y) {
        c = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]>(x, w, b)
        y = Relu(c)
    }"""
    integers = weights()["first"]
    scale = np.linspace(0.001, 0.002, 32, dtype=np.float32)
    bias = np.linspace(-1, 1, 32, dtype=np.float32)
    plain = parsed(text, w=integers * scale.reshape(-1, 1, 1, 1), b=bias)
    plain.graph.node[0].name = "/net/conv/Conv"
    quantization = QuantizedModel(
        {"net.conv": (torch.from_numpy(integers), torch.from_numpy(scale))},
        {"net.conv:input": 2.5, "net.conv:output": 4.0},
    )
    written = insert_qdq(plain, quantization, "dq" if form == "dq" else "qdq")
    onnx.checker.check_model(written, full_check=True)
    assert [str(finding) for finding in findings_of(written, "onnx-int8") if not finding.warning] == []
    stored = {entry.name: numpy_helper.to_array(entry) for entry in written.graph.initializer}
    if form == "dq":
        assert np.array_equal(stored["net.conv.weight_int8"], integers)
        assert count_operators(optimized_graph(written.SerializeToString()))["QLinearConv"] == 1
    x = torch.randn(4, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    entering = torch.fake_quantize_per_tensor_affine(x, 2.5 / 127, 0, -128, 127)
    weight = torch.from_numpy(integers * scale.reshape(-1, 1, 1, 1))
    expected = torch.nn.functional.conv2d(entering, weight, torch.from_numpy(bias), stride=2, padding=1)
    expected = torch.fake_quantize_per_tensor_affine(expected, 4 / 127, 0, -128, 127).relu()
    result = torch.from_numpy(run_batches(session(written.SerializeToString(), threads=1), [{"x": x.numpy()}]))
    assert (result - expected).abs().max() <= 4 / 127 * 1.01  # one step at most, where a value lies at a tie
    assert ((result - expected).abs() > 1e-5).float().mean() < 5e-3
