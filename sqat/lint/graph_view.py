"""A read-only view of any ONNX graph: producers and consumers of tensors, constants, products with a weight.

Rules and `sqat inspect` read every file through it. It stays on the protobuf: a file to lint may be no valid graph,
and a repaired file keeps all that it does not change.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sqat.lint.weight import OPERANDS, STEPS, Weight, shape_after, weight_axes
from sqat.onnx_files.checks import TensorInfo, infer, is_standard, opset_of

Array = NDArray[np.generic]
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
PRODUCTS = ("MatMul", "Gemm", "Conv")
SUMS = ("Add", "Sum")
LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Split", "Slice", "Cast")
SIZE_READERS = ("Shape", "Size")
# Nodes between a product and what belongs to it: its weight, bias, activation function or quantizer. Without an end,
# walks from each of many products along one long chain would take quadratic time.
LONGEST_PATH = 32


def op_type(node: NodeProto) -> str:
    """``MatMul`` for ONNX's own operator, ``com.microsoft.FusedMatMul`` for others."""
    return node.op_type if is_standard(node) else f"{node.domain}.{node.op_type}"


def label(node: NodeProto) -> str:
    """A node's name, or that of its output where it has none."""
    return node.name or next(iter(node.output), node.op_type)


class GraphView:
    """Producers, consumers and constants of a graph.

    Attributes:
        constants: initializers and values of Constant nodes, by name.
        outputs: names of the graph's outputs.
        producers: the node behind each tensor.
        consumers: nodes that read each tensor, once for each operand; a node reads what its subgraphs read.
    """

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.opset = opset_of(model)
        self.nodes = list(model.graph.node)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer} | constant_nodes(self.nodes)
        self.outputs = {value.name for value in model.graph.output}
        self.producers: dict[str, NodeProto] = {}
        self.consumers: dict[str, list[NodeProto]] = defaultdict(list)
        self.found: dict[tuple[str, int, int, str], Weight] = {}
        for node in self.nodes:
            self.producers.update(dict.fromkeys(filter(None, node.output), node))
            for name in input_names(node):
                self.consumers[name].append(node)

    @cached_property
    def tensor_info(self) -> TensorInfo:
        """Types and shapes, from the file and from inference."""
        return infer(self.model)

    @property
    def shapes(self) -> dict[str, tuple[int | str, ...]]:
        """Shapes by tensor; symbolic sizes as text, unknown ones as 0."""
        return self.tensor_info.shapes

    @property
    def types(self) -> dict[str, int]:
        """Element types by tensor."""
        return self.tensor_info.types

    def constant_value(self, name: str) -> Array | None:
        """Value of a constant; None for any other tensor."""
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def producer(self, name: str, *op_types: str) -> NodeProto | None:
        """The node behind a tensor if it is one of the operators, else None."""
        node = self.producers.get(name)
        return node if node is not None and op_type(node) in op_types else None

    def consumers_of(self, node: NodeProto) -> list[NodeProto]:
        """Nodes that read a node's outputs."""
        if len(node.output) == 1:  # a list of thousands is not copied for each of them
            return self.consumers.get(node.output[0], [])
        return [reader for name in node.output for reader in self.consumers.get(name, ())]

    def needed_names(self) -> set[str]:
        """Tensors that an output of the graph depends on, and labels of their producers."""
        names = set(self.outputs)
        for node in reversed(self.nodes):
            if names & set(node.output):
                names |= {*input_names(node), label(node)}
        return names

    def quantizer_before(self, name: str) -> NodeProto | None:
        """The Q of the Q/DQ pair whose result a tensor is."""
        dequantizer = self.producer(name, DEQUANTIZE)
        return self.producer(dequantizer.input[0], QUANTIZE) if dequantizer is not None else None

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is a constant, or one behind Q, DQ and changes of layout."""
        return name in self.constants or name in self.derived_constants

    @cached_property
    def derived_constants(self) -> set[str]:
        """Tensors that nodes compute from one constant; nodes are sorted, so that one pass finds them."""
        derived: set[str] = set()
        for node in self.nodes:
            is_step = op_type(node) in (QUANTIZE, DEQUANTIZE, *STEPS) and len(node.input) > 0
            if is_step and (node.input[0] in self.constants or node.input[0] in derived):
                derived.update(node.output)
        return derived

    def layout_source(self, name: str) -> str:
        """The tensor before all changes of layout of a tensor."""
        return self.layout_sources.get(name, name)

    @cached_property
    def layout_sources(self) -> dict[str, str]:
        """For each tensor behind changes of layout, the tensor before all of them."""
        sources: dict[str, str] = {}
        for node in self.nodes:
            if op_type(node) in LAYOUT and node.input:
                sources |= dict.fromkeys(node.output, sources.get(node.input[0], node.input[0]))
        return sources

    @cached_property
    def all_weights(self) -> list[Weight]:
        """Weights of all products in order of execution, those of foreign and integer operators too."""
        return [weight for node in self.nodes if (weight := self.find_weight(node)) is not None]

    @cached_property
    def weights(self) -> list[Weight]:
        """Weights of MatMul, Gemm and Conv."""
        return [weight for weight in self.all_weights if op_type(weight.node) in PRODUCTS]

    @cached_property
    def quantized_weights(self) -> list[Weight]:
        """Weights of MatMul, Gemm and Conv that come from a DQ."""
        return [weight for weight in self.weights if weight.dequantizer is not None]

    def find_weight(self, node: NodeProto) -> Weight | None:
        """Constant operand of a product, behind Q, DQ and changes of layout; None for two activations."""
        operands = OPERANDS.get(op_type(node))
        if operands is None or len(node.input) <= operands.weight or not node.output:
            return None
        steps: list[NodeProto] = []
        name = node.input[operands.weight]
        while (step := self.producer(name, QUANTIZE, DEQUANTIZE, *STEPS)) is not None and len(steps) < LONGEST_PATH:
            steps.insert(0, step)
            name = step.input[0]
        stored = self.constants.get(name)
        dims = self.step_shapes(stored, steps) if stored is not None else []
        if stored is None or not dims or len(dims[-1]) < 2 or not prod(dims[-1]):
            return None
        dequantizer = next((step for step in reversed(steps) if op_type(step) == DEQUANTIZE), None)
        quantizer = next((step for step in steps if op_type(step) == QUANTIZE), None)
        out, reduction = weight_axes(node, len(dims[-1]))
        source = quantizer if quantizer is not None else dequantizer
        zero_point = source.input[2] if source is not None and len(source.input) > 2 else operands.zero_point_of(node)
        same = (node.input[operands.weight], out, reduction, zero_point)
        if same in self.found:
            return replace(self.found[same], node=node)
        weight = self.found[same] = Weight(
            node=node,
            name=name,
            stored=stored,
            steps=tuple(steps),
            dims=tuple(dims),
            quantizer=quantizer,
            dequantizer=dequantizer,
            scale=self.constant_value(source.input[1]) if source is not None else None,
            zero_point=self.constant_value(zero_point),
            out=out,
            reduction=reduction,
        )
        return weight

    def step_shapes(self, stored: TensorProto, steps: list[NodeProto]) -> list[tuple[int, ...]]:
        """Shape of a weight as stored and behind each step; empty where a shape is unknown."""
        dims = [tuple(int(size) for size in stored.dims)]
        for step in steps:
            shape = shape_after(step, dims[-1], self.shapes.get(step.output[0]) if op_type(step) in STEPS else None)
            if shape is None:
                return []
            dims.append(shape)
        return dims

    def attention_products(self) -> list[NodeProto]:
        """MatMuls of two activations."""
        return [
            node
            for node in self.nodes
            if op_type(node) == "MatMul" and not any(self.is_constant(name) for name in node.input)
        ]


def constant_nodes(nodes: list[NodeProto]) -> dict[str, TensorProto]:
    """Tensors that older exporters write as Constant nodes and not as initializers."""
    tensors = {node.output[0]: constant_tensor(node) for node in nodes if op_type(node) == "Constant"}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def constant_tensor(node: NodeProto) -> TensorProto | None:
    """Value of a Constant node, whichever attribute holds it; None for strings and sparse tensors."""
    entry = node.attribute[0] if node.attribute else None
    if entry is None or entry.name not in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        return None
    if entry.name == "value":
        tensor: TensorProto = entry.t
        return tensor
    dtype = np.float32 if "float" in entry.name else np.int64
    return numpy_helper.from_array(np.asarray(helper.get_attribute_value(entry), dtype))


def input_names(node: NodeProto) -> list[str]:
    """Tensors that a node reads, those of the outer graph in its subgraphs included."""
    return [*filter(None, node.input), *(name for graph in subgraphs_of(node) for name in outer_names(graph))]


def subgraphs_of(node: NodeProto) -> list[GraphProto]:
    """Graphs in a node's attributes."""
    single = [entry.g for entry in node.attribute if entry.type == AttributeProto.GRAPH]
    return single + [graph for entry in node.attribute for graph in entry.graphs]


def outer_names(graph: GraphProto) -> set[str]:
    """Names that a subgraph uses and does not define."""
    own = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
    own |= {name for node in graph.node for name in node.output}
    used = {name for node in graph.node for name in input_names(node)}
    return (used | {value.name for value in graph.output}) - own


def all_names(graph: GraphProto) -> set[str]:
    """Names of nodes and tensors in a graph and its subgraphs."""
    names = {entry.name for entry in (*graph.node, *graph.initializer, *graph.input, *graph.value_info)}
    names |= {name for node in graph.node for name in node.output}
    return names.union(*(all_names(inner) for node in graph.node for inner in subgraphs_of(node)))


def int_attribute(node: NodeProto, name: str, default: int) -> int:
    """Integer attribute of a node."""
    return next((int(entry.i) for entry in node.attribute if entry.name == name), default)
