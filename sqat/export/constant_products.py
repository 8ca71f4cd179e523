"""Compute the products of quantized linears that read no input of the graph, such as a table of relative positions.

A file stores their results. ONNX Runtime would compute them in float at every call: it has no int8 product of two
constants.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper
from torch import Tensor
from torch.nn import functional

from sqat.export.quantized_model import QuantizedModel
from sqat.export.sites import LinearNode, SiteIndex
from sqat.quantization.fake_quant import fake_quantize
from sqat.runtime.sessions import session

Array = NDArray[np.generic]


def compute_constant_products(
    model: ModelProto, index: SiteIndex, quantized: QuantizedModel
) -> dict[str, tuple[str, NDArray[np.float32]]]:
    """Compute the linears of a float graph whose inputs are constant, to the bit as fake quantization does.

    Returns:
        Name of what leaves a linear behind its bias -> its layer and its value.
    """
    constants = constant_tensors(model.graph)
    runs = {
        run.output: (layer, linear_inputs(index, run))
        for layer in quantized.weights
        for run in index.linears[layer]
        if index.nodes[run.node].op_type != "Conv" and index.nodes[run.node].input[0] in constants
    }
    values = evaluate(model, {name for _, names in runs.values() for name in names}) if runs else {}
    return {output: (layer, multiply(layer, [torch.from_numpy(values[name]) for name in names], quantized))
            for output, (layer, names) in runs.items()}  # fmt: skip


def linear_inputs(index: SiteIndex, run: LinearNode) -> list[str]:
    """Name what a linear multiplies, and its bias if it has one."""
    node = index.nodes[run.node]
    bias = [name for edge in index.consumers[node.output[0]] if run.output in index.nodes[edge.node].output
            for name in index.nodes[edge.node].input if name in index.constants]  # fmt: skip
    return [node.input[0], *(node.input[2:] or bias)]


def constant_tensors(graph: GraphProto) -> set[str]:
    """Name the initializers of a graph and what its nodes compute from them alone."""
    names = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" or (node.input and names.issuperset(filter(None, node.input))):
            names.update(node.output)
    return names


def evaluate(model: ModelProto, names: Iterable[str]) -> dict[str, Array]:
    """Compute constant tensors of a graph."""
    outputs, needed, nodes = sorted(names), set(names), list[NodeProto]()
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            nodes.insert(0, node)
            needed.update(node.input)
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    part = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    part.graph.CopyFrom(helper.make_graph(nodes, "constants", [], values, tensors))
    results = session(part.SerializeToString(), optimize=False).run(None, {})
    return dict(zip(outputs, results, strict=True))


def multiply(layer: str, inputs: list[Tensor], quantized: QuantizedModel) -> NDArray[np.float32]:
    """Compute one linear of int8 numbers."""
    weight_OI, scale_O = quantized.weights[layer]  # noqa: N806
    table, *bias = inputs
    x = fake_quantize(table, torch.tensor(quantized.amax[f"{layer}:input"]))
    result: NDArray[np.float32] = functional.linear(x, weight_OI * scale_O[:, None], *bias).numpy()
    return result
