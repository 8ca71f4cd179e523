"""The attention scale 1/sqrt(d) out of the graph, into a number that is there already (B12).

What: a Mul or Div by a constant that directly follows a product of two activations is taken away, and the first
operand (q) is scaled instead. Where q comes from a DequantizeLinear, only *its* scale is multiplied, in an
initializer of its own: the QuantizeLinear before it keeps the scale that q, k and v share (T16). Else, where only
changes of layout lie between the product and a linear, the linear's weight scales (or float weight) and bias are
multiplied. Exact where 1/sqrt(d) is a power of two, one rounding otherwise.

Why not always into the linear: the int8 values of q would then need a finer scale than those of k and v.
Left out: a scale on q or k before the product (sdpa exports), and a q that passes anything else on its way
(rotary embeddings); there the graph stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx import ModelProto

from sqat.export.onnx_edit import LAYOUT, Rewriting, known, maker, stored, weight_chain


def fold_attention_scale(model: ModelProto) -> ModelProto:
    """Fold the scales behind first attention products where that is possible.

    Args:
        model: float32 graph, with or without Q/DQ pairs; left as it is.

    Returns:
        A graph that computes the same; products whose scale could not be folded keep it.
    """
    folding = Folding(Rewriting(model))
    for product in list(folding.rewriting.graph):
        if product.op_type == "MatMul" and not any(is_weight(value) for value in product.inputs):
            folding.fold(product)
    return folding.rewriting.finish()


@dataclass
class Folding:
    """A graph being folded, and the initializers already multiplied, by name and factor."""

    rewriting: Rewriting
    scaled: dict[tuple[str | None, float], ir.Value] = field(default_factory=dict)

    def fold(self, product: ir.Node) -> None:
        """Take away the scale behind a product of two activations, if there is one and it can be folded."""
        found = scale_behind(product)
        if found is None:
            return
        node, factor = found
        targets = places(product.inputs[0])
        for reader, operand in targets:
            reader.replace_input_with(operand, self.multiplied(reader.inputs[operand], factor))
        if targets:
            node.outputs[0].replace_all_uses_with(product.outputs[0])

    def multiplied(self, value: ir.Value | None, factor: np.float32) -> ir.Value:
        """An initializer times the factor, in its own type."""
        old, array = known(value)
        key = (old.name, float(factor))
        if key not in self.scaled:
            product = (array.astype(np.float32) * factor + np.float32(0)).astype(array.dtype)
            self.scaled[key] = self.rewriting.constant(str(old.name), product)
        return self.scaled[key]


def is_weight(value: ir.Value | None) -> bool:
    """Whether a product's operand is stored in the graph, in float or behind Q/DQ."""
    return stored(value) is not None or bool(weight_chain(value))


def scale_behind(product: ir.Node) -> tuple[ir.Node, np.float32] | None:
    """The Mul or Div by one positive number that alone reads a product, and what it multiplies with."""
    output = product.outputs[0]
    readers = [use.node for use in output.uses()]
    if len(readers) != 1 or output.is_graph_output() or readers[0].outputs[0].is_graph_output():
        return None
    reader = readers[0]
    if reader.op_type not in ("Mul", "Div"):
        return None
    left, right = reader.inputs
    other = stored(right if left is output else left)
    if other is None or other.size != 1 or (reader.op_type == "Div" and right is output):
        return None
    number = np.float32(other.reshape(()))
    if not (np.isfinite(number) and number > 0):
        return None
    return reader, number if reader.op_type == "Mul" else np.float32(1) / number


def places(operand: ir.Value | None) -> list[tuple[ir.Node, int]]:
    """Where a factor on a product's operand can be put: readers of initializers, with the input they read.

    Empty where something other than a change of layout lies before the operand, or something else reads it.
    """
    node = behind_layout(operand)
    if node is None:
        return []
    if node.op_type == "DequantizeLinear":
        return [(node, 1)]
    bias: list[tuple[ir.Node, int]] = []
    if node.op_type == "Add":
        linear = next((found for value in node.inputs if (found := maker(value, "MatMul")) is not None), None)
        constant = next((index for index, value in enumerate(node.inputs) if stored(value) is not None), None)
        if linear is None or constant is None or len(linear.outputs[0].uses()) != 1:
            return []
        node, bias = linear, [(node, constant)]
    if node.op_type == "Gemm" and len(node.inputs) == 3:
        if stored(node.inputs[2]) is None:
            return []
        bias = [(node, 2)]
    weight = weight_places(node) if node.op_type in ("MatMul", "Gemm") else []
    return weight + bias if weight else []


def behind_layout(value: ir.Value | None) -> ir.Node | None:
    """The first node before a value that is no change of layout, if nothing else reads what lies between."""
    while value is not None and len(value.uses()) == 1 and not value.is_graph_output():
        node = value.producer()
        if node is None or node.op_type not in LAYOUT:
            return node
        value = node.inputs[0]
    return None


def weight_places(linear: ir.Node) -> list[tuple[ir.Node, int]]:
    """Readers of the numbers that make up a linear's weight: itself, or the DQ's scale, or w, Q's and DQ's scale."""
    if stored(linear.inputs[1]) is not None:
        return [(linear, 1)]
    chain = weight_chain(linear.inputs[1])
    return [(node, 1) for node in chain] + [(node, 0) for node in chain[:-1]]
