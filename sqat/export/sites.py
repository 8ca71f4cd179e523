"""Where a layer or an activation site of the checkpoint lies in an exported graph.

What: `Anatomy` lists the linears and convolutions, attention products and residual adds of a graph by module name, and
`Anatomy.edges` turns a site name into the (node, operand) edges that carry its tensor.

Why from node names alone: `sqat.export.graph` put the module name there, so nothing has to be guessed from
the weights or from the graph's shape. Left out: residual adds of a module that runs several times in one
forward (ALBERT), which the site's number cannot tell apart.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from onnx import GraphProto, NodeProto

from sqat.export.names import WEIGHTED, module_of

PRODUCT_ROLES = {"query": (0, 0), "key": (0, 1), "softmax": (1, 0), "value": (1, 1)}
ADD_ROLE = re.compile(r"add([0-9]+)\.(left|right)")


class Edge(NamedTuple):
    """One operand of one node: where a Q/DQ pair can be put."""

    node: int
    operand: int


class Linear(NamedTuple):
    """One run of a linear or convolution: its MatMul, Gemm or Conv, and the tensor that leaves it after the bias."""

    node: int
    output: str


class Anatomy:
    """Linears, attention products and residual adds of a graph, by module name, in order of execution."""

    def __init__(self, graph: GraphProto) -> None:
        self.nodes: Sequence[NodeProto] = graph.node
        self.constants = {tensor.name for tensor in graph.initializer}
        self.shapes = tensor_shapes(graph)
        self.consumers: dict[str, list[Edge]] = defaultdict(list)
        for index, node in enumerate(self.nodes):
            for operand, name in enumerate(node.input):
                self.consumers[name].append(Edge(index, operand))
        self.linears: dict[str, list[Linear]] = defaultdict(list)
        self.products: dict[str, list[int]] = defaultdict(list)
        self.adds: dict[str, list[int]] = defaultdict(list)
        for index, node in enumerate(self.nodes):
            self._place(index, node)

    def _place(self, index: int, node: NodeProto) -> None:
        module = module_of(node)
        if node.op_type in WEIGHTED and node.input[1] in self.constants:
            self.linears[module].append(Linear(index, self._after_bias(module, node)))
        elif node.op_type == "MatMul" and not self.constants & set(node.input):
            self.products[module].append(index)
        elif node.op_type == "Add" and self._is_residual(node):
            self.adds[module].append(index)

    def _after_bias(self, module: str, node: NodeProto) -> str:
        output: str = node.output[0]
        for edge in self.consumers[output]:
            follower = self.nodes[edge.node]
            other = follower.input[1 - edge.operand] if follower.op_type == "Add" else ""
            if module_of(follower) == module and other in self.constants:
                return str(follower.output[0])
        return output

    def _is_residual(self, node: NodeProto) -> bool:
        left, right = (self.shapes.get(name) for name in node.input)
        return not self.constants & set(node.input) and left == right and left is not None and len(left) == 3

    def edges(self, site: str) -> list[Edge]:
        """Edges that carry the tensor of a site; empty where the graph has no such site."""
        module, _, role = site.rpartition(":")
        if role == "input":
            return [Edge(linear.node, 0) for linear in self.linears.get(module, ())]
        if role == "output":
            return [edge for linear in self.linears.get(module, ()) for edge in self.consumers[linear.output]]
        if role in PRODUCT_ROLES:
            which, operand = PRODUCT_ROLES[role]
            products = self.products.get(module, [])
            return [Edge(node, operand) for node in products[which::2]] if len(products) % 2 == 0 else []
        return self._add_edges(module, role)

    def _add_edges(self, module: str, role: str) -> list[Edge]:
        match = ADD_ROLE.fullmatch(role)
        adds = self.adds.get(module, [])
        if match is None or int(match[1]) >= len(adds):
            return []
        return [Edge(adds[int(match[1])], 0 if match[2] == "left" else 1)]


def tensor_shapes(graph: GraphProto) -> dict[str, tuple[int | str, ...]]:
    """Shapes the graph itself declares, symbolic sizes by name."""
    return {
        value.name: tuple(size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }
