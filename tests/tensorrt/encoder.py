"""Build a graph with the layers, names and Q/DQ of a quantized two-layer encoder, in milliseconds and without torch.

Attention is a sum of q, k and v: what TensorRT does with the linears does not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

LAYERS = ("attention/self/query", "attention/self/key", "attention/self/value", "attention/output/dense",
          "intermediate/dense", "output/dense")  # fmt: skip
HIDDEN, INNER = 32, 64


@dataclass
class Graph:
    """Nodes and initializers as they are added, with names as the exporter gives them."""

    int8_out: bool
    seed: int = 0
    nodes: list[NodeProto] = field(default_factory=list)
    tensors: list[TensorProto] = field(default_factory=list)

    def constant(self, name: str, value: np.ndarray) -> str:
        self.tensors.append(numpy_helper.from_array(value, name))
        return name

    def node(self, operator: str, name: str, *inputs: str, **attributes: int) -> str:
        self.nodes.append(helper.make_node(operator, list(inputs), [f"{name}:0"], name=name, **attributes))
        return f"{name}:0"

    def pair(self, tensor: str, name: str) -> str:
        scale = self.constant(f"{name}_scale", np.float32(0.05))
        point = self.constant(f"{name}_zero_point", np.int8(0))
        quantized = self.node("QuantizeLinear", f"{name}/QuantizeLinear", tensor, scale, point)
        return self.node("DequantizeLinear", f"{name}/DequantizeLinear", quantized, scale, point)

    def linear(self, tensor: str, name: str, inputs: int, outputs: int) -> str:
        generator = np.random.default_rng(len(self.tensors) + self.seed)
        weight = generator.integers(1, 100, (inputs, outputs)).astype(np.int8)
        weight[::2] = 0
        dequantized = self.node(
            "DequantizeLinear",
            f"{name}/weight/DequantizeLinear",
            self.constant(f"{name}.weight_int8", weight),
            self.constant(f"{name}.weight_scale", np.full(outputs, 0.01, np.float32)),
            self.constant(f"{name}.weight_zero_point", np.zeros(outputs, np.int8)),
            axis=1,
        )
        product = self.node("MatMul", f"{name}/MatMul", self.pair(tensor, f"{name}/input"), dequantized)
        return self.node("Add", f"{name}/Add", product, self.constant(f"{name}.bias", np.ones(outputs, np.float32)))

    def read(self, tensor: str, name: str) -> str:
        """What reads a linear's output other than a linear."""
        return self.pair(tensor, name) if self.int8_out else tensor


def encoder(*, int8_out: bool = True, layers: int = 2) -> ModelProto:
    """A classifier over vectors [batch, sequence, 32] -> [batch, 3].

    Args:
        int8_out: whether a linear's output is quantized also where something else than a linear reads it (rule T16).
    """
    graph = Graph(int8_out)
    x = "hidden"
    for number in range(layers):
        names = [f"/bert/encoder/layer.{number}/{part}" for part in LAYERS]
        query, key, value = (graph.read(graph.linear(x, name, HIDDEN, HIDDEN), f"{name}/output") for name in names[:3])
        x = graph.node("Add", f"{names[0]}/sum/Add", query, key)
        x = graph.node("Add", f"{names[2]}/sum/Add", graph.read(x, f"{names[2]}/sum/left"), value)
        x = graph.linear(x, names[3], HIDDEN, HIDDEN)
        x = graph.read(graph.linear(x, names[4], HIDDEN, INNER), f"{names[4]}/output")
        x = graph.node("Gelu", f"{names[4]}/Gelu", x)
        x = graph.linear(x, names[5], INNER, HIDDEN)
    x = graph.read(x, "/bert/pooler/input")
    x = graph.node("ReduceMean", "/bert/pooler/ReduceMean", x, graph.constant("axes", np.array([1])), keepdims=0)
    generator = np.random.default_rng(9)
    for name, outputs in (("bert/pooler/dense", HIDDEN), ("classifier", 3)):
        weight = generator.normal(size=(outputs, HIDDEN)).astype(np.float32)
        bias = graph.constant(f"{name}.bias", np.zeros(outputs, np.float32))
        x = graph.node("Gemm", f"/{name}/Gemm", x, graph.constant(f"{name}.weight", weight), bias, transB=1)
    hidden = helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "sequence", HIDDEN])
    logits = helper.make_tensor_value_info(x, TensorProto.FLOAT, ["batch", 3])
    graph_proto = helper.make_graph(graph.nodes, "encoder", [hidden], [logits], graph.tensors)
    return helper.make_model(graph_proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
