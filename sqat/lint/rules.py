"""Which rule holds for which target: `RULES` at the foot is the table, a row per check.

What: a check is a small function over the wiring that yields what breaks it, with the node; the row says what is
asked, how grave a breach is for each target, and what to do. The checks look at the finished file only: the writer
obeys the rules by construction, so a check of its own data would prove nothing. A rule with several rows is told
apart by severity or advice. Left out: patterns that a checkpoint claims (`sqat.lint.checks`), and what only a
runtime can tell (`sqat.runtime.sessions.left_in_float`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from sqat.lint.attention_rules import attention, fused_attention
from sqat.lint.findings import Finding, Problem
from sqat.lint.layer_rules import (
    axes,
    both_operands,
    float_bias,
    int8_convolutions,
    near_patterns,
    sizes,
    sparse_sizes,
    weight_values,
)
from sqat.lint.operator_rules import (
    float_only,
    microsoft_operators,
    older_opset,
    operators,
    opset,
    other_operators,
    output_types,
    own_initializers,
    readable_opset,
    subgraphs,
    symbolic_sizes,
    tensorrt_operators,
)
from sqat.lint.pair_rules import dedicated_pairs, float_weights, granularity, own_zero_points, scales, zero_points
from sqat.lint.tensorrt_rules import convolutions, int8_out, one_output_scale, residual_adds
from sqat.lint.typing_rules import half_range, half_scales, mixed_types, quantizer_types
from sqat.lint.wiring import Wiring

Check = Callable[[Wiring], Iterator[Problem]]
Target = Literal["onnx-int8", "tensorrt", "tensorrt-8", "onnx-fp16", "onnx-fp32"]
TARGETS: tuple[Target, ...] = ("onnx-int8", "tensorrt", "tensorrt-8", "onnx-fp16", "onnx-fp32")


class Rule(NamedTuple):
    """A row of the table.

    Attributes:
        id: as the rules are numbered; rules of the linter itself have a word.
        grades: a letter per target, in the order of `TARGETS`: E wrong or not accelerated, W costs speed, - not asked.
        title: what is asked.
        check: yields what breaks it.
        fix: what to do about it.
    """

    id: str
    grades: str
    title: str
    check: Check
    fix: str

    def findings(self, wiring: Wiring, target: Target) -> list[Finding]:
        """What breaks the rule, as grave as it is for a target; nothing where it is not asked."""
        grade = self.grades[TARGETS.index(target)]
        if grade == "-":
            return []
        return [
            Finding(self.id, found.node, found.text, found.warning or grade == "W", self.title, found.fix or self.fix)
            for found in self.check(wiring)
        ]


# What a fix by hand needs, in the words of the one who has to do it.
EXPORT_AGAIN = "export again at opset 20, or convert with onnx.version_converter"
PLAIN_QDQ = "quantize in the form Q/DQ around float operators (QDQ, static), not with integer operators"
OWN_PAIR = "give each consumer its own pair; --fix does it"
# fmt: off
RULES: tuple[Rule, ...] = (
    Rule("B1", "EW-WW", "opset 18 to 20", opset, EXPORT_AGAIN),
    Rule("B1", "--E--", "opset 13 to 17", older_opset,
         "export with stages.export.tensorrt.layers=conv1x1 and weights=qdq"),
    Rule("B1", "EEEEE", "opset 13 to 25 at the least", readable_opset, EXPORT_AGAIN),
    Rule("B1", "EEE--", "Q/DQ around float operators, no integer ones", operators, PLAIN_QDQ),
    Rule("B1", "EEE--", "no attribute output_dtype", output_types,
         "leave it out, the zero-point gives the type; --fix does it where that is so"),
    Rule("B2", "EEE--", "an int8 zero-point of zeros on every Q and DQ", zero_points,
         "quantize symmetric to int8; --fix writes one that is missing, and makes uint8 around 128 int8 around 0"),
    Rule("B3", "EEE--", "constant, finite and positive scales", scales,
         "calibrate again; --fix gives the scale of a fully pruned row a positive value"),
    Rule("B4", "EEE--", "one scale for activations, one per output channel for int8 weights", granularity,
         "quantize activations per tensor, weights per output channel to int8, Q and DQ with one scale"),
    Rule("B4", "--E--", "weights as float behind Q and DQ", float_weights,
         "export with stages.export.tensorrt.weights=qdq"),
    Rule("B5", "EEE--", "weight scales along the output channels, the DQ next to the product", axes,
         "store the weight as the product reads it, its DQ right before; --fix moves a Transpose into the weight"),
    Rule("B6", "WEEEW", "2:4 along the sum, on the values as stored", near_patterns,
         "prune to 2:4 along the inputs, and keep the zeros through training and quantization"),
    Rule("B7", "EEEEE", "weights in [-127, 127], no -0.0", weight_values,
         "quantize weights to [-127, 127] and multiply by the mask so that zeros are +0.0; --fix mends -0.0"),
    Rule("B8", "EEE--", "quantized layers at least 16 wide, nothing else quantized", sizes,
         "leave embeddings, norms, softmax and narrow layers in float"),
    Rule("B8", "WEEEW", "sparse layers with inputs in 16s and outputs in 8s", sparse_sizes,
         "leave the layer dense, or widen it: sparse kernels do not take it"),
    Rule("B9", "EEE--", "both inputs of a product from a DQ, or neither", both_operands,
         "put a Q/DQ pair right before the other input, or take this one away"),
    Rule("B10", "EEE--", "a Q/DQ pair for each consumer", dedicated_pairs, OWN_PAIR),
    Rule("B10", "EWW--", "a zero-point for each pair", own_zero_points, OWN_PAIR),
    Rule("B11", "EEE--", "float bias right behind the product", float_bias,
         "keep the bias in float and add it right behind the product (a Conv's is its third input)"),
    Rule("B12", "EEE--", "attention products right behind their DQs, softmax scale at most 1/127", attention,
         "fold the factor into the DQ's scale (--fix does it), move a Transpose before the Q"),
    Rule("B13", "WWW--", "int8 attention as TensorRT fuses it", fused_attention,
         "head sizes 16, 32 or 64, and Q/DQ behind the second product"),
    Rule("B14", "EWWWW", "symbolic batch and sequence", symbolic_sizes,
         "export with dynamic batch and sequence axes"),
    Rule("B15", "EEEWW", "initializers of their own, none left over", own_initializers,
         "give the layer a copy, drop what nothing reads; --fix does both"),
    Rule("O21", "W----", "int8 out right behind a convolution", int8_convolutions,
         "put a Q/DQ pair right behind it, before the activation function"),
    Rule("T16", "-EE--", "int8 out: the output reaches a Q behind bias and changes of layout", int8_out,
         "calibrate with placement tensorrt, so that outputs, residual adds and attention have Q/DQ too"),
    Rule("T16", "-WW--", "one output scale for q, k and v", one_output_scale,
         "give them the largest of their scales, so that they can be merged into one product"),
    Rule("T17", "-WW--", "both inputs of a residual Add from a DQ", residual_adds,
         "put a Q/DQ pair before each input (calibrate with placement tensorrt)"),
    Rule("T18", "-EEE-", "a Q's scale of its input's type, a DQ's of its readers'", quantizer_types,
         "write the scale in that type, or put a Cast there"),
    Rule("T18", "-EEE-", "float16 scales of at least 6.2e-5", half_scales,
         "keep Q, DQ and their scales in float32, with a Cast around them"),
    Rule("T18", "-EEE-", "one float type per operator", mixed_types, "put a Cast before the other input"),
    Rule("T18", "-EEE-", "constants within the range of float16", half_range,
         "clip them to +-65504 (masks too) before converting to float16"),
    Rule("T20", "--E--", "sparse layers as Conv", convolutions,
         "export with stages.export.tensorrt.layers=conv1x1, or build with TensorRT 10 or later"),
    Rule("float", "---EE", "no Q/DQ in a float file", float_only, "export the float model, or lint for an int8 target"),
    Rule("operator", "WEEWW", "operators of ONNX only", microsoft_operators,
         "export without ONNX Runtime's own operators: TensorRT cannot read them"),
    Rule("operator", "EWWEE", "operators of ONNX only", tensorrt_operators,
         "only TensorRT with that plugin can read it"),
    Rule("operator", "EEEEE", "operators of ONNX only", other_operators,
         "write it with operators that ONNX has at this opset"),
    Rule("subgraph", "WWWWW", "no subgraphs", subgraphs, "export without control flow, so that every layer is seen"),
)
