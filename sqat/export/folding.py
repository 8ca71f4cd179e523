"""Move the attention scale 1/sqrt(d) behind its product, and fold it into a constant of the query (B12).

A Mul or Div by a constant right after a product of activations goes away, and the query is scaled: behind a
DequantizeLinear by another scale there, since k and v share the QuantizeLinear's (T16); else by its linear's weight
and bias.
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
    module_name,
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


def move_factors(model: ModelProto) -> ModelProto:
    """Move a constant factor between a DequantizeLinear and a product of two activations behind the product.

    Families outside transformers' attention interface (DeBERTa) scale an operand. The product is int8 without it.

    Args:
        model: with Q/DQ pairs; is not changed.
    """
    editor, moved = GraphEditor(model), False
    for product in [node for node in editor.graph if node.op_type == "MatMul"]:
        operands = {index: find_operand(value) for index, value in enumerate(product.inputs)}
        found = {index: operand for index, operand in operands.items() if operand is not None}
        is_output = product.outputs[0].is_graph_output()
        if not found or is_output or any(is_weight(value) for value in product.inputs):
            continue
        moved, output, total = True, product.outputs[0], np.float32(1)
        for index, operand in found.items():
            product.replace_input_with(index, operand.without_factor(editor, product))
            total *= operand.factor
        module, uses = module_name(product), list(output.uses())
        constant = editor.add_constant(f"{module}.scale", total)
        scaled = editor.add_node("Mul", [output, constant], module, after=product, dtype=output.dtype,
                                 shape=output.shape)  # fmt: skip
        for reader, index in uses:
            reader.replace_input_with(index, scaled)
    return editor.finish() if moved else model


@dataclass(frozen=True)
class ScaledOperand:
    """An operand of a product: a DequantizeLinear's result, times a factor, in another layout.

    Attributes:
        source: what is multiplied.
        layout: changes of layout of the result, the last first.
    """

    source: ir.Value
    factor: np.float32
    layout: list[ir.Node]

    def without_factor(self, editor: GraphEditor, product: ir.Node) -> ir.Value:
        """Repeat the changes of layout before a product, on what is multiplied."""
        value = self.source
        for node in reversed(self.layout):
            output = node.outputs[0]
            attributes = {name: attribute.value for name, attribute in node.attributes.items()}
            value = editor.add_node(node.op_type, [value, *node.inputs[1:]], module_name(node), before=product,
                                    dtype=output.dtype, shape=output.shape, attributes=attributes)  # fmt: skip
        return value


def find_operand(value: ir.Value | None) -> ScaledOperand | None:
    """Find the factor of an operand that comes from a DequantizeLinear; None where it has none."""
    layout = list[ir.Node]()
    while (node := producer(value, *LAYOUT_OPS)) is not None:
        layout.append(node)
        value = node.inputs[0]
    node = producer(value, "Mul", "Div")
    found = factor_of(node) if node is not None else None
    if found is None:
        return None
    source = value = found[0]
    while (node := producer(value, *LAYOUT_OPS)) is not None:
        value = node.inputs[0]
    return ScaledOperand(source, found[1], layout) if producer(value, "DequantizeLinear") is not None else None


def factor_of(node: ir.Node) -> tuple[ir.Value, np.float32] | None:
    """Get what a Mul or Div multiplies by one positive constant, and the factor; None for another one."""
    left, right = node.inputs
    constant = constant_value(right)
    data = left
    if constant is None and node.op_type == "Mul":
        constant, data = constant_value(left), right
    if constant is None or data is None or constant.size != 1:
        return None
    number = np.float32(constant.reshape(()))
    if not (np.isfinite(number) and number > 0):
        return None
    return data, number if node.op_type == "Mul" else np.float32(1) / number


def is_weight(value: ir.Value | None) -> bool:
    """Whether a product's operand is stored in the graph, in float or behind Q/DQ."""
    return constant_value(value) is not None or bool(weight_chain(value))


def find_scale(product: ir.Node) -> tuple[ir.Node, np.float32] | None:
    """Find the Mul or Div by one positive number that alone reads a product, and its factor."""
    reader = only_reader(product.outputs[0])
    if reader is None or reader.op_type not in ("Mul", "Div") or reader.outputs[0].is_graph_output():
        return None
    found = factor_of(reader)
    return None if found is None else (reader, found[1])


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
