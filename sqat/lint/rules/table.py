"""The table of rules: what each requires, how severe it is for each target, and what repairs it.

`scripts/docs/lint_rules.py` writes it into the README of this package. Rules look at the finished file only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from sqat.lint.findings import Finding, Problem
from sqat.lint.graph_editor import GraphEditor
from sqat.lint.graph_view import GraphView
from sqat.lint.rules import attention, float_types, int8_outputs, layers, operators, pairs, quantizers, weights

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
        advice: what to do about it.
        check: yields what breaks the rule.
        repair: what ``--fix`` runs.
    """

    id: str
    severities: str
    requirement: str
    advice: str
    check: Callable[[GraphView], Iterator[Problem]]
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
# The letters stand for onnx-int8, tensorrt, tensorrt-8, onnx-fp16, onnx-fp32.
# fmt: off
RULES: tuple[Rule, ...] = (
    Rule("B1", "EW-WW", "opset 18 to 20", EXPORT_AGAIN,
         operators.check_opset),
    Rule("B1", "--E--", "opset 13 to 17", "export with stages.export.tensorrt.layers=conv1x1 and weights=qdq",
         operators.check_older_opset),
    Rule("B1", "EEEEE", "opset 13 to 25 at the least", EXPORT_AGAIN,
         operators.check_readable_opset),
    Rule("B1", "EEE--", "Q/DQ around float operators, no integer ones",
         "quantize in the form Q/DQ around float operators (QDQ, static), not with integer operators",
         operators.check_operators),
    Rule("B1", "EEE--", "no attribute output_dtype",
         "leave it out, the zero-point gives the type; --fix does it where that is so",
         operators.check_output_types, Repair(6, operators.drop_output_types_)),
    Rule("B2", "EEE--", "an int8 zero-point of zeros on every Q and DQ",
         "quantize symmetric to int8; --fix writes one that is missing, and makes uint8 around 128 int8 around 0",
         quantizers.check_zero_points, Repair(4, quantizers.write_zero_points_)),
    Rule("B3", "EEE--", "constant, finite and positive scales",
         "calibrate again; --fix gives the scale of a fully pruned row a positive value",
         quantizers.check_scales, Repair(5, quantizers.raise_dead_scales_)),
    Rule("B4", "EEE--", "one scale for activations, one per output channel for int8 weights",
         "quantize activations per tensor, weights per output channel to int8, Q and DQ with one scale",
         quantizers.check_granularity),
    Rule("B4", "--E--", "weights as float behind Q and DQ", "export with stages.export.tensorrt.weights=qdq",
         quantizers.check_float_weights),
    Rule("B5", "EEE--", "weight scales along the output channels, the DQ next to the product",
         "store the weight as the product reads it, its DQ right before; --fix moves a Transpose into the weight",
         weights.check_axes, Repair(2, weights.move_layout_)),
    Rule("B6", "WEEEW", "2:4 along the sum, on the values as stored",
         "prune to 2:4 along the inputs, and keep the zeros through training and quantization",
         weights.check_almost_sparse),
    Rule("B7", "EEEEE", "weights in [-127, 127], no -0.0",
         "quantize weights to [-127, 127] and multiply by the mask so that zeros are +0.0; --fix mends -0.0",
         weights.check_weight_values, Repair(3, weights.clear_negative_zeros_)),
    Rule("B8", "EEE--", "quantized layers at least 16 wide, nothing else quantized",
         "leave embeddings, norms, softmax and narrow layers in float", layers.check_sizes),
    Rule("B8", "WEEEW", "sparse layers with inputs in 16s and outputs in 8s",
         "leave the layer dense, or widen it: sparse kernels do not take it", layers.check_sparse_sizes),
    Rule("B9", "EEE--", "both inputs of a product from a DQ, or neither",
         "put a Q/DQ pair right before the other input, or take this one away", layers.check_both_operands),
    Rule("B10", "EEE--", "a Q/DQ pair for each consumer", OWN_PAIR,
         pairs.check_dedicated_pairs, Repair(7, pairs.split_pairs_)),
    Rule("B10", "EWW--", "a zero-point for each pair", OWN_PAIR,
         pairs.check_own_zero_points, Repair(8, pairs.split_zero_points_)),
    Rule("B11", "EEE--", "float bias right behind the product",
         "keep the bias in float and add it right behind the product (a Conv's is its third input)",
         layers.check_float_bias),
    Rule("B12", "EEE--", "attention products right behind their DQs, softmax scale at most 1/127",
         "fold the factor into the DQ's scale (--fix does it), move a Transpose before the Q",
         attention.check_attention, Repair(9, attention.fold_factors_)),
    Rule("B13", "WWW--", "int8 attention as TensorRT fuses it",
         "head sizes 16, 32 or 64, and Q/DQ behind the second product", attention.check_fused_attention),
    Rule("B14", "EWWWW", "symbolic batch and sequence", "export with dynamic batch and sequence axes",
         operators.check_symbolic_sizes),
    Rule("B15", "EEEWW", "no unused initializer", "drop it; --fix does it",
         weights.check_unused_initializers, Repair(10, weights.drop_unused_)),
    Rule("B15", "EEEWW", "a weight of its own for each quantized layer", "give the layer a copy; --fix does it",
         weights.check_shared_weights, Repair(1, weights.copy_shared_weights_)),
    Rule("O21", "W----", "int8 out right behind a convolution",
         "put a Q/DQ pair right behind it, before the activation function", layers.check_int8_convolutions),
    Rule("T16", "-EE--", "int8 out: the output reaches a Q behind bias and changes of layout",
         "calibrate with placement tensorrt, so that outputs, residual adds and attention have Q/DQ too",
         int8_outputs.check_int8_out),
    Rule("T16", "-WW--", "one output scale for q, k and v",
         "give them the largest of their scales, so that they can be merged into one product",
         int8_outputs.check_one_output_scale),
    Rule("T17", "-WW--", "both inputs of a residual Add from a DQ",
         "put a Q/DQ pair before each input (calibrate with placement tensorrt)", int8_outputs.check_residual_adds),
    Rule("T18", "-EEE-", "a Q's scale of its input's type, a DQ's of its readers'",
         "write the scale in that type, or put a Cast there", float_types.check_quantizer_types),
    Rule("T18", "-EEE-", "float16 scales of at least 6.2e-5",
         "keep Q, DQ and their scales in float32, with a Cast around them", float_types.check_half_scales),
    Rule("T18", "-EEE-", "one float type per operator", "put a Cast before the other input",
         float_types.check_mixed_types),
    Rule("T18", "-EEE-", "constants within the range of float16",
         "clip them to +-65504 (masks too) before converting to float16", float_types.check_half_range),
    Rule("T20", "--E--", "sparse layers as Conv",
         "export with stages.export.tensorrt.layers=conv1x1, or build with TensorRT 10 or later",
         layers.check_convolutions),
    Rule("float", "---EE", "no Q/DQ in a float file", "export the float model, or lint for an int8 target",
         operators.check_float_file),
    Rule("operator", "WEEWW", "operators of ONNX only",
         "export without ONNX Runtime's own operators: TensorRT cannot read them", operators.check_microsoft_operators),
    Rule("operator", "EWWEE", "operators of ONNX only", "only TensorRT with that plugin can read it",
         operators.check_tensorrt_operators),
    Rule("operator", "EEEEE", "operators of ONNX only", "write it with operators that ONNX has at this opset",
         operators.check_other_operators),
    Rule("subgraph", "WWWWW", "no subgraphs", "export without control flow, so that every layer is seen",
         operators.check_subgraphs),
)
