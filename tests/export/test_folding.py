"""The attention scale folded away: same numbers, same int8 products, and nothing else touched."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from sqat.bench.candidates import openvino_core
from sqat.export.folding import fold_attention_scale
from sqat.export.qdq import insert_qdq
from sqat.lint.apply_rules import list_findings
from sqat.runtime.sessions import find_float_products, optimized_graph, parity, run_batches, session
from tests.onnx_graphs import count_operators
from tests.onnx_models import ATTENTION, Family, ImageFamily, build_family, rtx_weight_bytes

BATCHES = [(1, 2, "right"), (3, 9, "right"), (4, 20, "left"), (2, 33, "right"), (8, 16, "left")]
PLACEMENTS = {"tensorrt": ("output", *ATTENTION, "add"), "linear": (), "outputs": ("output",)}
ROUNDING = 5e-6
INT8 = ("MatMulIntegerToFloat", "QLinearMatMul")
SELF = "bert.encoder.layer.0.attention.self"


def factors_behind_products(model: ModelProto) -> list[str]:
    """Muls and Divs by a constant that read a MatMul."""
    constants = {entry.name for entry in model.graph.initializer}
    products = {node.output[0] for node in model.graph.node if node.op_type == "MatMul"}
    return [node.name for node in model.graph.node if node.op_type in ("Mul", "Div")
            and set(node.input) & products and set(node.input) & constants]  # fmt: skip


def tensor(model: ModelProto, name: str) -> np.ndarray:
    return next(numpy_helper.to_array(entry) for entry in model.graph.initializer if entry.name == name)


def quantized(family: Family, placement: str) -> ModelProto:
    return insert_qdq(family.graph, family.quantization(*family.roles(*PLACEMENTS[placement])))


def compare(family: Family, left: ModelProto, right: ModelProto) -> float:
    sessions = [session(model.SerializeToString(), threads=1) for model in (left, right)]
    batches = [{k: v.numpy() for k, v in family.inputs(b, s, side, seed=4).items()} for b, s, side in BATCHES]
    return max(parity(*(run_batches(runtime, [batch]) for runtime in sessions)) for batch in batches)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_numbers_and_int8_products_stay(family: Family, placement: str) -> None:
    before = quantized(family, placement)
    after = fold_attention_scale(before)
    assert factors_behind_products(before)
    assert not factors_behind_products(after) or (family.name, placement) in LEFT
    assert compare(family, before, after) < ROUNDING  # 1/sqrt(16) is a power of two
    graphs = [optimized_graph(model.SerializeToString()) for model in (before, after)]
    counts = [count_operators(graph) for graph in graphs]
    assert [counts[1][name] for name in INT8] == [counts[0][name] for name in INT8]
    assert find_float_products(graphs[1]) == []
    broken = {finding.rule for finding in list_findings(after, target="tensorrt") if not finding.warning}
    assert broken <= {"T16", "T17"}  # which a placement without outputs or adds breaks


def test_a_float_graph(family: Family) -> None:
    after = fold_attention_scale(family.graph)
    assert not factors_behind_products(after) or (family.name, "linear") in LEFT
    assert compare(family, family.graph, after) < ROUNDING


def test_images(vit: ImageFamily) -> None:
    before = quantized(vit, "tensorrt")
    after = fold_attention_scale(before)
    assert factors_behind_products(before)
    assert not factors_behind_products(after)
    assert compare(vit, before, after) < ROUNDING


def test_only_the_dequantizer_of_q_is_scaled(bert: Family) -> None:
    before = quantized(bert, "tensorrt")
    after = fold_attention_scale(before)
    quantizers = ("QuantizeLinear", "DequantizeLinear")
    scales = {node.name: node.input[1] for node in after.graph.node if node.op_type in quantizers}
    place = "/bert/encoder/layer.0/attention/self/query"
    shared = tensor(before, f"{SELF}:query_scale")
    assert tensor(after, scales[f"{place}/QuantizeLinear"]) == shared
    assert tensor(after, scales[f"{place}/DequantizeLinear"]) == shared * np.float32(0.25)
    old = {entry.name: entry for entry in before.graph.initializer}
    changed = [entry.name for entry in after.graph.initializer if old.get(entry.name) != entry]
    assert changed == [scales[f"/bert/encoder/layer.{layer}/attention/self/query/DequantizeLinear"] for layer in (0, 1)]


@pytest.mark.parametrize("weights", ["dq", "qdq"])
def test_without_a_pair_the_linear_is_scaled(bert: Family, weights: str) -> None:
    before = insert_qdq(bert.graph, bert.quantization(), weights)
    after = fold_attention_scale(before)
    for name in (f"{SELF}.query.weight_scale", f"{SELF}.query.bias"):
        assert np.array_equal(tensor(after, name), tensor(before, name) * np.float32(0.25))
    if weights == "dq":
        assert np.array_equal(tensor(after, f"{SELF}.query.weight_int8"), tensor(before, f"{SELF}.query.weight_int8"))
    for name in (f"{SELF}.key.weight_scale", f"{SELF}.key.bias"):
        assert np.array_equal(tensor(after, name), tensor(before, name))


def test_the_given_graph_stays_unchanged(bert: Family) -> None:
    model = quantized(bert, "tensorrt")
    before = model.SerializeToString(deterministic=True)
    fold_attention_scale(model)
    assert model.SerializeToString(deterministic=True) == before


ATTENDING = """<ir_version: 9, opset_import: ["" : 20]>
agraph (float[batch, S, 32] x) => (float[batch, S, S] scores, float[batch, S, 8] other) {
    plain = MatMul(x, w)
    q = Add(plain, b)
    k = MatMul(x, w)
    kb = Add(k, b)
    kt = Transpose<perm = [0, 2, 1]>(kb)
    product = MatMul(q, kt)
    scaled = SCALE
    scores = Identity(scaled)
    other = Relu(READ)
}"""


def attending(factor: float, scale: str = "Mul(product, factor)", read: str = "kb") -> ModelProto:
    """q and k from one weight and one bias, which a fold of q must not change for k."""
    model = onnx.parser.parse_model(ATTENDING.replace("SCALE", scale).replace("READ", read))
    generator = np.random.default_rng(0)
    values = {"w": generator.normal(size=(32, 8)), "b": generator.normal(size=8), "factor": np.array(factor)}
    model.graph.initializer.extend(numpy_helper.from_array(v.astype(np.float32), k) for k, v in values.items())
    onnx.checker.check_model(model, full_check=True)
    return model


def scores(model: ModelProto) -> np.ndarray:
    x = np.random.default_rng(1).normal(size=(2, 5, 32)).astype(np.float32)
    return ReferenceEvaluator(model).run(None, {"x": x})[0]


@given(st.floats(2.0**-10, 2.0**10, width=32))
def test_any_factor_and_what_is_shared_stays(factor: float) -> None:
    model = attending(factor)
    after = fold_attention_scale(model)
    assert not factors_behind_products(after)
    expected = scores(model)
    np.testing.assert_allclose(scores(after), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    names = {entry.name for entry in after.graph.initializer}
    assert {"w", "b"} < names  # k still reads them as they were
    assert "factor" not in names


@pytest.mark.parametrize("model", [
    attending(-0.5),
    attending(0.0),
    attending(float("inf")),
    attending(0.5, read="q"),
    attending(0.5, read="product"),
    attending(0.5, scale="Div(factor, product)"),
    attending(0.5, scale="Add(product, factor)"),
], ids=["negative", "zero", "infinite", "q read twice", "product read twice", "divided by", "added"])  # fmt: skip
def test_what_is_no_scale_or_cannot_be_folded_stays(model: ModelProto) -> None:
    after = fold_attention_scale(model)
    assert sorted(node.op_type for node in after.graph.node) == sorted(node.op_type for node in model.graph.node)
    assert {entry.name for entry in after.graph.initializer} == {"w", "b", "factor"}


def test_a_divisor() -> None:
    model = attending(0.5, scale="Div(product, factor)")
    after = fold_attention_scale(model)
    assert not factors_behind_products(after)
    np.testing.assert_allclose(scores(after), scores(model), rtol=1e-5, atol=1e-4)


def test_openvino_keeps_its_int8_products(family: Family) -> None:
    pytest.importorskip("openvino")
    core = openvino_core()
    before = quantized(family, "tensorrt")
    found = []
    batch = {k: v.numpy() for k, v in family.inputs(2, 12, seed=3).items()}
    for model in (before, fold_attention_scale(before)):
        compiled = core.compile_model(
            core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        kinds = [
            (info["layerType"].astype(str), info["runtimePrecision"].astype(str))
            for info in (op.get_rt_info() for op in compiled.get_runtime_model().get_ops())
        ]
        products = sorted(kind for kind in kinds if kind[0] in ("FullyConnected", "MatMul"))
        found.append((products, next(iter(compiled(batch).values()))))
    assert found[0][0] == found[1][0]
    assert sum(precision in ("i8", "u8") for _, precision in found[1][0]) >= len(family.weights)
    assert parity(found[0][1], found[1][1]) < ROUNDING


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_tensorrt_builds_it_with_the_same_weights(name: str) -> None:
    model = quantized(build_family(name), "tensorrt")
    assert rtx_weight_bytes(fold_attention_scale(model)) <= rtx_weight_bytes(model)


LEFT = {("modernbert", "linear"), ("modernbert", "outputs")}  # rotary embeddings lie between the linear and the product
