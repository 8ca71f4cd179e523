"""ONNX files with changed nodes, names, shapes and values, for `sqat inspect` and `sqat engine`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper

from scripts.faults.fuzzing.case import HOSTILE_TEXTS, Action, cut, flip_bytes

LAYER = """<ir_version: 9, opset_import: ["" : 21]>
g (float[n, 32] x) => (float[n, 32] y) <float s = {0.1}, int8 z = {0}> {
    q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) t = DequantizeLinear<axis = 1>(w, ws, wz)
    p = MatMul(d, t) r = Reshape(p, shape) u = Transpose<perm = [0, 1]>(r) o = Add(u, b) y = Relu(o)
}"""
COMMANDS = (
    ["inspect", "model.onnx"], ["inspect", "model.onnx", "--fix"], ["inspect", "model.onnx", "--json"],
    *(["inspect", "model.onnx", "--target", name] for name in ("tensorrt", "tensorrt-8", "onnx-int8", "onnx-fp16")),
    ["engine", "model.onnx", "--output", "."],
)  # fmt: skip
OPERATORS = ("Identity", "Transpose", "Reshape", "Cast", "QuantizeLinear", "DequantizeLinear", "MatMul", "Gemm", "Conv",
             "Constant", "Concat", "Slice", "Split", "Add", "Softmax", "If", "Einsum", "Unknown")  # fmt: skip
NUMBERS = (0, 1, -1, 2, 7, 99, 1 << 31, 1 << 62, -(1 << 63))


@cache
def quantized_layer() -> ModelProto:
    """Return a small sound model: a 2:4 layer between Q and DQ."""
    model = onnx.parser.parse_model(LAYER)
    weight = np.ones((32, 32), np.int8)
    weight[::2] = 0
    values: dict[str, NDArray[Any]] = {
        "w": weight,
        "ws": np.ones(32, np.float32),
        "wz": np.zeros(32, np.int8),
        "b": np.ones(32, np.float32),
        "shape": np.array([-1, 32]),
    }
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    return model


def make_case(draw: random.Random, folder: Path) -> Sequence[Action]:
    """Write a model with up to four changes."""
    model = ModelProto.FromString(quantized_layer().SerializeToString())
    for _ in range(draw.randint(0, 4)):
        draw.choice(CHANGES)(draw, model)
    raw = model.SerializeToString()
    if draw.random() < 0.1:
        raw = draw.choice((flip_bytes, cut))(draw, raw)
    (folder / "model.onnx").write_bytes(raw)
    return [draw.choice(COMMANDS)]


def change_operands(draw: random.Random, model: ModelProto) -> None:
    """Let a node read other tensors, or none."""
    node = draw.choice(model.graph.node)
    names = ["", *(name for other in model.graph.node for name in (*other.input, *other.output))]
    side = draw.choice((node.input, node.input, node.output))
    kept = [draw.choice(names) if draw.random() < 0.4 else name for name in side]
    side[:] = kept[: draw.randint(0, len(kept) + 1)]


def change_operator(draw: random.Random, model: ModelProto) -> None:
    """Give a node another operator or domain."""
    node = draw.choice(model.graph.node)
    node.op_type = draw.choice(OPERATORS)
    node.domain = draw.choice(("", "", "com.microsoft", "sqat", "my"))


def change_attribute(draw: random.Random, model: ModelProto) -> None:
    """Give a node an attribute with odd numbers."""
    name = draw.choice(("axis", "perm", "to", "output_dtype", "block_size", "transB", "num_outputs", "value"))
    value = [draw.choice(NUMBERS) for _ in range(draw.randint(1, 3))] if draw.random() < 0.5 else draw.choice(NUMBERS)
    node = draw.choice(model.graph.node)
    kept = [entry for entry in node.attribute if entry.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])


def change_tensor(draw: random.Random, model: ModelProto) -> None:
    """Give a stored tensor another shape, type, or other data."""
    tensor = draw.choice(model.graph.initializer)
    match draw.randint(0, 4):
        case 0:
            tensor.dims[:] = [draw.choice(NUMBERS) for _ in range(draw.randint(0, 3))]
        case 1:
            tensor.data_type = draw.randint(-1, 30)
        case 2:
            tensor.raw_data = cut(draw, tensor.raw_data)
        case 3:
            tensor.raw_data = flip_bytes(draw, tensor.raw_data)
        case _:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(
                key="location", value=draw.choice(("../secret", "model.onnx", "/etc/hostname", "a"))
            )


def change_name(draw: random.Random, model: ModelProto) -> None:
    """Give a node, or a tensor everywhere, a name that a terminal may obey."""
    new = draw.choice(HOSTILE_TEXTS).encode("utf-8", "replace").decode()
    node = draw.choice(model.graph.node)
    old, node.name = node.output[0] if node.output else "", new
    for reader in model.graph.node:
        reader.input[:] = [new if name == old and old else name for name in reader.input]
    node.output[:] = [new if name == old else name for name in node.output]


def repeat_node(draw: random.Random, model: ModelProto) -> None:
    """Add a node again, in another place."""
    nodes = list(model.graph.node)
    nodes.insert(draw.randint(0, len(nodes)), draw.choice(nodes))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


CHANGES: tuple[Callable[[random.Random, ModelProto], None], ...] = (
    change_operands, change_operator, change_attribute, change_tensor, change_name, repeat_node,
)  # fmt: skip
