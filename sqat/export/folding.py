"""Fold the attention scale 1/sqrt(d) into a constant of the query (B12).

A Mul or Div by a constant right after a product of two activations goes away, and the first operand is scaled. A query
behind a DequantizeLinear gets another scale there: k and v share the QuantizeLinear's (T16). Else weight and bias of
the query's linear are scaled.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx import ModelProto

from sqat.export.onnx_edit import (
    LAYOUT_OPS,
    GraphEditor,
    constant_value,
    only_reader,
    producer,
    require_constant,
    weight_chain,
)


def fold_attention_scale(model: ModelProto) -> ModelProto:
    """Fold the scales behind first attention products where possible.

    A query with another operator on its way, such as a rotary embedding, keeps its scale.

    Args:
        model: float32 graph, with or without Q/DQ pairs; is not changed.

    Returns:
        A graph that computes the same: exactly where the scale is a power of two, else up to one rounding.
    """
    folder = ScaleFolder(GraphEditor(model))
    for product in list(folder.editor.graph):
        if product.op_type == "MatMul" and not any(is_weight(value) for value in product.inputs):
            folder.fold(product)
    return folder.editor.finish()


@dataclass
class ScaleFolder:
    """A graph under change, and the initializers that are scaled already, by name and factor."""

    editor: GraphEditor
    scaled: dict[tuple[str | None, float], ir.Value] = field(default_factory=dict)

    def fold(self, product: ir.Node) -> None:
        """Fold the scale behind a product of two activations, if there is one."""
        scale = find_scale(product)
        if scale is None:
            return
        node, factor = scale
        constants = query_constants(product.inputs[0])
        for reader, operand in constants:
            reader.replace_input_with(operand, self.multiply(reader.inputs[operand], factor))
        if constants:
            node.outputs[0].replace_all_uses_with(product.outputs[0])

    def multiply(self, value: ir.Value | None, factor: np.float32) -> ir.Value:
        """Multiply an initializer by the factor, in its own type."""
        old, array = require_constant(value)
        key = (old.name, float(factor))
        if key not in self.scaled:
            product = (array.astype(np.float32) * factor + np.float32(0)).astype(array.dtype)
            self.scaled[key] = self.editor.add_constant(str(old.name), product)
        return self.scaled[key]


def is_weight(value: ir.Value | None) -> bool:
    """Whether a product's operand is stored in the graph, in float or behind Q/DQ."""
    return constant_value(value) is not None or bool(weight_chain(value))


def find_scale(product: ir.Node) -> tuple[ir.Node, np.float32] | None:
    """Find the Mul or Div by one positive number that alone reads a product, and its factor."""
    output = product.outputs[0]
    reader = only_reader(output)
    if reader is None or reader.op_type not in ("Mul", "Div") or reader.outputs[0].is_graph_output():
        return None
    left, right = reader.inputs
    other = constant_value(right if left is output else left)
    if other is None or other.size != 1 or (reader.op_type == "Div" and right is output):
        return None
    number = np.float32(other.reshape(()))
    if not (np.isfinite(number) and number > 0):
        return None
    return reader, number if reader.op_type == "Mul" else np.float32(1) / number


def query_constants(operand: ir.Value | None) -> list[tuple[ir.Node, int]]:
    """List the constants that scale a product's operand: each reader, and the input that it reads.

    Empty where another operator than a change of layout lies between, or something else reads the operand.
    """
    node = skip_layout(operand)
    if node is None:
        return []
    if node.op_type == "DequantizeLinear":
        return [(node, 1)]
    bias: list[tuple[ir.Node, int]] = []
    if node.op_type == "Add":
        linear = next(filter(None, (producer(value, "MatMul") for value in node.inputs)), None)
        index = next((index for index, value in enumerate(node.inputs) if constant_value(value) is not None), None)
        if linear is None or index is None or len(linear.outputs[0].uses()) != 1:
            return []
        node, bias = linear, [(node, index)]
    if node.op_type == "Gemm" and len(node.inputs) == 3:
        if constant_value(node.inputs[2]) is None:
            return []
        bias = [(node, 2)]
    weight = weight_constants(node) if node.op_type in ("MatMul", "Gemm") else []
    return weight + bias if weight else []


def skip_layout(value: ir.Value | None) -> ir.Node | None:
    """Find the first node before a value that changes no layout, if nothing else reads what lies between."""
    while value is not None and only_reader(value) is not None:
        node = value.producer()
        if node is None or node.op_type not in LAYOUT_OPS:
            return node
        value = node.inputs[0]
    return None


def weight_constants(linear: ir.Node) -> list[tuple[ir.Node, int]]:
    """List the constants that scale a linear's weight: the weight, the DQ's scale, or weight and scales of Q and DQ."""
    if constant_value(linear.inputs[1]) is not None:
        return [(linear, 1)]
    chain = weight_chain(linear.inputs[1])
    return [(node, 1) for node in chain] + [(node, 0) for node in chain[:-1]]
