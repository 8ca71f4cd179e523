"""TensorRT-RTX, which builds without a GPU: the parser takes every flavour, strongly typed, and the weights stay int8.

The network is strongly typed, so an engine that is built is proof that every type in the file agrees; and what it
says of its weights' memory, that int8 weights were not turned into floats. Which layers run sparse it decides on the
GPU. All families are built in the main flavours, one in every flavour, the rest with the marker ``slow``.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto, TensorProto

from sqat.tensorrt.build_engine import BuildError, build
from tests.witnesses.flavours import FAMILIES, FLAVOURS, embeds, exported

tensorrt_rtx = pytest.importorskip("tensorrt_rtx")

MAIN = ("folded", "fp16")  # of every family
EVERY = "electra"  # in every flavour
REFUSED = ("embeddings-int8", "onnx-fp16-embeddings-int8")
SIZES = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.INT8: 1, TensorProto.INT32: 4, TensorProto.INT64: 8}
SIZES |= {TensorProto.BOOL: 1}
# Each Q/DQ pair costs the engine some bytes of aligned scales, the rest a few constants of its own.
PER_PAIR, PER_ENGINE = 256, 2048

Build = Callable[[ModelProto], str]


def cases() -> list[object]:
    """All flavours of all families, those that are neither main nor of the one family marked slow."""
    return [
        pytest.param(flavour, name, marks=[] if flavour in MAIN or name == EVERY else pytest.mark.slow)
        for flavour in FLAVOURS
        for name in FAMILIES
        if flavour not in REFUSED and (embeds(name) or "embeddings" not in flavour)
    ]


def build_log(model: ModelProto, folder: Path) -> str:
    """The log of a build with sparse weights allowed and one dynamic profile; BuildError where it fails."""
    path = folder / "model.onnx"
    onnx.save(model, path)
    sizes = {entry.name: [axis.dim_value for axis in entry.type.tensor_type.shape.dim] for entry in model.graph.input}
    free = ((1, 2), (4, 16), (8, 40))
    shapes = {name: [[*end[: fixed.count(0)], *filter(None, fixed)] for end in free] for name, fixed in sizes.items()}
    log = io.StringIO()
    engine = build(tensorrt_rtx, path, shapes, [], log)
    assert engine.nbytes > 0
    return log.getvalue()


def weight_memory(log: str) -> int:
    """Bytes of weights in the engine."""
    found = re.search(r"Total Weights Memory: (\d+) bytes", log)
    assert found is not None
    return int(found[1])


def stored_bytes(model: ModelProto) -> int:
    """Bytes of a graph's weights and constants, what a QuantizeLinear reads counted as int8, zero-points left out."""
    quantized = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    return sum(
        elements(tensor) * (1 if tensor.name in quantized else SIZES[tensor.data_type])
        for tensor in model.graph.initializer
        if tensor.dims and not tensor.name.endswith("zero_point")
    )


def elements(tensor: TensorProto) -> int:
    """Numbers in a tensor; the 3 colours that a float16 convolution reads become 4."""
    if tensor.data_type == TensorProto.FLOAT16 and len(tensor.dims) == 4:
        return math.prod(tensor.dims) // tensor.dims[1] * (tensor.dims[1] + -tensor.dims[1] % 4)
    return math.prod(tensor.dims)


@pytest.mark.parametrize(("flavour", "name"), cases())
def test_it_parses_and_builds_and_keeps_int8_weights(flavour: str, name: str, tmp_path: Path) -> None:
    model = exported(flavour, name)
    log = build_log(model, tmp_path)
    assert not re.search(r"^\[[EF]\]", log, re.MULTILINE)
    pairs = sum(node.op_type == "QuantizeLinear" for node in model.graph.node)
    assert 0 <= weight_memory(log) - stored_bytes(model) <= PER_ENGINE + PER_PAIR * pairs


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["folded", "conv1x1", "fp16", "onnx-fp16"])
def test_the_real_model_to_one_in_a_thousand(flavour: str, tmp_path: Path) -> None:
    model = exported(flavour, "minilm")
    assert weight_memory(build_log(model, tmp_path)) == pytest.approx(stored_bytes(model), rel=2e-3)


@pytest.mark.parametrize("flavour", REFUSED)
def test_what_it_refuses(flavour: str, tmp_path: Path) -> None:
    """An int8 constant before anything but a DequantizeLinear: embeddings for TensorRT are dequantized as a table."""
    with pytest.raises(BuildError, match="is only allowed before DQ"):
        build_log(exported(flavour, EVERY), tmp_path)


def test_types_that_disagree_are_refused(tmp_path: Path) -> None:
    """What strong typing means: a float16 graph in which one constant was left in float32."""
    model = ModelProto()
    model.CopyFrom(exported("onnx-fp16", EVERY))
    half = next(t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT16 and len(t.dims) == 1)
    values = onnx.numpy_helper.to_array(half).astype("float32")
    half.CopyFrom(onnx.numpy_helper.from_array(values, half.name))
    with pytest.raises(BuildError):
        build_log(model, tmp_path)
