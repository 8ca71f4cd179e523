"""Repairs of weights that keep the numbers: copies of shared ones (B15), transposes carried out (B5), -0.0 (B7),
scales of fully pruned rows (B3), and what nothing reads (B15).

Each looks at the graph anew and edits it in place.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, numpy_helper

from sqat.lint.editing import Array, Editing
from sqat.lint.pair_rules import sound
from sqat.lint.weights import FLOATS, Weight, permutation
from sqat.lint.wiring import DEQUANTIZE, QUANTIZE, label, operator

MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")


def copy_shared_weights_(edit: Editing) -> None:
    """Give each quantized layer a weight that nothing else reads (B15); the first of several layers keeps it."""
    taken: set[str] = set()
    for weight in edit.wiring.weights:
        chain = [weight.name, *(step.output[0] for step in weight.steps)]
        if weight.dequantizer is None:
            continue
        is_shared = any(len(edit.wiring.readers[name]) > 1 for name in chain)
        if weight.name in taken or (is_shared and not only_layers_read(edit, weight.name)):
            rebuild_(edit, weight, weight.steps, numpy_helper.to_array(weight.stored))
            edit.note("B15", label(weight.node), f"got a copy of {weight.name}, which something else reads too")
        taken.add(weight.name)


def only_layers_read(edit: Editing, name: str) -> bool:
    """Whether a constant goes nowhere but into the weights of layers."""
    layers = {id(step) for weight in edit.wiring.weights for step in weight.steps}
    layers |= {id(weight.node) for weight in edit.wiring.weights}
    return all(id(reader) in layers for reader in edit.wiring.readers[name])


def rebuild_(
    edit: Editing, weight: Weight, steps: tuple[NodeProto, ...], values: Array, axis: int | None = None
) -> None:
    """Store a weight anew and lead it to its product through copies of the steps given."""
    name = edit.constant(weight.name, values)
    for step in steps:
        name = edit.before(weight.node, step.op_type, [name, *step.input[1:]], step)
        if axis is not None and operator(step) in (QUANTIZE, DEQUANTIZE):
            set_axis_(edit.inserted[id(weight.node)][-1], axis)
    operand = list(weight.node.input).index(weight.steps[-1].output[0])
    weight.node.input[operand] = name


def set_axis_(node: NodeProto, axis: int) -> None:
    """Write a Q's or DQ's axis."""
    kept = [entry for entry in node.attribute if entry.name != "axis"]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.add(name="axis", i=axis, type=2)


def move_layout_(edit: Editing) -> None:
    """Carry out transposes and reshapes of a weight in the stored values (B5)."""
    for weight in edit.wiring.weights:
        moves = [step for step in weight.steps if operator(step) in MOVES]
        kept = tuple(step for step in weight.steps if operator(step) in (QUANTIZE, DEQUANTIZE))
        others = len(weight.steps) - len(moves) - len(kept)
        axis = weight.read_axis
        is_lost = weight.scale is not None and weight.scale.ndim and axis is None
        is_shared = any(len(edit.wiring.readers[step.input[0]]) > 1 for step in weight.steps)
        if not moves or others or is_lost or is_shared or is_torn(weight):
            continue
        values = numpy_helper.to_array(weight.stored)
        for step, before, after in weight.passage:
            if operator(step) == "Transpose":
                values = values.transpose(permutation(step, len(before)))
            values = values.reshape(after)
        rebuild_(edit, weight, kept, values, axis)
        edit.note("B5", label(weight.node), f"stored the weight as the product reads it, without {moves[0].op_type}")


def is_torn(weight: Weight) -> bool:
    """Whether something lies between a weight's Q and its DQ."""
    return weight.quantizer is not None and weight.place(weight.dequantizer) != weight.place(weight.quantizer) + 1


def clear_negative_zeros_(edit: Editing) -> None:
    """Make -0.0 in float weights +0.0 (B7)."""
    for weight in edit.wiring.weights:
        if weight.stored.data_type not in FLOATS:
            continue
        values = numpy_helper.to_array(weight.stored)
        negative = np.signbit(values) & np.equal(values, 0)
        if negative.any():
            edit.replace(weight.name, np.where(negative, np.zeros((), values.dtype), values))
            edit.note("B7", weight.name, f"made {int(negative.sum())} zeros +0.0")


def raise_dead_scales_(edit: Editing) -> None:
    """Give the scale of a fully pruned channel a positive value (B3)."""
    for weight in edit.wiring.weights:
        scale = weight.scale
        if weight.dequantizer is None or scale is None or sound(scale).all():
            continue
        good, dead = sound(scale), dead_channels(weight)
        if dead is None or not np.logical_or(good, dead).all():
            continue
        usual = scale[good].min() if good.any() else np.ones((), scale.dtype)
        name = edit.constant(weight.dequantizer.input[1], np.where(good, scale, usual).astype(scale.dtype))
        for step in weight.steps:
            if operator(step) in (QUANTIZE, DEQUANTIZE):
                step.input[1] = name
        count = int(np.logical_not(good).sum())
        edit.note("B3", label(weight.dequantizer), f"gave {count} scales of pruned channels a positive value")


def dead_channels(weight: Weight) -> Array | None:
    """Which scales have only zeros under them, in the shape of the scale; None where that cannot be told."""
    zero = weight.zero_point.flat[0] if weight.zero_point is not None else 0
    alive = np.not_equal(numpy_helper.to_array(weight.stored), zero)
    source = weight.quantizer if weight.quantizer is not None else weight.dequantizer
    if weight.scale is None or weight.scale.ndim == 0:
        return np.asarray(not alive.any())
    if weight.axis is None or weight.place(source) != 0:
        return None
    others = tuple(index for index in range(alive.ndim) if index != weight.axis)
    dead: Array = np.logical_not(alive.any(axis=others))
    return dead


def drop_leftovers_(edit: Editing) -> None:
    """Drop nodes and initializers that nothing reads (B15); only those left over from the start are worth a note."""
    graph, needed = edit.model.graph, edit.wiring.needed
    kept = needed | {value.name for value in graph.input}
    for node in edit.wiring.nodes:
        if node.output and label(node) not in needed:
            edit.drop(node)
            if label(node) in edit.unread:
                edit.note("B15", label(node), f"dropped {node.op_type}, whose output nothing reads")
    for index, tensor in reversed(list(enumerate(graph.initializer))):
        if tensor.name not in kept:
            if tensor.name in edit.unread:
                edit.note("B15", tensor.name, "dropped, nothing reads it")
            del graph.initializer[index]
