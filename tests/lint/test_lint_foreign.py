"""The linter on other tools' files: older exporters' forms, integer operators, foreign domains, subgraphs.

Each graph is written out here; one comes from ONNX Runtime's quantizer.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from broken_graphs import FOR_INT8, FOR_TENSORRT
from graph_edits import (
    ALL,
    LAYER,
    RESIDUAL,
    findings_of,
    messages,
    parsed,
    put,
    quantized_weight,
    sparse,
    tied,
    verdicts,
)
from onnx import ModelProto, helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from test_convolution_graphs import FLOATING, chain
from test_lint_targets import TYPES

from sqat.export.qdq import insert_qdq
from sqat.lint.apply_rules import fix
from sqat.lint.layer_report import lint
from sqat.lint.rules.table import RULES, TARGETS
from tests.onnx_models import ATTENTION, Family

ERF = """agraph (float[batch, sequence, 64] x) => (float[batch, sequence, 64] y)
<float s = {0.01}, int8 z1 = {0}, int8 z2 = {0}, int8 z3 = {0}, float root = {1.4142135}, float one = {1},
 float half = {0.5}> {
    q1 = QuantizeLinear(x, s, z1)
    d1 = DequantizeLinear(q1, s, z1)
    w1 = DequantizeLinear<axis = 1>(up, up_scale, up_zero)
    first = MatMul(d1, w1)
    h = Add(bias, first)
    a = Div(h, root)
    b = Erf(a)
    c = Add(b, one)
    d = Mul(h, c)
    e = Mul(d, half)
    q2 = QuantizeLinear(e, s, z2)
    d2 = DequantizeLinear(q2, s, z2)
    w2 = DequantizeLinear<axis = 1>(down, down_scale, down_zero)
    second = MatMul(d2, w2)
    q3 = QuantizeLinear(second, s, z3)
    y = DequantizeLinear(q3, s, z3)
}"""


def feed_forward(text: str = ERF, **others: np.ndarray) -> ModelProto:
    values = {
        "up": sparse(64, 128), "up_scale": np.ones(128, np.float32), "up_zero": np.zeros(128, np.int8),
        "down": sparse(128, 64), "down_scale": np.ones(64, np.float32), "down_zero": np.zeros(64, np.int8),
        "bias": np.ones(128, np.float32), **others,
    }  # fmt: skip
    return parsed(text, **values)


def test_the_error_function_is_an_activation() -> None:
    """Older exporters write GELU out; nodes have no names there, so outputs stand for them."""
    model = feed_forward()
    assert [str(f) for f in findings_of(model, "tensorrt")] == ["T16 first: int8 only behind Erf"]
    assert verdicts(model) == {"up": ("sparse int8?", "int8 only behind Erf"), "down": ("sparse int8", "")}


GATED = """agraph (float[batch, sequence, 64] x, float[batch, sequence, 128] other) => (float[batch, sequence, 128] y)
<float s = {0.01}, int8 z1 = {0}, int8 z2 = {0}, int8 z3 = {0}> {
    q1 = QuantizeLinear(x, s, z1)
    d1 = DequantizeLinear(q1, s, z1)
    w1 = DequantizeLinear<axis = 1>(up, up_scale, up_zero)
    gate = MatMul(d1, w1)
    q2 = QuantizeLinear(x, s, z2)
    d2 = DequantizeLinear(q2, s, z2)
    w2 = DequantizeLinear<axis = 1>(gain, gain_scale, gain_zero)
    up_x = MatMul(d2, w2)
    open = Sigmoid(gate)
    swish = Mul(gate, open)
    h = Mul(swish, %s)
    q3 = QuantizeLinear(h, s, z3)
    y = DequantizeLinear(q3, s, z3)
}"""


def gated(other: str) -> ModelProto:
    more = {"gain": sparse(64, 128, 1), "gain_scale": np.ones(128, np.float32), "gain_zero": np.zeros(128, np.int8)}
    model = feed_forward(GATED % other, **more)
    unused = {"down", "down_scale", "down_zero", "bias"}
    kept = [entry for entry in model.graph.initializer if entry.name not in unused]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def test_a_gate_is_part_of_an_activation() -> None:
    assert {str(f) for f in findings_of(gated("up_x"), "tensorrt")} == {
        "T16 gate: int8 only behind Sigmoid",
        "T16 up_x: int8 only behind Mul",
    }
    assert "T16 gate: its output stays float: it goes to Sigmoid" in messages(gated("other"), "tensorrt", "T16")


def test_weights_of_other_forms_have_their_pattern(bert: Family) -> None:
    """Constant nodes, a transposed weight, one in float16 behind a Cast, one with uint8 values around 128."""
    text = """agraph (float[batch, 32] x) => (float[batch, 32] y) <float s = {0.5}, int8 z = {0}, int8 z2 = {0},
        uint8 u = {128}> {
        turned = Transpose<perm = [1, 0]>(w_oi)
        a = MatMul(x, turned)
        wide = Cast<to = 1>(w_half)
        b = MatMul(a, wide)
        qb = QuantizeLinear(b, s, z)
        db = DequantizeLinear(qb, s, z)
        wc = DequantizeLinear(w_uint8, s, u)
        c = MatMul(db, wc)
        y = Gemm<transB = 1>(c, w_gemm)
    }"""
    weight = sparse(32, 32)
    model = parsed(
        text,
        w_oi=weight.T.astype(np.float32),
        w_half=weight.astype(np.float16),
        w_uint8=(weight.astype(np.int16) + 128).astype(np.uint8),
        w_gemm=weight.T.astype(np.float32),
    )
    (constant,) = [t for t in model.graph.initializer if t.name == "w_oi"]
    model.graph.initializer.remove(constant)
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w_oi"], value=constant))
    layers = lint(model, "tensorrt").layers
    assert [(layer.name, layer.pattern, layer.zeros, layer.shape) for layer in layers] == [
        (name, "2:4", 0.5, (32, 32)) for name in ("w_oi", "w_half", "w_uint8", "w_gemm")
    ]
    assert [layer.runs for layer in layers] == ["float", "sparse fp16", "float", "float"]
    assert "breaks B2" in layers[2].reason
    assert "breaks B4" in layers[2].reason


def test_reshaped_weights_keep_their_axes() -> None:
    text = """agraph (float[batch, 32, 1, 8] x) => (float[batch, 16, 1, 8] y)
    <float s = {0.5}, int8 z = {0}, int64[4] shape = {16, 32, 1, 1}> {
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        flat = DequantizeLinear<axis = 0>(w, ws, wz)
        kernel = Reshape(flat, shape)
        y = Conv(d, kernel)
    }"""
    constants = {"w": sparse(32, 16).T.copy(), "ws": np.ones(16, np.float32), "wz": np.zeros(16, np.int8)}
    model = parsed(text, **constants)
    assert messages(model, "onnx-int8", "B5") == ["B5 y: Reshape between the weight's DequantizeLinear and the product"]
    (layer,) = lint(model, "onnx-int8").layers
    assert (layer.shape, layer.pattern) == ((16, 32), "2:4")


OPERATOR_FORM = """agraph (uint8[batch, 64] x) => (uint8[batch, 64] y)
<float s = {0.1}, uint8 z = {0}, float t = {0.1}, int8 w_zero = {0}> {
    y = QLinearMatMul(x, s, z, w, ws, wz, t, z)
}"""
DYNAMIC = """agraph (float[batch, 64] x) => (float[batch, 64] y) <float s = {0.1}, int8 wz = {0}> {
    q, qs, qz = DynamicQuantizeLinear(x)
    p = MatMulInteger(q, w, qz, wz)
    f = Cast<to = 1>(p)
    y = Mul(f, qs)
}"""


def test_integer_operators_are_refused() -> None:
    static = parsed(OPERATOR_FORM, **quantized_weight())
    assert messages(static, "tensorrt", "B1") == ["B1 y: operator QLinearMatMul instead of Q/DQ around a float one"]
    dynamic = parsed(DYNAMIC, w=sparse(64, 64))
    assert len(messages(dynamic, "onnx-int8", "B1")) == 2
    for model, op in ((static, "QLinearMatMul"), (dynamic, "DynamicQuantizeLinear")):
        (layer,) = lint(model, "tensorrt").layers
        assert (layer.pattern, layer.runs) == ("2:4", "refused")
        assert layer.reason == f"the file holds {op}, which the engine cannot read"


DOMAINS = """agraph (float[batch, 64] x) => (float[batch, 64] y) {
    a = MatMul(x, w)
    y = %s(a)
}"""


@pytest.mark.parametrize(
    ("op", "imports", "place", "error_targets"),
    [
        ("com.microsoft.FastGelu", ', "com.microsoft": 1', "of domain com.microsoft", {"tensorrt", "tensorrt-8"}),
        ("trt.plugins.Fancy", ', "trt.plugins": 1', "of domain trt.plugins", set(TARGETS) - {"tensorrt", "tensorrt-8"}),
        ("my.Fancy", ', "my": 1', "of domain my", set(TARGETS)),
        ("my.Fancy", "", "of domain my", set(TARGETS)),
        ("Fancy", "", "at opset 20", set(TARGETS)),
    ],
)
def test_unknown_operators_are_named(op: str, imports: str, place: str, error_targets: set[str]) -> None:
    model = parsed(DOMAINS % op, imports=imports, w=np.ones((64, 64), np.float32))
    for target in TARGETS:
        (finding,) = [f for f in findings_of(model, target) if f.rule == "operator"]
        assert str(finding) == f"operator y: operator {op.rpartition('.')[2]} {place} is not known to ONNX"
        assert finding.warning == (target not in error_targets)
        assert not [f for f in findings_of(model, target) if f.rule in ("checker", "shapes")]
    runs = {layer.runs for layer in lint(model, "tensorrt").layers}
    assert runs == ({"float"} if op.startswith("trt") else {"refused"})


def test_a_foreign_quantizer_is_not_onnx_own() -> None:
    text = """agraph (float[batch, 64] x) => (float[batch, 64] y) <float s = {0.1}, int8 z = {0}> {
        q = com.microsoft.QuantizeLinear(x, s, z)
        d = com.microsoft.DequantizeLinear(q, s, z)
        y = MatMul(d, w)
    }"""
    model = parsed(text, imports=', "com.microsoft": 1', w=np.ones((64, 64), np.float32))
    assert [f.problem for f in findings_of(model, "onnx-int8")] == [
        f"operator {op} of domain com.microsoft is not known to ONNX" for op in ("QuantizeLinear", "DequantizeLinear")
    ]


BRANCH = """agraph (float[batch, 64] x, bool flag) => (float[batch, 64] y) {
    a = MatMul(x, w)
    y = If(flag)<then_branch = yes () => (float[batch, 64] t) { t = Add(a, only_inside) },
                 else_branch = no () => (float[batch, 64] e) { e = Identity(a) }>
}"""


def test_tensors_that_a_subgraph_reads_are_used() -> None:
    model = parsed(BRANCH, w=np.ones((64, 64), np.float32), only_inside=np.ones(64, np.float32))
    assert [str(f) for f in findings_of(model, "onnx-fp32")] == ["subgraph y: rules do not read the subgraph of If"]
    assert messages(model, "onnx-int8", "B15") == []


PLAIN = "agraph (float[batch, 64] x) => (float[batch, 64] y) { y = MatMul(x, w) }"


@pytest.mark.parametrize("opset", [7, 12, 26, 99])
def test_an_unreadable_opset_is_an_error_and_layers_are_shown(opset: int) -> None:
    model = parsed(PLAIN, opset=opset, w=np.ones((64, 64), np.float32))
    result = lint(model, "onnx-fp32")
    assert [str(f) for f in result.findings] == [f"B1: opset {opset}, must be 18 to 20"]
    assert (len(result.layers), result.errors) == (1, result.findings)


def test_an_unusual_opset_only_costs_speed_where_it_can_be_read() -> None:
    model = parsed(PLAIN, opset=13, w=np.ones((64, 64), np.float32))
    assert {
        target: [f.warning for f in findings_of(model, target)] for target in ("onnx-int8", "tensorrt", "onnx-fp32")
    } == {
        "onnx-int8": [False],
        "tensorrt": [True],
        "onnx-fp32": [True],
    }


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ("[batch, sequence, 64]", "residual Add of which input 1 is float"),
        ("[b, s, 64]", "residual Add of which input 1 is float"),
        ("[1, sequence, 64]", None),
        ("[batch, sequence, 1]", None),
        ("[64]", None),
    ],
)
def test_shapes_decide_what_is_a_residual_add(shape: str, problem: str | None) -> None:
    model = parsed(RESIDUAL % shape, **quantized_weight())
    assert messages(model, "tensorrt", "T17") == ([f"T17 y: {problem}"] if problem else [])


def test_an_add_of_unknown_shape_is_a_warning() -> None:
    text = (RESIDUAL % "[batch, sequence, 64]").replace("y = Add(d2, other)", "u = my.Op(other) y = Add(d2, u)")
    model = parsed(text, imports=', "my": 1', **quantized_weight())
    (finding,) = [finding for finding in findings_of(model, "tensorrt") if finding.rule == "T17"]
    assert str(finding) == "T17 y: shapes of its inputs are unknown, so it may be a residual Add"
    assert finding.warning


def test_missing_shapes_are_inferred(bert: Family) -> None:
    model = insert_qdq(bert.graph, tied(bert, *ALL))
    del model.graph.value_info[:]
    assert findings_of(model, "tensorrt") == []
    put(model, f"{LAYER}.attention.self:softmax_scale", np.float32(0.01))
    assert [f.rule for f in findings_of(model, "tensorrt")] == ["B12"]


def test_rules_apply_although_types_contradict_each_other() -> None:
    text = """agraph (float[batch, 64] x, float[batch, 3] other) => (float[batch, 64] y) {
        a = MatMul(x, w)
        b = Concat<axis = 0>(a, other)
        y = Identity(a)
    }"""
    model = parsed(text, w=np.full((64, 64), -0.0, np.float32))
    rules = [f.rule for f in findings_of(model, "onnx-int8")]
    assert rules == ["shapes", "B7"]


def test_a_tensor_cut_short_is_a_finding_of_the_checker(bert: Family) -> None:
    model = onnx.load_from_string(bert.graph.SerializeToString())
    table = next(t for t in model.graph.initializer if t.name == "bert.embeddings.position_embeddings.weight")
    table.raw_data = table.raw_data[:-4]
    assert [f.rule for f in findings_of(model, "onnx-int8")] == ["checker"]


class Batches(CalibrationDataReader):
    """Three batches for ONNX Runtime's calibration."""

    def __init__(self, family: Family) -> None:
        batches = [family.inputs(2, 8, seed=seed) for seed in range(3)]
        self.batches = iter([{name: value.numpy() for name, value in batch.items()} for batch in batches])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


@pytest.mark.parametrize("own_pairs", [False, True])
def test_files_of_onnx_runtimes_quantizer(bert: Family, tmp_path: Path, own_pairs: bool) -> None:
    """Symmetric and per channel, as its TensorRT example has it; the pairs are its option DedicatedQDQPair."""
    options = {"ActivationSymmetric": True, "QuantizeBias": False, "DedicatedQDQPair": own_pairs,
               "AddQDQPairToWeight": True, "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1}}  # fmt: skip
    (tmp_path / "float.onnx").write_bytes(bert.graph.SerializeToString())
    quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "int8.onnx",
        Batches(bert),
        per_channel=True,
        op_types_to_quantize=["MatMul", "Add"],
        extra_options=options,
    )
    model = onnx.load(tmp_path / "int8.onnx")
    result = lint(model, "tensorrt")
    shared = () if own_pairs else ("query", "key", "value", "intermediate.dense")
    alone = {name for name in bert.weights if not name.endswith(shared)}
    assert {layer.name for layer in result.layers if layer.runs == "sparse int8"} == alone
    assert {f.rule for f in result.errors} == ({"B8"} if own_pairs else {"B8", "B10"})
    assert {f.problem.split()[0] for f in result.errors if f.rule == "B8"} == {"input"}
    fixed, _ = fix(model, "tensorrt")
    assert {f.rule for f in lint(fixed, "tensorrt").errors} == {"B8"}
    assert lint(fixed, "tensorrt").running == len(bert.weights)


# The table


def test_every_row_of_the_table_has_a_failing_example(bert: Family) -> None:
    weight, ones = sparse(64, 64).astype(np.float32), np.ones(64, np.float32)
    untied = insert_qdq(bert.graph, bert.quantization(*ALL)).SerializeToString()
    linear = insert_qdq(bert.graph, bert.quantization(*ATTENTION))
    broken: list[tuple[ModelProto, str]] = [(linear, "tensorrt"), (linear, "tensorrt-8"), (linear, "onnx-fp32")]
    for edit in (*FOR_INT8, *FOR_TENSORRT):
        model = onnx.load_from_string(untied)
        edit(model)
        broken.append((model, "tensorrt"))
    broken += [(model, "tensorrt") for model, _ in TYPES]
    broken += [(parsed(DOMAINS % op, w=np.ones((64, 64), np.float32)), "tensorrt")
               for op in ("com.microsoft.Fancy", "trt.Fancy", "Fancy")]  # fmt: skip
    broken.append((parsed(BRANCH, w=weight, only_inside=ones), "tensorrt"))
    broken.append((parsed(PLAIN, opset=12, w=weight), "tensorrt"))
    broken.append(
        (parsed((RESIDUAL % "[36]").replace("64", "40", 1).replace("64", "36"), **quantized_weight(40, 36)), "tensorrt")
    )
    broken.append((chain(FLOATING), "onnx-int8"))
    seen = {(f.rule, f.requirement) for model, target in broken for f in findings_of(model, target)}
    assert {(rule.id, rule.requirement) for rule in RULES} - seen == {("B13", "int8 attention as TensorRT fuses it")}
    assert all(len(rule.severities) == len(TARGETS) and set(rule.severities) <= set("EW-") for rule in RULES)
