"""Every repair: ONNX Runtime computes the same before and after, and the finding is gone.

Graphs are broken from one that the writer made, or written out; the runtime's own rewriting is switched off, so that
what is compared is the graph as it stands.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
from graph_edits import ENCODER, LAYER, QUERY, SELF, between, change, node, put, tensor, tied
from onnx import ModelProto, TensorProto, helper, numpy_helper

from sqat.export.qdq import insert_qdq
from sqat.lint import apply_rules as rules_module
from sqat.lint.apply_rules import REPAIRABLE, apply_rules, find, fix, parse_target
from sqat.lint.findings import Change
from sqat.lint.graph_view import GraphView
from tests.onnx_models import ATTENTION, Family


@pytest.fixture(scope="module")
def written(bert: Family) -> bytes:
    model = insert_qdq(bert.graph, tied(bert, "output", *ATTENTION, "add"))
    return bytes(model.SerializeToString())


def run(model: ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, inputs)]


def repaired(model: ModelProto, rule: str, target: str = "tensorrt") -> tuple[ModelProto, list[Change]]:
    """The model after `fix`, in which the rule is kept, and what was done for it; the model itself is untouched."""
    before = model.SerializeToString()
    errors = [f for f in find(model, None, target) if f.rule == rule and not f.problem.startswith("opset")]
    assert errors, "nothing to repair"
    assert all(f.fixable for f in errors)
    result, changes = fix(model, parse_target(target))
    assert model.SerializeToString() == before
    onnx.checker.check_model(result, full_check=True)
    left = apply_rules(GraphView(result), None, parse_target(target))
    assert [str(f) for f in left if f.rule == rule and not f.problem.startswith("opset")] == []
    own = [entry for entry in changes if entry.rule == rule]
    assert own
    return result, own


def transposed_weight(model: ModelProto) -> None:
    change_layout(model, f"{SELF}/query/weight/DequantizeLinear", f"{SELF}/query/MatMul", QUERY)


def change_layout(model: ModelProto, dequantizer: str, product: str, layer: str) -> None:
    """Store a weight as [out, in] behind which a Transpose follows."""
    put(model, f"{layer}.weight_int8", numpy_helper.to_array(tensor(model, f"{layer}.weight_int8")).T.copy())
    node(model, dequantizer).attribute[0].i = 0
    between(model, product, 1, "Transpose", perm=[1, 0])


def shared_pair(model: ModelProto) -> None:
    for part in ("key", "value"):
        node(model, f"{SELF}/{part}/MatMul").input[0] = node(model, f"{SELF}/query/MatMul").input[0]


def shared_quantizer(model: ModelProto) -> None:
    for part in ("key", "value"):
        node(model, f"{SELF}/{part}/input/DequantizeLinear").input[0] = f"{SELF}/query/input/QuantizeLinear:0"


def shared_zero_point(model: ModelProto) -> None:
    for part in ("key", "value"):
        for op in ("QuantizeLinear", "DequantizeLinear"):
            node(model, f"{SELF}/{part}/input/{op}").input[2] = f"{QUERY}:input_zero_point"


def pair_that_is_an_output_too(model: ModelProto) -> None:
    shared_pair(model)
    name = node(model, f"{SELF}/query/MatMul").input[0]
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "sequence", 32]))


def shared_weight(model: ModelProto) -> None:
    key = node(model, f"{SELF}/key/weight/DequantizeLinear")
    key.input[:] = node(model, f"{SELF}/query/weight/DequantizeLinear").input


def shared_weight_chain(model: ModelProto) -> None:
    node(model, f"{SELF}/key/MatMul").input[1] = node(model, f"{SELF}/query/MatMul").input[1]


def weight_that_is_read_elsewhere(model: ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", [f"{QUERY}.weight_int8"], ["weight_copy"], name="/Copy"))
    model.graph.output.append(helper.make_tensor_value_info("weight_copy", TensorProto.INT8, [32, 32]))


def leftovers(model: ModelProto) -> None:
    put(model, "left_over", np.ones((32, 32), np.float32))
    put(model, "read_by_what_nothing_reads", np.ones(3, np.float32))
    model.graph.node.append(helper.make_node("Relu", ["read_by_what_nothing_reads"], ["unread"], name="/Dead"))


def no_zero_points(model: ModelProto) -> None:
    del node(model, f"{SELF}/query/weight/DequantizeLinear").input[2:]


def output_types(model: ModelProto) -> None:
    model.opset_import[0].version = 21
    for part in ("query", "key"):
        entry = node(model, f"{SELF}/{part}/input/QuantizeLinear")
        entry.attribute.append(helper.make_attribute("output_dtype", TensorProto.INT8))


def output_type_instead_of_a_zero_point(model: ModelProto) -> None:
    output_types(model)
    for op in ("QuantizeLinear", "DequantizeLinear"):
        del node(model, f"{SELF}/query/input/{op}").input[2:]


def negative_zeros(model: ModelProto) -> None:
    change(model, "classifier.weight", lambda value: value.__setitem__((0, slice(3)), -0.0))


def dead_scale(model: ModelProto) -> None:
    change(model, f"{QUERY}.weight_scale", lambda value: value.__setitem__(3, 0))


def denormal_dead_scale(model: ModelProto) -> None:
    change(model, f"{QUERY}.weight_scale", lambda value: value.__setitem__(3, 1e-40))


def unsigned_activation(model: ModelProto) -> None:
    put(model, f"{QUERY}:input_zero_point", np.uint8(128))
    for value in [v for v in model.graph.value_info if v.name.startswith(f"{SELF}/query/input/Quant")]:
        value.type.tensor_type.elem_type = TensorProto.UINT8


def unsigned_weight(model: ModelProto) -> None:
    value = numpy_helper.to_array(tensor(model, f"{QUERY}.weight_int8")).astype(np.int16)
    put(model, f"{QUERY}.weight_int8", (value + 128).astype(np.uint8))
    put(model, f"{QUERY}.weight_zero_point", np.full(32, 128, np.uint8))


EXACT: list[tuple[str, Callable[[ModelProto], None], int]] = [
    ("B1", output_types, 2),
    ("B2", no_zero_points, 1),
    ("B2", output_type_instead_of_a_zero_point, 2),
    ("B2", unsigned_activation, 1),
    ("B2", unsigned_weight, 1),
    ("B3", dead_scale, 1),
    ("B3", denormal_dead_scale, 1),
    ("B5", transposed_weight, 1),
    ("B7", negative_zeros, 1),
    ("B10", shared_pair, 2),
    ("B10", shared_quantizer, 2),
    ("B10", shared_zero_point, 2),
    ("B15", shared_weight, 4),
    ("B15", shared_weight_chain, 5),
    ("B15", weight_that_is_read_elsewhere, 1),
    ("B15", leftovers, 3),
]


@pytest.mark.parametrize(("rule", "break_it", "count"), EXACT, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_repair_keeps_every_bit(
    written: bytes, bert: Family, rule: str, break_it: Callable[[ModelProto], None], count: int
) -> None:
    model = onnx.load_from_string(written)
    break_it(model)
    result, changes = repaired(model, rule)
    assert len(changes) == count
    for sequence, seed in ((8, 0), (13, 1)):
        inputs = {name: value.numpy() for name, value in bert.inputs(3, sequence, seed=seed).items()}
        for before, after in zip(run(model, inputs), run(result, inputs), strict=True):
            np.testing.assert_array_equal(before, after)
    known = {(f.rule, f.node) for f in apply_rules(GraphView(model), None, "tensorrt")}
    assert {(f.rule, f.node) for f in apply_rules(GraphView(result), None, "tensorrt")} <= known


def test_every_repair_has_its_test() -> None:
    assert {rule for rule, *_ in EXACT} | {"B12"} == REPAIRABLE


@pytest.mark.parametrize(("op", "factor"), [("Mul", 0.25), ("Div", 4.0), ("Mul", 0.17677669), ("Div", 5.656854)])
def test_a_factor_behind_a_pair_goes_into_its_scale(written: bytes, bert: Family, op: str, factor: float) -> None:
    model = onnx.load_from_string(written)
    put(model, "factor", np.float32(factor))
    between(model, f"{SELF}/MatMul", 0, op, "factor")
    result, (entry,) = repaired(model, "B12")
    assert (entry.node, entry.text) == (
        f"{SELF}/MatMul", f"folded /{op}_extra into the scale of {SELF}/query/DequantizeLinear",
    )  # fmt: skip
    assert not [n for n in result.graph.node if n.name == f"/{op}_extra"]
    exact = np.log2(factor) % 1 == 0
    inputs = {name: value.numpy() for name, value in bert.inputs(3, 9).items()}
    for before, after in zip(run(model, inputs), run(result, inputs), strict=True):
        # A quantizer downstream may round the other way where the last bit differs, so steps are allowed for.
        np.testing.assert_allclose(before, after, rtol=0, atol=0 if exact else 5e-2)
    found = apply_rules(GraphView(result), None, "tensorrt")
    assert found == apply_rules(GraphView(onnx.load_from_string(written)), None, "tensorrt")


PRODUCT = """<ir_version: 9, opset_import: ["" : 20]>
agraph (float[batch, heads, sequence, 32] q, float[batch, heads, 32, sequence] k) => (float[batch, heads, s, t] scores)
<float s = {0.01}, int8 z = {0}, float t = {0.02}, int8 zk = {0}, float root = {2.3784142}> {
    qq = QuantizeLinear(q, s, z)
    qd = DequantizeLinear(qq, s, z)
    scaled = Div(qd, root)
    twice = Mul(root, scaled)
    small = Div(twice, root)
    kq = QuantizeLinear(k, t, zk)
    kd = DequantizeLinear(kq, t, zk)
    k_small = Mul(root, kd)
    scores = MatMul(small, k_small)
}"""


def test_factors_on_both_sides_are_folded_to_the_last_bits() -> None:
    model = onnx.parser.parse_model(PRODUCT)
    result, changes = repaired(model, "B12")
    assert (len(changes), len(result.graph.node)) == (4, 5)
    random = np.random.default_rng(0)
    inputs = {
        "q": random.standard_normal((2, 3, 5, 32)).astype(np.float32),
        "k": random.standard_normal((2, 3, 32, 5)).astype(np.float32),
    }
    (before,), (after,) = run(model, inputs), run(result, inputs)
    np.testing.assert_allclose(before, after, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("flavour", ["dq", "qdq"])
def test_a_transpose_goes_into_either_form_of_a_weight(bert: Family, flavour: str) -> None:
    model = insert_qdq(bert.graph, tied(bert, "output"), flavour)
    chain = [n for n in ("QuantizeLinear", "DequantizeLinear") if flavour == "qdq" or n == "DequantizeLinear"]
    name = node(model, f"{SELF}/query/weight/{chain[0]}").input[0]
    put(model, name, numpy_helper.to_array(tensor(model, name)).T.copy())
    for op in chain:
        node(model, f"{SELF}/query/weight/{op}").attribute[0].i = 0
    between(model, f"{SELF}/query/MatMul", 1, "Transpose", perm=[1, 0])
    result, _ = repaired(model, "B5", "onnx-int8")
    inputs = {name: value.numpy() for name, value in bert.inputs(2, 7).items()}
    for before, after in zip(run(model, inputs), run(result, inputs), strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_transposed_float_weight_is_stored_as_it_is_read() -> None:
    text = """<ir_version: 9, opset_import: ["" : 20]>
    agraph (float[batch, 32] x) => (float[batch, 32] y) {
        t = Transpose<perm = [1, 0]>(w)
        a = MatMul(x, t)
        u = Transpose<perm = [1, 0]>(tied)
        b = MatMul(a, u)
        c = MatMul(b, tied)
        y = Relu(c)
    }"""
    model = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    for name in ("w", "tied"):
        put(model, name, random.standard_normal((32, 32)).astype(np.float32))
    result, changes = fix(model, "tensorrt")
    assert [(entry.rule, entry.node) for entry in changes] == [("B5", "a")]
    assert [entry.op_type for entry in result.graph.node] == ["MatMul", "Transpose", "MatMul", "MatMul", "Relu"]
    x = random.standard_normal((4, 32)).astype(np.float32)
    np.testing.assert_array_equal(run(model, {"x": x})[0], run(result, {"x": x})[0])
    assert fix(model, "onnx-fp32")[1] == []


def test_what_would_change_the_numbers_is_left(written: bytes) -> None:
    """An asymmetric or unsigned quantizer, a scale that is simply wrong, an output that was never calibrated."""
    model = onnx.load_from_string(written)
    put(model, f"{QUERY}:input_zero_point", np.uint8(7))
    put(model, f"{LAYER}.attention.self.key:input_zero_point", np.int8(3))
    put(model, f"{LAYER}.attention.self.value:input_scale", np.float32(-1))
    change(model, f"{LAYER}.output.dense.weight_scale", lambda value: value.__setitem__(0, 0))
    put(model, "factor", np.float32(-1))
    between(model, f"{SELF}/MatMul", 0, "Mul", "factor")
    for value in [v for v in model.graph.value_info if v.name.startswith(f"{SELF}/query/input/Quant")]:
        value.type.tensor_type.elem_type = TensorProto.UINT8
    found = find(model, None, "tensorrt")
    assert {f.rule for f in found} == {"B2", "B3", "B12"}
    assert not any(f.fixable for f in found)
    assert fix(model, "tensorrt")[1] == []


def test_an_output_keeps_its_pair_and_readers_get_others(written: bytes, bert: Family) -> None:
    model = onnx.load_from_string(written)
    pair_that_is_an_output_too(model)
    result, changes = fix(model, "tensorrt")
    assert [entry.node for entry in changes if entry.rule == "B10"] == [
        f"{SELF}/{part}/MatMul" for part in ("query", "key", "value")
    ]
    inputs = {name: value.numpy() for name, value in bert.inputs(2, 7).items()}
    for before, after in zip(run(model, inputs), run(result, inputs), strict=True):
        np.testing.assert_array_equal(before, after)
    readers = GraphView(result).consumers
    assert [len(readers.get(n, [])) for n in (model.graph.output[-1].name,)] == [0]


def test_a_subgraph_keeps_what_it_reads() -> None:
    text = """<ir_version: 9, opset_import: ["" : 20]>
    agraph (float[batch, 32] x, bool flag) => (float[batch, 32] y) <float s = {0.1}, int8 z = {0}, float[1] k = {2}> {
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        a = MatMul(d, w)
        b = MatMul(d, w)
        c = Add(a, b)
        y = If(flag)<then_branch = yes () => (float[batch, 32] t) { t = Mul(d, k) },
                     else_branch = no () => (float[batch, 32] e) { e = Add(c, d) }>
    }"""
    model = onnx.parser.parse_model(text)
    put(model, "w", np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32))
    result, changes = fix(model, "onnx-int8")
    assert [entry.node for entry in changes] == ["a", "b"]
    x = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)
    for flag in (True, False):
        inputs = {"x": x, "flag": np.asarray(flag)}
        np.testing.assert_array_equal(run(model, inputs)[0], run(result, inputs)[0])


def test_all_repairs_together(written: bytes, bert: Family) -> None:
    model = onnx.load_from_string(written)
    for break_it in (shared_pair, transposed_weight, negative_zeros, dead_scale, leftovers):
        break_it(model)
    put(model, "factor", np.float32(0.5))
    between(model, f"{SELF}/MatMul", 1, "Mul", "factor")
    assert {f.rule for f in find(model, None, "tensorrt")} == {"B3", "B5", "B7", "B10", "B12", "B15"}
    result, changes = fix(model, "tensorrt")
    assert find(result, None, "tensorrt") == []
    assert {entry.rule for entry in changes} == {"B3", "B5", "B7", "B10", "B12", "B15"}
    assert fix(result, "tensorrt")[1] == []
    inputs = {name: value.numpy() for name, value in bert.inputs(2, 7).items()}
    np.testing.assert_array_equal(run(model, inputs)[0], run(result, inputs)[0])


def test_a_file_in_order_comes_back_as_it_was(written: bytes) -> None:
    model = onnx.load_from_string(written)
    result, changes = fix(model, "tensorrt")
    assert changes == []
    assert [n.SerializeToString() for n in result.graph.node] == [n.SerializeToString() for n in model.graph.node]
    assert {t.name for t in result.graph.initializer} == {t.name for t in model.graph.initializer}


def test_a_repair_that_fails_is_told_and_hides_nothing(written: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load_from_string(written)
    negative_zeros(model)

    def fail(*_: object) -> None:
        raise ValueError("the repaired graph is not sound: so and so")

    monkeypatch.setattr(rules_module, "fix", fail)
    assert [str(f) for f in find(model)] == [
        "B7 /classifier/Gemm: 3 weights are -0.0",
        "fix: the repaired graph is not sound: so and so",
    ]


def test_an_invalid_graph_is_not_touched(written: bytes) -> None:
    model = onnx.load_from_string(written)
    shared_pair(model)
    node(model, f"{ENCODER}/output/dense/MatMul").input[0] = "nowhere"
    result, changes = fix(model, "tensorrt")
    assert result is model
    assert changes == []
    assert not any(f.fixable for f in find(model, None, "tensorrt"))
