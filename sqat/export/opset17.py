"""A graph of opset 20 in terms of opset 17, the last that TensorRT 8.6 reads.

What: ``Gelu`` (20) is spelled out with Erf, or Tanh for its approximation, and attributes younger than 17 that
stand at their defaults are dropped; every other operator of our graphs means the same in both.

Why not onnx's version converter: it has no step down for most of these operators. Left out: float16 graphs, since
the QuantizeLinear of opset 13 knows float32 alone; TensorRT 8 is told by a flag to use float16.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
from onnx import ModelProto

from sqat.errors import SqatError
from sqat.export.onnx_edit import Rewriting, module

OPSET = 17
DEFAULTS = {"Cast": "saturate", "QuantizeLinear": "saturate", "Split": "num_outputs"}
WIDENED = ("Cast", "Constant", "ConstantOfShape", "DequantizeLinear", "Equal", "Identity", "IsNaN", "QuantizeLinear",
           "Reshape", "Shape", "Size", "Split")  # fmt: skip
CUBIC = 0.044715


def to_opset17(model: ModelProto) -> ModelProto:
    """Rewrite a float32 graph, with or without Q/DQ, for readers of opset 17.

    Raises:
        SqatError: it holds an operator that opset 17 does not have, or has with another meaning.
    """
    rewriting = Rewriting(model)
    for node in list(rewriting.graph):
        if node.op_type == "Gelu":
            spell_out(rewriting, node)
        elif (name := DEFAULTS.get(node.op_type)) is not None:
            node.attributes.pop(name, None)
        if node.op_type not in ("Gelu", *WIDENED) and changed(node.op_type):
            raise SqatError(f"operator {node.op_type} of {node.name} is not that of opset {OPSET}",
                            "TensorRT 8.x cannot read this model: use TensorRT 10 with weights: dq")  # fmt: skip
    result = rewriting.finish()
    for entry in result.opset_import:
        entry.version = OPSET if entry.domain in ("", "ai.onnx") else entry.version
    return result


def changed(operator: str) -> bool:
    """Whether an operator was made or changed after opset 17."""
    return bool(onnx.defs.get_schema(operator, 20).since_version > OPSET)


def spell_out(rewriting: Rewriting, gelu: ir.Node) -> None:
    """Replace a Gelu by x/2 (1 + erf(x / sqrt 2)), or by the same with tanh(sqrt(2/pi) (x + 0.044715 x^3)).

    Its input is read once, for it may come from a DequantizeLinear (B10).
    """
    x, old = gelu.inputs[0], gelu.outputs[0]
    name = module(gelu)
    tanh = "approximate" in gelu.attributes and gelu.attributes["approximate"].as_string() == "tanh"

    def number(label: str, value: float) -> ir.Value:
        return rewriting.constant(f"{name}.gelu_{label}", np.float32(value))

    def step(op: str, *inputs: ir.Value | None) -> ir.Value:
        return rewriting.node(op, inputs, name, before=gelu, dtype=old.dtype, shape=old.shape)

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
