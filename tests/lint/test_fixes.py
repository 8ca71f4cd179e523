"""Every repair: ONNX Runtime computes the same before and after, and the finding is gone.

The runtime's own rewriting is off, so that it computes the graph as it stands.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import onnxruntime
import pytest
from broken_graphs import (
    Edit,
    copy_weight_to_output,
    drop_zero_point_of_weight,
    leave_unused,
    make_activation_unsigned,
    make_dead_scale_denormal,
    make_weight_unsigned,
    set_negative_zeros,
    set_output_types,
    set_output_types_without_zero_points,
    share_dequantizer,
    share_initializer,
    share_pair,
    share_quantizer,
    share_zero_point,
    transpose_weight,
    zero_dead_scale,
)
from graph_edits import ENCODER, LAYER, QUERY, SELF, between, change, findings_of, node, put, tensor, tied
from onnx import ModelProto, TensorProto, helper, numpy_helper

from sqat.export.qdq import insert_qdq
from sqat.lint import apply_rules
from sqat.lint.apply_rules import REPAIRABLE, fix, list_findings, parse_target
from sqat.lint.findings import Change
from sqat.lint.graph_view import GraphView
from tests.onnx_models import Family


def run(model: ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, inputs)]


def assert_same_outputs(model: ModelProto, result: ModelProto, inputs: dict[str, np.ndarray]) -> None:
    for before, after in zip(run(model, inputs), run(result, inputs), strict=True):
        np.testing.assert_array_equal(before, after)


def batch(family: Family, size: int, sequence: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in family.inputs(size, sequence, seed=seed).items()}


def repair(model: ModelProto, rule: str, target: str = "tensorrt") -> tuple[ModelProto, list[Change]]:
    """The model after `fix`, which keeps the rule, and the changes made for it; the model itself does not change."""

    def broken(findings: Iterable) -> list:
        return [entry for entry in findings if entry.rule == rule and not entry.problem.startswith("opset")]

    before = model.SerializeToString()
    errors = broken(list_findings(model, None, target))
    assert errors, "nothing to repair"
    assert all(finding.fixable for finding in errors)
    result, changes = fix(model, parse_target(target))
    assert model.SerializeToString() == before
    onnx.checker.check_model(result, full_check=True)
    assert broken(findings_of(result, target)) == []
    own = [entry for entry in changes if entry.rule == rule]
    assert own
    return result, own


def make_pair_an_output(model: ModelProto) -> None:
    share_pair(model)
    name = node(model, f"{SELF}/query/MatMul").input[0]
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "sequence", 32]))


EXACT: list[tuple[str, Edit, int]] = [
    ("B1", set_output_types, 2),
    ("B2", drop_zero_point_of_weight, 1),
    ("B2", set_output_types_without_zero_points, 2),
    ("B2", make_activation_unsigned, 1),
    ("B2", make_weight_unsigned, 1),
    ("B3", zero_dead_scale, 1),
    ("B3", make_dead_scale_denormal, 1),
    ("B5", transpose_weight, 1),
    ("B7", set_negative_zeros, 1),
    ("B10", share_pair, 2),
    ("B10", share_quantizer, 2),
    ("B10", share_zero_point, 2),
    ("B15", share_initializer, 4),
    ("B15", share_dequantizer, 5),
    ("B15", copy_weight_to_output, 1),
    ("B15", leave_unused, 3),
]


@pytest.mark.parametrize(("rule", "edit", "count"), EXACT, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_repair_keeps_every_bit(written: bytes, bert: Family, rule: str, edit: Edit, count: int) -> None:
    model = onnx.load_from_string(written)
    edit(model)
    result, changes = repair(model, rule)
    assert len(changes) == count
    for sequence, seed in ((8, 0), (13, 1)):
        assert_same_outputs(model, result, batch(bert, 3, sequence, seed))
    before, after = ({(f.rule, f.node) for f in findings_of(each, "tensorrt")} for each in (model, result))
    assert after <= before


def test_every_repair_has_its_test() -> None:
    assert {rule for rule, *_ in EXACT} | {"B12"} == REPAIRABLE


@pytest.mark.parametrize(("op", "factor"), [("Mul", 0.25), ("Div", 4.0), ("Mul", 0.17677669), ("Div", 5.656854)])
def test_a_factor_behind_a_pair_goes_into_its_scale(written: bytes, bert: Family, op: str, factor: float) -> None:
    model = onnx.load_from_string(written)
    put(model, "factor", np.float32(factor))
    between(model, f"{SELF}/MatMul", 0, op, "factor")
    result, (entry,) = repair(model, "B12")
    assert (entry.node, entry.text) == (
        f"{SELF}/MatMul", f"folded /{op}_extra into the scale of {SELF}/query/DequantizeLinear",
    )  # fmt: skip
    assert not [n for n in result.graph.node if n.name == f"/{op}_extra"]
    exact = np.log2(factor) % 1 == 0
    inputs = batch(bert, 3, 9)
    for before, after in zip(run(model, inputs), run(result, inputs), strict=True):
        # A quantizer downstream may round the other way where the last bit differs, so steps are allowed for.
        np.testing.assert_allclose(before, after, rtol=0, atol=0 if exact else 5e-2)
    assert findings_of(result, "tensorrt") == findings_of(onnx.load_from_string(written), "tensorrt")


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
    result, changes = repair(model, "B12")
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
    result, _ = repair(model, "B5", "onnx-int8")
    assert_same_outputs(model, result, batch(bert, 2, 7))


def test_a_transposed_float_weight_is_stored_as_the_product_reads_it() -> None:
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
    assert_same_outputs(model, result, {"x": x})
    assert fix(model, "onnx-fp32")[1] == []


def test_what_would_change_the_numbers_is_not_repaired(written: bytes) -> None:
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
    findings = list_findings(model, None, "tensorrt")
    assert {finding.rule for finding in findings} == {"B2", "B3", "B12"}
    assert not any(finding.fixable for finding in findings)
    assert fix(model, "tensorrt")[1] == []


def test_an_output_keeps_its_pair_and_readers_get_others(written: bytes, bert: Family) -> None:
    model = onnx.load_from_string(written)
    make_pair_an_output(model)
    result, changes = fix(model, "tensorrt")
    assert [entry.node for entry in changes if entry.rule == "B10"] == [
        f"{SELF}/{part}/MatMul" for part in ("query", "key", "value")
    ]
    assert_same_outputs(model, result, batch(bert, 2, 7))
    readers = GraphView(result).consumers
    assert [len(readers.get(n, [])) for n in (model.graph.output[-1].name,)] == [0]


def test_a_subgraph_keeps_the_tensors_it_reads() -> None:
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
        assert_same_outputs(model, result, {"x": x, "flag": np.asarray(flag)})


def test_all_repairs_together(written: bytes, bert: Family) -> None:
    model = onnx.load_from_string(written)
    for edit in (share_pair, transpose_weight, set_negative_zeros, zero_dead_scale, leave_unused):
        edit(model)
    put(model, "factor", np.float32(0.5))
    between(model, f"{SELF}/MatMul", 1, "Mul", "factor")
    assert {f.rule for f in list_findings(model, None, "tensorrt")} == {"B3", "B5", "B7", "B10", "B12", "B15"}
    result, changes = fix(model, "tensorrt")
    assert list_findings(result, None, "tensorrt") == []
    assert {entry.rule for entry in changes} == {"B3", "B5", "B7", "B10", "B12", "B15"}
    assert fix(result, "tensorrt")[1] == []
    assert_same_outputs(model, result, batch(bert, 2, 7))


def test_a_file_in_order_comes_back_as_it_was(written: bytes) -> None:
    model = onnx.load_from_string(written)
    result, changes = fix(model, "tensorrt")
    assert changes == []
    assert [n.SerializeToString() for n in result.graph.node] == [n.SerializeToString() for n in model.graph.node]
    assert {t.name for t in result.graph.initializer} == {t.name for t in model.graph.initializer}


def test_a_failed_repair_hides_no_finding(written: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load_from_string(written)
    set_negative_zeros(model)

    def fail(*_: object) -> None:
        raise ValueError("the repaired graph is not valid: so and so")

    monkeypatch.setattr(apply_rules, "fix", fail)
    assert [str(f) for f in list_findings(model)] == [
        "B7 /classifier/Gemm: 3 weights are -0.0",
        "fix: the repaired graph is not valid: so and so",
    ]


def test_an_invalid_graph_is_not_touched(written: bytes) -> None:
    model = onnx.load_from_string(written)
    share_pair(model)
    node(model, f"{ENCODER}/output/dense/MatMul").input[0] = "nowhere"
    result, changes = fix(model, "tensorrt")
    assert result is model
    assert changes == []
    assert not any(f.fixable for f in list_findings(model, None, "tensorrt"))
