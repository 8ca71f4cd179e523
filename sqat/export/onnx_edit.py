"""Adding nodes and constants to an `onnx_ir` graph under free names that carry their module.

Subgraphs of If, Loop and Scan are not supported: encoders have none.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import ModelProto

from sqat.export.names import module_in_name, node_name

Array = NDArray[Any]
LAYOUT_OPS = ("Transpose", "Reshape", "Squeeze", "Unsqueeze")


class GraphEditor:
    """A graph under change, and the names in use.

    Args:
        model: is not changed.
    """

    def __init__(self, model: ModelProto) -> None:
        self.model = ir.from_proto(model)
        self.graph = self.model.graph
        self.names = {node.name for node in self.graph} | set(self.graph.initializers)
        self.names |= {value.name for node in self.graph for value in node.outputs}
        self.names |= {value.name for value in self.graph.inputs}
        self.constants: list[tuple[ir.Value, str]] = []

    def add_constant(self, name: str, value: Array | np.generic) -> ir.Value:
        """Add an initializer; `finish` gives it its name if another initializer has made way by then."""
        free = self.free_name(name)
        array = np.asarray(value)
        tensor = ir.tensor(array, name=free)
        constant = ir.val(free, tensor.dtype, array.shape, const_value=tensor)
        self.graph.register_initializer(constant)
        self.constants.append((constant, name))
        return constant

    def add_node(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        module: str,
        *,
        before: ir.Node | None = None,
        after: ir.Node | None = None,
        dtype: ir.DataType | None = None,
        shape: ir.Shape | None = None,
        attributes: Mapping[str, int | Sequence[int]] | None = None,
    ) -> ir.Value:
        """Add a node beside another one, or at the front; return its output of the given type and shape."""
        name = self.free_name(node_name(module, op))
        output = ir.val(f"{name}:0", dtype, None if shape is None else ir.Shape(list(shape)))
        node = ir.node(op, inputs, attributes, outputs=[output], name=name)
        if after is not None:
            self.graph.insert_after(after, node)
        else:
            self.graph.insert_before(before or self.graph[0], node)
        return output

    def free_name(self, name: str) -> str:
        """Reserve a name, with a number if it is in use."""
        names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
        free = next(candidate for candidate in names if candidate not in self.names)
        self.names.add(free)
        return free

    def finish(self) -> ModelProto:
        """Drop nodes and initializers without readers (B15), sort the nodes, and return the model."""
        for node in reversed(list(self.graph)):
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                self.graph.remove(node, safe=True)
        initializers = self.graph.initializers
        for name, value in list(initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del initializers[name]
        for value, name in self.constants:
            if value.graph is self.graph and name not in initializers and value.name in initializers:
                value.name = name
        self.graph.sort()
        return ir.to_proto(self.model)


def producer(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """Get the node that computes a value if its operator is one of those given, or any if none is given."""
    node = value.producer() if value is not None else None
    return node if node is not None and (not operators or node.op_type in operators) else None


def only_reader(value: ir.Value) -> ir.Node | None:
    """Get the one node that reads a value; None where several do, or the graph outputs it."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def constant_value(value: ir.Value | None) -> Array | None:
    """Get the array of an initializer or Constant node; None for anything else."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else np.asarray(tensor.numpy())


def require_constant(value: ir.Value | None) -> tuple[ir.Value, Array]:
    """Get a stored value and its array.

    Raises:
        ValueError: the value is computed or missing.
    """
    array = constant_value(value)
    if value is None or array is None:
        raise ValueError(f"{value.name if value is not None else 'a missing operand'} is not stored in the graph")
    return value, array


def weight_chain(value: ir.Value | None) -> list[ir.Node]:
    """List DQ, or Q and DQ, between a stored weight and its reader; empty for a float weight or an activation."""
    dequantizer = producer(value, "DequantizeLinear")
    if dequantizer is None:
        return []
    quantizer = producer(dequantizer.inputs[0], "QuantizeLinear")
    chain = [dequantizer] if quantizer is None else [quantizer, dequantizer]
    return chain if constant_value(chain[0].inputs[0]) is not None else []


def raise_dead_scales(weight: Array, scales: Array, axis: int) -> Array:
    """Raise the scales of all-zero channels to the largest scale, which changes no value of the weight.

    Args:
        scales: one for every channel along ``axis``, or 0-d, which is returned unchanged.
    """
    if scales.ndim == 0:
        return scales
    alive = weight.any(axis=tuple(other for other in range(weight.ndim) if other != axis % weight.ndim))
    return np.where(alive, scales, scales.max(where=alive, initial=0) or 1).astype(scales.dtype)


def module_name(node: ir.Node) -> str:
    """Get the dotted module name of a node, empty where its name holds none."""
    return module_in_name(node.name or "")
