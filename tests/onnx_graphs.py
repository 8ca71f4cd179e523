"""What tests ask of an ONNX graph."""

from __future__ import annotations

from collections import Counter

from onnx import GraphProto


def count_operators(graph: GraphProto) -> Counter[str]:
    """Return how many nodes of each operator a graph has."""
    return Counter(node.op_type for node in graph.node)
