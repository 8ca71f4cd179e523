"""Every rule passes a file in order, and finds the one thing that an edit breaks in it.

`test_lint_targets` has the rules for other kinds of file: float, float16, convolutions, foreign operators.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from broken_graphs import (
    FOR_INT8,
    FOR_TENSORRT,
    Edit,
    fix_batch,
    leave_unused,
    set_negative_zeros,
    set_opset_21,
    share_zero_point,
)
from graph_edits import ALL, ENCODER, LAYER, QUERY, SELF, bypass, change, findings_of, node, put, tensor, tied
from onnx import ModelProto, numpy_helper

from sqat.errors import GateError, SqatError
from sqat.export.qdq import insert_qdq
from sqat.export.quantized_model import QuantizedModel
from sqat.lint.apply_rules import list_findings, verify
from tests.onnx_models import ATTENTION, Family


@pytest.fixture(scope="module")
def written_qdq(bert: Family) -> bytes:
    return bytes(insert_qdq(bert.graph, tied(bert, *ALL), "qdq").SerializeToString())


@pytest.mark.parametrize("weights", ["dq", "qdq"])
@pytest.mark.parametrize("target", ["onnx-int8", "tensorrt"])
def test_a_written_model_passes_every_rule(bert: Family, weights: str, target: str) -> None:
    model = insert_qdq(bert.graph, tied(bert, *ALL), weights)
    assert verify(model, dict.fromkeys(bert.weights, "2:4"), target) == []
    assert verify(model, None, target) == []


def test_a_float_model_has_nothing_to_break(bert: Family) -> None:
    assert verify(bert.graph) == []
    assert verify(bert.graph, dict.fromkeys(bert.weights, "2:4"), "onnx-fp32") == []


def lines(model: ModelProto, target: str, *, warning: bool = False) -> list[str]:
    return [str(finding) for finding in findings_of(model, target) if finding.warning == warning]


@pytest.mark.parametrize("edit", FOR_INT8)
def test_a_broken_rule_is_found(written: bytes, edit: Edit) -> None:
    model = onnx.load_from_string(written)
    line = edit(model)
    for target in ("onnx-int8", "tensorrt"):
        findings = findings_of(model, target)
        (first, *_) = [finding for finding in findings if str(finding).startswith(line)] or [pytest.fail(f"{findings}")]
        assert first.warning == (target == "tensorrt" and edit in (set_opset_21, fix_batch, share_zero_point))
        assert all(finding.requirement and finding.advice for finding in findings)


@pytest.mark.parametrize("edit", FOR_TENSORRT)
def test_tensorrt_requires_more(written: bytes, edit: Edit) -> None:
    model = onnx.load_from_string(written)
    line = edit(model)
    assert line in lines(model, "tensorrt")
    assert lines(model, "onnx-int8") == []


def test_int8_only_behind_gelu_is_a_warning(bert: Family) -> None:
    quantization = tied(bert, *ALL)
    amax = {site: bound for site, bound in quantization.amax.items() if not site.endswith("intermediate.dense:output")}
    model = insert_qdq(bert.graph, QuantizedModel(quantization.weights, amax))
    names = [f"/bert/encoder/layer.{layer}/intermediate/dense/MatMul" for layer in (0, 1)]
    assert lines(model, "tensorrt", warning=True) == [f"T16 {name}: int8 only behind Gelu" for name in names]
    assert lines(model, "tensorrt") == []


def test_q_k_and_v_share_an_output_scale(written: bytes) -> None:
    model = onnx.load_from_string(written)
    put(model, f"{LAYER}.attention.self.key:output_scale", np.float32(0.001))
    largest = float(numpy_helper.to_array(tensor(model, f"{QUERY}:output_scale")))
    line = f"T16 {SELF}/key/MatMul: output scale 0.001, of those that read the same tensor {largest:.4g}"
    assert lines(model, "tensorrt", warning=True) == [line]
    assert list_findings(model) == []


@pytest.mark.parametrize(("operand", "site"), [(1, "add0/right"), (0, "dense/output")])
def test_a_residual_add_takes_both_inputs_from_dequantizers(written: bytes, operand: int, site: str) -> None:
    model = onnx.load_from_string(written)
    bypass(model, f"{ENCODER}/output/{site}")
    assert lines(model, "tensorrt", warning=True) == [
        f"T17 {ENCODER}/output/Add: residual Add of which input {operand} is float"
    ]
    assert list_findings(model) == []


def test_embedding_sums_are_no_residual_adds(written: bytes) -> None:
    assert lines(onnx.load_from_string(written), "tensorrt", warning=True) == []


def test_int8_fused_attention_requires_a_quantizer_behind_it(bert: Family) -> None:
    dense = "bert.encoder.layer.0.attention.output.dense"
    quantization = bert.quantization(*ATTENTION)
    weights = {layer: weight for layer, weight in quantization.weights.items() if layer != dense}
    amax = {site: bound for site, bound in quantization.amax.items() if not site.startswith(dense)}
    (finding,) = list_findings(insert_qdq(bert.graph, QuantizedModel(weights, amax)))
    assert str(finding) == f"B13 {SELF}/MatMul_1: no QuantizeLinear behind the second product"
    assert finding.warning


HEADS = """<ir_version: 9, opset_import: ["" : 20]>
agraph (float[batch, heads, sequence, %s] q, float[batch, heads, %s, sequence] k) => (float[batch, heads, s, t] scores)
<float s = {0.01}, int8 z = {0}, int8 zk = {0}> {
    qq = QuantizeLinear(q, s, z)
    qd = DequantizeLinear(qq, s, z)
    kq = QuantizeLinear(k, s, zk)
    kd = DequantizeLinear(kq, s, zk)
    scores = MatMul(qd, kd)
}"""


@pytest.mark.parametrize(("size", "problems"), [("64", []), ("48", ["head size 48"]), ("width", ["head size width"])])
def test_int8_fused_attention_requires_a_head_size(size: str, problems: list[str]) -> None:
    model = onnx.parser.parse_model(HEADS % (size, size))
    expected = [f"{text}, int8 fused attention takes 16, 32 and 64" for text in problems]
    assert [finding.problem for finding in list_findings(model) if finding.rule == "B13"] == expected


NARROW = """<ir_version: 9, opset_import: ["" : 20]>
agraph (float[batch, sequence, %d] x) => (float[batch, sequence, %d] logits)
<float s = {0.01}, int8 z = {0}> {
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    wd = DequantizeLinear<axis = 1>(w, ws, wz)
    logits = MatMul(d, wd)
}"""


def product(inputs: int, outputs: int) -> ModelProto:
    model = onnx.parser.parse_model(NARROW % (inputs, outputs))
    put(model, "w", np.ones((inputs, outputs), np.int8))
    put(model, "ws", np.ones(outputs, np.float32))
    put(model, "wz", np.zeros(outputs, np.int8))
    for entry in model.graph.node:
        entry.name = f"/layer/{entry.op_type}" if entry.op_type == "MatMul" else f"/{entry.output[0]}"
    return model


def test_narrow_layers_are_refused() -> None:
    assert verify(product(32, 64)) == []
    with pytest.raises(GateError, match=r"B8 /layer/MatMul: quantized at \(8, 32\)") as error:
        verify(product(8, 32))
    assert error.value.code == "broken-rule"
    assert [str(finding) for finding in verify(product(48, 32))] == [
        "B8 /layer/MatMul: (48, 32) [in, out] are not both multiples of 32"
    ]


def test_two_of_four_is_checked_on_the_integers(written: bytes) -> None:
    model = onnx.load_from_string(written)
    change(model, f"{QUERY}.weight_int8", lambda value: value.__setitem__((slice(0, 4), 5), 1))
    assert [(f.rule, f.warning) for f in verify(model)] == [("B6", True)]
    with pytest.raises(GateError, match=r"B6 .*query/MatMul: 1 groups hold more than 2 of 4 weights; "):
        verify(model, {QUERY: "2:4"})


def test_pruned_layers_must_be_there_and_fit_the_pattern(written: bytes) -> None:
    model = onnx.load_from_string(written)
    with pytest.raises(GateError, match=r"B6 bert\.none: pruned to 2:4, but not in the graph"):
        verify(model, {"bert.none": "2:4"})
    with pytest.raises(GateError, match=r"B6 .*query/MatMul: 32 inputs are not a multiple of 5"):
        verify(model, {QUERY: "2:5"})
    narrow = product(40, 36)
    change(narrow, "w", lambda value: value.__setitem__(slice(None, None, 4), 0))
    change(narrow, "w", lambda value: value.__setitem__(slice(1, None, 4), 0))
    line = "B8 /layer/MatMul: sparse at (40, 36) [in, out], which are not multiples of 16 and 8"
    assert line in [str(finding) for finding in verify(narrow, {"layer": "2:4"})]
    assert line in lines(narrow, "tensorrt")


def test_an_invalid_model_is_the_checkers_finding(written: bytes) -> None:
    model = onnx.load_from_string(written)
    node(model, f"{SELF}/query/MatMul").input[0] = "nowhere"
    (finding,) = list_findings(model)
    assert finding.rule == "checker"
    assert "\n" not in finding.problem
    with pytest.raises(GateError, match=r"breaks rule checker: .*nowhere"):
        verify(model)


def test_verify_counts_the_other_errors(written: bytes) -> None:
    model = onnx.load_from_string(written)
    set_negative_zeros(model)
    leave_unused(model)
    with pytest.raises(GateError, match=r"B7 /classifier/Gemm: 3 weights are -0\.0 \(and 1 more\); ") as error:
        verify(model)
    assert (error.value.code, error.value.exit_code) == ("broken-rule", 3)


def test_the_integers_of_a_float_weight_are_those_its_quantizer_makes(written_qdq: bytes) -> None:
    model = onnx.load_from_string(written_qdq)
    scale = numpy_helper.to_array(tensor(model, f"{QUERY}.weight_scale"))
    name = node(model, f"{SELF}/query/weight/QuantizeLinear").input[0]

    def nudge(value: np.ndarray) -> None:
        value[:4, 5] = 0.4 * scale[5]  # rounds to 0: not a weight as far as the product sees

    change(model, name, nudge)
    assert list_findings(model, None, "tensorrt") == []
    change(model, name, lambda value: value.__setitem__((slice(0, 4), 5), 0.6 * scale[5]))
    (finding,) = list_findings(model, {QUERY: "2:4"}, "tensorrt")
    assert str(finding) == f"B6 {SELF}/query/MatMul: 1 groups hold more than 2 of 4 weights"
    change(model, name, lambda value: value.__setitem__((slice(0, 4), 5), [-128 * scale[5], 0, 0, 0]))
    (finding,) = list_findings(model, None, "tensorrt")
    assert str(finding) == f"B7 {SELF}/query/MatMul: int8 weight of -128"


def test_the_quantizer_of_a_weight_agrees_with_its_dequantizer(written_qdq: bytes) -> None:
    model = onnx.load_from_string(written_qdq)
    next(a for a in node(model, f"{SELF}/query/weight/QuantizeLinear").attribute if a.name == "axis").i = 0
    pair = f"{SELF}/query/weight"
    assert f"B4 {pair}/DequantizeLinear: axis differs from that of {pair}/QuantizeLinear" in lines(model, "onnx-int8")


def test_an_unknown_target_is_refused(written: bytes) -> None:
    with pytest.raises(SqatError) as error:
        verify(onnx.load_from_string(written), None, "tensorrt-9")
    assert error.value.code == "unknown-name"


def test_a_written_file_is_read_by_the_checker_too(written: bytes, tmp_path: Path) -> None:
    model = onnx.load_from_string(written)
    path = tmp_path / "model.onnx"
    path.write_bytes(written)
    assert verify(model, None, "onnx-int8", path) == []
    other = onnx.load_from_string(written)
    node(other, f"{SELF}/query/MatMul").input[0] = "nowhere"
    path.write_bytes(other.SerializeToString())
    with pytest.raises(GateError, match=r"breaks rule checker: .*nowhere"):
        verify(model, None, "onnx-int8", path)
