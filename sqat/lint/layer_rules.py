"""Rules about layers, that is products with a weight: axes (B5), N:M (B6), values (B7), sizes (B8), inputs (B9) and
bias (B11).

Sources: the ONNX operator reference, the TensorRT guide (B8), and a compressor that made garbage of -0.0 (B7).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from onnx import NodeProto, TensorProto, numpy_helper

from sqat.export.names import module_of
from sqat.lint.attention_rules import between_pair
from sqat.lint.findings import Problem
from sqat.lint.operator_rules import feeds_gather
from sqat.lint.weights import FLOATS, Weight, kept_in_groups
from sqat.lint.wiring import DEQUANTIZE, LAYOUT, PRODUCTS, QUANTIZE, Wiring, attribute, label, operator
from sqat.sparsity.hardware_limits import GOOD_SIDE, SMALLEST_SIDE, SPARSE_INPUTS, SPARSE_OUTPUTS
from sqat.sparsity.pattern import Pattern, parse_pattern

FLOAT_INPUTS = ("LayerNormalization", "Softmax", "Gelu", "Gather")
TWO_OF_FOUR = Pattern(2, 4)
ALMOST = 0.4


def axes(wiring: Wiring) -> Iterator[Problem]:
    """A weight's scales run along its output channels, and its DQ feeds the product itself."""
    for weight in quantized(wiring):
        assert weight.dequantizer is not None
        axis = attribute(weight.dequantizer, "axis", 1)
        last = weight.steps[-1]
        if weight.axis is not None and weight.read_axis != weight.out:
            text = f"weight scales along axis {axis}, output channels are axis {weight.out}"
            yield Problem(label(weight.node), text)
        if operator(last) != DEQUANTIZE:
            yield Problem(label(weight.node), f"{last.op_type} between the weight's DequantizeLinear and the product")


def told_patterns(wiring: Wiring, pruned: Mapping[str, str]) -> Iterator[Problem]:
    """Layers said to be pruned: N:M on the stored values along the sum."""
    found = {module_of(weight.node): weight for weight in wiring.weights}
    for layer, text in pruned.items():
        weight, pattern = found.get(layer), parse_pattern(text)
        if weight is None:
            yield Problem(layer, f"said to be {text}, is not in the graph")
        elif weight.size[0] % pattern.m:
            yield Problem(label(weight.node), f"{weight.size[0]} inputs are not a multiple of {pattern.m}")
        elif broken := violations(weight, pattern):
            yield Problem(label(weight.node), f"{broken} groups hold more than {pattern.n} of {pattern.m} weights")


def near_patterns(wiring: Wiring) -> Iterator[Problem]:
    """Layers that somebody meant to prune: many zeros, and yet groups of four with three weights or more."""
    for weight in wiring.weights:
        zeros = float(np.equal(weight.values, 0).mean())
        if zeros > ALMOST and weight.size[0] % TWO_OF_FOUR.m == 0 and (broken := violations(weight, TWO_OF_FOUR)):
            groups = weight.values.size // TWO_OF_FOUR.m
            text = f"almost 2:4: {zeros:.0%} zeros, but {broken} of {groups} groups hold more than 2 of 4 weights"
            yield Problem(label(weight.node), text)


def violations(weight: Weight, pattern: Pattern) -> int:
    """Groups along the sum that hold more weights than the pattern keeps."""
    return int(np.greater(kept_in_groups(weight.values, pattern.m, weight.reduction), pattern.n).sum())


def is_sparse(weight: Weight) -> bool:
    """Whether every group of four along the sum holds two weights at most."""
    return weight.size[0] % TWO_OF_FOUR.m == 0 and not violations(weight, TWO_OF_FOUR)


def weight_values(wiring: Wiring) -> Iterator[Problem]:
    """Int8 weights are in [-127, 127]; float ones hold no -0.0."""
    for weight in wiring.weights:
        if weight.dequantizer is not None and weight.values.min() < -127:
            yield Problem(label(weight.node), "int8 weight of -128")
        if weight.stored.data_type in FLOATS and (negative := negative_zeros(weight.stored)):
            yield Problem(label(weight.node), f"{negative} weights are -0.0")


def negative_zeros(stored: TensorProto) -> int:
    """How many values of an initializer are -0.0."""
    values = numpy_helper.to_array(stored)
    return int((np.signbit(values) & np.equal(values, 0)).sum())


def sizes(wiring: Wiring) -> Iterator[Problem]:
    """Quantized products are wide enough to gain; what must stay float has no DQ before it."""
    for weight in quantized(wiring):
        if min(weight.size) < SMALLEST_SIDE:
            yield Problem(label(weight.node), f"quantized at {weight.size} [in, out], both must be at least 16")
        elif any(side % GOOD_SIDE for side in weight.size):
            yield Problem(label(weight.node), f"{weight.size} [in, out] are not both multiples of 32", warning=True)
    for node in wiring.nodes:
        source = wiring.producer(node.input[0], DEQUANTIZE) if operator(node) in FLOAT_INPUTS else None
        if source is None or feeds_gather(wiring, source):
            continue
        if not (operator(node) == "Gelu" and leaves_linear(wiring, source)):
            yield Problem(label(node), f"input of {node.op_type} is quantized")


def sparse_sizes(wiring: Wiring) -> Iterator[Problem]:
    """Sparse products have the sizes that sparse kernels take."""
    for weight in wiring.weights:
        inputs, outputs = weight.size
        if (inputs % SPARSE_INPUTS or outputs % SPARSE_OUTPUTS) and np.any(weight.values) and is_sparse(weight):
            text = f"sparse at {weight.size} [in, out], which are not multiples of {SPARSE_INPUTS} and {SPARSE_OUTPUTS}"
            yield Problem(label(weight.node), text)


def leaves_linear(wiring: Wiring, dequantizer: NodeProto) -> bool:
    """Whether a DQ carries the int8 output of a quantized linear (which T16 asks for)."""
    quantizer = wiring.producer(dequantizer.input[0], QUANTIZE)
    name = quantizer.input[0] if quantizer is not None else ""
    while (maker := wiring.producer(name, *LAYOUT, "Add")) is not None:
        name = next((entry for entry in maker.input if not wiring.is_constant(entry)), "")
    product = wiring.producer(name, *PRODUCTS)
    return product is not None and wiring.producer(product.input[1], DEQUANTIZE) is not None


def both_operands(wiring: Wiring) -> Iterator[Problem]:
    """A product has both inputs directly from a DQ or neither."""
    weights = {id(weight.node): weight for weight in wiring.weights}
    for node in wiring.nodes:
        if operator(node) not in PRODUCTS:
            continue
        weight = weights.get(id(node))
        sides = [wiring.producer(name, DEQUANTIZE) is not None for name in node.input[:2]]
        sides[1] |= weight is not None and weight.dequantizer is not None  # what stands between is for B5
        if any(sides) == all(sides) or (sides[0] and leaves_convolution(wiring, node.input[0])):
            continue
        missing = node.input[1 if sides[0] else 0]
        if weight is None and between_pair(wiring, missing) is not None:
            continue  # that is for B12
        between = layout_before(wiring, missing)
        which = ("first", "second") if sides[0] else ("second", "first")
        if between is not None:
            yield Problem(label(node), f"{between.op_type} between DequantizeLinear and the {which[1]} input")
        else:
            yield Problem(label(node), f"only the {which[0]} input is quantized")


def leaves_convolution(wiring: Wiring, name: str) -> bool:
    """Whether a tensor is the int8 output of a quantized convolution, which is no one else's int8 input."""
    quantizer = wiring.pair_before(name)
    return quantizer is not None and any(
        weight.node.output[0] == quantizer.input[0] for weight in quantized(wiring) if operator(weight.node) == "Conv"
    )


def int8_convolutions(wiring: Wiring) -> Iterator[Problem]:
    """A quantized convolution's output goes to a Q right behind it: ONNX Runtime has no int8 one with float outputs."""
    for weight in quantized(wiring):
        name = weight.node.output[0]
        readers = [operator(reader) for reader in wiring.readers.get(name, ())]
        if operator(weight.node) == "Conv" and (set(readers) != {QUANTIZE} or name in wiring.outputs):
            yield Problem(label(weight.node), "its output is not quantized, so ONNX Runtime computes it in float")


def layout_before(wiring: Wiring, name: str) -> NodeProto | None:
    """The change of layout that makes a tensor, if a DQ lies before it."""
    nearest = maker = wiring.producer(name, *LAYOUT)
    while maker is not None:
        name = maker.input[0]
        maker = wiring.producer(name, *LAYOUT)
    return nearest if wiring.producer(name, DEQUANTIZE) is not None else None


def float_bias(wiring: Wiring) -> Iterator[Problem]:
    """A bias is float, and its Add directly follows the product; that of a Conv is its third input."""
    for node in wiring.nodes:
        stored = wiring.tensors.get(node.input[0]) if operator(node) == DEQUANTIZE else None
        if stored is not None and stored.data_type == TensorProto.INT32:
            yield Problem(label(node), "int32 bias")
    for weight in quantized(wiring):
        if directly(wiring, weight.node):
            continue
        for late in behind_layout(wiring, weight.node):
            if operator(late) == "Add" and is_bias(wiring, late, weight):
                yield Problem(label(late), f"bias is not added directly behind {label(weight.node)}")


def behind_layout(wiring: Wiring, node: NodeProto) -> list[NodeProto]:
    """What reads a node's output behind one change of layout or more."""
    waiting = [reader for reader in wiring.following(node) if operator(reader) in LAYOUT]
    found = []
    while waiting:
        readers = wiring.following(waiting.pop())
        found += readers
        waiting += [reader for reader in readers if operator(reader) in LAYOUT]
    return found


def is_bias(wiring: Wiring, add: NodeProto, weight: Weight) -> bool:
    """Whether an Add has a constant operand of the layer's width."""
    return any(
        [size for size in wiring.tensors[name].dims if size != 1] == [weight.size[1]]
        for name in add.input
        if name in wiring.tensors
    )


def directly(wiring: Wiring, node: NodeProto) -> bool:
    """Whether a product has its bias: as a third input, or as an Add of a constant right behind it."""
    return any(node.input[2:]) or any(
        operator(follower) == "Add" and any(name in wiring.tensors for name in follower.input)
        for follower in wiring.following(node)
    )


def quantized(wiring: Wiring) -> list[Weight]:
    """Weights behind a DQ."""
    return [weight for weight in wiring.weights if weight.dequantizer is not None]
