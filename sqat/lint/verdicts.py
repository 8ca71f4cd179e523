"""How an engine would compute each layer of a graph: from the findings about the layer and the nodes around it.

A layer runs sparse int8 if its weight is 2:4 in int8, its input is quantized, and no rule of the target is broken at
the product, its Q/DQ, its weight or its bias. What breaks a rule about sparsity leaves it dense; anything else leaves
it in float. One operator that the engine cannot read keeps the whole file from being built.

Left out: whether a sparse kernel is faster for a layer's size, which an engine finds out by timing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from sqat.lint.findings import Finding
from sqat.lint.layer_rules import is_sparse
from sqat.lint.operator_rules import is_integer
from sqat.lint.rules import Target
from sqat.lint.tensorrt_rules import IN_DOUBT
from sqat.lint.weights import FLOATS, HALF, Weight
from sqat.lint.wiring import DEQUANTIZE, PRODUCTS, QUANTIZE, Wiring, label, operator
from sqat.sparsity.hardware_limits import SMALLEST_SIDE

SPARSE_INT8, DENSE_INT8, SPARSE_FP16, FLOAT, REFUSED = "sparse int8", "dense int8", "sparse fp16", "float", "refused"
DOUBT = "?"
LEAVES_FLOAT = "O21"  # right, but computed in float
ABOUT_SPARSITY = ("B6", "B7", "B8", "B15", "T16", "T20")
WANTED: dict[Target, tuple[str, ...]] = {
    "onnx-int8": (SPARSE_INT8, DENSE_INT8),
    "tensorrt": (SPARSE_INT8,),
    "tensorrt-8": (SPARSE_INT8,),
    "onnx-fp16": (SPARSE_FP16,),
    "onnx-fp32": (FLOAT, SPARSE_FP16),
}


class Verdict(NamedTuple):
    """How a layer would run, and what stands in the way of better."""

    runs: str
    why: str = ""


def verdicts(wiring: Wiring, findings: Iterable[Finding], target: Target) -> list[Verdict]:
    """A verdict for each of the wiring's layers, in their order."""
    at: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        at[finding.node].append(finding)
    barrier = unreadable(wiring, at, target)
    found = [verdict(wiring, weight, at, barrier) for weight in wiring.layers]
    return [Verdict(entry.runs) if entry.runs in WANTED[target] else entry for entry in found]


def verdict(wiring: Wiring, weight: Weight, at: Mapping[str, list[Finding]], barrier: str) -> Verdict:
    """How one layer would run."""
    if barrier:
        return Verdict(REFUSED, barrier)
    if operator(weight.node) not in PRODUCTS:
        runs = FLOAT if weight.stored.data_type in FLOATS else REFUSED
        return Verdict(runs, f"{weight.node.op_type} is not a product between Q and DQ")
    found = sorted((finding for part in parts(wiring, weight) for finding in at.get(part, ())), key=by_rule)
    graver = [finding for finding in found if not finding.warning or finding.rule == LEAVES_FLOAT]
    broken = {finding.rule: f"breaks {finding.rule} ({finding.asks})" for finding in graver}
    unquantized = why_float(weight, wiring.producer(weight.node.input[0], DEQUANTIZE) is not None)
    is_half = weight.dequantizer is None and weight.stored.data_type in HALF
    if is_half and is_sparse(weight) and not broken:
        return Verdict(SPARSE_FP16, "; ".join(unquantized))
    if unquantized or set(broken) - {*ABOUT_SPARSITY}:
        return Verdict(FLOAT, "; ".join([*unquantized, *why_dense(weight), *broken.values()]))
    if broken or not is_sparse(weight):
        return Verdict(DENSE_INT8, "; ".join([*why_dense(weight), *broken.values()]))
    doubts = dict.fromkeys(
        finding.problem for finding in found if finding.rule == "T16" and IN_DOUBT in finding.problem
    )
    return Verdict(SPARSE_INT8 + DOUBT if doubts else SPARSE_INT8, "; ".join(doubts))


def by_rule(finding: Finding) -> tuple[str, int]:
    """B2 before B10 before T16."""
    number = finding.rule[1:]
    return (finding.rule[0], int(number)) if number.isdecimal() else (finding.rule, 0)


def why_float(weight: Weight, quantized_input: bool) -> list[str]:
    """Why a layer does not run in int8, as far as its own Q/DQ tell."""
    if weight.dequantizer is not None and quantized_input:
        return []
    if weight.dequantizer is not None:
        return ["its input has no Q/DQ pair"]
    if min(weight.size) < SMALLEST_SIDE:
        return [f"{min(weight.size)} channels are fewer than {SMALLEST_SIDE}"]
    return ["its weight has no DequantizeLinear"]


def why_dense(weight: Weight) -> list[str]:
    """Why a layer is not 2:4, as far as its values tell."""
    if weight.size[0] % 4:
        return [f"{weight.size[0]} inputs are not a multiple of 4"]
    return [] if is_sparse(weight) else ["not 2:4 along its inputs"]


def parts(wiring: Wiring, weight: Weight) -> set[str]:
    """Labels of a layer's product and weight, of the pair before it, and of the bias behind it."""
    pair = [wiring.producer(weight.node.input[0], DEQUANTIZE), wiring.pair_before(weight.node.input[0])]
    adds = [node for node in wiring.following(weight.node) if operator(node) == "Add"]
    late = [node for first in wiring.following(weight.node) for node in wiring.following(first)]
    adds += [node for node in late if operator(node) == "Add" and any(wiring.is_constant(name) for name in node.input)]
    bias = [name for node in (weight.node, *adds) for name in node.input if wiring.is_constant(name)]
    adds += [node for name in bias if (node := wiring.producer(name, DEQUANTIZE, QUANTIZE)) is not None]
    nodes = [weight.node, *weight.steps, *adds, *(node for node in pair if node is not None)]
    return {weight.name, *(label(node) for node in nodes)}


def unreadable(wiring: Wiring, at: Mapping[str, list[Finding]], target: Target) -> str:
    """What keeps an engine from reading the file at all, empty if nothing does."""
    if "" in at and any(finding.rule == "checker" for finding in at[""]):
        return "the file is not valid ONNX"
    names = {
        found.node for finding in at.values() for found in finding if found.rule == "operator" and not found.warning
    }
    bad = [
        node for node in wiring.nodes if label(node) in names or (is_integer(node) and target.startswith("tensorrt"))
    ]
    return f"the file holds {bad[0].op_type}, which the engine cannot read" if bad else ""
