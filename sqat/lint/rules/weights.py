"""B5, B6, B7 and B15: a weight's axes, its N:M pattern, its values, and its initializer.

B7 forbids -0.0, since a compressor turned it into wrong values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, numpy_helper

from sqat.export.names import PRODUCT, module_of
from sqat.lint.findings import Problem
from sqat.lint.graph_editor import GraphEditor, remove_attribute_
from sqat.lint.graph_view import DEQUANTIZE, QUANTIZE, Array, GraphView, int_attribute, label, op_type
from sqat.lint.weight import FLOATS, Weight, permutation
from sqat.sparsity.pattern import Pattern, parse_pattern

MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")
TWO_OF_FOUR = Pattern(2, 4)
ALMOST = 0.4  # share of zeros from which a layer counts as meant to be sparse


def check_axes(view: GraphView) -> Iterator[Problem]:
    """B5: a weight's scales run along its output channels, and its DQ feeds the product itself."""
    for weight in view.quantized_weights:
        last = weight.steps[-1]
        if weight.axis is not None and weight.read_axis != weight.out:
            assert weight.dequantizer is not None
            axis = int_attribute(weight.dequantizer, "axis", 1)
            text = f"weight scales along axis {axis}, output channels are axis {weight.out}"
            yield Problem(label(weight.node), text)
        if op_type(last) != DEQUANTIZE:
            yield Problem(label(weight.node), f"{last.op_type} between the weight's DequantizeLinear and the product")


def move_layout_(editor: GraphEditor) -> None:
    """Carry out transposes and reshapes of a weight in the stored values (B5)."""
    for weight in editor.view.weights:
        moves = [step for step in weight.steps if op_type(step) in MOVES]
        kept = tuple(step for step in weight.steps if op_type(step) in (QUANTIZE, DEQUANTIZE))
        has_other_steps = len(weight.steps) > len(moves) + len(kept)
        axis = weight.read_axis
        loses_axis = weight.scale is not None and weight.scale.ndim and axis is None
        is_shared = any(len(editor.view.consumers[step.input[0]]) > 1 for step in weight.steps)
        if not moves or has_other_steps or loses_axis or is_shared or has_split_pair(weight):
            continue
        values = numpy_helper.to_array(weight.stored)
        for step, before, after in weight.transitions:
            if op_type(step) == "Transpose":
                values = values.transpose(permutation(step, len(before)))
            values = values.reshape(after)
        store_weight_(editor, weight, kept, values, axis)
        editor.record(
            "B5", label(weight.node), f"stored the weight as the product reads it, without {moves[0].op_type}"
        )


def has_split_pair(weight: Weight) -> bool:
    """Whether something stands between a weight's Q and its DQ."""
    return weight.quantizer is not None and weight.index_of(weight.dequantizer) != weight.index_of(weight.quantizer) + 1


def store_weight_(
    editor: GraphEditor, weight: Weight, steps: tuple[NodeProto, ...], values: Array, axis: int | None = None
) -> None:
    """Store a weight anew; the product reads it through copies of the steps given."""
    name = editor.add_constant(weight.name, values)
    for step in steps:
        name = editor.insert_before(weight.node, step.op_type, [name, *step.input[1:]], step)
        if axis is not None and op_type(step) in (QUANTIZE, DEQUANTIZE):
            node = editor.inserted[id(weight.node)][-1]
            remove_attribute_(node, "axis")
            node.attribute.add(name="axis", i=axis, type=2)
    operand = list(weight.node.input).index(weight.steps[-1].output[0])
    weight.node.input[operand] = name


def check_claimed_patterns(view: GraphView, pruned: Mapping[str, str]) -> Iterator[Problem]:
    """B6: layers that a checkpoint pruned keep their N:M pattern on the stored values."""
    weights = {module_of(weight.node): weight for weight in view.weights}
    for layer, text in pruned.items():
        weight, pattern = weights.get(layer), parse_pattern(text)
        if weight is None and f"{layer}{PRODUCT}" in view.constants:
            continue
        if weight is None:
            yield Problem(layer, f"pruned to {text}, but not in the graph")
        elif weight.size[0] % pattern.m:
            yield Problem(label(weight.node), f"{weight.size[0]} inputs are not a multiple of {pattern.m}")
        elif broken := count_violations(weight, pattern):
            yield Problem(label(weight.node), f"{broken} groups hold more than {pattern.n} of {pattern.m} weights")


def check_almost_sparse(view: GraphView) -> Iterator[Problem]:
    """B6: no layer with many zeros, and yet groups of four with three weights or more."""
    for weight in view.weights:
        zeros = weight.zeros
        if zeros <= ALMOST or weight.size[0] % TWO_OF_FOUR.m:
            continue
        if broken := count_violations(weight, TWO_OF_FOUR):
            groups = weight.values.size // TWO_OF_FOUR.m
            text = f"almost 2:4: {zeros:.0%} zeros, but {broken} of {groups} groups hold more than 2 of 4 weights"
            yield Problem(label(weight.node), text)


def count_violations(weight: Weight, pattern: Pattern) -> int:
    """Groups along the sum that hold more weights than the pattern keeps."""
    return weight.count_over(pattern.n, pattern.m)


def is_sparse(weight: Weight) -> bool:
    """Whether every group of four along the sum holds two weights at most."""
    return weight.size[0] % TWO_OF_FOUR.m == 0 and not count_violations(weight, TWO_OF_FOUR)


def check_weight_values(view: GraphView) -> Iterator[Problem]:
    """B7: int8 weights are in [-127, 127]; float ones hold no -0.0."""
    for weight in view.weights:
        if weight.dequantizer is not None and weight.smallest < -127:
            yield Problem(label(weight.node), "int8 weight of -128")
        if weight.stored.data_type in FLOATS and (negative := int(negative_zeros(weight).sum())):
            yield Problem(label(weight.node), f"{negative} weights are -0.0")


def negative_zeros(weight: Weight) -> NDArray[np.bool_]:
    """Which stored values are -0.0."""
    return weight.once("negative zeros", lambda: is_negative_zero(numpy_helper.to_array(weight.stored)))


def is_negative_zero(values: Array) -> NDArray[np.bool_]:
    """Which values are -0.0."""
    negative: NDArray[np.bool_] = np.signbit(values) & np.equal(values, 0)
    return negative


def clear_negative_zeros_(editor: GraphEditor) -> None:
    """Make -0.0 in float weights +0.0 (B7)."""
    for weight in editor.view.weights:
        if weight.stored.data_type not in FLOATS:
            continue
        negative = negative_zeros(weight)
        if negative.any():
            values = numpy_helper.to_array(weight.stored)
            editor.replace_constant(weight.name, np.where(negative, np.zeros((), values.dtype), values))
            editor.record("B7", weight.name, f"made {int(negative.sum())} zeros +0.0")


def check_unused_initializers(view: GraphView) -> Iterator[Problem]:
    """B15: something reads every initializer."""
    for tensor in view.model.graph.initializer:
        if tensor.name not in view.consumers and tensor.name not in view.outputs:
            yield Problem(tensor.name, "initializer that nothing reads")


def drop_unused_(editor: GraphEditor) -> None:
    """Drop nodes and initializers that nothing reads (B15)."""
    graph, needed = editor.model.graph, editor.view.needed_names()
    kept = needed | {value.name for value in graph.input}
    # What other repairs no longer need goes without a record.
    for node in editor.view.nodes:
        if node.output and label(node) not in needed:
            editor.remove(node)
            if label(node) in editor.unused:
                editor.record("B15", label(node), f"dropped {node.op_type}, whose output nothing reads")
    for index, tensor in reversed(list(enumerate(graph.initializer))):
        if tensor.name not in kept:
            if tensor.name in editor.unused:
                editor.record("B15", tensor.name, "dropped, nothing reads it")
            del graph.initializer[index]


def check_shared_weights(view: GraphView) -> Iterator[Problem]:
    """B15: a quantized weight has one reader."""
    for weight in view.quantized_weights:
        readers = view.consumers[weight.name]
        if len(readers) != 1:
            yield Problem(label(weight.node), f"quantized weight {weight.name} has {len(readers)} readers")
        shared = next((step for step in weight.steps if len(view.consumers_of(step)) > 1), None)
        if shared is not None:
            yield Problem(label(weight.node), f"quantized weight {weight.name} is shared behind {label(shared)}")


def copy_shared_weights_(editor: GraphEditor) -> None:
    """Give each quantized layer a weight that nothing else reads (B15); the first of several layers keeps it."""
    seen: set[str] = set()
    layers = {id(node) for weight in editor.view.weights for node in (*weight.steps, weight.node)}
    for weight in editor.view.quantized_weights:
        chain = [weight.name, *(step.output[0] for step in weight.steps)]
        is_shared = any(len(editor.view.consumers[name]) > 1 for name in chain)
        if weight.name in seen or (
            is_shared and any(id(reader) not in layers for reader in editor.view.consumers[weight.name])
        ):
            store_weight_(editor, weight, weight.steps, numpy_helper.to_array(weight.stored))
            editor.record("B15", label(weight.node), f"got a copy of {weight.name}, which something else reads too")
        seen.add(weight.name)
