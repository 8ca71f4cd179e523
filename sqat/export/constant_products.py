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

from sqat.export.names import module_of
from sqat.export.quantized_model import QuantizedModel
from sqat.quantization.fake_quant import fake_quantize
from sqat.runtime.sessions import session

Array = NDArray[np.generic]


def compute_constant_products(
    model: ModelProto, quantized: QuantizedModel
) -> dict[str, tuple[str, NDArray[np.float32]]]:
    """Compute the linears of a float graph whose inputs are constant, as fake quantization does.

    Returns:
        Name of the output of a MatMul or Gemm -> its layer and its value.
    """
    constants = constant_tensors(model.graph)
    nodes = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm") and node.input[0] in constants
             and module_of(node) in quantized.weights and node.input[1] in constants]  # fmt: skip
    values = evaluate(model, {name for node in nodes for name in (node.input[0], *node.input[2:])}) if nodes else {}
    return {node.output[0]: (module_of(node), multiply(node, values, quantized)) for node in nodes}


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


def multiply(node: NodeProto, values: dict[str, Array], quantized: QuantizedModel) -> NDArray[np.float32]:
    """Compute one product of int8 numbers, with the bias of a Gemm."""
    layer = module_of(node)
    weight_OI, scale_O = quantized.weights[layer]  # noqa: N806
    table, *bias = (torch.from_numpy(values[name]) for name in (node.input[0], *node.input[2:]))
    x: Tensor = fake_quantize(table, torch.tensor(quantized.amax[f"{layer}:input"]))
    product = x.double() @ (weight_OI * scale_O[:, None]).double().T
    result: NDArray[np.float32] = sum(bias, product).float().numpy()
    return result
