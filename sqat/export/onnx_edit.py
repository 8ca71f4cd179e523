"""New nodes and constants in a graph that is being rewritten, named as the rest of it.

What: `Rewriting` holds an `onnx_ir` graph and the names in it, and adds nodes and initializers whose names are
free and carry the module they belong to, as `sqat.export.graph` made them. The passes over a finished graph
(`folding`, `conv1x1`, `float16`, `embeddings`) share it.

Why `onnx_ir` there and not the protobuf: a pass follows tensors both ways and replaces them, and every replaced
reader has to be kept. Left out: subgraphs of If, Loop and Scan, which encoders do not have.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import ModelProto

from sqat.export.names import module_named, node_name

Array = NDArray[Any]
LAYOUT = ("Transpose", "Reshape", "Squeeze", "Unsqueeze")


class Rewriting:
    """A graph being rewritten, and the names that are taken in it."""

    def __init__(self, model: ModelProto) -> None:
        self.model = ir.from_proto(model)
        self.graph = self.model.graph
        self.names = {node.name for node in self.graph} | set(self.graph.initializers)
        self.names |= {value.name for node in self.graph for value in node.outputs}
        self.names |= {value.name for value in self.graph.inputs}
        self.replacing: list[tuple[ir.Value, str]] = []

    def constant(self, name: str, value: Array | np.generic) -> ir.Value:
        """Add an initializer, numbered if its name is taken; it gets the name if that is free in the end."""
        free = self.free(name)
        array = np.asarray(value)
        tensor = ir.tensor(array, name=free)
        made = ir.val(free, tensor.dtype, array.shape, const_value=tensor)
        self.graph.register_initializer(made)
        self.replacing.append((made, name))
        return made

    def node(
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
        """Put a node of one output beside another one; returns the output, of the type and shape given."""
        name = self.free(node_name(module, op))
        output = ir.val(f"{name}:0", dtype, None if shape is None else ir.Shape(list(shape)))
        made = ir.node(op, inputs, attributes, outputs=[output], name=name)
        if after is not None:
            self.graph.insert_after(after, made)
        else:
            self.graph.insert_before(before or self.graph[0], made)
        return output

    def free(self, name: str) -> str:
        """The name, numbered if it is taken; taken from now on."""
        names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
        found = next(candidate for candidate in names if candidate not in self.names)
        self.names.add(found)
        return found

    def finish(self) -> ModelProto:
        """Drop nodes and initializers that nothing reads any more (B15), sort, and hand the model back."""
        for node in reversed(list(self.graph)):
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                self.graph.remove(node, safe=True)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]
        for value, name in self.replacing:
            if (
                value.graph is self.graph
                and name not in self.graph.initializers
                and value.name in self.graph.initializers
            ):
                value.name = name
        self.graph.sort()
        return ir.to_proto(self.model)


def maker(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """The node that makes a value if it is one of the operators (any where none is given), else None."""
    node = value.producer() if value is not None else None
    return node if node is not None and (not operators or node.op_type in operators) else None


def stored(value: ir.Value | None) -> Array | None:
    """What an initializer or a Constant node holds, None for anything else."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else np.asarray(tensor.numpy())


def known(value: ir.Value | None) -> tuple[ir.Value, Array]:
    """A stored value and what it holds; ValueError for anything else."""
    array = stored(value)
    if value is None or array is None:
        raise ValueError(f"{value.name if value is not None else 'an operand left out'} is not stored in the graph")
    return value, array


def weight_chain(value: ir.Value | None) -> list[ir.Node]:
    """DQ, or Q and DQ, between a stored weight and its reader; empty for a float weight or an activation."""
    dequantizer = maker(value, "DequantizeLinear")
    if dequantizer is None:
        return []
    quantizer = maker(dequantizer.inputs[0], "QuantizeLinear")
    chain = [dequantizer] if quantizer is None else [quantizer, dequantizer]
    return chain if stored(chain[0].inputs[0]) is not None else []


def live_scales(weight: Array, scales: Array, axis: int) -> Array:
    """A weight's scales with those of all-zero channels raised to the largest, which changes no number of it.

    Args:
        weight: as stored.
        scales: one for every channel along ``axis``, or 0-d, which is returned as it is.
    """
    if scales.ndim == 0:
        return scales
    alive = weight.any(axis=tuple(other for other in range(weight.ndim) if other != axis % weight.ndim))
    return np.where(alive, scales, scales.max(where=alive, initial=0) or 1).astype(scales.dtype)


def module(node: ir.Node) -> str:
    """Dotted module name in a node's name, empty where it holds none."""
    return module_named(node.name or "")
