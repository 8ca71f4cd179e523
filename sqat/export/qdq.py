"""Write Q/DQ pairs and int8 weights into a float graph, by rules B1 to B15.

A weight is int8 -> DequantizeLinear (``dq``), or float32 -> QuantizeLinear -> DequantizeLinear (``qdq``) for
TensorRT 8 and Polygraphy, whose floats are integers times scale (B4). Scales are known and final, so no quantizer of a
library is needed.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper
from torch import Tensor

from sqat.errors import SqatError
from sqat.export.constant_products import compute_constant_products
from sqat.export.folding import move_factors
from sqat.export.names import PRODUCT, node_name
from sqat.export.quantized_model import QuantizedModel
from sqat.export.sites import Edge, SiteIndex
from sqat.quantization.fake_quant import ACTIVATION_LOW, HIGH

WeightForm = Literal["dq", "qdq"]


def insert_qdq(
    model: ModelProto, quantized: QuantizedModel, weights: WeightForm = "dq", join_outputs: bool = False
) -> ModelProto:
    """Write the Q/DQ pairs and int8 weights into a copy of a float graph.

    Args:
        model: from `sqat.export.graph.export_float`.
        weights: ``dq`` for int8 -> DQ, ``qdq`` for float32 -> Q -> DQ.
        join_outputs: one pair behind a product for all readers, the only form that ONNX Runtime computes in int8.

    Raises:
        SqatError: a layer or site is not in the graph, or a layer has a weight but no input amax.
        ValueError: an amax is not positive and finite, or a weight does not have the graph's shape.
    """
    index = SiteIndex(model.graph)
    check_names(index, quantized)
    result = ModelProto()
    result.CopyFrom(model)
    forks = find_forks(index, quantized.amax) if join_outputs else frozenset[str]()
    writer = QdqWriter(result.graph, weights, forks)
    pairs = pairs_on_edges(index, quantized.amax, forks)
    layers = {run.node: layer for layer in quantized.weights for run in index.linears[layer]}
    stored = {name: writer.add_constant(f"{layer}{PRODUCT}", product)
              for name, (layer, product) in compute_constant_products(model, index, quantized).items()}  # fmt: skip
    computed = {run.node for layer in quantized.weights for run in index.linears[layer] if run.output in stored}
    for number, node in enumerate(model.graph.node):
        if number in computed or node.output[0] in stored:
            continue
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [stored.get(name, name) for name in node.input]
        for operand in range(len(node.input)):
            for site, scale in pairs.get(Edge(number, operand), []):
                copy.input[operand] = writer.add_pair(copy.input[operand], site, scale)
        if number in layers:
            copy.input[1] = writer.add_weight(node, layers[number], *quantized.weights[layers[number]])
        writer.nodes.append(copy)
    writer.finish()
    has_outputs = any(site.endswith(":output") for site in quantized.amax)
    return move_factors(result) if has_outputs else result


def check_names(index: SiteIndex, quantized: QuantizedModel) -> None:
    """Refuse layers and sites that are not in the graph, and layers quantized on one side only (B9)."""
    missing = [layer for layer in quantized.weights if layer not in index.linears]
    missing += [site for site in quantized.amax if not index.edges(site)]
    if missing:
        raise SqatError(f"{len(missing)} quantized layers or sites are not in the graph: {', '.join(missing[:3])}",
                        "export the graph from the model that was calibrated", code="model-mismatch")  # fmt: skip
    inputs = {site.removesuffix(":input") for site in quantized.amax if site.endswith(":input")}
    if incomplete := sorted(inputs ^ set(quantized.weights)):
        raise SqatError(f"layer {incomplete[0]} needs both an int8 weight and an input amax, and has one of them",
                        code="model-mismatch")  # fmt: skip


def pairs_on_edges(
    index: SiteIndex, amax: Mapping[str, float], forks: Collection[str] = ()
) -> dict[Edge, list[tuple[str, np.float32]]]:
    """List site and scale of the pairs on each edge: a producer's ``:output`` first, and a repeated scale once.

    What reads a fork has a pair of its own in any case, since that of the output is not right before it.
    """
    pairs: dict[Edge, list[tuple[str, np.float32]]] = defaultdict(list)
    for site in sorted(amax, key=lambda name: not name.endswith(":output")):
        scale = activation_scale(site, amax[site])
        for edge in index.edges(site):
            is_fork = len(pairs[edge]) == 1 and index.nodes[edge.node].input[edge.operand] in forks
            if not pairs[edge] or pairs[edge][-1][1] != scale or is_fork:
                pairs[edge].append((site, scale))
    return pairs


def find_forks(index: SiteIndex, amax: Iterable[str]) -> frozenset[str]:
    """Find the quantized outputs of products that several nodes read, without a bias Add between."""
    layers = (site.removesuffix(":output") for site in amax if site.endswith(":output"))
    outputs = {run.output for layer in layers for run in index.linears[layer]
               if run.output == index.nodes[run.node].output[0]}  # fmt: skip
    return frozenset(output for output in outputs if len(index.consumers[output]) > 1)


def activation_scale(site: str, amax: float) -> np.float32:
    """Compute a scale in float32, as the fake quantizer does."""
    scale: np.float32 = np.divide(amax, HIGH, dtype=np.float32)
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"site {site} has amax {amax}, needs a positive finite one")
    return scale


class QdqWriter:
    """A graph under change: its new nodes in order, and its initializers by name."""

    def __init__(self, graph: GraphProto, form: WeightForm, forks: Collection[str]) -> None:
        self.graph = graph
        self.form = form
        self.forks = forks
        self.joined: dict[str, str] = {}
        self.nodes: list[NodeProto] = []
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.names = {node.name for node in graph.node} | set(self.tensors)

    def add_pair(self, tensor: str, site: str, scale: np.float32) -> str:
        """Quantize and dequantize a tensor for one consumer (B10), a fork for all; return the name of the result."""
        if tensor in self.joined:
            return self.joined[tensor]
        # With a common zero point ONNX Runtime merges the equal pairs of q, k and v before it looks for int8 products,
        # and leaves all three in float.
        operands = [
            self.add_constant(f"{site}_scale", scale),
            self.add_constant(f"{site}_zero_point", np.int8(0)),
        ]
        quantized = self.add_node("QuantizeLinear", [tensor, *operands], site)
        result = self.add_node("DequantizeLinear", [quantized, *operands], site)
        if tensor in self.forks:
            # ONNX Runtime has int8 products with one Q behind them, and gives each reader of a DQ one of its own, which
            # undoes that on x86. A Clip to the whole range changes nothing, and is the only reader.
            limits = (self.add_constant(f"{site}_{name}", np.float32(value) * scale)
                      for name, value in (("low", ACTIVATION_LOW), ("high", HIGH)))  # fmt: skip
            result = self.joined[tensor] = self.add_node("Clip", [result, *limits], site)
        return result

    def add_weight(self, node: NodeProto, layer: str, weight_OI: Tensor, scale_O: Tensor) -> str:  # noqa: N803
        """Put a weight behind its DequantizeLinear, in the layout that its operator reads (B5)."""
        outputs_first = node.op_type == "Conv" or int_attribute(node, "transB") == 1
        stored = weight_OI if outputs_first else weight_OI.t()
        expected = tuple(self.tensors[node.input[1]].dims)
        if tuple(stored.shape) != expected or tuple(scale_O.shape) != (weight_OI.shape[0],):
            raise ValueError(f"layer {layer}: weight {tuple(stored.shape)} in a graph that has {expected}")
        axis = 0 if outputs_first else 1
        integers, scale = stored.contiguous().numpy(), scale_O.float().numpy()
        scales = [
            self.add_constant(f"{layer}.weight_scale", scale),
            self.add_constant(f"{layer}.weight_zero_point", np.zeros(len(scale), np.int8)),
        ]
        site = f"{layer}:weight"
        if self.form == "dq":
            quantized = self.add_constant(f"{layer}.weight_int8", integers)
        else:
            floats = integers * (scale.reshape(-1, *[1] * (integers.ndim - 1)) if outputs_first else scale)
            constant = self.add_constant(f"{layer}.weight_float", floats)
            quantized = self.add_node("QuantizeLinear", [constant, *scales], site, axis)
        return self.add_node("DequantizeLinear", [quantized, *scales], site, axis)

    def add_constant(self, name: str, value: NDArray[np.generic] | np.generic) -> str:
        """Add an initializer; it is never shared, so a repeated name gets a number."""
        free = self.free_name(name)
        self.graph.initializer.add().CopyFrom(numpy_helper.from_array(np.asarray(value), free))
        return free

    def add_node(self, op: str, inputs: list[str], site: str, axis: int | None = None) -> str:
        """Append a node named after its site; return its output."""
        module, _, role = site.rpartition(":")
        name = self.free_name(node_name(f"{module}.{role}", op))
        self.nodes.append(helper.make_node(op, inputs, [f"{name}:0"], name=name, axis=axis))
        return f"{name}:0"

    def free_name(self, name: str) -> str:
        """Reserve a name, with a number if it is in use."""
        names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
        free = next(candidate for candidate in names if candidate not in self.names)
        self.names.add(free)
        return free

    def finish(self) -> None:
        """Put the new nodes in place and drop nodes and float weights that nothing reads (B15)."""
        used, nodes = {value.name for value in self.graph.output}, list[NodeProto]()
        for node in reversed(self.nodes):
            if used & set(node.output):
                used.update(node.input)
                nodes.insert(0, node)
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        for index in reversed(range(len(self.graph.initializer))):
            if self.graph.initializer[index].name not in used:
                del self.graph.initializer[index]


def int_attribute(node: NodeProto, name: str) -> int:
    """Get an integer attribute of a node, 0 where it is not set."""
    return next((int(entry.i) for entry in node.attribute if entry.name == name), 0)
