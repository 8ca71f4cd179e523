"""Rules about QuantizeLinear and DequantizeLinear themselves: zero-points (B2), scales (B3), one scale or one per
channel (B4), pairs of their own (B10).

Sources: the ONNX operator reference; B10 was seen in ONNX Runtime, whose own quantizer says the same of TensorRT.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, TensorProto

from sqat.lint.findings import Problem
from sqat.lint.operator_rules import feeds_gather
from sqat.lint.weights import FLOATS, Weight
from sqat.lint.wiring import DEQUANTIZE, LAYOUT, QUANTIZE, Array, Wiring, attribute, label, operator


def zero_points(wiring: Wiring) -> Iterator[Problem]:
    """Every Q and DQ has a constant int8 zero-point of zeros shaped as its scale."""
    for node in quantizers(wiring):
        if is_integer_bias(wiring, node):
            continue
        point = wiring.constant(node.input[2]) if len(node.input) == 3 else None
        scale = wiring.constant(node.input[1])
        if point is None:
            yield Problem(label(node), "no constant zero-point")
        elif point.dtype != np.int8 or point.any():
            yield Problem(label(node), f"zero-point is not int8 zero ({point.dtype})")
        elif scale is not None and point.shape != scale.shape:
            yield Problem(label(node), f"zero-point of shape {point.shape}, scale of shape {scale.shape}")


def scales(wiring: Wiring) -> Iterator[Problem]:
    """Scales are constant, finite, positive, and no denormal numbers, which engines take for zero."""
    for node in quantizers(wiring):
        scale = wiring.constant(node.input[1])
        if scale is None:
            if not feeds_gather(wiring, node):
                yield Problem(label(node), "scale is not constant")
        elif not sound(scale).all():
            yield Problem(label(node), f"smallest scale is {scale.min()}, must be positive and finite")


def sound(scale: Array) -> Array:
    """Which scales are finite, positive and not denormal."""
    wide = scale.astype(np.float32)
    smallest = 2.0**-14 if scale.dtype == np.float16 else np.finfo(np.float32).tiny
    result: Array = np.isfinite(wide) & (wide >= smallest)
    return result


def granularity(wiring: Wiring) -> Iterator[Problem]:
    """Activations have one scale, weights one per output channel; Q and DQ agree; weights are int8.

    A DQ before an attention product may differ from its Q: there 1/sqrt(d) is folded in (B12).
    """
    weights = {id(weight.dequantizer): weight for weight in wiring.weights}
    products = {id(node) for node in wiring.attention_products()}
    for node in quantizers(wiring):
        weight = weights.get(id(node))
        scale = wiring.constant(node.input[1])
        if weight is not None:
            yield from weight_granularity(wiring, weight, scale)
        elif (
            not wiring.is_constant(node.input[0])
            and scale is not None
            and scale.shape != ()
            and not unpacks(wiring, node)
        ):
            yield Problem(label(node), f"scale of shape {scale.shape}, must be ()")
        quantizer = wiring.producer(node.input[0], QUANTIZE) if operator(node) == DEQUANTIZE else None
        if quantizer is None or equal(scale, wiring.constant(quantizer.input[1])):
            continue
        if not ends_in(wiring, node, products):
            yield Problem(label(node), f"scale differs from that of {label(quantizer)}")


def ends_in(wiring: Wiring, node: NodeProto, products: set[int]) -> bool:
    """Whether a node feeds one attention product alone, behind nothing but changes of layout."""
    readers = wiring.following(node)
    while len(readers) == 1 and operator(readers[0]) in LAYOUT:
        readers = wiring.following(readers[0])
    return [id(reader) in products for reader in readers] == [True]


def unpacks(wiring: Wiring, node: NodeProto) -> bool:
    """Whether a DQ unpacks a stored embedding table."""
    return operator(node) == DEQUANTIZE and feeds_gather(wiring, node)


def weight_granularity(wiring: Wiring, weight: Weight, scale: Array | None) -> Iterator[Problem]:
    """One scale per output channel, of a weight stored as int8 or as float with a Q."""
    assert weight.dequantizer is not None
    dims = weight.dims[weight.place(weight.dequantizer)]
    axis = attribute(weight.dequantizer, "axis", 1)
    wanted = (dims[axis],) if -len(dims) <= axis < len(dims) else ("one per output channel",)
    if scale is not None and scale.shape != wanted:
        yield Problem(label(weight.dequantizer), f"scale of shape {scale.shape}, must be {wanted}")
    if weight.quantizer is None and weight.stored.data_type != TensorProto.INT8:
        yield Problem(label(weight.dequantizer), "weight is not stored as int8")
    if weight.quantizer is not None and weight.stored.data_type not in FLOATS:
        yield Problem(label(weight.quantizer), "weight before a QuantizeLinear is not stored as float")
    if weight.quantizer is not None and attribute(weight.quantizer, "axis", 1) != axis:
        yield Problem(label(weight.dequantizer), f"axis differs from that of {label(weight.quantizer)}")


def float_weights(wiring: Wiring) -> Iterator[Problem]:
    """TensorRT 8.x reads weights as float initializer -> Q -> DQ only."""
    for weight in wiring.weights:
        if weight.dequantizer is not None and weight.quantizer is None:
            yield Problem(
                label(weight.dequantizer), "weight is stored as int8, TensorRT 8.x wants float behind Q and DQ"
            )


def dedicated_pairs(wiring: Wiring) -> Iterator[Problem]:
    """A Q has one reader, a DQ, and that one reader."""
    for node in wiring.nodes:
        if operator(node) != QUANTIZE or wiring.is_constant(node.input[0]):
            continue
        readers = wiring.following(node)
        if [operator(reader) for reader in readers] != [DEQUANTIZE] or node.output[0] in wiring.outputs:
            yield Problem(label(node), f"read by {len(readers)} nodes, must be one DequantizeLinear")
        for reader in readers:
            count = len(wiring.following(reader)) + (reader.output[0] in wiring.outputs)
            if operator(reader) == DEQUANTIZE and count != 1:
                yield Problem(label(reader), f"read {count} times, must be once")


def own_zero_points(wiring: Wiring) -> Iterator[Problem]:
    """Pairs that quantize one tensor share no zero-point.

    Equal pairs that share one are merged by ONNX Runtime, which then leaves their products in float.
    """
    points: dict[tuple[str, str], str] = {}
    for node in wiring.nodes:
        if operator(node) != QUANTIZE or wiring.is_constant(node.input[0]) or not node.input[2:]:
            continue
        operands = (node.input[0], node.input[2])
        if operands in points:
            yield Problem(label(node), f"shares its zero-point with {points[operands]} on the same tensor")
        points[operands] = label(node)


def quantizers(wiring: Wiring) -> list[NodeProto]:
    """All Q and DQ nodes."""
    return [node for node in wiring.nodes if operator(node) in (QUANTIZE, DEQUANTIZE)]


def is_integer_bias(wiring: Wiring, node: NodeProto) -> bool:
    """Whether a DQ reads int32 numbers: a bias, which B11 is about."""
    stored = wiring.tensors.get(node.input[0]) if operator(node) == DEQUANTIZE else None
    return stored is not None and stored.data_type == TensorProto.INT32


def equal(left: Array | None, right: Array | None) -> bool:
    """Whether two constants are known and the same."""
    return left is not None and right is not None and np.array_equal(left, right)
