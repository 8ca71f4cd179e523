"""B12 and B13: products of two activations, as NVIDIA's guide to TensorRT asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from onnx import NodeProto

from sqat.lint.findings import Problem
from sqat.lint.graph_editor import GraphEditor
from sqat.lint.graph_view import DEQUANTIZE, LAYOUT, LONGEST_PATH, QUANTIZE, Array, GraphView, label, op_type
from sqat.lint.rules.quantizers import is_valid_scale

HEAD_SIZES = (16, 32, 64)
SOFTMAX_SCALE = np.float32(1) / np.float32(127)
FACTORS = ("Mul", "Div")


def check_attention(view: GraphView) -> Iterator[Problem]:
    """B12: probabilities fit their scale, and nothing stands between a DQ and the product."""
    for node in view.attention_products():
        for name in node.input:
            between = node_behind_dequantizer(view, name)
            if between is not None:
                yield Problem(label(node), f"{between.op_type} between DequantizeLinear and the product")
            quantizer = view.quantizer_before(name)
            if quantizer is not None and view.producer(quantizer.input[0], "Softmax") is not None:
                scale = view.constant_value(quantizer.input[1])
                if scale is not None and np.greater(scale, SOFTMAX_SCALE).any():
                    yield Problem(label(node), f"softmax scale {scale} above 1/127")


def node_behind_dequantizer(view: GraphView, name: str) -> NodeProto | None:
    """What stands between a DQ and the product that reads a tensor; None if nothing does, or without a DQ."""
    path = path_to_dequantizer(view, name)[:-1]
    factors = [node for node in path if op_type(node) in FACTORS]
    # Behind the DQ of a linear's output, a split into heads is no fault: there the product is float.
    is_split = any(op_type(node) == "Reshape" for node in path)
    return next(iter(factors or ([] if is_split else path)), None)


def path_to_dequantizer(view: GraphView, name: str) -> list[NodeProto]:
    """Constant factors and changes of layout between a tensor and the DQ before it, the DQ last; empty without one."""
    path: list[NodeProto] = []
    while (node := view.producer(name, *FACTORS, *LAYOUT, DEQUANTIZE)) is not None and len(path) < LONGEST_PATH:
        path.append(node)
        if op_type(node) == DEQUANTIZE:
            return path
        data = [entry for entry in node.input if not view.is_constant(entry)]
        if op_type(node) in FACTORS and (len(data) != 1 or (op_type(node) == "Div" and node.input[0] != data[0])):
            return []
        name = data[0] if op_type(node) in FACTORS else node.input[0]
    return []


def check_fused_attention(view: GraphView) -> Iterator[Problem]:
    """B13: head sizes that int8 fused attention takes, and a Q behind the second product."""
    for node in view.attention_products():
        quantizer = view.quantizer_before(node.input[0])
        if quantizer is None:
            continue
        if view.producer(quantizer.input[0], "Softmax") is not None:
            if not reaches_quantizer(view, node):
                yield Problem(label(node), "no QuantizeLinear behind the second product", warning=True)
            continue
        size = (view.shapes.get(quantizer.input[0]) or (0,))[-1]
        if size not in HEAD_SIZES:
            text = f"head size {size}" if size else "head size unknown"
            yield Problem(label(node), f"{text}, int8 fused attention takes 16, 32 and 64", warning=True)


def reaches_quantizer(view: GraphView, node: NodeProto) -> bool:
    """Whether a product's output meets a Q behind nothing but changes of layout."""
    readers = view.consumers_of(node)
    for _ in range(LONGEST_PATH):
        if not readers or any(op_type(reader) not in LAYOUT for reader in readers):
            break
        distinct = {id(reader): reader for reader in readers}.values()  # one may read a tensor several times
        readers = [after for reader in distinct for after in view.consumers_of(reader)]
    return any(op_type(reader) == QUANTIZE for reader in readers)


def fold_factors_(editor: GraphEditor) -> None:
    """Fold a constant Mul or Div between a DQ and an attention product into the DQ's scale (B12)."""
    # The product's numbers stay the same up to one rounding.
    view = editor.view
    for product in view.attention_products():
        for name in list(product.input):
            path = path_to_dequantizer(view, name)
            factors = [node for node in path if op_type(node) in FACTORS]
            if not factors or not all(is_read_once(view, node) for node in path):
                continue
            dequantizer = path[-1]
            scale = folded_scale(view, view.constant_value(dequantizer.input[1]), factors)
            if scale is None:
                continue
            dequantizer.input[1] = editor.add_constant(f"{dequantizer.input[1]}_folded", scale)
            for node in reversed(factors):
                editor.bypass(node)
                editor.record("B12", label(product), f"folded {label(node)} into the scale of {label(dequantizer)}")


def is_read_once(view: GraphView, node: NodeProto) -> bool:
    """Whether exactly one node, and no output of the graph, reads a node's result."""
    return len(view.consumers_of(node)) == 1 and not set(node.output) & view.outputs


def folded_scale(view: GraphView, scale: Array | None, factors: Sequence[NodeProto]) -> Array | None:
    """A DQ's scale times the factors; None where it would not be one valid scale."""
    if scale is None or scale.ndim:
        return None
    product = np.float64(scale)
    for node in factors:
        value = next((value for name in node.input if (value := view.constant_value(name)) is not None), None)
        if value is None or value.size != 1:
            return None
        factor = np.float64(value.reshape(()))
        product = product * factor if op_type(node) == "Mul" else product / factor
    result = np.asarray(product, scale.dtype)
    return result if is_valid_scale(result).all() else None
