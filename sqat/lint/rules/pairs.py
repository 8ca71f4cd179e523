"""B10: a Q/DQ pair of its own for each consumer.

ONNX Runtime merges equal pairs that share a zero-point and then leaves their products in float.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from sqat.lint.findings import Problem
from sqat.lint.graph_editor import GraphEditor
from sqat.lint.graph_view import DEQUANTIZE, QUANTIZE, GraphView, label, op_type


def activation_quantizers(view: GraphView) -> list[NodeProto]:
    """Q nodes that do not quantize a constant."""
    return [node for node in view.nodes if op_type(node) == QUANTIZE and not view.is_constant(node.input[0])]


def check_dedicated_pairs(view: GraphView) -> Iterator[Problem]:
    """B10: a Q has one reader, a DQ, and that has one reader."""
    for node in activation_quantizers(view):
        readers = view.consumers_of(node)
        if [op_type(reader) for reader in readers] != [DEQUANTIZE] or node.output[0] in view.outputs:
            yield Problem(label(node), f"read by {len(readers)} nodes, must be one DequantizeLinear")
        for reader in readers:
            count = len(view.consumers_of(reader)) + (reader.output[0] in view.outputs)
            if op_type(reader) == DEQUANTIZE and count != 1:
                yield Problem(label(reader), f"read {count} times, must be once")


def check_own_zero_points(view: GraphView) -> Iterator[Problem]:
    """B10: pairs that quantize one tensor share no zero-point."""
    first: dict[tuple[str, str], str] = {}
    for node in activation_quantizers(view):
        if not node.input[2:]:
            continue
        operands = (node.input[0], node.input[2])
        if operands in first:
            yield Problem(label(node), f"shares its zero-point with {first[operands]} on the same tensor")
        first[operands] = label(node)


def split_pairs_(editor: GraphEditor) -> None:
    """Give each reader of a Q/DQ pair a pair, a scale and a zero-point of its own (B10)."""
    view = editor.view
    for node in activation_quantizers(view):
        readers = view.consumers_of(node)
        dequantizers = [reader for reader in readers if op_type(reader) == DEQUANTIZE]
        if not dequantizers:
            continue
        only_dequantizers = len(readers) == len(dequantizers) and node.output[0] not in view.outputs
        # This one keeps the Q: what a subgraph or an output reads cannot be replaced.
        keeper = next((entry for entry in dequantizers if is_fixed(view, entry)), dequantizers[0])
        for dequantizer in dequantizers:
            uses = direct_uses(view, dequantizer)
            if not is_fixed(view, dequantizer):
                uses = uses[1:]
            for reader, operand in uses:
                inputs = [copy_quantizer(editor, node, reader), *copy_operands(editor, node, dequantizer, reader)]
                reader.input[operand] = editor.insert_before(reader, DEQUANTIZE, inputs, dequantizer)
                editor.record("B10", label(reader), f"got a Q/DQ pair of its own, it shared {label(dequantizer)}")
            if dequantizer is not keeper or not only_dequantizers:
                output = copy_quantizer(editor, node, dequantizer)
                dequantizer.input[:] = [output, *copy_operands(editor, node, dequantizer, dequantizer)]
                editor.record("B10", label(dequantizer), f"got a QuantizeLinear of its own, it shared {label(node)}")


def is_fixed(view: GraphView, node: NodeProto) -> bool:
    """Whether an output of the model or a subgraph reads a node, so that no copy can replace it."""
    direct = {id(reader) for reader, _ in direct_uses(view, node)}
    return node.output[0] in view.outputs or any(id(reader) not in direct for reader in view.consumers_of(node))


def direct_uses(view: GraphView, node: NodeProto) -> list[tuple[NodeProto, int]]:
    """Each reader of a node's output with the operand it is, without readers in subgraphs."""
    readers = {id(reader): reader for reader in view.consumers_of(node)}
    return [
        (reader, operand)
        for reader in readers.values()
        for operand, name in enumerate(reader.input)
        if name == node.output[0]
    ]


def copy_quantizer(editor: GraphEditor, quantizer: NodeProto, reader: NodeProto) -> str:
    """Insert a copy of a Q before a reader; returns its output."""
    operands = [editor.copy_constant(name) for name in quantizer.input[1:]]
    return editor.insert_before(reader, QUANTIZE, [quantizer.input[0], *operands], quantizer)


def copy_operands(editor: GraphEditor, quantizer: NodeProto, dequantizer: NodeProto, reader: NodeProto) -> list[str]:
    """Scale and zero-point for a DQ behind the new Q before a reader; those of that Q, if the old pair shared them."""
    if list(dequantizer.input[1:]) == list(quantizer.input[1:]):
        return list(editor.inserted[id(reader)][-1].input[1:])
    return [editor.copy_constant(name) for name in dequantizer.input[1:]]


def split_zero_points_(editor: GraphEditor) -> None:
    """Give pairs that quantize one tensor zero-points of their own (B10)."""
    seen: set[tuple[str, ...]] = set()
    for node in activation_quantizers(editor.view):
        if len(node.input) < 3:
            continue
        operands = (node.input[0], node.input[2])
        if operands in seen:
            new, old = editor.copy_constant(node.input[2]), node.input[2]
            for entry in (node, *editor.view.consumers_of(node)):
                if op_type(entry) in (QUANTIZE, DEQUANTIZE) and entry.input[2:3] == [old]:
                    entry.input[2] = new
            editor.record("B10", label(node), f"got a zero-point of its own, it shared {old}")
        seen.add(operands)
