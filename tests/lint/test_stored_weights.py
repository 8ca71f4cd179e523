"""A weight as the linter reads it, against ONNX's reference evaluator and ONNX Runtime's quantizer."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import torch
from graph_edits import parsed, put
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from sqat.lint.graph_view import GraphView
from sqat.lint.weight import count_nonzeros
from sqat.sparsity.masks import count_violations
from sqat.sparsity.pattern import Pattern

STEPS = st.lists(st.sampled_from(["Transpose", "Reshape", "Unsqueeze", "Identity", "Cast"]), max_size=5)


def chain(steps: list[str], place: int, axis: int, values: np.ndarray) -> onnx.ModelProto:
    """A MatMul whose weight passes some steps, with a DequantizeLinear before the step at ``place``."""
    model = parsed("agraph (float[batch, k] x) => (float[batch, n] y) { y = Identity(x) }")
    del model.graph.node[:]
    name, dims, lifted = "w", values.shape, False
    nodes = []
    for index, op in enumerate([*steps[:place], "DequantizeLinear", *steps[place:]]):
        inputs, attributes = [name], {}
        if op == "DequantizeLinear":
            axis = [i for i, size in enumerate(dims) if size > 1][axis % 2]
            put(model, "scale", (2.0 ** np.arange(dims[axis])).astype(np.float32))
            put(model, "point", np.zeros(dims[axis], np.int8))
            inputs, attributes = [name, "scale", "point"], {"axis": axis}
        if op == "Transpose":
            order = [*range(len(dims) - 2), len(dims) - 1, len(dims) - 2]
            dims, attributes = tuple(dims[i] for i in order), {"perm": order}
        if op == "Cast":
            attributes = {"to": TensorProto.FLOAT if index > place else TensorProto.INT8}
        if op in ("Reshape", "Unsqueeze"):
            dims = tuple(size for size in dims if size != 1) if lifted else (1, *dims)
            if lifted and op == "Unsqueeze":
                op = "Squeeze"
            lifted = not lifted
            put(model, f"shape{index}", np.array([0] if op in ("Unsqueeze", "Squeeze") else dims, np.int64))
            inputs.append(f"shape{index}")
        nodes.append(helper.make_node(op, inputs, [f"t{index}"], **attributes))
        name = f"t{index}"
    nodes.append(helper.make_node("MatMul", ["x", name], ["y"]))
    model.graph.node.extend(nodes)
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    put(model, "w", values)
    return model


@settings(max_examples=60, deadline=None)
@given(STEPS, st.integers(0, 5), st.integers(0, 1), st.sampled_from([(4, 8), (8, 4), (6, 5)]), st.integers(0, 99))
def test_a_weight_is_read_as_the_product_reads_it(
    steps: list[str], place: int, axis: int, shape: tuple[int, int], seed: int
) -> None:
    values = np.random.default_rng(seed).integers(-127, 128, shape).astype(np.int8)
    model = chain(steps, min(place, len(steps)), axis, values)
    name = model.graph.output[-1].name
    weight = GraphView(model).find_weight(model.graph.node[-1])
    assert weight is not None
    expected = evaluate(model, name)
    assert weight.values.shape == expected.shape == weight.dims[-1]
    along = weight.read_axis
    assert along is not None
    scale = 2.0 ** np.arange(expected.shape[along])
    scaled = weight.values * scale.reshape([-1 if i == along else 1 for i in range(expected.ndim)])
    np.testing.assert_array_equal(scaled.astype(np.float32), expected)


def evaluate(model: onnx.ModelProto, name: str) -> np.ndarray:
    """A constant tensor of a graph, by the reference evaluator."""
    part = onnx.ModelProto()
    part.CopyFrom(model)
    del part.graph.node[-1]
    del part.graph.output[0]
    del part.graph.input[:]
    return np.asarray(ReferenceEvaluator(part).run([name], {})[0])


@settings(deadline=None)
@given(st.integers(0, 2), st.sampled_from([2, 4, 8]), st.integers(0, 999))
def test_groups_are_counted_as_the_masks_count_them(axis: int, size: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    values = random.integers(-2, 3, (16, 24, 8)).astype(np.int8)
    for n in range(1, size):
        expected = count_violations(torch.from_numpy(values), Pattern(n, size), axis)
        assert int((count_nonzeros(values, size, axis) > n).sum()) == expected


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.booleans())
def test_integers_of_a_float_weight_are_those_onnx_runtime_makes(seed: int, ties: bool) -> None:
    random = np.random.default_rng(seed)
    scale = (2.0 ** random.integers(-9, 2, 8) if ties else random.random(8) + 1e-3).astype(np.float32)
    steps = random.integers(-254, 255, (16, 8)) / 2 if ties else random.uniform(-127, 127, (16, 8))
    text = """agraph (float[batch, 16] x) => (float[batch, 8] y, int8[16, 8] q) {
        q = QuantizeLinear<axis = 1>(w, s, z)
        d = DequantizeLinear<axis = 1>(q, s, z)
        y = MatMul(x, d)
    }"""
    model = parsed(text, w=(steps * scale).astype(np.float32), s=scale, z=np.zeros(8, np.int8))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (expected,) = session.run(["q"], {"x": np.zeros((1, 16), np.float32)})
    (weight,) = GraphView(model).weights
    np.testing.assert_array_equal(weight.values, expected)
