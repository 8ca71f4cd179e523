"""B2, B3 and B4: zero-points and scales of QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from sqat.lint.findings import Problem
from sqat.lint.graph_editor import GraphEditor, remove_attribute_
from sqat.lint.graph_view import (
    DEQUANTIZE,
    LAYOUT,
    LONGEST_PATH,
    QUANTIZE,
    Array,
    GraphView,
    int_attribute,
    label,
    op_type,
)
from sqat.lint.rules.operators import reads_embedding_table
from sqat.lint.weight import FLOATS, Weight

MIDDLE = 128  # zero-point of a uint8 quantizer that equals the int8 one around 0


def quantizers(view: GraphView) -> list[NodeProto]:
    """All Q and DQ nodes."""
    return [node for node in view.nodes if op_type(node) in (QUANTIZE, DEQUANTIZE)]


def check_zero_points(view: GraphView) -> Iterator[Problem]:
    """B2: every Q and DQ has a constant int8 zero-point of zeros, shaped as its scale."""
    for node in quantizers(view):
        if is_integer_bias(view, node):
            continue
        point = view.constant_value(node.input[2]) if len(node.input) == 3 else None
        scale = view.constant_value(node.input[1])
        if point is None:
            yield Problem(label(node), "no constant zero-point")
        elif point.dtype != np.int8 or point.any():
            yield Problem(label(node), f"zero-point is not int8 zero ({point.dtype})")
        elif scale is not None and point.shape != scale.shape:
            yield Problem(label(node), f"zero-point of shape {point.shape}, scale of shape {scale.shape}")


def is_integer_bias(view: GraphView, node: NodeProto) -> bool:
    """Whether a DQ reads int32 values: a bias, which B11 checks."""
    stored = view.constants.get(node.input[0]) if op_type(node) == DEQUANTIZE else None
    return stored is not None and stored.data_type == TensorProto.INT32


def write_zero_points_(editor: GraphEditor) -> None:
    """Write missing int8 zero-points, and make uint8 around 128 int8 around 0 (B2)."""
    view = editor.view
    for node in quantizers(view):
        scale = view.constant_value(node.input[1])
        is_missing = len(node.input) < 3 or not node.input[2]
        if is_missing and scale is not None and implied_type(view, node) == TensorProto.INT8:
            point = editor.add_constant(f"{label(node)}_zero_point", np.zeros(scale.shape, np.int8))
            node.input[:] = [*node.input[:2], point]
            editor.record("B2", label(node), "wrote the missing int8 zero-point")
    for node in quantizers(view):
        if not has_middle_zero_point(view, node):
            continue
        stored = view.constant_value(node.input[0])
        readers = view.consumers_of(node) if op_type(node) == QUANTIZE else []
        is_output = bool(view.outputs & set(node.output))
        if op_type(node) == DEQUANTIZE and stored is not None and stored.dtype == np.uint8:
            int8 = (stored.astype(np.int16) - MIDDLE).astype(np.int8)
            node.input[0] = editor.add_constant(f"{node.input[0]}_int8", int8)
            center_(editor, [node])
        elif readers and all(has_middle_zero_point(view, reader) for reader in readers) and not is_output:
            center_(editor, [node, *readers])


def implied_type(view: GraphView, node: NodeProto) -> int:
    """Integer type of a Q or DQ without zero-point; 0 where it is unknown."""
    if op_type(node) == QUANTIZE:
        return int_attribute(node, "output_dtype", 0) or TensorProto.UINT8
    stored = view.constants.get(node.input[0])
    quantizer = view.producer(node.input[0], QUANTIZE)
    if stored is not None:
        return int(stored.data_type)
    if quantizer is None:
        return view.types.get(node.input[0], 0)
    point = view.constant_value(quantizer.input[2]) if len(quantizer.input) > 2 else None
    return implied_type(view, quantizer) if point is None else helper.np_dtype_to_tensor_dtype(point.dtype)


def has_middle_zero_point(view: GraphView, node: NodeProto) -> bool:
    """Whether a Q or DQ has the uint8 zero-point 128."""
    has_point = op_type(node) in (QUANTIZE, DEQUANTIZE) and len(node.input) > 2
    point = view.constant_value(node.input[2]) if has_point else None
    return point is not None and point.dtype == np.uint8 and bool(np.equal(point, MIDDLE).all())


def center_(editor: GraphEditor, nodes: Sequence[NodeProto]) -> None:
    """Give nodes an int8 zero-point of zeros, and their tensor that type."""
    for node in nodes:
        point = editor.view.constant_value(node.input[2])
        assert point is not None
        node.input[2] = editor.add_constant(f"{node.input[2]}_int8", np.zeros(point.shape, np.int8))
        if op_type(node) == QUANTIZE:
            remove_attribute_(node, "output_dtype")  # it says uint8; the zero-point gives the type
    editor.record("B2", label(nodes[0]), "uint8 around 128 became int8 around 0")
    for value in editor.model.graph.value_info:
        if op_type(nodes[0]) == QUANTIZE and value.name == nodes[0].output[0]:
            value.type.tensor_type.elem_type = TensorProto.INT8


def check_scales(view: GraphView) -> Iterator[Problem]:
    """B3: scales are constant, finite, positive and not denormal."""
    for node in quantizers(view):
        scale = view.constant_value(node.input[1])
        if scale is None:
            if not reads_embedding_table(view, node):
                yield Problem(label(node), "scale is not constant")
        elif not scale.size:
            yield Problem(label(node), "scale is empty")
        elif not is_valid_scale(scale).all():
            yield Problem(label(node), f"smallest scale is {scale.min()}, must be positive and finite")


def is_valid_scale(scale: Array) -> Array:
    """Which scales are finite, positive and not denormal; engines take denormal numbers for zero."""
    wide = scale.astype(np.float32)
    smallest = 2.0**-14 if scale.dtype == np.float16 else np.finfo(np.float32).tiny
    result: Array = np.isfinite(wide) & (wide >= smallest)
    return result


def raise_dead_scales_(editor: GraphEditor) -> None:
    """Give the scale of a fully pruned channel a positive value (B3)."""
    for weight in editor.view.quantized_weights:
        scale = weight.scale
        if scale is None or is_valid_scale(scale).all():
            continue
        valid, dead = is_valid_scale(scale), dead_channels(weight)
        if dead is None or not np.logical_or(valid, dead).all():
            continue
        usual = scale[valid].min() if valid.any() else np.ones((), scale.dtype)
        assert weight.dequantizer is not None
        name = editor.add_constant(weight.dequantizer.input[1], np.where(valid, scale, usual).astype(scale.dtype))
        for step in weight.steps:
            if op_type(step) in (QUANTIZE, DEQUANTIZE):
                step.input[1] = name
        count = int(np.logical_not(valid).sum())
        editor.record("B3", label(weight.dequantizer), f"gave {count} scales of pruned channels a positive value")


def dead_channels(weight: Weight) -> Array | None:
    """Which scales have only zeros under them, in the scale's shape; None where that is unknown."""
    zero = weight.zero_point.flat[0] if weight.zero_point is not None else 0
    alive = np.not_equal(numpy_helper.to_array(weight.stored), zero)
    source = weight.quantizer if weight.quantizer is not None else weight.dequantizer
    if weight.scale is None or weight.scale.ndim == 0:
        return np.asarray(not alive.any())
    if weight.axis is None or weight.index_of(source) != 0:
        return None
    others = tuple(index for index in range(alive.ndim) if index != weight.axis)
    dead: Array = np.logical_not(alive.any(axis=others))
    return dead


def check_granularity(view: GraphView) -> Iterator[Problem]:
    """B4: one scale for activations, one per output channel for weights; Q and DQ agree; weights are int8."""
    weights = {id(weight.dequantizer): weight for weight in view.weights}
    products = {id(node) for node in view.attention_products()}
    for node in quantizers(view):
        weight = weights.get(id(node))
        scale = view.constant_value(node.input[1])
        if weight is not None:
            yield from weight_granularity(weight, scale)
        elif scale is not None and scale.shape != () and not may_have_several_scales(view, node):
            yield Problem(label(node), f"scale of shape {scale.shape}, must be ()")
        quantizer = view.producer(node.input[0], QUANTIZE) if op_type(node) == DEQUANTIZE else None
        if quantizer is None or are_equal(scale, view.constant_value(quantizer.input[1])):
            continue
        # A DQ before an attention product may differ from its Q: there 1/sqrt(d) is folded in (B12).
        if not feeds_one_product(view, node, products):
            yield Problem(label(node), f"scale differs from that of {label(quantizer)}")


def may_have_several_scales(view: GraphView, node: NodeProto) -> bool:
    """Whether a Q or DQ reads a constant, or dequantizes rows of an embedding table."""
    return view.is_constant(node.input[0]) or (op_type(node) == DEQUANTIZE and reads_embedding_table(view, node))


def feeds_one_product(view: GraphView, node: NodeProto, products: set[int]) -> bool:
    """Whether a node feeds one attention product alone, behind nothing but changes of layout."""
    readers = view.consumers_of(node)
    for _ in range(LONGEST_PATH):
        if len(readers) != 1 or op_type(readers[0]) not in LAYOUT:
            break
        readers = view.consumers_of(readers[0])
    return [id(reader) in products for reader in readers] == [True]


def weight_granularity(weight: Weight, scale: Array | None) -> Iterator[Problem]:
    """Problems of one weight: one scale per output channel, stored as int8, or as float behind a Q."""
    assert weight.dequantizer is not None
    dims = weight.dims[weight.index_of(weight.dequantizer)]
    axis = int_attribute(weight.dequantizer, "axis", 1)
    shape = (dims[axis],) if -len(dims) <= axis < len(dims) else ("one per output channel",)
    if scale is not None and scale.shape != shape:
        yield Problem(label(weight.dequantizer), f"scale of shape {scale.shape}, must be {shape}")
    if weight.quantizer is None and weight.stored.data_type != TensorProto.INT8:
        yield Problem(label(weight.dequantizer), "weight is not stored as int8")
    if weight.quantizer is not None and weight.stored.data_type not in FLOATS:
        yield Problem(label(weight.quantizer), "weight before a QuantizeLinear is not stored as float")
    if weight.quantizer is not None and int_attribute(weight.quantizer, "axis", 1) != axis:
        yield Problem(label(weight.dequantizer), f"axis differs from that of {label(weight.quantizer)}")


def check_float_weights(view: GraphView) -> Iterator[Problem]:
    """B4: TensorRT 8 reads weights as float initializer -> Q -> DQ only."""
    for weight in view.quantized_weights:
        if weight.quantizer is None and weight.dequantizer is not None:
            text = "weight is stored as int8, TensorRT 8 needs float behind Q and DQ"
            yield Problem(label(weight.dequantizer), text)


def are_equal(first: Array | None, second: Array | None) -> bool:
    """Whether both are constants, and the same."""
    return first is not None and second is not None and np.array_equal(first, second)
