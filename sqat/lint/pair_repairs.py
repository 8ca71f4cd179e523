"""Repairs of Q/DQ nodes that keep the numbers: zero-points (B2), output_dtype (B1), shared pairs (B10), factors
behind a DQ (B12).

Each looks at the graph anew and edits it in place. A uint8 quantizer around 128 is the int8 one around 0 less 128, so
that both give the same floats. A factor between DQ and an attention product goes into the DQ's scale: equal up to one
rounding. Left out: zero-points other than those, since the numbers would change.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import NodeProto, TensorProto, helper

from sqat.lint.attention_rules import FACTORS, path_to_pair
from sqat.lint.editing import Array, Editing
from sqat.lint.pair_rules import quantizers, sound
from sqat.lint.wiring import DEQUANTIZE, QUANTIZE, Wiring, attribute, label, operator

MIDDLE = 128


def add_zero_points_(edit: Editing) -> None:
    """Write the int8 zeros that a missing zero-point stands for (B2)."""
    for node in quantizers(edit.wiring):
        scale = edit.wiring.constant(node.input[1])
        missing = len(node.input) < 3 or not node.input[2]
        if missing and scale is not None and implied_type(edit.wiring, node) == TensorProto.INT8:
            point = edit.constant(f"{label(node)}_zero_point", np.zeros(scale.shape, np.int8))
            node.input[:] = [*node.input[:2], point]
            edit.note("B2", label(node), "wrote the int8 zero-point that was left out")


def implied_type(wiring: Wiring, node: NodeProto) -> int:
    """Integer type of a Q or DQ without zero-point; 0 where it is not known."""
    if operator(node) == QUANTIZE:
        return attribute(node, "output_dtype", 0) or TensorProto.UINT8
    stored = wiring.tensors.get(node.input[0])
    quantizer = wiring.producer(node.input[0], QUANTIZE)
    if stored is not None:
        return int(stored.data_type)
    if quantizer is None:
        return wiring.types.get(node.input[0], 0)
    point = wiring.constant(quantizer.input[2]) if len(quantizer.input) > 2 else None
    return implied_type(wiring, quantizer) if point is None else helper.np_dtype_to_tensor_dtype(point.dtype)


def center_zero_points_(edit: Editing) -> None:
    """Make uint8 around 128 int8 around 0 (B2): stored weights, and pairs of Q and DQ."""
    for node in quantizers(edit.wiring):
        if not is_middle(edit.wiring, node):
            continue
        stored = edit.wiring.constant(node.input[0])
        readers = edit.wiring.following(node) if operator(node) == QUANTIZE else []
        if operator(node) == DEQUANTIZE and stored is not None and stored.dtype == np.uint8:
            node.input[0] = edit.constant(f"{node.input[0]}_int8", (stored.astype(np.int16) - MIDDLE).astype(np.int8))
            zero_(edit, [node])
        elif readers and all(is_middle(edit.wiring, reader) for reader in readers) and not is_output(edit, node):
            zero_(edit, [node, *readers])


def is_output(edit: Editing, node: NodeProto) -> bool:
    """Whether the graph hands out what a node makes."""
    return bool(edit.wiring.outputs & set(node.output))


def is_middle(wiring: Wiring, node: NodeProto) -> bool:
    """Whether a Q or DQ has the uint8 zero-point 128."""
    point = wiring.constant(node.input[2]) if operator(node) in (QUANTIZE, DEQUANTIZE) and len(node.input) > 2 else None
    return point is not None and point.dtype == np.uint8 and bool(np.equal(point, MIDDLE).all())


def zero_(edit: Editing, nodes: Sequence[NodeProto]) -> None:
    """Give nodes an int8 zero-point of zeros, and their tensor that type."""
    for node in nodes:
        point = edit.wiring.constant(node.input[2])
        assert point is not None
        node.input[2] = edit.constant(f"{node.input[2]}_int8", np.zeros(point.shape, np.int8))
    edit.note("B2", label(nodes[0]), "uint8 around 128 became int8 around 0")
    for value in edit.model.graph.value_info:
        if operator(nodes[0]) == QUANTIZE and value.name == nodes[0].output[0]:
            value.type.tensor_type.elem_type = TensorProto.INT8


def drop_output_types_(edit: Editing) -> None:
    """Take away an output_dtype that says what the zero-point (of a Q) or the scale (of a DQ) says (B1)."""
    for node in quantizers(edit.wiring):
        wanted = attribute(node, "output_dtype", 0)
        says = node.input[2] if operator(node) == QUANTIZE and len(node.input) > 2 else node.input[1]
        if wanted and wanted == edit.wiring.types.get(says) and (operator(node) == DEQUANTIZE or len(node.input) > 2):
            kept = [entry for entry in node.attribute if entry.name != "output_dtype"]
            del node.attribute[:]
            node.attribute.extend(kept)
            edit.note("B1", label(node), "dropped output_dtype, which said what the inputs say")


def split_pairs_(edit: Editing) -> None:
    """Give each reader of a Q/DQ pair a pair of its own, with scale and zero-point of its own (B10)."""
    for node in [node for node in edit.wiring.nodes if operator(node) == QUANTIZE]:
        readers = edit.wiring.following(node)
        dequantizers = [reader for reader in readers if operator(reader) == DEQUANTIZE]
        if edit.wiring.is_constant(node.input[0]) or not dequantizers:
            continue
        is_free = len(readers) == len(dequantizers) and node.output[0] not in edit.wiring.outputs
        home = next((entry for entry in dequantizers if is_pinned(edit.wiring, entry)), dequantizers[0])
        for dequantizer in dequantizers:
            uses = edges(edit.wiring, dequantizer)
            if not is_pinned(edit.wiring, dequantizer):
                uses = uses[1:]
            for consumer, operand in uses:
                operands = [own_quantizer(edit, node, consumer), *own_operands(edit, node, dequantizer, consumer)]
                consumer.input[operand] = edit.before(consumer, DEQUANTIZE, operands, dequantizer)
                edit.note("B10", label(consumer), f"got a Q/DQ pair of its own, it shared {label(dequantizer)}")
            if dequantizer is not home or not is_free:
                made = own_quantizer(edit, node, dequantizer)
                dequantizer.input[:] = [made, *own_operands(edit, node, dequantizer, dequantizer)]
                edit.note("B10", label(dequantizer), f"got a QuantizeLinear of its own, it shared {label(node)}")


def is_pinned(wiring: Wiring, node: NodeProto) -> bool:
    """Whether something that cannot be led elsewhere reads a node: an output of the model, or a subgraph."""
    direct = {id(reader) for reader, _ in edges(wiring, node)}
    return node.output[0] in wiring.outputs or any(id(reader) not in direct for reader in wiring.following(node))


def edges(wiring: Wiring, node: NodeProto) -> list[tuple[NodeProto, int]]:
    """Readers of a node's output and which operand it is, an edge for each; those in subgraphs are left out."""
    readers = {id(reader): reader for reader in wiring.following(node)}
    return [
        (reader, operand)
        for reader in readers.values()
        for operand, name in enumerate(reader.input)
        if name == node.output[0]
    ]


def own_quantizer(edit: Editing, quantizer: NodeProto, reader: NodeProto) -> str:
    """A copy of a Q right before a reader; returns what comes out of it."""
    operands = [edit.copied(name) for name in quantizer.input[1:]]
    return edit.before(reader, QUANTIZE, [quantizer.input[0], *operands], quantizer)


def own_operands(edit: Editing, quantizer: NodeProto, dequantizer: NodeProto, reader: NodeProto) -> list[str]:
    """Scale and zero-point of a DQ behind the Q just put before a reader: that Q's, if the old pair shared them."""
    if list(dequantizer.input[1:]) == list(quantizer.input[1:]):
        return list(edit.inserted[id(reader)][-1].input[1:])
    return [edit.copied(name) for name in dequantizer.input[1:]]


def split_zero_points_(edit: Editing) -> None:
    """Give pairs that quantize one tensor zero-points of their own (B10): equal ones are merged otherwise."""
    taken: set[tuple[str, ...]] = set()
    for node in edit.wiring.nodes:
        if operator(node) != QUANTIZE or len(node.input) < 3 or edit.wiring.is_constant(node.input[0]):
            continue
        operands = (node.input[0], node.input[2])
        if operands in taken:
            point, old = edit.copied(node.input[2]), node.input[2]
            for entry in (node, *edit.wiring.following(node)):
                if operator(entry) in (QUANTIZE, DEQUANTIZE) and entry.input[2:3] == [old]:
                    entry.input[2] = point
            edit.note("B10", label(node), f"got a zero-point of its own, it shared {old}")
        taken.add(operands)


def fold_factors_(edit: Editing) -> None:
    """Put a constant Mul or Div between a DQ and an attention product into the DQ's scale (B12)."""
    wiring = edit.wiring
    for product in wiring.attention_products():
        for name in list(product.input):
            path = path_to_pair(wiring, name)
            factors = [node for node in path if operator(node) in FACTORS]
            if not factors or not all(is_read_once(wiring, node) for node in path):
                continue
            dequantizer = path[-1]
            scale = wiring.constant(dequantizer.input[1])
            folded = folded_scale(wiring, scale, factors)
            if folded is None:
                continue
            dequantizer.input[1] = edit.constant(f"{dequantizer.input[1]}_folded", folded)
            for node in reversed(factors):
                bypass_(edit, node)
                edit.note("B12", label(product), f"folded {label(node)} into the scale of {label(dequantizer)}")


def is_read_once(wiring: Wiring, node: NodeProto) -> bool:
    """Whether one node alone reads what a node makes."""
    return len(wiring.following(node)) == 1 and not set(node.output) & wiring.outputs


def folded_scale(wiring: Wiring, scale: Array | None, factors: Sequence[NodeProto]) -> Array | None:
    """A DQ's scale times the factors; None where it would not be one sound number."""
    if scale is None or scale.ndim:
        return None
    folded = np.float64(scale)
    for node in factors:
        value = next((found for name in node.input if (found := wiring.constant(name)) is not None), None)
        if value is None or value.size != 1:
            return None
        number = np.float64(value.reshape(()))
        folded = folded * number if operator(node) == "Mul" else folded / number
    result = np.asarray(folded, scale.dtype)
    return result if sound(result).all() else None


def bypass_(edit: Editing, node: NodeProto) -> None:
    """Take a node with one reader out of the way."""
    data = next(name for name in node.input if not edit.wiring.is_constant(name))
    for reader in edit.wiring.following(node):
        reader.input[:] = [data if name == node.output[0] else name for name in reader.input]
    edit.drop(node)
