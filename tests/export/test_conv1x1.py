"""Linears as 1x1 convolutions: the same numbers to the bit, the same integers, and int8 where ONNX Runtime has it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, NodeProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from sqat.export.conv1x1 import to_conv1x1
from sqat.export.names import module_of
from sqat.export.qdq import insert_qdq
from sqat.export.quantized_model import QuantizedModel
from sqat.lint.apply_rules import list_findings
from sqat.runtime.sessions import find_float_products, optimized_graph, parity, run_batches, session
from tests.onnx_graphs import count_operators
from tests.onnx_models import ATTENTION, Family, ImageFamily, build_family, rtx_weight_bytes

BATCHES = [(1, 2, "right"), (3, 9, "right"), (4, 20, "left"), (2, 33, "right"), (8, 16, "left")]
TENSORRT = ("output", *ATTENTION, "add")
ROUNDING = 5e-6


def quantized(family: Family, *roles: str, weights: str = "dq") -> ModelProto:
    return insert_qdq(family.graph, family.quantization(*family.roles(*roles)), weights)


def plain(model: ModelProto) -> onnxruntime.InferenceSession:
    """ONNX Runtime without rewriting: every Q, DQ and product as the file has it."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def batches(family: Family) -> list[dict[str, np.ndarray]]:
    return [{k: v.numpy() for k, v in family.inputs(b, s, side, seed=4).items()} for b, s, side in BATCHES]


def difference(family: Family, left: onnxruntime.InferenceSession, right: onnxruntime.InferenceSession) -> float:
    return max(parity(run_batches(left, [batch]), run_batches(right, [batch])) for batch in batches(family))


def constants(model: ModelProto) -> dict[str, np.ndarray]:
    return {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}


def makers(model: ModelProto) -> dict[str, NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def check(model: ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


@pytest.mark.parametrize("weights", ["dq", "qdq"])
@pytest.mark.parametrize("roles", [(), TENSORRT], ids=["linear", "tensorrt"])
def test_the_numbers_of_the_file_stay(family: Family, roles: tuple[str, ...], weights: str) -> None:
    before = quantized(family, *roles, weights=weights)
    after = to_conv1x1(before)
    check(after)
    assert difference(family, plain(before), plain(after)) < 1e-6
    count = Counter(node.op_type for node in after.graph.node)
    assert count["Conv"] == len(family.weights)
    assert [
        finding.rule for finding in list_findings(after, dict.fromkeys(family.weights, "2:4")) if not finding.warning
    ] == []


def test_images(vit: ImageFamily) -> None:
    before = quantized(vit, *TENSORRT)
    after = to_conv1x1(before)
    check(after)
    assert difference(vit, plain(before), plain(after)) < 1e-6
    assert count_operators(optimized_graph(after.SerializeToString()))["QLinearConv"] == len(vit.weights)


def test_onnx_runtime_runs_int8_convolutions_and_rounds_the_bias(family: Family) -> None:
    """What differs from the products there is the bias alone, which a convolution takes as an int32."""
    before = quantized(family, *TENSORRT)
    after = to_conv1x1(before)
    optimized = optimized_graph(after.SerializeToString())
    assert count_operators(optimized)["QLinearConv"] == len(family.weights)
    assert find_float_products(optimized) == []
    expected = session(with_rounded_biases(before, after).SerializeToString(), threads=1)
    assert difference(family, expected, session(after.SerializeToString(), threads=1)) < ROUNDING


def test_a_convolution_with_a_float_output_is_no_fault_in_onnx_runtime(bert: Family) -> None:
    """As the layer before a GELU, whose output has no pair of its own."""
    complete = bert.quantization(*TENSORRT)
    amax = {site: a for site, a in complete.amax.items() if not site.endswith("intermediate.dense:output")}
    optimized = optimized_graph(
        to_conv1x1(insert_qdq(bert.graph, QuantizedModel(complete.weights, amax))).SerializeToString()
    )
    counts = count_operators(optimized)
    assert (counts["QLinearConv"], counts["Conv"] + counts["FusedConv"]) == (len(bert.weights) - 2, 2)
    assert find_float_products(optimized) == []


def with_rounded_biases(before: ModelProto, after: ModelProto) -> ModelProto:
    """The products' graph, each bias a multiple of its convolution's scales, as int32 arithmetic has it."""
    rounded = ModelProto()
    rounded.CopyFrom(before)
    values, origin = constants(after), makers(after)
    steps = {}
    for node in after.graph.node:
        if node.op_type == "Conv" and len(node.input) == 3:
            x, w = (values[origin[name].input[1]] for name in node.input[:2])
            steps[module_of(node)] = (x * w, values[node.input[2]])
    for node in rounded.graph.node:
        step = steps.get(module_of(node)) if node.op_type == "Add" else None
        if step is not None and any(name in values and values[name].shape == step[1].shape for name in node.input):
            index = next(i for i, name in enumerate(node.input) if name in constants(before))
            name = f"{module_of(node)}.rounded_bias"
            exact = np.rint(step[1].astype(np.float64) / step[0]) * step[0]
            rounded.graph.initializer.append(numpy_helper.from_array(exact.astype(np.float32), name))
            node.input[index] = name
    return rounded


@pytest.mark.parametrize("weights", ["dq", "qdq"])
def test_kernels_hold_the_integers(bert: Family, weights: str) -> None:
    model = to_conv1x1(quantized(bert, weights=weights))
    values, origin = constants(model), makers(model)
    for node in model.graph.node:
        if node.op_type != "Conv":
            continue
        dequantizer = origin[node.input[1]]
        integers, scale = bert.weights[module_of(node)]
        stored = values.get(dequantizer.input[0])
        if stored is None:
            quantizer = origin[dequantizer.input[0]]
            scales = values[quantizer.input[1]][:, None, None, None]
            stored = np.rint(values[quantizer.input[0]] / scales)
        assert np.array_equal(stored, integers.numpy()[:, :, None, None])
        assert [entry.i for entry in dequantizer.attribute if entry.name == "axis"] == [0]
        alive = integers.numpy().any(1)
        assert np.array_equal(values[dequantizer.input[1]][alive], scale.numpy()[alive])
        assert values[dequantizer.input[1]][~alive].min() >= scale.numpy()[alive].max()
        assert (np.count_nonzero(stored.reshape(-1, 4), axis=1) <= 2).all()


def test_layouts_change_before_q_and_behind_the_outputs_pair(bert: Family) -> None:
    """Eight changes a layer: before q, k and v (one), out and up; behind q, k, v, out and down."""
    before = quantized(bert, *TENSORRT)
    after = to_conv1x1(before)
    counts = [Counter(node.op_type for node in model.graph.node) for model in (before, after)]
    for op in ("Transpose", "Squeeze"):
        assert counts[1][op] - counts[0][op] == {"Transpose": 8, "Squeeze": 5}[op] * 2
    assert counts[1]["Unsqueeze"] - counts[0]["Unsqueeze"] == 3 * 2
    origin = makers(after)
    readers = {name: [n for n in after.graph.node if name in n.input] for name in origin}
    for node in after.graph.node:
        if node.op_type == "Conv":
            assert [origin[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
            assert {reader.op_type for reader in readers[node.output[0]]} == {"QuantizeLinear"}
    gelu = next(node for node in after.graph.node if node.op_type == "Gelu")
    assert origin[gelu.input[0]].op_type == "DequantizeLinear"
    assert origin[origin[origin[gelu.input[0]].input[0]].input[0]].op_type == "Conv"


def test_each_pair_keeps_one_reader(family: Family) -> None:
    model = to_conv1x1(quantized(family, *TENSORRT))
    readers = Counter(name for node in model.graph.node for name in node.input)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert readers[node.output[0]] == 1


SYNTHETIC = """<ir_version: 9, opset_import: ["" : 20]>
agraph (float[SHAPE] x) => (float[OUT] logits) {
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    wd = DequantizeLinear<axis = AXIS>(w, ws, wz)
    logits = PRODUCT
}"""


def synthetic(shape: str, product: str, axis: int = 1, dead: int | None = None) -> ModelProto:
    """One quantized product at the end of a graph; an output may be dead, with the scale that sqat gives it then."""
    text = SYNTHETIC.replace("SHAPE", shape).replace("OUT", shape.replace("32", "16"))
    model = onnx.parser.parse_model(text.replace("PRODUCT", product).replace("AXIS", str(axis)))
    generator = np.random.default_rng(0)
    weight = generator.integers(-127, 128, (32, 16) if axis else (16, 32)).astype(np.int8)
    if dead is not None:
        weight[:, dead] = 0
    values = {"w": weight, "ws": generator.uniform(0.01, 0.02, 16).astype(np.float32), "wz": np.zeros(16, np.int8)}
    values["ws"][dead if dead is not None else []] = 2.0**-47
    values |= {"s": np.float32(0.03), "z": np.int8(0), "b": generator.normal(size=16).astype(np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in values.items())
    for index, node in enumerate(model.graph.node):
        node.name = f"/some/layer/{node.op_type}_{index}"
    return model


@pytest.mark.parametrize(("shape", "product", "axis"), [
    ("2, 32", "MatMul(d, wd)", 1),
    ("2, 32", "Gemm<transB = 1>(d, wd, b)", 0),
    ("2, 32", "Gemm(d, wd, b)", 1),
    ("2, 32", "Gemm(d, wd)", 1),
    ("2, 5, 32", "MatMul(d, wd)", 1),
    ("2, 3, 5, 32", "MatMul(d, wd)", 1),
])  # fmt: skip
def test_every_rank_and_form(shape: str, product: str, axis: int) -> None:
    before = synthetic(shape, product, axis)
    after = to_conv1x1(before)
    check(after)
    assert [entry.name for entry in after.graph.output] == ["logits"]
    assert {module_of(node) for node in after.graph.node} == {"some.layer"}
    x = np.random.default_rng(1).normal(size=[int(side) for side in shape.split(",")]).astype(np.float32)
    expected, got = (ReferenceEvaluator(model).run(None, {"x": x})[0] for model in (before, after))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "product", "axis", "problem"), [
    ("1, 2, 3, 4, 32", "MatMul(d, wd)", 1, "rank 5"),
    ("2, 32", "Gemm<alpha = 0.5>(d, wd, b)", 1, "alpha = beta = 1"),
    ("32, 32", "Gemm<transA = 1>(d, wd, b)", 1, "no transA"),
])  # fmt: skip
def test_what_no_convolution_computes(shape: str, product: str, axis: int, problem: str) -> None:
    with pytest.raises(ValueError, match=f"/some/layer/.*{problem}"):
        to_conv1x1(synthetic(shape, product, axis))


def test_a_dead_channel_keeps_its_bias() -> None:
    """With the tiny scale of a dead channel the bias would not fit an int32, and ONNX Runtime would cut it off."""
    tail = "MatMul(d, wd)\n y = Add(p, b)\n yq = QuantizeLinear(y, s, z)\n logits = DequantizeLinear(yq, s, z)"
    model = synthetic("2, 5, 32", tail, dead=3)
    model.graph.node[3].output[0] = "p"
    after = to_conv1x1(model)
    assert count_operators(optimized_graph(after.SerializeToString()))["QLinearConv"] == 1
    x = np.random.default_rng(1).normal(size=(2, 5, 32)).astype(np.float32)
    got = run_batches(session(after.SerializeToString(), threads=1), [{"x": x}])
    assert np.unique(got[..., 3]) == pytest.approx([np.rint(constants(model)["b"][3] / 0.03) * 0.03], abs=1e-5)


def test_the_given_graph_stays_unchanged(bert: Family) -> None:
    model = quantized(bert, *TENSORRT)
    before = model.SerializeToString(deterministic=True)
    to_conv1x1(model)
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(("name", "weights"), [("bert", "dq"), ("modernbert", "qdq")])
def test_tensorrt_builds_it_in_int8(name: str, weights: str) -> None:
    family = build_family(name)
    before = rtx_weight_bytes(quantized(family, *TENSORRT, weights=weights))
    assert rtx_weight_bytes(to_conv1x1(quantized(family, *TENSORRT, weights=weights))) < 1.1 * before
