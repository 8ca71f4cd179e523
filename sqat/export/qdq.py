"""The Q/DQ writer: a float graph and the checkpoint's scales in, an int8 graph by rules B1-B15 out.

What: each quantized linear or convolution gets its weight as an int8 initializer behind a DequantizeLinear (``dq``)
or as float32 behind a QuantizeLinear and a DequantizeLinear (``qdq``), and every site of the checkpoint a pair of the
two on the edge it names. Each edge has its own pair even where three layers read one tensor: a shared pair leaves
half of the products in float in ONNX Runtime (B10).

Why ours and not a quantizer's: the scales are known, symmetric and final, so nothing is left to decide but to
put them where the torch model had them. Where two sites of equal scale meet on an edge one pair is written.
Why two forms of weights (B4): ``dq`` is a file of a quarter of the size; TensorRT 8 reads only ``qdq``, and so
does Polygraphy's search for 2:4. There the float32 is the int8 times its scale, so that Q gives the int8 back.
Left out: float16 (`sqat.export.float16`) and linears as convolutions (`sqat.export.conv1x1`), which rewrite what is
written here. Padding needs nothing: the zero-point is 0.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper
from torch import Tensor

from sqat.errors import SqatError
from sqat.export.names import node_name
from sqat.export.quantized_model import QuantizedModel
from sqat.export.sites import Anatomy, Edge

LEVELS = 127
WeightForm = Literal["dq", "qdq"]


def insert_qdq(model: ModelProto, quantized: QuantizedModel, weights: WeightForm = "dq") -> ModelProto:
    """Write the Q/DQ pairs and int8 weights of a quantized into a copy of a float graph.

    Args:
        model: from `sqat.export.graph.export_float`; left as it is.
        quantized: layers and sites under the model's module names.
        weights: ``dq`` int8 -> DequantizeLinear, or ``qdq`` float32 -> QuantizeLinear -> DequantizeLinear.

    Raises:
        SqatError: a layer or site matches nothing in the graph, or a layer has a weight but no input bound.
        ValueError: a bound is not positive and finite, or a weight does not have the graph's shape.
    """
    anatomy = Anatomy(model.graph)
    check_names(anatomy, quantized)
    result = ModelProto()
    result.CopyFrom(model)
    writer = Writer(result.graph, weights)
    chains = site_chains(anatomy, quantized.amax)
    layers = {run.node: layer for layer in quantized.weights for run in anatomy.linears[layer]}
    for index, node in enumerate(model.graph.node):
        copied = NodeProto()
        copied.CopyFrom(node)
        for operand in range(len(node.input)):
            for site, scale in chains.get(Edge(index, operand), []):
                copied.input[operand] = writer.pair(copied.input[operand], site, scale)
        if index in layers:
            copied.input[1] = writer.weight(node, layers[index], *quantized.weights[layers[index]])
        writer.nodes.append(copied)
    writer.finish()
    return result


def check_names(anatomy: Anatomy, quantized: QuantizedModel) -> None:
    """Refuse layers and sites that the graph does not have, and layers quantized on one side only (B9)."""
    missing = [layer for layer in quantized.weights if layer not in anatomy.linears]
    missing += [site for site in quantized.amax if not anatomy.edges(site)]
    if missing:
        raise SqatError(
            f"{len(missing)} quantized layers or sites are not in the graph: {', '.join(missing[:3])}",
            "the graph must be exported from the model that was calibrated",
        )
    inputs = {site.removesuffix(":input") for site in quantized.amax if site.endswith(":input")}
    halves = sorted(inputs ^ set(quantized.weights))
    if halves:
        raise SqatError(f"layer {halves[0]} needs both an int8 weight and an input bound, and has one of them")


def site_chains(anatomy: Anatomy, amax: Mapping[str, float]) -> dict[Edge, list[tuple[str, np.float32]]]:
    """Sites and scales on each edge, the producer's ``:output`` first, a repeated scale once."""
    chains: dict[Edge, list[tuple[str, np.float32]]] = defaultdict(list)
    for site in sorted(amax, key=lambda name: not name.endswith(":output")):
        scale = activation_scale(site, amax[site])
        for edge in anatomy.edges(site):
            if not chains[edge] or chains[edge][-1][1] != scale:
                chains[edge].append((site, scale))
    return chains


def activation_scale(site: str, amax: float) -> np.float32:
    """Bound to scale, in float32 as the fake quantizer computes it."""
    scale: np.float32 = np.divide(amax, LEVELS, dtype=np.float32)
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"site {site} has amax {amax}, needs a positive finite one")
    return scale


class Writer:
    """A graph being rewritten: its new nodes in order, and its initializers by name."""

    def __init__(self, graph: GraphProto, form: WeightForm) -> None:
        self.graph = graph
        self.form = form
        self.nodes: list[NodeProto] = []
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.names = {node.name for node in graph.node} | set(self.tensors)

    def pair(self, tensor: str, site: str, scale: np.float32) -> str:
        """Quantize and dequantize a tensor for one consumer (B10); returns the name of what comes out.

        The zero-point is the pair's own: with a common one ONNX Runtime merges the equal pairs of q, k and v
        before it looks for int8 products, and then leaves all three in float.
        """
        operands = [self.constant(f"{site}_scale", scale), self.constant(f"{site}_zero_point", np.int8(0))]
        quantized = self.add("QuantizeLinear", [tensor, *operands], site)
        return self.add("DequantizeLinear", [quantized, *operands], site)

    def weight(self, node: NodeProto, layer: str, weight_OI: Tensor, scale_O: Tensor) -> str:  # noqa: N803
        """Put a weight behind its DequantizeLinear in the layout its op reads (B5)."""
        outputs_first = node.op_type == "Conv" or attribute(node, "transB") == 1
        stored = weight_OI if outputs_first else weight_OI.t()
        expected = tuple(self.tensors[node.input[1]].dims)
        if tuple(stored.shape) != expected or tuple(scale_O.shape) != (weight_OI.shape[0],):
            raise ValueError(f"layer {layer}: weight {tuple(stored.shape)} in a graph that has {expected}")
        axis = 0 if outputs_first else 1
        integers = stored.contiguous().numpy()
        scale = scale_O.float().numpy()
        scales = [
            self.constant(f"{layer}.weight_scale", scale),
            self.constant(f"{layer}.weight_zero_point", np.zeros(len(scale), np.int8)),
        ]
        if self.form == "dq":
            quantized = self.constant(f"{layer}.weight_int8", integers)
        else:
            floats = integers * (scale.reshape(-1, *[1] * (integers.ndim - 1)) if outputs_first else scale)
            quantized = self.add(
                "QuantizeLinear", [self.constant(f"{layer}.weight_float", floats), *scales], f"{layer}:weight", axis
            )
        return self.add("DequantizeLinear", [quantized, *scales], f"{layer}:weight", axis)

    def constant(self, name: str, value: NDArray[np.generic] | np.generic) -> str:
        """Add an initializer; never shared, so a number is added where a layer or site occurs again."""
        free = self.free(name)
        self.graph.initializer.add().CopyFrom(numpy_helper.from_array(np.asarray(value), free))
        return free

    def add(self, op: str, inputs: list[str], site: str, axis: int | None = None) -> str:
        """Append a node named after its site; returns its output."""
        module, _, role = site.rpartition(":")
        name = self.free(node_name(f"{module}.{role}", op))
        self.nodes.append(helper.make_node(op, inputs, [f"{name}:0"], name=name, axis=axis))
        return f"{name}:0"

    def free(self, name: str) -> str:
        """The name, numbered if it is taken; taken from now on."""
        names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
        found = next(candidate for candidate in names if candidate not in self.names)
        self.names.add(found)
        return found

    def finish(self) -> None:
        """Put the new nodes in place and drop the float weights that nothing reads any more (B15)."""
        used = {name for node in self.nodes for name in node.input}
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        for index in reversed(range(len(self.graph.initializer))):
            if self.graph.initializer[index].name not in used:
                del self.graph.initializer[index]


def attribute(node: NodeProto, name: str) -> int:
    """Integer attribute of a node, 0 where it is not set (the default of all that are read here)."""
    return next((int(entry.i) for entry in node.attribute if entry.name == name), 0)
