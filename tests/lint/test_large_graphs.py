"""Rules and repairs take linear time, and end, whatever hangs on one Q/DQ pair or along one chain."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FrameType

import numpy as np
import onnx
import pytest
from graph_edits import quantized_weight
from onnx import ModelProto, numpy_helper

from sqat.lint.apply_rules import fix
from sqat.lint.layer_report import lint

HEAD = """<ir_version: 9, opset_import: ["" : 20]>
agraph (float[n, 64] x) => ({outputs}) <float s = {{0.01}}, int8 z = {{0}}> {{
    q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) e = DequantizeLinear<axis = 1>(w, ws, wz) {nodes}
}}"""


def graph(nodes: str, outputs: int = 1) -> ModelProto:
    names = ", ".join(f"float[n, 64] y{i}" for i in range(outputs))
    model = onnx.parser.parse_model(HEAD.format(outputs=names, nodes=nodes))
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in quantized_weight().items())
    return model


def own_weights(count: int) -> ModelProto:
    """One pair, and a weight for each product."""
    nodes = "".join(f"e{i} = DequantizeLinear<axis = 1>(w{i}, ws, wz) y{i} = MatMul(d, e{i}) " for i in range(count))
    model = graph(nodes, count)
    weight = quantized_weight()["w"]
    model.graph.initializer.extend(numpy_helper.from_array(weight, f"w{i}") for i in range(count))
    return model


def one_weight(count: int) -> ModelProto:
    return graph("".join(f"y{i} = MatMul(d, e) " for i in range(count)), count)


def sum_of_products(count: int) -> ModelProto:
    """Each product's output goes to all sums behind it."""
    sums = "".join(f"a{i} = Add(a{i - 1}, p{i}) " for i in range(1, count))
    products = "".join(f"p{i} = MatMul(d, e) " for i in range(count))
    return graph(f"{products} a0 = Identity(p0) {sums} y0 = Identity(a{count - 1})")


def chain_of_weights(count: int) -> ModelProto:
    """Each product reads the weight behind one Identity more."""
    nodes = "".join(f"e{i} = Identity({f'e{i - 1}' if i else 'e'}) y{i} = MatMul(d, e{i}) " for i in range(count))
    return graph(nodes, count)


def chain_of_inputs(count: int) -> ModelProto:
    nodes = "".join(f"l{i} = Identity({f'l{i - 1}' if i else 'd'}) y{i} = MatMul(l{i}, e) " for i in range(count))
    return graph(nodes, count)


def read_three_times(count: int) -> ModelProto:
    """Each node reads the last one's output three times, so that there are 3^count paths."""
    nodes = "".join(f"t{i + 1} = Slice(t{i}, t{i}, t{i}) " for i in range(count))
    model = graph(f"p = MatMul(d, e) t0 = Cast<to = 7>(p) {nodes} y0 = Cast<to = 1>(t{count})")
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    return model


def count_calls(work: Callable[[], object]) -> int:
    """Count the Python functions that a piece of work calls."""
    calls = 0

    def see(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("make", [own_weights, one_weight, sum_of_products, chain_of_weights, chain_of_inputs])
@pytest.mark.parametrize("target", ["tensorrt", "onnx-int8"])
def test_work_grows_with_the_graph(make: Callable[[int], ModelProto], target: str) -> None:
    few, many = (count_calls(partial(lint, make(count), target)) for count in (100, 400))
    assert many < 5 * few, (few, many)


def test_paths_are_not_counted_one_by_one() -> None:
    model = read_three_times(200)
    assert [layer.runs for layer in lint(model, "tensorrt").layers] == ["dense int8"]
    assert fix(model, "tensorrt")[1] == []


def test_a_repair_gives_thousands_of_products_a_pair_each() -> None:
    model, changes = fix(one_weight(1500), "tensorrt")
    pairs = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(pairs) == 1500
    assert len({node.output[0] for node in pairs}) == 1500
    assert len([change for change in changes if change.rule == "B10"]) == 1499


@pytest.mark.parametrize("shape", [(0,), (0, 0)])
def test_an_empty_scale_is_a_finding(shape: tuple[int, ...]) -> None:
    model = one_weight(2)
    for name, dtype in (("s", np.float32), ("z", np.int8)):
        kept = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        kept.CopyFrom(numpy_helper.from_array(np.zeros(shape, dtype), name))
    report = lint(model, "tensorrt")
    assert "scale is empty" in {finding.problem for finding in report.findings}
    assert [layer.input_amax for layer in report.layers] == [None, None]
