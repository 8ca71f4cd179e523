"""The graph rules B1-B15, each a small function over the wiring; `RULES` at the foot is the list.

What: a rule yields what breaks it, with the node. It looks at the finished file only: the writer obeys the
rules by construction, so a check of its own data would prove nothing. Sources: the ONNX operator reference, the
TensorRT guide (B8, B12, B13), and what ONNX Runtime was seen to do (B10, B14, B15). Left out: B6, which needs
to be told what is pruned (`sqat.export.checks`), fp16 graphs, and what only a runtime can tell
(`sqat.export.runtime.left_in_float`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from onnx import NodeProto, TensorProto

from sqat.export.wiring import DEQUANTIZE, PRODUCTS, QUANTIZE, Weight, Wiring, attribute

FORBIDDEN = ("QLinear", "MatMulInteger", "ConvInteger", "DynamicQuantize")
FLOAT_INPUTS = ("LayerNormalization", "Softmax", "Gelu", "Gather")
SMALLEST_SIDE, GOOD_SIDE = 16, 32
HEAD_SIZES = (16, 32, 64)
SOFTMAX_SCALE = np.float32(1) / np.float32(127)


class Problem(NamedTuple):
    """What a rule has to say about one node; a warning costs speed, not correctness."""

    node: str
    text: str
    warning: bool = False


def operators(wiring: Wiring) -> Iterator[Problem]:
    """Opset 18-20, explicit Q/DQ only."""
    opset = next((entry.version for entry in wiring.model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if not 18 <= opset <= 20:
        yield Problem("", f"opset {opset}, must be 18 to 20")
    for node in wiring.nodes:
        if node.op_type.startswith(FORBIDDEN) or node.op_type == "Attention":
            yield Problem(node.name, f"operator {node.op_type} instead of Q/DQ around a float one")
        if any(entry.name == "output_dtype" for entry in node.attribute):
            yield Problem(node.name, "attribute output_dtype")


def zero_points(wiring: Wiring) -> Iterator[Problem]:
    """Every Q and DQ has a constant int8 zero-point of zeros shaped as its scale."""
    for node in quantizers(wiring):
        point = wiring.constant(node.input[2]) if len(node.input) == 3 else None
        scale = wiring.constant(node.input[1])
        if point is None:
            yield Problem(node.name, "no constant zero-point")
        elif point.dtype != np.int8 or point.any():
            yield Problem(node.name, f"zero-point is not int8 zero ({point.dtype})")
        elif scale is not None and point.shape != scale.shape:
            yield Problem(node.name, f"zero-point of shape {point.shape}, scale of shape {scale.shape}")


def scales(wiring: Wiring) -> Iterator[Problem]:
    """Scales are constant, finite and positive."""
    for node in quantizers(wiring):
        scale = wiring.constant(node.input[1])
        if scale is None:
            yield Problem(node.name, "scale is not constant")
        elif not (np.isfinite(scale).all() and np.greater(scale, 0).all()):
            yield Problem(node.name, f"smallest scale is {scale.min()}, must be positive and finite")


def granularity(wiring: Wiring) -> Iterator[Problem]:
    """Activations have one scale, weights one per output channel; Q and DQ agree; weights are stored as int8."""
    channels = {id(weight.dequantizer): weight for weight in wiring.weights}
    for node in quantizers(wiring):
        scale = wiring.constant(node.input[1])
        weight = channels.get(id(node))
        source = wiring.producer(node.input[0], QUANTIZE)
        wanted = () if weight is None else (weight.stored.dims[attribute(node, "axis", 1)],)
        if scale is not None and node.op_type == DEQUANTIZE and scale.shape != wanted:
            yield Problem(node.name, f"scale of shape {scale.shape}, must be {wanted}")
        if source is not None and not equal(scale, wiring.constant(source.input[1])):
            yield Problem(node.name, f"scale differs from that of {source.name}")
        if weight is not None and source is None and weight.stored.data_type != TensorProto.INT8:
            yield Problem(node.name, "weight is not stored as int8")


def axes(wiring: Wiring) -> Iterator[Problem]:
    """A weight's scales run along its output channels, and its DQ feeds the product itself."""
    for weight in wiring.weights:
        if weight.dequantizer is None:
            continue
        axis = attribute(weight.dequantizer, "axis", 1)
        if axis != weight.out:
            yield Problem(weight.node.name, f"weight scales along axis {axis}, output channels are axis {weight.out}")
        if weight.passed[0] != DEQUANTIZE:
            yield Problem(weight.node.name, f"{weight.passed[0]} between the weight's DequantizeLinear and the product")


def weight_values(wiring: Wiring) -> Iterator[Problem]:
    """Int8 weights are in [-127, 127]; float ones hold no -0.0."""
    for weight in wiring.weights:
        if weight.stored.data_type == TensorProto.INT8 and weight.values.min() < -127:
            yield Problem(weight.node.name, "int8 weight of -128")
        if weight.stored.data_type == TensorProto.FLOAT:
            negative = int((np.signbit(weight.values) & (weight.values == 0)).sum())
            if negative:
                yield Problem(weight.node.name, f"{negative} weights are -0.0")


def sizes(wiring: Wiring) -> Iterator[Problem]:
    """Quantized products are wide enough to gain; what must stay float has no DQ before it."""
    for weight in quantized(wiring):
        if min(weight.size) < SMALLEST_SIDE:
            yield Problem(weight.node.name, f"quantized at {weight.size} [in, out], both must be at least 16")
        elif any(side % GOOD_SIDE for side in weight.size):
            yield Problem(weight.node.name, f"{weight.size} [in, out] are not both multiples of 32", warning=True)
    for node in wiring.nodes:
        source = wiring.producer(node.input[0], DEQUANTIZE) if node.op_type in FLOAT_INPUTS else None
        if source is not None and not (node.op_type == "Gelu" and leaves_linear(wiring, source)):
            yield Problem(node.name, f"input of {node.op_type} is quantized")


def leaves_linear(wiring: Wiring, dequantizer: NodeProto) -> bool:
    """Whether a DQ carries the int8 output of a quantized linear (which T16 asks for)."""
    quantizer = wiring.producer(dequantizer.input[0], QUANTIZE)
    maker = wiring.producer(quantizer.input[0], "Add", *PRODUCTS) if quantizer is not None else None
    if maker is not None and maker.op_type == "Add":
        maker = next((node for name in maker.input if (node := wiring.producer(name, "MatMul")) is not None), None)
    return maker is not None and wiring.producer(maker.input[1], DEQUANTIZE) is not None


def both_operands(wiring: Wiring) -> Iterator[Problem]:
    """A product has both inputs from a DQ or neither."""
    for node in wiring.nodes:
        if node.op_type in PRODUCTS:
            sides = [wiring.producer(name, DEQUANTIZE) is not None for name in node.input[:2]]
            if any(sides) and not all(sides):
                yield Problem(node.name, f"only the {'first' if sides[0] else 'second'} input is quantized")


def dedicated_pairs(wiring: Wiring) -> Iterator[Problem]:
    """A Q has one reader, a DQ, and that one reader; pairs of one tensor share no zero-point.

    Equal pairs that share one are merged by ONNX Runtime, which then leaves their products in float.
    """
    points: dict[tuple[str, ...], str] = {}
    for node in wiring.nodes:
        if node.op_type == QUANTIZE and node.input[0] not in wiring.tensors:
            readers = wiring.following(node)
            if [reader.op_type for reader in readers] != [DEQUANTIZE] or node.output[0] in wiring.outputs:
                yield Problem(node.name, f"read by {len(readers)} nodes, must be one DequantizeLinear")
            for reader in readers:
                count = len(wiring.following(reader)) + (reader.output[0] in wiring.outputs)
                if reader.op_type == DEQUANTIZE and count != 1:
                    yield Problem(reader.name, f"read {count} times, must be once")
            operands = (node.input[0], *node.input[2:])
            if operands in points:
                yield Problem(node.name, f"shares its zero-point with {points[operands]} on the same tensor")
            points[operands] = node.name


def float_bias(wiring: Wiring) -> Iterator[Problem]:
    """A bias is float, and its Add directly follows the product."""
    for node in wiring.nodes:
        stored = wiring.tensors.get(node.input[0]) if node.op_type == DEQUANTIZE else None
        if stored is not None and stored.data_type == TensorProto.INT32:
            yield Problem(node.name, "int32 bias")
    for weight in quantized(wiring):
        for late in [node for follower in wiring.following(weight.node) for node in wiring.following(follower)]:
            if late.op_type == "Add" and is_bias(wiring, late, weight) and not directly(wiring, weight.node):
                yield Problem(late.name, f"bias is not added directly behind {weight.node.name}")


def is_bias(wiring: Wiring, add: NodeProto, weight: Weight) -> bool:
    """Whether an Add has a constant operand of the layer's width."""
    return any(list(wiring.tensors[name].dims) == [weight.size[1]] for name in add.input if name in wiring.tensors)


def directly(wiring: Wiring, node: NodeProto) -> bool:
    """Whether an Add of a constant is the next thing that happens to a product."""
    return any(
        follower.op_type == "Add" and any(name in wiring.tensors for name in follower.input)
        for follower in wiring.following(node)
    )


def attention(wiring: Wiring) -> Iterator[Problem]:
    """Attention products: probabilities fit their scale, nothing between DQ and product."""
    for node in wiring.attention_products():
        for name in node.input:
            between = wiring.producer(name, "Mul", "Transpose")
            if between is not None and wiring.producer(between.input[0], DEQUANTIZE) is not None:
                yield Problem(node.name, f"{between.op_type} between DequantizeLinear and the product")
            pair = pair_before(wiring, name)
            if pair is not None and wiring.producer(pair.input[0], "Softmax") is not None:
                scale = wiring.constant(pair.input[1])
                if scale is not None and scale > SOFTMAX_SCALE:
                    yield Problem(node.name, f"softmax scale {scale} above 1/127")


def fused_attention(wiring: Wiring) -> Iterator[Problem]:
    """What TensorRT's int8 fused attention asks for: head size, and Q behind the second product."""
    for node in wiring.attention_products():
        pair = pair_before(wiring, node.input[0])
        if pair is None:
            continue
        if wiring.producer(pair.input[0], "Softmax") is not None:
            if not reaches_quantizer(wiring, node):
                yield Problem(node.name, "no QuantizeLinear behind the second product", warning=True)
        elif (size := wiring.shapes.get(pair.input[0], ("unknown",))[-1]) not in HEAD_SIZES:
            yield Problem(node.name, f"head size {size}, int8 fused attention takes 16, 32 and 64", warning=True)


def pair_before(wiring: Wiring, name: str) -> NodeProto | None:
    """The Q of the Q/DQ pair a tensor comes out of."""
    dequantizer = wiring.producer(name, DEQUANTIZE)
    return wiring.producer(dequantizer.input[0], QUANTIZE) if dequantizer is not None else None


def reaches_quantizer(wiring: Wiring, node: NodeProto) -> bool:
    """Whether a product's output meets a Q behind nothing but changes of layout."""
    followers = wiring.following(node)
    while followers and all(follower.op_type in ("Transpose", "Reshape") for follower in followers):
        followers = [reader for follower in followers for reader in wiring.following(follower)]
    return any(follower.op_type == QUANTIZE for follower in followers)


def symbolic_sizes(wiring: Wiring) -> Iterator[Problem]:
    """Batch and sequence are symbolic in every input."""
    for value in wiring.model.graph.input:
        if value.name not in wiring.tensors and not all(
            isinstance(size, str) for size in wiring.shapes.get(value.name, ())[:2]
        ):
            yield Problem(value.name, f"fixed input shape {wiring.shapes[value.name]}")


def own_initializers(wiring: Wiring) -> Iterator[Problem]:
    """A quantized weight has one reader; no initializer is left over."""
    for name in wiring.tensors:
        if name not in wiring.readers and name not in wiring.outputs:
            yield Problem(name, "initializer that nothing reads")
    for weight in wiring.weights:
        readers = wiring.readers[weight.stored.name]
        if weight.dequantizer is not None and len(readers) != 1:
            yield Problem(weight.node.name, f"quantized weight {weight.stored.name} has {len(readers)} readers")


def quantizers(wiring: Wiring) -> list[NodeProto]:
    """All Q and DQ nodes."""
    return [node for node in wiring.nodes if node.op_type in (QUANTIZE, DEQUANTIZE)]


def quantized(wiring: Wiring) -> list[Weight]:
    """Weights behind a DQ."""
    return [weight for weight in wiring.weights if weight.dequantizer is not None]


def equal(left: object, right: object) -> bool:
    """Whether two constants are known and the same."""
    return left is not None and right is not None and np.array_equal(np.asarray(left), np.asarray(right))


RULES: dict[str, Callable[[Wiring], Iterator[Problem]]] = {
    "B1": operators,
    "B2": zero_points,
    "B3": scales,
    "B4": granularity,
    "B5": axes,
    "B7": weight_values,
    "B8": sizes,
    "B9": both_operands,
    "B10": dedicated_pairs,
    "B11": float_bias,
    "B12": attention,
    "B13": fused_attention,
    "B14": symbolic_sizes,
    "B15": own_initializers,
}
