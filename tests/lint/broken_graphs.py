"""Edits that each break one rule of a file in order, and return the finding that they cause.

Names are those of the first layer of tests/onnx_models.py's BERT.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from graph_edits import ENCODER, LAYER, QUERY, SELF, between, bypass, change, node, put, tensor
from onnx import ModelProto, TensorProto, helper, numpy_helper

Edit = Callable[[ModelProto], str]
PRODUCT = f"{SELF}/query/MatMul"
Q, DQ = f"{SELF}/query/input/QuantizeLinear", f"{SELF}/query/input/DequantizeLinear"
WEIGHT_DQ = f"{SELF}/query/weight/DequantizeLinear"
INPUT_SCALE, INPUT_ZERO = f"{QUERY}:input_scale", f"{QUERY}:input_zero_point"
OTHERS = ("key", "value")  # they read the tensor that query reads


def set_opset_21(model: ModelProto) -> str:
    model.opset_import[0].version = 21
    return "B1: opset 21, must be 18 to 20"


def quantize_dynamically(model: ModelProto) -> str:
    model.graph.node.append(helper.make_node("DynamicQuantizeLinear", ["logits"], ["a", "b", "c"], name="/Dynamic"))
    return "B1 /Dynamic: operator DynamicQuantizeLinear"


def set_output_types(model: ModelProto) -> str:
    model.opset_import[0].version = 21
    for name in (Q, f"{SELF}/key/input/QuantizeLinear"):
        node(model, name).attribute.append(helper.make_attribute("output_dtype", TensorProto.INT8))
    return f"B1 {Q}: attribute output_dtype"


def drop_zero_points(model: ModelProto) -> str:
    for name in (Q, DQ):
        del node(model, name).input[2:]
    return f"B2 {Q}: no constant zero-point"


def drop_zero_point_of_weight(model: ModelProto) -> str:
    del node(model, WEIGHT_DQ).input[2:]
    return f"B2 {WEIGHT_DQ}: no constant zero-point"


def set_output_types_without_zero_points(model: ModelProto) -> str:
    set_output_types(model)
    return drop_zero_points(model)


def shift_zero_point(model: ModelProto) -> str:
    put(model, INPUT_ZERO, np.int8(3))
    return f"B2 {Q}: zero-point is not int8 zero"


def make_activation_unsigned(model: ModelProto) -> str:
    put(model, INPUT_ZERO, np.uint8(128))
    for value in [value for value in model.graph.value_info if value.name.startswith(Q)]:
        value.type.tensor_type.elem_type = TensorProto.UINT8
    return f"B2 {Q}: zero-point is not int8 zero (uint8)"


def make_weight_unsigned(model: ModelProto) -> str:
    value = numpy_helper.to_array(tensor(model, f"{QUERY}.weight_int8")).astype(np.int16)
    put(model, f"{QUERY}.weight_int8", (value + 128).astype(np.uint8))
    put(model, f"{QUERY}.weight_zero_point", np.full(32, 128, np.uint8))
    return f"B4 {WEIGHT_DQ}: weight is not stored as int8"


def negate_scale(model: ModelProto) -> str:
    put(model, INPUT_SCALE, np.float32(-0.1))
    return f"B3 {Q}: smallest scale is -0.1"


def make_scale_infinite(model: ModelProto) -> str:
    put(model, INPUT_SCALE, np.float32(np.inf))
    return f"B3 {Q}: smallest scale is inf"


def compute_scale(model: ModelProto) -> str:
    between(model, Q, 1, "Identity")
    return f"B3 {Q}: scale is not constant"


def zero_dead_scale(model: ModelProto) -> str:
    change(model, f"{QUERY}.weight_scale", lambda value: value.__setitem__(3, 0))
    return f"B3 {WEIGHT_DQ}: smallest scale is 0.0"


def make_dead_scale_denormal(model: ModelProto) -> str:
    change(model, f"{QUERY}.weight_scale", lambda value: value.__setitem__(3, 1e-40))
    return f"B3 {WEIGHT_DQ}: smallest scale is 9.99994"


def add_dimension_to_scale(model: ModelProto) -> str:
    put(model, INPUT_SCALE, np.ones(1, np.float32))
    put(model, INPUT_ZERO, np.zeros(1, np.int8))
    return f"B4 {DQ}: scale of shape (1,), must be ()"


def give_weight_one_scale(model: ModelProto) -> str:
    put(model, f"{QUERY}.weight_scale", np.float32(0.1))
    put(model, f"{QUERY}.weight_zero_point", np.int8(0))
    return f"B4 {WEIGHT_DQ}: scale of shape (), must be (32,)"


def give_weight_31_scales(model: ModelProto) -> str:
    put(model, f"{QUERY}.weight_scale", np.ones(31, np.float32))
    put(model, f"{QUERY}.weight_zero_point", np.zeros(31, np.int8))
    return f"B4 {WEIGHT_DQ}: scale of shape (31,), must be (32,)"


def make_scales_unequal(model: ModelProto) -> str:
    put(model, "other", np.float32(0.5))
    node(model, DQ).input[1] = "other"
    return f"B4 {DQ}: scale differs from that of {Q}"


def set_wrong_axis(model: ModelProto) -> str:
    node(model, WEIGHT_DQ).attribute[0].i = 0
    return f"B5 {PRODUCT}: weight scales along axis 0, output channels are axis 1"


def transpose_weight(model: ModelProto) -> str:
    put(model, f"{QUERY}.weight_int8", numpy_helper.to_array(tensor(model, f"{QUERY}.weight_int8")).T.copy())
    node(model, WEIGHT_DQ).attribute[0].i = 0
    between(model, PRODUCT, 1, "Transpose", perm=[1, 0])
    return f"B5 {PRODUCT}: Transpose between the weight's DequantizeLinear and the product"


def set_lowest_integer(model: ModelProto) -> str:
    change(model, f"{QUERY}.weight_int8", lambda value: value.__setitem__((0, 0), -128))
    return f"B7 {PRODUCT}: int8 weight of -128"


def set_negative_zeros(model: ModelProto) -> str:
    change(model, "classifier.weight", lambda value: value.__setitem__((0, slice(3)), -0.0))
    return "B7 /classifier/Gemm: 3 weights are -0.0"


def quantize_layer_norm(model: ModelProto) -> str:
    norm = next(entry for entry in model.graph.node if entry.op_type == "LayerNormalization")
    put(model, "ln_scale", np.float32(0.1))
    put(model, "ln_zero", np.int8(0))
    place = list(model.graph.node).index(norm)
    q = helper.make_node("QuantizeLinear", [norm.input[0], "ln_scale", "ln_zero"], ["ln_q"], name="/q")
    dq = helper.make_node("DequantizeLinear", ["ln_q", "ln_scale", "ln_zero"], ["ln_dq"], name="/dq")
    norm.input[0] = "ln_dq"
    model.graph.node.insert(place, dq)
    model.graph.node.insert(place, q)
    return f"B8 {norm.name}: input of LayerNormalization is quantized"


def make_input_float(model: ModelProto) -> str:
    node(model, PRODUCT).input[0] = node(model, Q).input[0]
    return f"B9 {PRODUCT}: only the second input is quantized"


def reshape_input(model: ModelProto) -> str:
    put(model, "same_shape", np.array([0, 0, 32], np.int64))
    between(model, PRODUCT, 0, "Reshape", "same_shape")
    return f"B9 {PRODUCT}: Reshape between DequantizeLinear and the first input"


def share_pair(model: ModelProto) -> str:
    for part in OTHERS:
        node(model, f"{SELF}/{part}/MatMul").input[0] = node(model, PRODUCT).input[0]
    return f"B10 {DQ}: read 3 times, must be once"


def share_quantizer(model: ModelProto) -> str:
    for part in OTHERS:
        node(model, f"{SELF}/{part}/input/DequantizeLinear").input[0] = f"{Q}:0"
    return f"B10 {Q}: read by 3 nodes, must be one DequantizeLinear"


def share_zero_point(model: ModelProto) -> str:
    for part in OTHERS:
        for op in ("QuantizeLinear", "DequantizeLinear"):
            node(model, f"{SELF}/{part}/input/{op}").input[2] = INPUT_ZERO
    return f"B10 {SELF}/key/input/QuantizeLinear: shares its zero-point with {Q}"


def add_integer_bias(model: ModelProto) -> str:
    put(model, "bias_int32", np.zeros(32, np.int32))
    put(model, "bias_scale", np.ones(32, np.float32))
    put(model, "bias_zero", np.zeros(32, np.int32))
    extra = helper.make_node("DequantizeLinear", ["bias_int32", "bias_scale", "bias_zero"], ["b"], name="/b", axis=0)
    node(model, f"{SELF}/query/Add").input[1] = "b"
    model.graph.node.insert(0, extra)
    return "B11 /b: int32 bias"


def delay_bias(model: ModelProto) -> str:
    between(model, f"{SELF}/query/Add", 0, "Identity")
    return f"B11 {SELF}/query/Add: bias is not added directly behind {PRODUCT}"


def widen_softmax(model: ModelProto) -> str:
    put(model, f"{LAYER}.attention.self:softmax_scale", np.float32(0.01))
    return f"B12 {SELF}/MatMul_1: softmax scale 0.009999999776482582 above 1/127"


def transpose_key(model: ModelProto) -> str:
    between(model, f"{SELF}/MatMul", 1, "Transpose", perm=[0, 1, 2, 3])
    return f"B12 {SELF}/MatMul: Transpose between DequantizeLinear and the product"


def scale_query(model: ModelProto) -> str:
    put(model, "factor", np.float32(0.25))
    between(model, f"{SELF}/MatMul", 0, "Mul", "factor")
    return f"B12 {SELF}/MatMul: Mul between DequantizeLinear and the product"


def fix_batch(model: ModelProto) -> str:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
    return "B14 input_ids: fixed input shape (8, 'sequence')"


def leave_unused(model: ModelProto) -> str:
    put(model, "unused", np.ones((32, 32), np.float32))
    put(model, "read_by_an_unused_node", np.ones(3, np.float32))
    model.graph.node.append(helper.make_node("Relu", ["read_by_an_unused_node"], ["unread"], name="/Unused"))
    return "B15 unused: initializer that nothing reads"


def share_initializer(model: ModelProto) -> str:
    node(model, f"{SELF}/key/weight/DequantizeLinear").input[:] = node(model, WEIGHT_DQ).input
    return f"B15 {PRODUCT}: quantized weight {QUERY}.weight_int8 has 2 readers"


def share_dequantizer(model: ModelProto) -> str:
    node(model, f"{SELF}/key/MatMul").input[1] = node(model, PRODUCT).input[1]
    return f"B15 {SELF}/key/MatMul: quantized weight {QUERY}.weight_int8 is shared behind {WEIGHT_DQ}"


def copy_weight_to_output(model: ModelProto) -> str:
    model.graph.node.append(helper.make_node("Identity", [f"{QUERY}.weight_int8"], ["weight_copy"], name="/Copy"))
    model.graph.output.append(helper.make_tensor_value_info("weight_copy", TensorProto.INT8, [32, 32]))
    return f"B15 {PRODUCT}: quantized weight {QUERY}.weight_int8 has 2 readers"


def almost_prune(model: ModelProto) -> str:
    change(model, f"{QUERY}.weight_int8", lambda value: value.__setitem__((slice(0, 4), slice(4, 7)), 1))
    return f"B6 {PRODUCT}: almost 2:4: 51% zeros, but 3 of 256 groups hold more than 2 of 4 weights"


def make_output_float(model: ModelProto) -> str:
    bypass(model, f"{ENCODER}/attention/output/dense/output")
    return f"T16 {ENCODER}/attention/output/dense/MatMul: its output stays float: it goes to Add"


def make_output_of_model(model: ModelProto) -> str:
    name = node(model, f"{ENCODER}/attention/output/dense/Add").output[0]
    model.graph.output.append(helper.make_tensor_value_info(name, 1, ["batch", "sequence", 32]))
    return f"T16 {ENCODER}/attention/output/dense/MatMul: its output stays float: it is an output of the model"


def make_output_float_on_one_path(model: ModelProto) -> str:
    source = node(model, f"{SELF}/value/Add").output[0]
    model.graph.node.append(helper.make_node("Softmax", [source], ["extra"], name="/Softmax_extra"))
    model.graph.output.append(helper.make_tensor_value_info("extra", 1, ["batch", "sequence", 32]))
    return f"T16 {SELF}/value/MatMul: its output stays float: it goes to Softmax"


FOR_INT8: tuple[Edit, ...] = (
    set_opset_21, quantize_dynamically, set_output_types, drop_zero_points, drop_zero_point_of_weight,
    shift_zero_point, make_activation_unsigned, make_weight_unsigned, negate_scale, make_scale_infinite, compute_scale,
    zero_dead_scale, make_dead_scale_denormal, add_dimension_to_scale, give_weight_one_scale, give_weight_31_scales,
    make_scales_unequal, set_wrong_axis, transpose_weight, set_lowest_integer, set_negative_zeros, quantize_layer_norm,
    make_input_float, reshape_input, share_pair, share_quantizer, share_zero_point, add_integer_bias, delay_bias,
    widen_softmax, transpose_key, scale_query, fix_batch, leave_unused, share_initializer, share_dequantizer,
    copy_weight_to_output,
)  # fmt: skip
FOR_TENSORRT: tuple[Edit, ...] = (almost_prune, make_output_float, make_output_of_model, make_output_float_on_one_path)
