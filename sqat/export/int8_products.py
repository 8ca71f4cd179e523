"""Write quantized linears in a form that ONNX Runtime computes in int8.

It fuses MatMul and Add on a matrix or a fixed shape to a Gemm, which is float where its bias is. A product that a Relu
reads stays float too. A Sum in place of the Add, or before the Relu, prevents both and computes the same.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx import ModelProto

from sqat.export.names import node_name
from sqat.export.onnx_edit import (
    GraphEditor,
    constant_value,
    module_name,
    only_reader,
    producer,
    require_constant,
    weight_chain,
)

PAIR = ("QuantizeLinear", "DequantizeLinear")
CLIPS = ("Relu", "Clip")


# TensorRT's parser makes the same layer of Sum and Add, and none of a Sum of one.
def keep_int8(model: ModelProto) -> ModelProto:
    """Put a Sum behind each quantized linear that ONNX Runtime would compute in float.

    Args:
        model: with Q/DQ pairs; is not changed.

    Returns:
        A graph that computes the same; the model itself where ONNX Runtime computes all linears in int8.
    """
    editor, is_changed = GraphEditor(model), False
    for node in list(editor.graph):
        chain = weight_chain(node.inputs[1]) if node.op_type in ("MatMul", "Gemm") else []
        if not chain:
            continue
        if node.op_type == "Gemm":
            split_gemm(editor, node, chain)
        elif (reader := only_reader(node.outputs[0])) is None or not loses_int8(node, reader):
            continue
        elif reader.op_type == "Add" and any(constant_value(value) is not None for value in reader.inputs):
            make_sum(editor, reader)
        else:
            output = node.outputs[0]
            own = editor.add_node("Sum", [output], module_name(node), after=node, dtype=output.dtype,
                                  shape=output.shape)  # fmt: skip
            reader.replace_input_with(list(reader.inputs).index(output), own)
        is_changed = True
    return editor.finish() if is_changed else model


def loses_int8(product: ir.Node, reader: ir.Node) -> bool:
    """Whether ONNX Runtime computes a product in float because of what alone reads it."""
    if reader.op_type in CLIPS:
        return only_reader(reader.outputs[0]) is not None
    return reader.op_type == "Add" and becomes_gemm(product)


def becomes_gemm(product: ir.Node) -> bool:
    """Whether a product reads a matrix or a tensor of a fixed shape, as the graph declares it before its Q/DQ pair."""
    value = product.inputs[0]
    while value is not None and value.shape is None and (pair := producer(value, *PAIR)) is not None:
        value = pair.inputs[0]
    shape = None if value is None else value.shape
    return shape is not None and (len(shape) == 2 or all(isinstance(size, int) for size in shape))


def split_gemm(editor: GraphEditor, gemm: ir.Node, chain: list[ir.Node]) -> None:
    """Turn a Gemm into a MatMul, whose weight lies as it reads it, and the Sum of that and the bias.

    Raises:
        ValueError: it does more than multiply and add.
    """
    settings = {name: entry.value for name, entry in gemm.attributes.items()}
    is_transposed = bool(settings.pop("transB", 0))
    if settings.pop("transA", 0) or set(settings.values()) - {1.0}:
        raise ValueError(f"{gemm.name} has {settings}, a quantized Gemm needs alpha = beta = 1 and no transA")
    if is_transposed:
        weight, array = require_constant(chain[0].inputs[0])
        chain[0].replace_input_with(0, editor.add_constant(str(weight.name), np.ascontiguousarray(array.T)))
        for node in chain:
            node.attributes["axis"] = ir.AttrInt64("axis", 1)
    output = gemm.outputs[0]
    product = editor.add_node("MatMul", gemm.inputs[:2], module_name(gemm), before=gemm, dtype=output.dtype,
                              shape=output.shape)  # fmt: skip
    gemm.replace_input_with(0, product)
    bias = gemm.inputs[2:]
    gemm.resize_inputs(1 + len(bias))
    for index, value in enumerate(bias, start=1):
        gemm.replace_input_with(index, value)
    gemm.attributes.clear()
    make_sum(editor, gemm)


def make_sum(editor: GraphEditor, node: ir.Node) -> None:
    """Let a node add up its inputs by a Sum."""
    node.op_type, node.name = "Sum", editor.free_name(node_name(module_name(node), "Sum"))
