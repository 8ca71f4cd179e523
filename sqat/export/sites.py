"""Where the layers and activation sites of a checkpoint lie in an exported graph, by the modules in node names.

A module may run several times in one forward (ALBERT): each run has nodes of its own, and its sites lie in all of them.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from onnx import GraphProto, NodeProto

from sqat.export.names import WEIGHTED, module_of

PRODUCT_ROLES = {"query": (0, 0), "key": (0, 1), "softmax": (1, 0), "value": (1, 1)}
ADD_ROLE = re.compile(r"add([0-9]+)\.(left|right)")


class Edge(NamedTuple):
    """One operand of one node: a place for a Q/DQ pair."""

    node: int
    operand: int


class LinearNode(NamedTuple):
    """One run of a linear or convolution: its MatMul, Gemm or Conv, and the tensor that leaves it after the bias."""

    node: int
    output: str


class SiteIndex:
    """Linears, attention products and residual adds of a graph, by module name, in order of execution."""

    def __init__(self, graph: GraphProto) -> None:
        self.nodes: Sequence[NodeProto] = graph.node
        self.constants = {tensor.name for tensor in graph.initializer}
        self.shapes = tensor_shapes(graph)
        self.consumers: dict[str, list[Edge]] = defaultdict(list)
        for index, node in enumerate(self.nodes):
            for operand, name in enumerate(node.input):
                self.consumers[name].append(Edge(index, operand))
        self.linears: dict[str, list[LinearNode]] = defaultdict(list)
        self.products: dict[str, list[int]] = defaultdict(list)
        self.adds: dict[str, list[int]] = defaultdict(list)
        for index, node in enumerate(self.nodes):
            module = module_of(node)
            if node.op_type in WEIGHTED and node.input[1] in self.constants:
                self.linears[module].append(LinearNode(index, self.output_after_bias(module, node)))
            elif node.op_type == "MatMul" and not self.constants & set(node.input):
                self.products[module].append(index)
            elif node.op_type == "Add" and self.is_residual(node):
                self.adds[module].append(index)

    def output_after_bias(self, module: str, node: NodeProto) -> str:
        """Get the output of the bias Add that follows a node in its module, or the node's own."""
        output: str = node.output[0]
        for edge in self.consumers[output]:
            follower = self.nodes[edge.node]
            other = follower.input[1 - edge.operand] if follower.op_type == "Add" else ""
            if module_of(follower) == module and other in self.constants:
                return str(follower.output[0])
        return output

    def is_residual(self, node: NodeProto) -> bool:
        """Whether an Add sums two activations of rank 3 and equal shape."""
        left, right = (self.shapes.get(name) for name in node.input)
        return not self.constants & set(node.input) and left == right and left is not None and len(left) == 3

    def edges(self, site: str) -> list[Edge]:
        """List the edges that carry the tensor of a site; empty where the graph has no such site."""
        module, _, role = site.rpartition(":")
        if role == "input":
            return [Edge(linear.node, 0) for linear in self.linears.get(module, ())]
        if role == "output":
            return [edge for linear in self.linears.get(module, ()) for edge in self.consumers[linear.output]]
        if role in PRODUCT_ROLES:
            which, operand = PRODUCT_ROLES[role]
            products = self.products.get(module, [])
            return [Edge(node, operand) for node in products[which::2]] if len(products) % 2 == 0 else []
        match, adds = ADD_ROLE.fullmatch(role), self.adds.get(module, [])
        per_run = len(adds) // self.count_runs(module)
        if match is None or int(match[1]) >= per_run:
            return []
        return [Edge(add, 0 if match[2] == "left" else 1) for add in adds[int(match[1]) :: per_run]]

    def count_runs(self, module: str) -> int:
        """Count how often a module with residual adds runs, by the linears in it; by those around it if it has none."""
        adds, runs = len(self.adds.get(module, [])), list[int]()
        while not runs and module:
            within = (name for name in self.linears if name == module or name.startswith(f"{module}."))
            runs = [len(self.linears[name]) for name in within]
            module = module.rpartition(".")[0]
        return math.gcd(adds, *runs) if adds and runs else 1


def tensor_shapes(graph: GraphProto) -> dict[str, tuple[int | str, ...]]:
    """Get the shapes that the graph declares, symbolic sizes by name."""
    return {
        value.name: tuple(size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }
