"""A read-only view of any ONNX graph: who makes and who reads a tensor, which values are constant, which products
have a weight. The checks and `sqat inspect` see a file through it, whoever wrote that file.

Left out: subgraphs of If, Loop and Scan, which encoders do not have.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from sqat.export.sites import tensor_shapes

Array = NDArray[np.generic]
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
PRODUCTS = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True)
class Weight:
    """The constant operand of a product.

    Attributes:
        node: the MatMul, Gemm or Conv.
        stored: its initializer, int8 or float.
        dequantizer: the DequantizeLinear it passes, None for a float weight.
        passed: operators between initializer and product, the product's neighbour first.
        out: axis of the output channels in the initializer.
        reduction: axis that is summed over.
    """

    node: NodeProto
    stored: TensorProto
    dequantizer: NodeProto | None
    passed: tuple[str, ...]
    out: int
    reduction: int

    @cached_property
    def values(self) -> Array:
        """The initializer as stored."""
        return numpy_helper.to_array(self.stored)

    @property
    def size(self) -> tuple[int, int]:
        """Inputs and outputs of the product (K, N)."""
        return self.stored.dims[self.reduction], self.stored.dims[self.out]


class Wiring:
    """Producers, readers and constants of a graph."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer} | constant_nodes(self.nodes)
        self.shapes = tensor_shapes(model.graph)
        self.outputs = {value.name for value in model.graph.output}
        self.producers: dict[str, NodeProto] = {}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            self.producers.update(dict.fromkeys(node.output, node))
            for name in filter(None, node.input):
                self.readers[name].append(node)

    def constant(self, name: str) -> Array | None:
        """Value of a tensor that the file fixes, else None."""
        return numpy_helper.to_array(self.tensors[name]) if name in self.tensors else None

    def producer(self, name: str, *operators: str) -> NodeProto | None:
        """The node that makes a tensor if it is one of the operators, else None."""
        node = self.producers.get(name)
        return node if node is not None and node.op_type in operators else None

    def following(self, node: NodeProto) -> list[NodeProto]:
        """Readers of a node's outputs."""
        return [reader for name in node.output for reader in self.readers[name]]

    @cached_property
    def weights(self) -> list[Weight]:
        """Weights of all products that have one, in order of execution."""
        return [weight for node in self.nodes if (weight := self.weight(node)) is not None]

    def weight(self, node: NodeProto) -> Weight | None:
        """Constant second operand of a product, through Q, DQ, Transpose and Cast; None for two activations."""
        if node.op_type not in PRODUCTS:
            return None
        name, passed, dequantizer = node.input[1], [], None
        while (maker := self.producer(name, QUANTIZE, DEQUANTIZE, "Transpose", "Cast")) is not None:
            passed.append(maker.op_type)
            dequantizer = maker if maker.op_type == DEQUANTIZE else dequantizer
            name = maker.input[0]
        stored = self.tensors.get(name)
        if stored is None or len(stored.dims) < 2:
            return None
        out, reduction = weight_axes(node, len(stored.dims))
        if passed.count("Transpose") % 2:
            out, reduction = reduction, out
        return Weight(node, stored, dequantizer, tuple(passed), out, reduction)

    def attention_products(self) -> list[NodeProto]:
        """MatMuls of two activations in float arithmetic or behind Q/DQ."""
        return [node for node in self.nodes if node.op_type == "MatMul" and self.weight(node) is None]


def constant_nodes(nodes: list[NodeProto]) -> dict[str, TensorProto]:
    """Tensors that older exporters write as Constant nodes rather than as initializers."""
    constants = [node for node in nodes if node.op_type == "Constant"]
    return {node.output[0]: node.attribute[0].t for node in constants if node.attribute[0].name == "value"}


def weight_axes(node: NodeProto, rank: int) -> tuple[int, int]:
    """Axes of output channels and of the sum in the second operand of a product (rule B5)."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)):
        return 0, 1
    return rank - 1, rank - 2


def attribute(node: NodeProto, name: str, default: int) -> int:
    """Integer attribute of a node."""
    return next((int(entry.i) for entry in node.attribute if entry.name == name), default)
