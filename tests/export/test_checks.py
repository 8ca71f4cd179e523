"""Every rule passes a file the writer made and fails that file with one thing broken, naming the node."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from conftest import ATTENTION, Family
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sqat.errors import GateError
from sqat.export.checks import find, verify
from sqat.export.qdq import Quantization, insert_qdq
from sqat.export.rules import RULES

ENCODER = "/bert/encoder/layer.0"
SELF = f"{ENCODER}/attention/self"
QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def written(bert: Family) -> bytes:
    model = insert_qdq(bert.graph, bert.quantization("output", *ATTENTION, "add"))
    return bytes(model.SerializeToString())


def node(model: ModelProto, name: str) -> NodeProto:
    return next(entry for entry in model.graph.node if entry.name == name)


def tensor(model: ModelProto, name: str) -> TensorProto:
    return next(entry for entry in model.graph.initializer if entry.name == name)


def put(model: ModelProto, name: str, value: np.ndarray | np.generic) -> None:
    """Replace the value of an initializer, or add one."""
    kept = [entry for entry in model.graph.initializer if entry.name != name]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, numpy_helper.from_array(np.asarray(value), name)])


def change(model: ModelProto, name: str, edit: Callable[[np.ndarray], object]) -> None:
    """Edit an initializer's values in place."""
    value = numpy_helper.to_array(tensor(model, name)).copy()
    edit(value)
    put(model, name, value)


def between(model: ModelProto, name: str, operand: int, op: str, **attributes: object) -> None:
    """Put one more node before an operand of a node."""
    target = node(model, name)
    extra = helper.make_node(op, [target.input[operand]], [f"{op}_out"], name=f"/{op}_extra", **attributes)
    target.input[operand] = f"{op}_out"
    model.graph.node.insert(list(model.graph.node).index(target), extra)


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


BROKEN: list[tuple[str, Callable[[ModelProto], str]]] = [
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


def test_a_written_model_passes_every_rule(written: bytes, bert: Family) -> None:
    model = onnx.load_from_string(written)
    assert verify(model, dict.fromkeys(bert.weights, "2:4")) == []
    assert verify(bert.graph) == []


def test_every_rule_has_a_failing_example() -> None:
    assert {rule for rule, _ in BROKEN} | {"B13"} == set(RULES)


@pytest.mark.parametrize(("rule", "break_it"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_model_is_found_out(written: bytes, rule: str, break_it: Callable[[ModelProto], str]) -> None:
    model = onnx.load_from_string(written)
    line = f"{rule} {break_it(model)}".replace("B1 opset", "B1: opset")
    found = [str(finding) for finding in find(model) if not finding.warning]
    assert any(entry.startswith(line) for entry in found), found


def test_int8_fused_attention_asks_for_a_quantizer_behind_it(bert: Family) -> None:
    dense = "bert.encoder.layer.0.attention.output.dense"
    quantization = bert.quantization(*ATTENTION)
    weights = {layer: weight for layer, weight in quantization.weights.items() if layer != dense}
    amax = {site: bound for site, bound in quantization.amax.items() if not site.startswith(dense)}
    found = find(insert_qdq(bert.graph, Quantization(weights, amax)))
    assert [str(f) for f in found] == [f"B13 {SELF}/MatMul_1: no QuantizeLinear behind the second product"]
    assert found[0].warning


def test_int8_fused_attention_asks_for_a_head_size(written: bytes) -> None:
    model = onnx.load_from_string(written)
    query = node(model, f"{SELF}/query/QuantizeLinear").input[0]
    for value in model.graph.value_info:
        if value.name == query:
            value.type.tensor_type.shape.dim[3].Clear()
    assert f"B13 {SELF}/MatMul: head size 0" in " ".join(str(f) for f in find(model) if f.warning)


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
    assert verify(model) == []
    with pytest.raises(GateError, match=r"breaks rule B6 .*query/MatMul: 1 groups hold more than 2 of 4 weights$"):
        verify(model, {QUERY: "2:4"})


def test_pruned_layers_must_be_there_and_fit_the_pattern(written: bytes) -> None:
    model = onnx.load_from_string(written)
    with pytest.raises(GateError, match=r"B6 bert\.none: said to be 2:4, is not in the graph"):
        verify(model, {"bert.none": "2:4"})
    with pytest.raises(GateError, match=r"B6 .*query/MatMul: 32 inputs are not a multiple of 5"):
        verify(model, {QUERY: "2:5"})
    narrow = product(40, 36)
    change(narrow, "w", lambda value: value.__setitem__(slice(None, None, 4), 0))
    warnings = [str(finding) for finding in verify(narrow, {"layer": "3:4"})]
    assert "B6 /layer/MatMul: (40, 36) [in, out] are not multiples of 16 and 8" in warnings


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
