"""Every rule passes a file the writer made and fails that file with one thing broken, naming the node.

Rules that ask for another kind of file (float, float16, convolutions, foreign operators) have theirs in
`test_lint_targets.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from graph_edits import ENCODER, LAYER, QUERY, SELF, between, bypass, change, node, put, tensor, tied
from onnx import ModelProto, helper, numpy_helper

from sqat.errors import GateError, SqatError
from sqat.export.qdq import insert_qdq
from sqat.export.quantized_model import QuantizedModel
from sqat.lint.apply_rules import apply_rules, find, parse_target, verify
from sqat.lint.graph_view import GraphView
from tests.onnx_models import ATTENTION, Family


@pytest.fixture(scope="module")
def written(bert: Family) -> bytes:
    model = insert_qdq(bert.graph, tied(bert, "output", *ATTENTION, "add"))
    return bytes(model.SerializeToString())


@pytest.fixture(scope="module")
def written_qdq(bert: Family) -> bytes:
    model = insert_qdq(bert.graph, tied(bert, "output", *ATTENTION, "add"), "qdq")
    return bytes(model.SerializeToString())


def opset_21(model: ModelProto) -> str:
    model.opset_import[0].version = 21
    return "opset 21, must be 18 to 20"


def dynamic_quantization(model: ModelProto) -> str:
    extra = helper.make_node("DynamicQuantizeLinear", ["logits"], ["a", "b", "c"], name="/Dynamic")
    model.graph.node.append(extra)
    return "/Dynamic: operator DynamicQuantizeLinear"


def no_zero_point(model: ModelProto) -> str:
    for op in ("QuantizeLinear", "DequantizeLinear"):
        del node(model, f"{SELF}/query/input/{op}").input[2:]
    return f"{SELF}/query/input/QuantizeLinear: no constant zero-point"


def shifted_zero_point(model: ModelProto) -> str:
    put(model, f"{QUERY}:input_zero_point", np.int8(3))
    return f"{SELF}/query/input/QuantizeLinear: zero-point is not int8 zero"


def unsigned_zero_point(model: ModelProto) -> str:
    put(model, f"{QUERY}:input_zero_point", np.uint8(0))
    return f"{SELF}/query/input/QuantizeLinear: zero-point is not int8 zero (uint8)"


def negative_scale(model: ModelProto) -> str:
    put(model, f"{QUERY}:input_scale", np.float32(-0.1))
    return f"{SELF}/query/input/QuantizeLinear: smallest scale is -0.1"


def scale_of_a_dead_row(model: ModelProto) -> str:
    change(model, f"{QUERY}.weight_scale", lambda value: value.__setitem__(3, 0))
    return f"{SELF}/query/weight/DequantizeLinear: smallest scale is 0.0"


def infinite_scale(model: ModelProto) -> str:
    put(model, f"{QUERY}:input_scale", np.float32(np.inf))
    return f"{SELF}/query/input/QuantizeLinear: smallest scale is inf"


def computed_scale(model: ModelProto) -> str:
    between(model, f"{SELF}/query/input/QuantizeLinear", 1, "Identity")
    return f"{SELF}/query/input/QuantizeLinear: scale is not constant"


def scale_with_a_dimension(model: ModelProto) -> str:
    put(model, f"{QUERY}:input_scale", np.ones(1, np.float32))
    put(model, f"{QUERY}:input_zero_point", np.zeros(1, np.int8))
    return f"{SELF}/query/input/DequantizeLinear: scale of shape (1,), must be ()"


def one_scale_for_a_weight(model: ModelProto) -> str:
    put(model, f"{QUERY}.weight_scale", np.float32(0.1))
    put(model, f"{QUERY}.weight_zero_point", np.int8(0))
    return f"{SELF}/query/weight/DequantizeLinear: scale of shape (), must be (32,)"


def unequal_scales(model: ModelProto) -> str:
    put(model, "other", np.float32(0.5))
    node(model, f"{SELF}/query/input/DequantizeLinear").input[1] = "other"
    return f"{SELF}/query/input/DequantizeLinear: scale differs from that of {SELF}/query/input/QuantizeLinear"


def wrong_axis(model: ModelProto) -> str:
    node(model, f"{SELF}/query/weight/DequantizeLinear").attribute[0].i = 0
    return f"{SELF}/query/MatMul: weight scales along axis 0, output channels are axis 1"


def transposed_weight(model: ModelProto) -> str:
    between(model, f"{SELF}/query/MatMul", 1, "Transpose", perm=[1, 0])
    return f"{SELF}/query/MatMul: Transpose between the weight's DequantizeLinear and the product"


def lowest_integer(model: ModelProto) -> str:
    change(model, f"{QUERY}.weight_int8", lambda value: value.__setitem__((0, 0), -128))
    return f"{SELF}/query/MatMul: int8 weight of -128"


def negative_zero(model: ModelProto) -> str:
    change(model, "classifier.weight", lambda value: value.__setitem__((0, slice(3)), -0.0))
    return "/classifier/Gemm: 3 weights are -0.0"


def quantized_layer_norm(model: ModelProto) -> str:
    name = next(entry.name for entry in model.graph.node if entry.op_type == "LayerNormalization")
    target = node(model, name)
    put(model, "ln_scale", np.float32(0.1))
    put(model, "ln_zero", np.int8(0))
    place = list(model.graph.node).index(target)
    q = helper.make_node("QuantizeLinear", [target.input[0], "ln_scale", "ln_zero"], ["ln_q"], name="/q")
    dq = helper.make_node("DequantizeLinear", ["ln_q", "ln_scale", "ln_zero"], ["ln_dq"], name="/dq")
    target.input[0] = "ln_dq"
    model.graph.node.insert(place, dq)
    model.graph.node.insert(place, q)
    return f"{name}: input of LayerNormalization is quantized"


def float_input(model: ModelProto) -> str:
    node(model, f"{SELF}/query/MatMul").input[0] = node(model, f"{SELF}/query/input/QuantizeLinear").input[0]
    return f"{SELF}/query/MatMul: only the second input is quantized"


def shared_pair(model: ModelProto) -> str:
    node(model, f"{SELF}/key/MatMul").input[0] = node(model, f"{SELF}/query/MatMul").input[0]
    return f"{SELF}/query/input/DequantizeLinear: read 2 times, must be once"


def shared_quantizer(model: ModelProto) -> str:
    node(model, f"{SELF}/key/input/DequantizeLinear").input[0] = f"{SELF}/query/input/QuantizeLinear:0"
    return f"{SELF}/query/input/QuantizeLinear: read by 2 nodes, must be one DequantizeLinear"


def shared_zero_point(model: ModelProto) -> str:
    for op in ("QuantizeLinear", "DequantizeLinear"):
        node(model, f"{SELF}/key/input/{op}").input[2] = f"{QUERY}:input_zero_point"
    return f"{SELF}/key/input/QuantizeLinear: shares its zero-point with {SELF}/query/input/QuantizeLinear"


def integer_bias(model: ModelProto) -> str:
    add = node(model, f"{SELF}/query/Add")
    put(model, "bias_int32", np.zeros(32, np.int32))
    put(model, "bias_scale", np.ones(32, np.float32))
    put(model, "bias_zero", np.zeros(32, np.int32))
    extra = helper.make_node("DequantizeLinear", ["bias_int32", "bias_scale", "bias_zero"], ["b"], name="/b", axis=0)
    add.input[1] = "b"
    model.graph.node.insert(0, extra)
    return "/b: int32 bias"


def late_bias(model: ModelProto) -> str:
    between(model, f"{SELF}/query/Add", 0, "Identity")
    return f"{SELF}/query/Add: bias is not added directly behind {SELF}/query/MatMul"


def wide_softmax(model: ModelProto) -> str:
    put(model, "bert.encoder.layer.0.attention.self:softmax_scale", np.float32(0.01))
    return f"{SELF}/MatMul_1: softmax scale 0.009999999776482582 above 1/127"


def transposed_key(model: ModelProto) -> str:
    between(model, f"{SELF}/MatMul", 1, "Transpose", perm=[0, 1, 2, 3])
    return f"{SELF}/MatMul: Transpose between DequantizeLinear and the product"


def fixed_batch(model: ModelProto) -> str:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
    return "input_ids: fixed input shape (8, 'sequence')"


def orphan(model: ModelProto) -> str:
    put(model, f"{QUERY}.weight", np.zeros((32, 32), np.float32))
    return f"{QUERY}.weight: initializer that nothing reads"


def shared_weight(model: ModelProto) -> str:
    model.graph.node.append(helper.make_node("Identity", [f"{QUERY}.weight_int8"], ["copy"], name="/Copy"))
    return f"{SELF}/query/MatMul: quantized weight {QUERY}.weight_int8 has 2 readers"


def output_type(model: ModelProto) -> str:
    model.opset_import[0].version = 21
    name = f"{SELF}/query/input/QuantizeLinear"
    node(model, name).attribute.append(helper.make_attribute("output_dtype", onnx.TensorProto.INT8))
    return f"{name}: attribute output_dtype"


def denormal_scale(model: ModelProto) -> str:
    change(model, f"{QUERY}.weight_scale", lambda value: value.__setitem__(0, 1e-40))
    return f"{SELF}/query/weight/DequantizeLinear: smallest scale is 9.99994"


def scale_of_another_number(model: ModelProto) -> str:
    put(model, f"{QUERY}.weight_scale", np.ones(31, np.float32))
    put(model, f"{QUERY}.weight_zero_point", np.zeros(31, np.int8))
    return f"{SELF}/query/weight/DequantizeLinear: scale of shape (31,), must be (32,)"


def unsigned_weight(model: ModelProto) -> str:
    put(model, f"{QUERY}.weight_int8", np.full((32, 32), 7, np.uint8))
    put(model, f"{QUERY}.weight_zero_point", np.zeros(32, np.uint8))
    return f"{SELF}/query/weight/DequantizeLinear: weight is not stored as int8"


def reshaped_input(model: ModelProto) -> str:
    put(model, "as_it_is", np.array([0, 0, 32], np.int64))
    between(model, f"{SELF}/query/MatMul", 0, "Reshape", "as_it_is")
    return f"{SELF}/query/MatMul: Reshape between DequantizeLinear and the first input"


def scaled_query(model: ModelProto) -> str:
    put(model, "factor", np.float32(0.25))
    between(model, f"{SELF}/MatMul", 0, "Mul", "factor")
    return f"{SELF}/MatMul: Mul between DequantizeLinear and the product"


def shared_dequantizer(model: ModelProto) -> str:
    node(model, f"{SELF}/key/MatMul").input[1] = node(model, f"{SELF}/query/MatMul").input[1]
    return f"{SELF}/key/MatMul: quantized weight {QUERY}.weight_int8 is shared behind {SELF}/query/weight/Dequ"


def almost_sparse(model: ModelProto) -> str:
    change(model, f"{QUERY}.weight_int8", lambda value: value.__setitem__((slice(0, 4), slice(4, 7)), 1))
    return f"{SELF}/query/MatMul: almost 2:4: 51% zeros, but 3 of 256 groups hold more than 2 of 4 weights"


def float_output(model: ModelProto) -> str:
    bypass(model, f"{ENCODER}/attention/output/dense/output")
    return f"{ENCODER}/attention/output/dense/MatMul: its output stays float: it goes to Add"


def float_output_of_the_model(model: ModelProto) -> str:
    name = node(model, f"{ENCODER}/attention/output/dense/Add").output[0]
    model.graph.output.append(helper.make_tensor_value_info(name, 1, ["batch", "sequence", 32]))
    return f"{ENCODER}/attention/output/dense/MatMul: its output stays float: it is an output of the model"


def float_output_on_one_path(model: ModelProto) -> str:
    source = node(model, f"{SELF}/value/Add").output[0]
    model.graph.node.append(helper.make_node("Softmax", [source], ["extra"], name="/Softmax_extra"))
    model.graph.output.append(helper.make_tensor_value_info("extra", 1, ["batch", "sequence", 32]))
    return f"{SELF}/value/MatMul: its output stays float: it goes to Softmax"


BROKEN: list[tuple[str, Callable[[ModelProto], str]]] = [
    ("B1", output_type),
    ("B3", denormal_scale),
    ("B4", scale_of_another_number),
    ("B4", unsigned_weight),
    ("B9", reshaped_input),
    ("B12", scaled_query),
    ("B15", shared_dequantizer),
    ("B1", opset_21),
    ("B1", dynamic_quantization),
    ("B2", no_zero_point),
    ("B2", shifted_zero_point),
    ("B2", unsigned_zero_point),
    ("B3", negative_scale),
    ("B3", scale_of_a_dead_row),
    ("B3", infinite_scale),
    ("B3", computed_scale),
    ("B4", scale_with_a_dimension),
    ("B4", one_scale_for_a_weight),
    ("B4", unequal_scales),
    ("B5", wrong_axis),
    ("B5", transposed_weight),
    ("B7", lowest_integer),
    ("B7", negative_zero),
    ("B8", quantized_layer_norm),
    ("B9", float_input),
    ("B10", shared_pair),
    ("B10", shared_quantizer),
    ("B10", shared_zero_point),
    ("B11", integer_bias),
    ("B11", late_bias),
    ("B12", wide_softmax),
    ("B12", transposed_key),
    ("B14", fixed_batch),
    ("B15", orphan),
    ("B15", shared_weight),
]


FOR_TENSORRT: list[tuple[str, Callable[[ModelProto], str]]] = [
    ("B6", almost_sparse),
    ("T16", float_output),
    ("T16", float_output_of_the_model),
    ("T16", float_output_on_one_path),
]


@pytest.mark.parametrize("weights", ["dq", "qdq"])
@pytest.mark.parametrize("target", ["onnx-int8", "tensorrt"])
def test_a_written_model_passes_every_rule(bert: Family, weights: str, target: str) -> None:
    model = insert_qdq(bert.graph, tied(bert, "output", *ATTENTION, "add"), weights)
    assert verify(model, dict.fromkeys(bert.weights, "2:4"), target) == []
    assert verify(model, None, target) == []


def test_a_float_model_has_nothing_to_break(bert: Family) -> None:
    assert verify(bert.graph) == []
    assert verify(bert.graph, dict.fromkeys(bert.weights, "2:4"), "onnx-fp32") == []


def lines(model: ModelProto, target: str, *, warning: bool = False) -> list[str]:
    found = apply_rules(GraphView(model), None, parse_target(target))
    return [str(finding) for finding in found if finding.warning == warning]


@pytest.mark.parametrize(("rule", "break_it"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_model_is_found_out(written: bytes, rule: str, break_it: Callable[[ModelProto], str]) -> None:
    model = onnx.load_from_string(written)
    line = f"{rule} {break_it(model)}".replace("B1 opset", "B1: opset")
    wiring = GraphView(model)
    for target in ("onnx-int8", "tensorrt"):
        found = apply_rules(wiring, None, parse_target(target))
        (first, *_) = [finding for finding in found if str(finding).startswith(line)] or [pytest.fail(f"{found}")]
        assert first.warning == (target == "tensorrt" and break_it in (opset_21, fixed_batch, shared_zero_point))
        assert all(finding.requirement and finding.advice for finding in found)


@pytest.mark.parametrize(("rule", "break_it"), FOR_TENSORRT, ids=lambda value: getattr(value, "__name__", value))
def test_what_tensorrt_asks_for_besides(written: bytes, rule: str, break_it: Callable[[ModelProto], str]) -> None:
    model = onnx.load_from_string(written)
    line = f"{rule} {break_it(model)}"
    assert line in lines(model, "tensorrt")
    assert lines(model, "onnx-int8") == []


def test_int8_only_behind_gelu_is_a_warning(bert: Family) -> None:
    quantization = tied(bert, "output", *ATTENTION, "add")
    amax = {site: bound for site, bound in quantization.amax.items() if not site.endswith("intermediate.dense:output")}
    model = insert_qdq(bert.graph, QuantizedModel(quantization.weights, amax))
    names = [f"/bert/encoder/layer.{layer}/intermediate/dense/MatMul" for layer in (0, 1)]
    assert lines(model, "tensorrt", warning=True) == [f"T16 {name}: int8 only behind Gelu" for name in names]
    assert lines(model, "tensorrt") == []


def test_q_k_and_v_share_an_output_scale(written: bytes) -> None:
    model = onnx.load_from_string(written)
    put(model, f"{LAYER}.attention.self.key:output_scale", np.float32(0.001))
    largest = float(
        onnx.numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == f"{QUERY}:output_scale"))
    )
    found = lines(model, "tensorrt", warning=True)
    assert found == [f"T16 {SELF}/key/MatMul: output scale 0.001, of those that read the same tensor {largest:.4g}"]
    assert find(model) == []


@pytest.mark.parametrize(("operand", "site"), [(1, "add0/right"), (0, "dense/output")])
def test_a_residual_add_takes_both_inputs_from_dequantizers(written: bytes, operand: int, site: str) -> None:
    model = onnx.load_from_string(written)
    bypass(model, f"{ENCODER}/output/{site}")
    found = lines(model, "tensorrt", warning=True)
    assert found == [f"T17 {ENCODER}/output/Add: residual Add of which input {operand} is float"]
    assert find(model) == []


def test_embedding_sums_are_no_residual_adds(written: bytes) -> None:
    assert lines(onnx.load_from_string(written), "tensorrt", warning=True) == []


def test_int8_fused_attention_asks_for_a_quantizer_behind_it(bert: Family) -> None:
    dense = "bert.encoder.layer.0.attention.output.dense"
    quantization = bert.quantization(*ATTENTION)
    weights = {layer: weight for layer, weight in quantization.weights.items() if layer != dense}
    amax = {site: bound for site, bound in quantization.amax.items() if not site.startswith(dense)}
    found = find(insert_qdq(bert.graph, QuantizedModel(weights, amax)))
    assert [str(f) for f in found] == [f"B13 {SELF}/MatMul_1: no QuantizeLinear behind the second product"]
    assert found[0].warning


HEADS = """<ir_version: 9, opset_import: ["" : 20]>
agraph (float[batch, heads, sequence, %s] q, float[batch, heads, %s, sequence] k) => (float[batch, heads, s, t] scores)
<float s = {0.01}, int8 z = {0}, int8 zk = {0}> {
    qq = QuantizeLinear(q, s, z)
    qd = DequantizeLinear(qq, s, z)
    kq = QuantizeLinear(k, s, zk)
    kd = DequantizeLinear(kq, s, zk)
    scores = MatMul(qd, kd)
}"""


@pytest.mark.parametrize(("size", "found"), [("64", []), ("48", ["head size 48"]), ("width", ["head size width"])])
def test_int8_fused_attention_asks_for_a_head_size(size: str, found: list[str]) -> None:
    model = onnx.parser.parse_model(HEADS % (size, size))
    said = [finding.problem for finding in find(model) if finding.rule == "B13"]
    assert said == [f"{text}, int8 fused attention takes 16, 32 and 64" for text in found]


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


def test_layers_too_narrow_to_gain() -> None:
    assert verify(product(32, 64)) == []
    with pytest.raises(
        GateError, match=r"B8 /layer/MatMul: quantized at \(8, 32\) \[in, out\], both must be at least 16"
    ):
        verify(product(8, 32))
    warnings = verify(product(48, 32))
    assert [str(w) for w in warnings] == ["B8 /layer/MatMul: (48, 32) [in, out] are not both multiples of 32"]


def test_two_of_four_is_checked_on_the_integers(written: bytes) -> None:
    model = onnx.load_from_string(written)
    change(model, f"{QUERY}.weight_int8", lambda value: value.__setitem__((slice(0, 4), 5), 1))
    assert [(f.rule, f.warning) for f in verify(model)] == [("B6", True)]
    with pytest.raises(GateError, match=r"breaks rule B6 .*query/MatMul: 1 groups hold more than 2 of 4 weights$"):
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
    found = find(model)
    assert [finding.rule for finding in found] == ["checker"]
    assert "\n" not in found[0].problem
    with pytest.raises(GateError, match=r"breaks rule checker: .*nowhere"):
        verify(model)


def test_verify_counts_what_else_is_broken(written: bytes) -> None:
    model = onnx.load_from_string(written)
    negative_zero(model)
    orphan(model)
    with pytest.raises(
        GateError, match=r"breaks rule B7 /classifier/Gemm: 3 weights are -0\.0 \(and 1 more\)$"
    ) as caught:
        verify(model)
    assert caught.value.exit_code == 3


def test_the_integers_of_a_float_weight_are_those_its_quantizer_makes(written_qdq: bytes) -> None:
    model = onnx.load_from_string(written_qdq)
    scale = numpy_helper.to_array(tensor(model, f"{QUERY}.weight_scale"))
    name = node(model, f"{SELF}/query/weight/QuantizeLinear").input[0]

    def nudge(value: np.ndarray) -> None:
        value[:4, 5] = 0.4 * scale[5]  # rounds to 0: not a weight as far as the product sees

    change(model, name, nudge)
    assert find(model, None, "tensorrt") == []
    change(model, name, lambda value: value.__setitem__((slice(0, 4), 5), 0.6 * scale[5]))
    assert [str(f) for f in find(model, {QUERY: "2:4"}, "tensorrt")] == [
        f"B6 {SELF}/query/MatMul: 1 groups hold more than 2 of 4 weights"
    ]
    change(model, name, lambda value: value.__setitem__((slice(0, 4), 5), [-128 * scale[5], 0, 0, 0]))
    assert [str(f) for f in find(model, None, "tensorrt")] == [f"B7 {SELF}/query/MatMul: int8 weight of -128"]


def test_the_quantizer_of_a_weight_agrees_with_its_dequantizer(written_qdq: bytes) -> None:
    model = onnx.load_from_string(written_qdq)
    next(a for a in node(model, f"{SELF}/query/weight/QuantizeLinear").attribute if a.name == "axis").i = 0
    pair = f"{SELF}/query/weight"
    assert f"B4 {pair}/DequantizeLinear: axis differs from that of {pair}/QuantizeLinear" in lines(model, "onnx-int8")


def test_an_unknown_target_is_told(written: bytes) -> None:
    with pytest.raises(SqatError, match="no target 'tensorrt-9' to lint for; allowed: onnx-int8, tensorrt, tensorrt-8"):
        verify(onnx.load_from_string(written), None, "tensorrt-9")


def test_a_written_file_is_read_by_the_checker_too(written: bytes, tmp_path) -> None:
    model = onnx.load_from_string(written)
    path = tmp_path / "model.onnx"
    path.write_bytes(written)
    assert verify(model, None, "onnx-int8", path) == []
    other = onnx.load_from_string(written)
    node(other, f"{SELF}/query/MatMul").input[0] = "nowhere"
    path.write_bytes(other.SerializeToString())
    with pytest.raises(GateError, match=r"breaks rule checker: .*nowhere"):
        verify(model, None, "onnx-int8", path)
