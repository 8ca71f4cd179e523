"""A read-only view of any ONNX graph: who makes and who reads a tensor, which values are constant, which products
have a weight. The checks and `sqat inspect` see a file through it, whoever wrote that file.

Types and shapes come from the file and, where it leaves them out, from ONNX's inference. Operators of another domain
never pass for ONNX's own of the same name. Left out: what happens inside the subgraphs of If, Loop and Scan (only
which tensors of the main graph they read), and constants computed from other constants.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sqat.lint.inference import Known, infer, is_standard, opset_of
from sqat.lint.weights import LAYERS, STEPS, Weight, moved_dims, weight_axes

Array = NDArray[np.generic]
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
PRODUCTS = ("MatMul", "Gemm", "Conv")
LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Split", "Slice", "Cast")
SIZE_READERS = ("Shape", "Size")


def operator(node: NodeProto) -> str:
    """``MatMul`` for ONNX's own, ``com.microsoft.FusedMatMul`` for others."""
    return node.op_type if is_standard(node) else f"{node.domain}.{node.op_type}"


def label(node: NodeProto) -> str:
    """A node's name, or that of its output where it has none."""
    return node.name or next(iter(node.output), node.op_type)


class Wiring:
    """Producers, readers and constants of a graph."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.opset = opset_of(model)
        self.nodes = list(model.graph.node)
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer} | constant_nodes(self.nodes)
        self.outputs = {value.name for value in model.graph.output}
        self.producers: dict[str, NodeProto] = {}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            self.producers.update(dict.fromkeys(filter(None, node.output), node))
            for name in reads(node):
                self.readers[name].append(node)

    @cached_property
    def known(self) -> Known:
        """Types and shapes, as far as they can be told."""
        return infer(self.model)

    @property
    def shapes(self) -> dict[str, tuple[int | str, ...]]:
        """Shapes by tensor; symbolic sizes as text, unknown ones as 0."""
        return self.known.shapes

    @property
    def types(self) -> dict[str, int]:
        """Element types by tensor."""
        return self.known.types

    def constant(self, name: str) -> Array | None:
        """Value of a tensor that the file fixes, else None."""
        return numpy_helper.to_array(self.tensors[name]) if name in self.tensors else None

    def producer(self, name: str, *operators: str) -> NodeProto | None:
        """The node that makes a tensor if it is one of the operators, else None."""
        node = self.producers.get(name)
        return node if node is not None and operator(node) in operators else None

    @property
    def needed(self) -> set[str]:
        """Tensors that an output of the graph depends on, and labels of the nodes that make them."""
        found = set(self.outputs)
        for node in reversed(self.nodes):
            if found & set(node.output):
                found |= {*reads(node), label(node)}
        return found

    def following(self, node: NodeProto) -> list[NodeProto]:
        """Readers of a node's outputs."""
        return [reader for name in node.output for reader in self.readers.get(name, ())]

    def pair_before(self, name: str) -> NodeProto | None:
        """The Q of the Q/DQ pair a tensor comes out of."""
        dequantizer = self.producer(name, DEQUANTIZE)
        return self.producer(dequantizer.input[0], QUANTIZE) if dequantizer is not None else None

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is fixed by the file, be it through Q, DQ or changes of layout."""
        while name not in self.tensors:
            maker = self.producer(name, QUANTIZE, DEQUANTIZE, *STEPS)
            if maker is None:
                return False
            name = maker.input[0]
        return True

    @cached_property
    def weights(self) -> list[Weight]:
        """Weights of MatMul, Gemm and Conv, in order of execution."""
        return [weight for weight in self.layers if operator(weight.node) in PRODUCTS]

    @cached_property
    def layers(self) -> list[Weight]:
        """Weights of all products that have one, those of foreign and integer operators too."""
        return [weight for node in self.nodes if (weight := self.weight(node)) is not None]

    def weight(self, node: NodeProto) -> Weight | None:
        """Constant operand of a product, through Q, DQ and changes of layout; None for two activations."""
        places = LAYERS.get(operator(node))
        if places is None or len(node.input) <= places.operand:
            return None
        steps: list[NodeProto] = []
        name = node.input[places.operand]
        while (maker := self.producer(name, QUANTIZE, DEQUANTIZE, *STEPS)) is not None:
            steps.insert(0, maker)
            name = maker.input[0]
        stored = self.tensors.get(name)
        dims = self.dims_behind(stored, steps) if stored is not None else []
        if stored is None or not dims or len(dims[-1]) < 2:
            return None
        scaled = next((step for step in reversed(steps) if operator(step) == DEQUANTIZE), None)
        quantizer = next((step for step in steps if operator(step) == QUANTIZE), None)
        out, reduction = weight_axes(node, len(dims[-1]))
        source = quantizer if quantizer is not None else scaled
        point = source.input[2] if source is not None and len(source.input) > 2 else places.zero_point(node)
        return Weight(
            node=node,
            name=name,
            stored=stored,
            steps=tuple(steps),
            dims=tuple(dims),
            quantizer=quantizer,
            dequantizer=scaled,
            scale=self.constant(source.input[1]) if source is not None else None,
            zero_point=self.constant(point),
            out=out,
            reduction=reduction,
        )

    def dims_behind(self, stored: TensorProto, steps: list[NodeProto]) -> list[tuple[int, ...]]:
        """Shape of a weight as stored and behind each step; empty where a shape is not known."""
        dims = [tuple(int(size) for size in stored.dims)]
        for step in steps:
            moved = moved_dims(step, dims[-1], self.shapes.get(step.output[0]) if operator(step) in STEPS else None)
            if moved is None:
                return []
            dims.append(moved)
        return dims

    def attention_products(self) -> list[NodeProto]:
        """MatMuls of two activations."""
        return [
            node
            for node in self.nodes
            if operator(node) == "MatMul" and not any(self.is_constant(name) for name in node.input)
        ]


def constant_nodes(nodes: list[NodeProto]) -> dict[str, TensorProto]:
    """Tensors that older exporters write as Constant nodes rather than as initializers."""
    found = {node.output[0]: constant_value(node) for node in nodes if operator(node) == "Constant"}
    return {name: value for name, value in found.items() if value is not None}


def constant_value(node: NodeProto) -> TensorProto | None:
    """Value of a Constant node in whichever attribute it stands; None for strings and sparse tensors."""
    entry = node.attribute[0] if node.attribute else None
    if entry is None or entry.name not in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        return None
    if entry.name == "value":
        tensor: TensorProto = entry.t
        return tensor
    dtype = np.float32 if "float" in entry.name else np.int64
    return numpy_helper.from_array(np.asarray(helper.get_attribute_value(entry), dtype))


def reads(node: NodeProto) -> list[str]:
    """Tensors a node reads, those of the outer graph that its subgraphs read among them."""
    return [*filter(None, node.input), *inner_reads(node)]


def inner_reads(node: NodeProto) -> Iterator[str]:
    """Tensors of the outer graph that a node's subgraphs read."""
    for graph in subgraphs_of(node):
        yield from outer_names(graph)


def subgraphs_of(node: NodeProto) -> list[GraphProto]:
    """Graphs in a node's attributes."""
    single = [entry.g for entry in node.attribute if entry.type == AttributeProto.GRAPH]
    return single + [graph for entry in node.attribute for graph in entry.graphs]


def names_in(graph: GraphProto) -> set[str]:
    """Names of nodes and tensors in a graph and its subgraphs."""
    found = {entry.name for entry in (*graph.node, *graph.initializer, *graph.input, *graph.value_info)}
    found |= {name for node in graph.node for name in node.output}
    return found.union(*(names_in(inner) for node in graph.node for inner in subgraphs_of(node)))


def outer_names(graph: GraphProto) -> set[str]:
    """Names that a subgraph uses and does not define."""
    own = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
    own |= {name for node in graph.node for name in node.output}
    used = {name for node in graph.node for name in reads(node)}
    return (used | {value.name for value in graph.output}) - own


def attribute(node: NodeProto, name: str, default: int) -> int:
    """Integer attribute of a node."""
    return next((int(entry.i) for entry in node.attribute if entry.name == name), default)
