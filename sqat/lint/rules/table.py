"""The table of rules: what each requires, how severe it is for each target, and what repairs it.

`scripts/lint_rules.py` writes it into the README beside this package. Rules look at the finished file only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from sqat.lint.findings import Finding, Problem
from sqat.lint.graph_editor import GraphEditor
from sqat.lint.graph_view import GraphView
from sqat.lint.rules.attention import check_attention, check_fused_attention, fold_factors_
from sqat.lint.rules.float_types import check_half_range, check_half_scales, check_mixed_types, check_quantizer_types
from sqat.lint.rules.int8_outputs import check_int8_out, check_one_output_scale, check_residual_adds
from sqat.lint.rules.layers import (
    check_both_operands,
    check_convolutions,
    check_float_bias,
    check_int8_convolutions,
    check_sizes,
    check_sparse_sizes,
)
from sqat.lint.rules.operators import (
    check_float_file,
    check_microsoft_operators,
    check_older_opset,
    check_operators,
    check_opset,
    check_other_operators,
    check_output_types,
    check_readable_opset,
    check_subgraphs,
    check_symbolic_sizes,
    check_tensorrt_operators,
    drop_output_types_,
)
from sqat.lint.rules.pairs import check_dedicated_pairs, check_own_zero_points, split_pairs_, split_zero_points_
from sqat.lint.rules.quantizers import (
    check_float_weights,
    check_granularity,
    check_scales,
    check_zero_points,
    raise_dead_scales_,
    write_zero_points_,
)
from sqat.lint.rules.weights import (
    check_almost_sparse,
    check_axes,
    check_shared_weights,
    check_unused_initializers,
    check_weight_values,
    clear_negative_zeros_,
    copy_shared_weights_,
    drop_unused_,
    move_layout_,
)

Target = Literal["onnx-int8", "tensorrt", "tensorrt-8", "onnx-fp16", "onnx-fp32"]
TARGETS: tuple[Target, ...] = ("onnx-int8", "tensorrt", "tensorrt-8", "onnx-fp16", "onnx-fp32")


class Repair(NamedTuple):
    """What repairs a rule without changing the numbers.

    Attributes:
        order: repairs run in this order, since some need the result of others.
    """

    order: int
    function: Callable[[GraphEditor], None]


class Rule(NamedTuple):
    """A row of the table; a rule has several rows where severity, advice or repair differ.

    Attributes:
        id: its number, or a word.
        severities: a letter for each of `TARGETS`: E an error, W a warning (it costs speed), - not required.
        requirement: what the file must be, in a few words.
        check: yields what breaks the rule.
        advice: what to do about it.
    """

    id: str
    severities: str
    requirement: str
    check: Callable[[GraphView], Iterator[Problem]]
    advice: str
    repair: Repair | None = None

    def severity(self, target: Target) -> str:
        """``E``, ``W`` or ``-`` for a target."""
        return self.severities[TARGETS.index(target)]

    def findings(self, view: GraphView, target: Target) -> list[Finding]:
        """What breaks the rule, as severe as it is for a target."""
        severity = self.severity(target)
        return [self.finding(problem, severity) for problem in self.check(view)] if severity != "-" else []

    def finding(self, problem: Problem, severity: str) -> Finding:
        """A problem as a finding of this rule."""
        is_warning = problem.warning or severity == "W"
        return Finding(self.id, problem.node, problem.text, is_warning, self.requirement, problem.advice or self.advice)


EXPORT_AGAIN = "export again at opset 20, or convert with onnx.version_converter"
OWN_PAIR = "give each consumer its own pair; --fix does it"
# fmt: off
RULES: tuple[Rule, ...] = (
    Rule("B1", "EW-WW", "opset 18 to 20", check_opset, EXPORT_AGAIN),
    Rule("B1", "--E--", "opset 13 to 17", check_older_opset,
         "export with stages.export.tensorrt.layers=conv1x1 and weights=qdq"),
    Rule("B1", "EEEEE", "opset 13 to 25 at the least", check_readable_opset, EXPORT_AGAIN),
    Rule("B1", "EEE--", "Q/DQ around float operators, no integer ones", check_operators,
         "quantize in the form Q/DQ around float operators (QDQ, static), not with integer operators"),
    Rule("B1", "EEE--", "no attribute output_dtype", check_output_types,
         "leave it out, the zero-point gives the type; --fix does it where that is so", Repair(6, drop_output_types_)),
    Rule("B2", "EEE--", "an int8 zero-point of zeros on every Q and DQ", check_zero_points,
         "quantize symmetric to int8; --fix writes one that is missing, and makes uint8 around 128 int8 around 0",
         Repair(4, write_zero_points_)),
    Rule("B3", "EEE--", "constant, finite and positive scales", check_scales,
         "calibrate again; --fix gives the scale of a fully pruned row a positive value",
         Repair(5, raise_dead_scales_)),
    Rule("B4", "EEE--", "one scale for activations, one per output channel for int8 weights", check_granularity,
         "quantize activations per tensor, weights per output channel to int8, Q and DQ with one scale"),
    Rule("B4", "--E--", "weights as float behind Q and DQ", check_float_weights,
         "export with stages.export.tensorrt.weights=qdq"),
    Rule("B5", "EEE--", "weight scales along the output channels, the DQ next to the product", check_axes,
         "store the weight as the product reads it, its DQ right before; --fix moves a Transpose into the weight",
         Repair(2, move_layout_)),
    Rule("B6", "WEEEW", "2:4 along the sum, on the values as stored", check_almost_sparse,
         "prune to 2:4 along the inputs, and keep the zeros through training and quantization"),
    Rule("B7", "EEEEE", "weights in [-127, 127], no -0.0", check_weight_values,
         "quantize weights to [-127, 127] and multiply by the mask so that zeros are +0.0; --fix mends -0.0",
         Repair(3, clear_negative_zeros_)),
    Rule("B8", "EEE--", "quantized layers at least 16 wide, nothing else quantized", check_sizes,
         "leave embeddings, norms, softmax and narrow layers in float"),
    Rule("B8", "WEEEW", "sparse layers with inputs in 16s and outputs in 8s", check_sparse_sizes,
         "leave the layer dense, or widen it: sparse kernels do not take it"),
    Rule("B9", "EEE--", "both inputs of a product from a DQ, or neither", check_both_operands,
         "put a Q/DQ pair right before the other input, or take this one away"),
    Rule("B10", "EEE--", "a Q/DQ pair for each consumer", check_dedicated_pairs, OWN_PAIR, Repair(7, split_pairs_)),
    Rule("B10", "EWW--", "a zero-point for each pair", check_own_zero_points, OWN_PAIR, Repair(8, split_zero_points_)),
    Rule("B11", "EEE--", "float bias right behind the product", check_float_bias,
         "keep the bias in float and add it right behind the product (a Conv's is its third input)"),
    Rule("B12", "EEE--", "attention products right behind their DQs, softmax scale at most 1/127", check_attention,
         "fold the factor into the DQ's scale (--fix does it), move a Transpose before the Q",
         Repair(9, fold_factors_)),
    Rule("B13", "WWW--", "int8 attention as TensorRT fuses it", check_fused_attention,
         "head sizes 16, 32 or 64, and Q/DQ behind the second product"),
    Rule("B14", "EWWWW", "symbolic batch and sequence", check_symbolic_sizes,
         "export with dynamic batch and sequence axes"),
    Rule("B15", "EEEWW", "no unused initializer", check_unused_initializers, "drop it; --fix does it",
         Repair(10, drop_unused_)),
    Rule("B15", "EEEWW", "a weight of its own for each quantized layer", check_shared_weights,
         "give the layer a copy; --fix does it", Repair(1, copy_shared_weights_)),
    Rule("O21", "W----", "int8 out right behind a convolution", check_int8_convolutions,
         "put a Q/DQ pair right behind it, before the activation function"),
    Rule("T16", "-EE--", "int8 out: the output reaches a Q behind bias and changes of layout", check_int8_out,
         "calibrate with placement tensorrt, so that outputs, residual adds and attention have Q/DQ too"),
    Rule("T16", "-WW--", "one output scale for q, k and v", check_one_output_scale,
         "give them the largest of their scales, so that they can be merged into one product"),
    Rule("T17", "-WW--", "both inputs of a residual Add from a DQ", check_residual_adds,
         "put a Q/DQ pair before each input (calibrate with placement tensorrt)"),
    Rule("T18", "-EEE-", "a Q's scale of its input's type, a DQ's of its readers'", check_quantizer_types,
         "write the scale in that type, or put a Cast there"),
    Rule("T18", "-EEE-", "float16 scales of at least 6.2e-5", check_half_scales,
         "keep Q, DQ and their scales in float32, with a Cast around them"),
    Rule("T18", "-EEE-", "one float type per operator", check_mixed_types, "put a Cast before the other input"),
    Rule("T18", "-EEE-", "constants within the range of float16", check_half_range,
         "clip them to +-65504 (masks too) before converting to float16"),
    Rule("T20", "--E--", "sparse layers as Conv", check_convolutions,
         "export with stages.export.tensorrt.layers=conv1x1, or build with TensorRT 10 or later"),
    Rule("float", "---EE", "no Q/DQ in a float file", check_float_file,
         "export the float model, or lint for an int8 target"),
    Rule("operator", "WEEWW", "operators of ONNX only", check_microsoft_operators,
         "export without ONNX Runtime's own operators: TensorRT cannot read them"),
    Rule("operator", "EWWEE", "operators of ONNX only", check_tensorrt_operators,
         "only TensorRT with that plugin can read it"),
    Rule("operator", "EEEEE", "operators of ONNX only", check_other_operators,
         "write it with operators that ONNX has at this opset"),
    Rule("subgraph", "WWWWW", "no subgraphs", check_subgraphs,
         "export without control flow, so that every layer is seen"),
)
