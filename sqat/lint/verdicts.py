"""How an engine would compute each layer of a graph, from the findings at the layer and the nodes around it.

A layer runs sparse int8 if its weight is 2:4 in int8, its input is quantized, and it breaks no rule of the target.
Whether a sparse kernel is faster, the engine's builder finds out by timing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from sqat.lint.findings import Finding
from sqat.lint.graph_view import DEQUANTIZE, PRODUCTS, QUANTIZE, SUMS, GraphView, label, op_type
from sqat.lint.rules.int8_outputs import IN_DOUBT
from sqat.lint.rules.operators import is_integer_operator
from sqat.lint.rules.table import Target
from sqat.lint.rules.weights import is_sparse
from sqat.lint.weight import FLOATS, HALF, Weight
from sqat.sparsity.hardware_limits import SMALLEST_SIDE

SPARSE_INT8, DENSE_INT8, SPARSE_FP16, FLOAT, REFUSED = "sparse int8", "dense int8", "sparse fp16", "float", "refused"
DOUBT = "?"
COMPUTED_IN_FLOAT = "O21"  # its warnings keep a layer in float
SPARSITY_RULES = ("B6", "B7", "B8", "B15", "T16", "T20")  # what breaks one of these runs dense; others, in float


class Goal(NamedTuple):
    """How layers should run on a target, and its name in a summary."""

    runs: tuple[str, ...]
    name: str


GOALS: dict[Target, Goal] = {
    "onnx-int8": Goal((SPARSE_INT8, DENSE_INT8), "in int8"),
    "tensorrt": Goal((SPARSE_INT8,), "sparse int8"),
    "tensorrt-8": Goal((SPARSE_INT8,), "sparse int8"),
    "onnx-fp16": Goal((SPARSE_FP16,), "sparse float16"),
    "onnx-fp32": Goal((FLOAT, SPARSE_FP16), "in float32"),
}


class Verdict(NamedTuple):
    """How a layer would run, and what keeps it from running better."""

    runs: str
    reason: str = ""


def judge_layers(view: GraphView, findings: Iterable[Finding], target: Target) -> list[Verdict]:
    """A verdict for each of the graph's weights, in their order."""
    by_node: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        by_node[finding.node].append(finding)
    obstacle = reading_obstacle(view, by_node, target)
    verdicts = [judge_layer(view, weight, by_node, obstacle) for weight in view.all_weights]
    return [Verdict(verdict.runs) if verdict.runs in GOALS[target].runs else verdict for verdict in verdicts]


def judge_layer(view: GraphView, weight: Weight, by_node: Mapping[str, list[Finding]], obstacle: str) -> Verdict:
    """How one layer would run."""
    if obstacle:
        return Verdict(REFUSED, obstacle)
    if op_type(weight.node) not in PRODUCTS:
        runs = FLOAT if weight.stored.data_type in FLOATS else REFUSED
        return Verdict(runs, f"{weight.node.op_type} is not a product between Q and DQ")
    nearby = sorted((finding for part in layer_parts(view, weight) for finding in by_node.get(part, ())), key=rule_key)
    severe = [finding for finding in nearby if not finding.warning or finding.rule == COMPUTED_IN_FLOAT]
    broken = {finding.rule: f"breaks {finding.rule} ({finding.requirement})" for finding in severe}
    float_reasons = reasons_float(weight, view.producer(weight.node.input[0], DEQUANTIZE) is not None)
    dense_reasons = reasons_dense(weight)
    if weight.dequantizer is None and weight.stored.data_type in HALF and not dense_reasons and not broken:
        return Verdict(SPARSE_FP16, "; ".join(float_reasons))
    if float_reasons or set(broken) - {*SPARSITY_RULES}:
        return Verdict(FLOAT, "; ".join([*float_reasons, *dense_reasons, *broken.values()]))
    if broken or dense_reasons:
        return Verdict(DENSE_INT8, "; ".join([*dense_reasons, *broken.values()]))
    doubts = dict.fromkeys(finding.problem for finding in nearby if IN_DOUBT in finding.problem)
    return Verdict(SPARSE_INT8 + DOUBT if doubts else SPARSE_INT8, "; ".join(doubts))


def rule_key(finding: Finding) -> tuple[str, int]:
    """A sort key that puts B2 before B10 before T16."""
    number = finding.rule[1:]
    return (finding.rule[0], int(number)) if number.isdecimal() else (finding.rule, 0)


def reasons_float(weight: Weight, has_quantized_input: bool) -> list[str]:
    """Why a layer does not run in int8, by its own Q/DQ."""
    if weight.dequantizer is not None:
        return [] if has_quantized_input else ["its input has no Q/DQ pair"]
    if min(weight.size) < SMALLEST_SIDE:
        return [f"{min(weight.size)} channels are fewer than {SMALLEST_SIDE}"]
    return ["its weight has no DequantizeLinear"]


def reasons_dense(weight: Weight) -> list[str]:
    """Why a layer is not 2:4, by its values."""
    if weight.size[0] % 4:
        return [f"{weight.size[0]} inputs are not a multiple of 4"]
    return [] if is_sparse(weight) else ["not 2:4 along its inputs"]


def layer_parts(view: GraphView, weight: Weight) -> list[str]:
    """Labels of a layer's product and weight, of the pair before it, and of the bias behind it."""
    pair = [view.producer(weight.node.input[0], DEQUANTIZE), view.quantizer_before(weight.node.input[0])]
    readers = view.consumers_of(weight.node)
    adds = [node for node in readers if op_type(node) in SUMS]
    late = [node for reader in readers for node in view.consumers_of(reader) if op_type(node) in SUMS]
    adds += [node for node in late if any(view.is_constant(name) for name in node.input)]
    bias = [name for node in (weight.node, *adds) for name in node.input if view.is_constant(name)]
    adds += [node for name in bias if (node := view.producer(name, DEQUANTIZE, QUANTIZE)) is not None]
    nodes = [weight.node, *weight.steps, *adds, *(node for node in pair if node is not None)]
    return list(dict.fromkeys([*(label(node) for node in nodes), weight.name]))


def reading_obstacle(view: GraphView, by_node: Mapping[str, list[Finding]], target: Target) -> str:
    """What keeps an engine from reading the file at all, empty if nothing does."""
    if any(finding.rule == "checker" for finding in by_node.get("", ())):
        return "the file is not valid ONNX"
    unknown = {
        finding.node
        for findings in by_node.values()
        for finding in findings
        if finding.rule == "operator" and not finding.warning
    }
    for node in view.nodes:
        if label(node) in unknown or (is_integer_operator(node) and target.startswith("tensorrt")):
            return f"the file holds {node.op_type}, which the engine cannot read"
    return ""
