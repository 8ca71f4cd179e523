"""Rules about attention, that is products of two activations: operands and scales (B12), int8 fusion (B13).

Source: the TensorRT guide. Left out: the longest sequence that int8 fusion takes, which a file with symbolic sizes
does not tell.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto

from sqat.lint.findings import Problem
from sqat.lint.wiring import DEQUANTIZE, LAYOUT, QUANTIZE, Wiring, label, operator

HEAD_SIZES = (16, 32, 64)
SOFTMAX_SCALE = np.float32(1) / np.float32(127)
FACTORS = ("Mul", "Div")


def attention(wiring: Wiring) -> Iterator[Problem]:
    """Attention products: probabilities fit their scale, nothing between DQ and product.

    A split into heads (Reshape, Transpose) behind the DQ of a linear's output is not meant: there the product is float.
    """
    for node in wiring.attention_products():
        for name in node.input:
            between = between_pair(wiring, name)
            if between is not None:
                yield Problem(label(node), f"{between.op_type} between DequantizeLinear and the product")
            pair = wiring.pair_before(name)
            if pair is not None and wiring.producer(pair.input[0], "Softmax") is not None:
                scale = wiring.constant(pair.input[1])
                if scale is not None and np.greater(scale, SOFTMAX_SCALE).any():
                    yield Problem(label(node), f"softmax scale {scale} above 1/127")


def between_pair(wiring: Wiring, name: str) -> NodeProto | None:
    """What stands between a DQ and the product that reads a tensor, None if nothing does or no DQ is there."""
    path = path_to_pair(wiring, name)[:-1]
    factors = [node for node in path if operator(node) in FACTORS]
    is_split = any(operator(node) == "Reshape" for node in path)
    return next(iter(factors or ([] if is_split else path)), None)


def path_to_pair(wiring: Wiring, name: str) -> list[NodeProto]:
    """Constant factors and changes of layout between a tensor and the DQ before it, the DQ last; empty if none is."""
    path: list[NodeProto] = []
    while (maker := wiring.producer(name, *FACTORS, *LAYOUT, DEQUANTIZE)) is not None:
        path.append(maker)
        if operator(maker) == DEQUANTIZE:
            return path
        data = [entry for entry in maker.input if not wiring.is_constant(entry)]
        if operator(maker) in FACTORS and (len(data) != 1 or (operator(maker) == "Div" and maker.input[0] != data[0])):
            return []
        name = data[0] if operator(maker) in FACTORS else maker.input[0]
    return []


def fused_attention(wiring: Wiring) -> Iterator[Problem]:
    """What TensorRT's int8 fused attention asks for: head size, and Q behind the second product."""
    for node in wiring.attention_products():
        pair = wiring.pair_before(node.input[0])
        if pair is None:
            continue
        if wiring.producer(pair.input[0], "Softmax") is not None:
            if not reaches_quantizer(wiring, node):
                yield Problem(label(node), "no QuantizeLinear behind the second product", warning=True)
            continue
        size = (wiring.shapes.get(pair.input[0]) or (0,))[-1]
        if size not in HEAD_SIZES:
            known = f"head size {size}" if size else "head size unknown"
            yield Problem(label(node), f"{known}, int8 fused attention takes 16, 32 and 64", warning=True)


def reaches_quantizer(wiring: Wiring, node: NodeProto) -> bool:
    """Whether a product's output meets a Q behind nothing but changes of layout."""
    followers = wiring.following(node)
    while followers and all(operator(follower) in LAYOUT for follower in followers):
        followers = [reader for follower in followers for reader in wiring.following(follower)]
    return any(operator(follower) == QUANTIZE for follower in followers)
