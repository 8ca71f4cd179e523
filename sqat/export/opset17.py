"""Rewrite a graph of opset 20 for opset 17, the last that TensorRT 8.6 reads.

``Gelu`` becomes Erf or Tanh; younger attributes at their defaults go. onnx's version converter has no step down for
most of these operators.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
from onnx import ModelProto

from sqat.errors import SqatError
from sqat.export.onnx_edit import GraphEditor, module_name

OPSET = 17
DEFAULTS = {"Cast": "saturate", "QuantizeLinear": "saturate", "Split": "num_outputs"}
WIDENED = ("Cast", "Constant", "ConstantOfShape", "DequantizeLinear", "Equal", "Identity", "IsNaN", "QuantizeLinear",
           "Reshape", "Shape", "Size", "Split")  # fmt: skip
CUBIC = 0.044715


def to_opset17(model: ModelProto) -> ModelProto:
    """Rewrite a float32 graph, with or without Q/DQ, for readers of opset 17.

    Raises:
        SqatError: opset 17 lacks an operator of the graph, or gives it another meaning.
    """
    editor = GraphEditor(model)
    for node in list(editor.graph):
        if node.op_type == "Gelu":
            expand_gelu(editor, node)
        elif (name := DEFAULTS.get(node.op_type)) is not None:
            node.attributes.pop(name, None)
        if node.op_type not in ("Gelu", *WIDENED) and changed_after_17(node.op_type):
            raise SqatError(f"operator {node.op_type} of {node.name} is not that of opset {OPSET}",
                            "TensorRT 8.x cannot read this model: use TensorRT 10 with weights: dq",
                            code="unsupported-target")  # fmt: skip
    result = editor.finish()
    for entry in result.opset_import:
        entry.version = OPSET if entry.domain in ("", "ai.onnx") else entry.version
    return result


def changed_after_17(operator: str) -> bool:
    """Whether an operator is new or changed after opset 17."""
    return bool(onnx.defs.get_schema(operator, 20).since_version > OPSET)


def expand_gelu(editor: GraphEditor, gelu: ir.Node) -> None:
    """Replace a Gelu by x/2 (1 + erf(x / sqrt 2)), or by the same with tanh(sqrt(2/pi) (x + 0.044715 x^3)).

    Its input is read once, since it may come from a DequantizeLinear (B10).
    """
    x, old = gelu.inputs[0], gelu.outputs[0]
    name = module_name(gelu)
    tanh = "approximate" in gelu.attributes and gelu.attributes["approximate"].as_string() == "tanh"

    def number(label: str, value: float) -> ir.Value:
        return editor.add_constant(f"{name}.gelu_{label}", np.float32(value))

    def step(op: str, *inputs: ir.Value | None) -> ir.Value:
        return editor.add_node(op, inputs, name, before=gelu, dtype=old.dtype, shape=old.shape)

    if tanh:
        part = step("Mul", x, number("half", 0.5))
        factor = step("Add", step("Mul", step("Mul", part, part), number("cubic", 4 * CUBIC)), number("unit", 1))
        slope = number("slope", 2 * math.sqrt(2 / math.pi))
        inner, half = step("Tanh", step("Mul", step("Mul", part, factor), slope)), part
    else:
        part = step("Mul", x, number("slope", math.sqrt(0.5)))
        inner, half = step("Erf", part), step("Mul", part, number("half", math.sqrt(0.5)))
    result = step("Mul", half, step("Add", inner, number("one", 1)))
    old.replace_all_uses_with(result)
