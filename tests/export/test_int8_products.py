"""Quantized linears that ONNX Runtime would compute in float are written so that it computes them in int8."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from sqat.export.int8_products import keep_int8
from sqat.export.qdq import insert_qdq
from sqat.export.quantized_model import QuantizedModel
from sqat.lint.apply_rules import list_findings
from sqat.quantization.fake_quant import quantize_weight
from sqat.runtime.sessions import find_float_products, optimized_graph, session
from tests.onnx_graphs import count_operators

INT8 = ("MatMulIntegerToFloat", "QLinearMatMul", "QGemm")
SHAPES: dict[str, list[int | str]] = {"matrix": ["rows", 32], "tokens": ["batch", "sequence", 32], "fixed": [2, 5, 32]}
# product, what lies between it and its reader, and that reader, which a Q reads
CASES: dict[str, list[tuple[str, ...]]] = {
    "bias": [("MatMul",), ("Add", "bias")],
    "bias and relu": [("MatMul",), ("Add", "bias"), ("Relu",)],
    "relu": [("MatMul",), ("Relu",)],
    "clip": [("MatMul",), ("Clip", "low", "high")],
    "residual": [("MatMul",), ("Add", "rest")],
    "gemm": [("Gemm", "bias")],
    "gemm and relu": [("Gemm", "bias"), ("Relu",)],
    "gemm without bias": [("Gemm",), ("Relu",)],
    "gelu": [("MatMul",), ("Gelu",)],
}
# shape of the input, case, whether it is rewritten
TRIED = [
    ("matrix", "bias", True), ("matrix", "bias and relu", True), ("matrix", "relu", True), ("matrix", "residual", True),
    ("matrix", "gemm", True), ("matrix", "gemm and relu", True), ("matrix", "gemm without bias", True),
    ("matrix", "gelu", False), ("tokens", "bias", False), ("tokens", "bias and relu", False), ("tokens", "relu", True),
    ("tokens", "clip", True), ("tokens", "residual", False), ("tokens", "gelu", False), ("fixed", "bias", True),
    ("fixed", "bias and relu", True), ("fixed", "gelu", False),
]  # fmt: skip


def make_graph(kind: str, case: str) -> ModelProto:
    """A quantized linear of 32 inputs and 48 outputs, and what reads it."""
    draw = np.random.default_rng(0)
    shape, transposed = SHAPES[kind], "gemm" in case
    weight = draw.integers(-127, 128, (48, 32) if transposed else (32, 48)).astype(np.int8)
    floats = {"scale": 0.02, "low": 0, "high": 6, "bias": draw.normal(size=48), "weight_scale": draw.random(48) / 100}
    constants = {name: np.asarray(value, np.float32) for name, value in floats.items()}
    constants |= {"zero": np.int8(0), "weight_zero": np.zeros(48, np.int8), "weight": weight}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["wd"], axis=1 - transposed),
    ]
    last = "xd"
    for number, (operator, *operands) in enumerate(CASES[case]):
        operands = ["wd", *operands] if operator in ("MatMul", "Gemm") else operands
        options = {"transB": 1} if operator == "Gemm" else {}
        nodes.append(helper.make_node(operator, [last, *operands], [f"t{number}"], f"/layer/{operator}", **options))
        last = f"t{number}"
    nodes += [
        helper.make_node("QuantizeLinear", [last, "scale", "zero"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "scale", "zero"], ["y"]),
    ]
    used = {name for node in nodes for name in node.input}
    inputs = {"x": shape, "rest": [*shape[:-1], 48]}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, inputs[name]) for name in inputs if name in used]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, inputs["rest"])
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in used]
    graph = helper.make_graph(nodes, "linear", values, [output], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize(("kind", "case", "is_rewritten"), TRIED)
def test_a_quantized_linear_runs_in_int8_and_computes_the_same(kind: str, case: str, is_rewritten: bool) -> None:
    model = make_graph(kind, case)
    before = model.SerializeToString()
    written = keep_int8(model)
    assert model.SerializeToString() == before
    assert (written is not model) == is_rewritten
    onnx.checker.check_model(written, full_check=True)
    content = written.SerializeToString()
    optimized = optimized_graph(content)
    assert find_float_products(optimized) == []
    counts = count_operators(optimized)
    assert sum(counts[name] for name in INT8) == 1
    assert counts["MatMul"] + counts["Gemm"] + counts["FusedGemm"] == 0
    broken = {finding.rule for finding in list_findings(written, target="tensorrt") if not finding.warning}
    assert broken <= ({"B6", "T16"} if case in ("clip", "residual") else {"B6"})
    assert_numbers_agree(model, content, kind, case)


def assert_numbers_agree(model: ModelProto, content: bytes, kind: str, case: str) -> None:
    """Compare a file in ONNX Runtime with the graph as ONNX's reference computes it; at a tie a step apart."""
    sizes = [size if isinstance(size, int) else 3 for size in SHAPES[kind]]
    draw = np.random.default_rng(1)
    inputs = {"x": draw.normal(size=sizes).astype(np.float32)}
    inputs |= {"rest": draw.normal(size=[*sizes[:-1], 48]).astype(np.float32)} if case == "residual" else {}
    expected = ReferenceEvaluator(model).run(None, inputs)[0]
    difference = np.abs(session(content, threads=1).run(None, inputs)[0] - expected)
    assert expected.std() > 0.3
    assert (difference > 1e-5).mean() < 0.01
    assert difference.max() < 0.0201


# rank of the table, whether the tokens go through the same linear, whether it has a bias
@pytest.mark.parametrize(
    ("rank", "is_shared", "has_bias"),
    [(2, False, True), (2, True, False), (3, True, True), (3, False, False), (4, False, True)],
)
def test_a_product_of_constants_is_stored_as_fake_quantization_computes_it(
    rank: int, is_shared: bool, has_bias: bool
) -> None:
    draw = np.random.default_rng(0)
    table = draw.normal(size=[*[1] * (rank - 2), 20, 32]).astype(np.float32)
    weight, bias = draw.normal(size=(32, 32)).astype(np.float32), draw.normal(size=32).astype(np.float32)
    layer = "tokens" if is_shared else "places"
    amax = {"tokens:input": 1.0, f"{layer}:input": 1.5}
    integers, scale = quantize_weight(torch.from_numpy(weight.T.copy()))
    model = make_positions(table, weight, bias if has_bias else None, layer)
    quantized = QuantizedModel(dict.fromkeys(("tokens", layer), (integers, scale)), amax)
    written = keep_int8(insert_qdq(model, quantized))

    step = np.float32(1.5 / 127)
    rounded = np.clip(np.rint(np.tanh(table) / step), -128, 127).astype(np.float64) * step
    expected = np.einsum("...i,oi,o->...o", rounded, integers.double(), scale.double()) + has_bias * bias
    x = draw.normal(size=(3, 32)).astype(np.float32)
    got = session(written.SerializeToString(), threads=1).run(["places"], {"x": x})[0]
    assert np.abs(got - expected).max() < 1e-5
    counts = count_operators(optimized_graph(written.SerializeToString()))
    assert sum(counts[name] for name in INT8) == 1  # that of the tokens
    assert counts["MatMul"] + counts["Gemm"] + counts["MatMulNBits"] == 0
    assert "Tanh" not in count_operators(written.graph)
    problems = [entry.node for entry in list_findings(written, {layer: "2:4", "lost": "2:4"}) if entry.rule == "B6"]
    assert ("lost" in problems, "places" in problems) == (True, False)


def make_positions(
    table: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32] | None, layer: str
) -> ModelProto:
    """A linear of tokens, and a layer that reads what is computed from a table alone."""
    nodes = [helper.make_node("Tanh", ["table"], ["tanh"], "/Tanh")]
    for name, source, output in (("tokens", "x", "y"), (layer, "tanh", "z")):
        is_gemm = bias is not None and (source == "x" or table.ndim == 2)
        inputs, operator = [source, f"{name}.weight", *["bias"] * is_gemm], "Gemm" if is_gemm else "MatMul"
        nodes.append(helper.make_node(operator, inputs, [output], f"/{name}/{operator}"))
    last = ["Add", ["z", "bias"]] if bias is not None and table.ndim > 2 else ["Identity", ["z"]]
    nodes += [helper.make_node("Identity", ["y"], ["tokens"]), helper.make_node(*last, ["places"])]
    constants = {"table": table, "tokens.weight": weight, f"{layer}.weight": weight}
    constants |= {} if bias is None else {"bias": bias}
    x, tokens = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 32]) for name in ("x", "tokens"))
    places = helper.make_tensor_value_info("places", TensorProto.FLOAT, table.shape)
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "positions", [x], [tokens, places], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
