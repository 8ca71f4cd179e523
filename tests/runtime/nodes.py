"""Graphs of one sqat op and what they must compute, by plain NumPy: the oracle of the runtime's tests.

Packing is written from the format's description alone, one weight at a time; products are int64, float work is float64
where rounding is allowed and float32 in the served order where bits are compared.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sqat import runtime
from sqat.errors import SqatError

TYPES = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.uint8): TensorProto.UINT8}
TYPES |= {np.dtype(np.int8): TensorProto.INT8, np.dtype(np.int64): TensorProto.INT64}
Arrays = Mapping[str, NDArray[Any] | None]


def compiled() -> bool:
    try:
        return runtime.library().is_file()
    except SqatError:
        return False


needs_library = pytest.mark.skipif(not compiled(), reason="the runtime is not compiled here")


def available() -> list[str]:
    """Instruction sets of this processor."""
    found = []
    for name in ("avx512_vnni", "avx2", "scalar"):
        with patch.dict(os.environ, {"SQAT_RUNTIME_ISA": name}):
            try:
                found.append(runtime.instruction_set())
            except SqatError:
                continue
    return found


@dataclass(frozen=True)
class Node:
    """One op: which inputs are fed and which are initializers; None leaves an optional one out."""

    op: str
    fed: Arrays
    constants: Arrays
    order: tuple[str, ...]
    outputs: Mapping[str, int]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def model(self) -> onnx.ModelProto:
        given = {name: value for name, value in {**self.fed, **self.constants}.items() if value is not None}
        names = [name if name in given else "" for name in self.order]
        while names and not names[-1]:
            names.pop()
        node = helper.make_node(self.op, names, list(self.outputs), domain="sqat", **self.attributes)
        inputs = [
            helper.make_tensor_value_info(name, TYPES[value.dtype], [None] * value.ndim)
            for name, value in self.fed.items()
            if value is not None
        ]
        outputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in self.outputs.items() if name]
        weights = [numpy_helper.from_array(value, n) for n, value in self.constants.items() if value is not None]
        graph = helper.make_graph([node], "one", inputs, outputs, weights)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("sqat", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)

    def session(self, isa: str = "", threads: int = 1, sparse: str = "", library: Path | None = None) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        with patch.dict(os.environ, {"SQAT_RUNTIME_ISA": isa, "SQAT_RUNTIME_SPARSE": sparse}):
            options.register_custom_ops_library(str(library or runtime.library()))
            model = self.model().SerializeToString()
            return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def feeds(self) -> dict[str, NDArray[Any]]:
        return {name: value for name, value in self.fed.items() if value is not None}

    def run(self, isa: str = "", threads: int = 1, sparse: str = "", library: Path | None = None) -> list[NDArray[Any]]:
        return list(self.session(isa, threads, sparse, library).run(None, self.feeds()))


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def pack_sparse(weight: NDArray[np.int8]) -> tuple[NDArray[np.int8], NDArray[np.uint8]]:
    """Values [N/16,K/8,64] and positions [N/16,K/16,64] of a weight [N,K] with at most 4 of any aligned 8 kept."""
    channels, inputs = weight.shape
    padded = np.zeros((round_up(channels, 16), round_up(inputs, 16)), np.int8)
    padded[:channels, :inputs] = weight
    tiles, groups = padded.shape[0] // 16, padded.shape[1] // 8
    values = np.zeros((tiles, groups, 64), np.int8)
    positions = np.zeros((tiles, groups // 2, 64), np.uint8)
    for channel, row in enumerate(padded):
        for group in range(groups):
            eight = row[group * 8 : group * 8 + 8]
            for j, position in enumerate(np.flatnonzero(eight)):
                at = channel % 16 * 4 + j
                values[channel // 16, group, at] = eight[position]
                positions[channel // 16, group // 2, at] |= position << (4 if group % 2 else 0)
    return values, positions


def pack_dense(weight: NDArray[np.int8]) -> NDArray[np.int8]:
    """Values [N/16,K/4,64] of a weight [N,K]."""
    channels, inputs = weight.shape
    padded = np.zeros((round_up(channels, 16), round_up(inputs, 16)), np.int8)
    padded[:channels, :inputs] = weight
    tiles, steps = padded.shape[0] // 16, padded.shape[1] // 4
    return np.ascontiguousarray(padded.reshape(tiles, 16, steps, 4).transpose(0, 2, 1, 3)).reshape(tiles, steps, 64)


def sparse_weight(rng: np.random.Generator, channels: int, inputs: int) -> NDArray[np.int8]:
    """Weights over the whole range, extremes among them, at most 4 of any aligned 8 inputs kept."""
    weight = rng.integers(-127, 128, (channels, inputs)).astype(np.int8)
    weight[rng.random(weight.shape) < 0.1] = 127
    weight[rng.random(weight.shape) < 0.1] = -127
    for start in range(0, inputs, 8):
        block = weight[:, start : start + 8]
        order = np.argsort(rng.random(block.shape), axis=1)
        np.put_along_axis(block, order[:, 4:], 0, axis=1)
    return weight


LINEAR = ("X", "values", "positions", "scale", "bias", "residual", "gamma", "beta", "steps", "mask")


@dataclass(frozen=True)
class Linear:
    """A random Linear node and its exact answer."""

    x: NDArray[np.uint8]
    weight: NDArray[np.int8]
    scale: NDArray[np.float32]
    bias: NDArray[np.float32]
    sparse: bool = True
    residual: NDArray[np.float32] | None = None
    gamma: NDArray[np.float32] | None = None
    beta: NDArray[np.float32] | None = None
    steps: NDArray[np.float32] | None = None
    mask: NDArray[np.int64] | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def y(self) -> NDArray[np.float32]:
        """acc * scale + bias: each step rounded to float32, as served."""
        acc = (self.x.astype(np.int64) - 128) @ self.weight.T.astype(np.int64)
        return np.asarray(acc.astype(np.float32) * self.scale + self.bias, np.float32)

    def node(self, outputs: str = "YQ") -> Node:
        values, positions = pack_sparse(self.weight) if self.sparse else (pack_dense(self.weight), None)
        constants = {"values": values, "positions": positions, "scale": self.scale, "bias": self.bias}
        constants |= {"gamma": self.gamma, "beta": self.beta, "steps": self.steps}
        names = {"Y" if "Y" in outputs else "": TensorProto.FLOAT}
        if "Q" in outputs:
            names["Q"] = TensorProto.UINT8
        fed = {"X": self.x, "residual": self.residual, "mask": self.mask}
        return Node("Linear", fed, constants, LINEAR, names, self.attributes)


def random_linear(
    seed: int, shape: tuple[int, ...], channels: int, sparse: bool = True, norm: bool = False, **attributes: Any
) -> Linear:
    rng = np.random.default_rng(seed)
    inputs = shape[-1]
    x = rng.integers(1, 256, shape).astype(np.uint8)
    x[rng.random(shape) < 0.1] = 255
    x[rng.random(shape) < 0.1] = 1
    weight = sparse_weight(rng, channels, inputs)
    if not sparse:
        weight = rng.integers(-127, 128, weight.shape).astype(np.int8)
    scale = (rng.random(channels).astype(np.float32) + 0.5) * np.float32(2e-4 / np.sqrt(inputs))
    vectors = [rng.normal(size=channels).astype(np.float32) for _ in range(3)]
    residual = rng.normal(size=(*shape[:-1], channels)).astype(np.float32) if norm else None
    gamma, beta = (vectors[1] + 1, vectors[2]) if norm else (None, None)
    return Linear(x, weight, scale, vectors[0], sparse, residual, gamma, beta, attributes=attributes)


def quantize(y: NDArray[Any], scale: float | NDArray[np.float32] = 1.0) -> NDArray[np.uint8]:
    inverse = np.float32(1) / np.float32(scale)
    return (np.rint(np.clip(y.astype(np.float32) * inverse, -127, 127)) + 128).astype(np.uint8)


def computed_rows(mask: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows [texts,tokens] are computed: tokens, and the first of every text; the others are 0."""
    return np.asarray((mask != 0) | (np.arange(mask.shape[1]) == 0))


def attention(
    qkv: NDArray[np.uint8], mask: NDArray[np.int64], heads: int, score_scale: float, scale: float
) -> NDArray[np.float64]:
    """Attention in float64 from the same integers, before it is quantized: the error of P's rounding is in it.

    Args:
        scale: step of the values over that of what comes out.
    """
    texts, tokens, three = qkv.shape
    width = three // 3 // heads
    q, k, v = (qkv.astype(np.float64) - 128).reshape(texts, tokens, 3, heads, width).transpose(2, 0, 3, 1, 4)
    scores = q @ k.swapaxes(-1, -2) * score_scale
    scores = np.where(mask[:, None, None, :] != 0, scores, -np.inf)
    kept = mask.any(axis=1)
    out = np.zeros((texts, heads, tokens, width))
    powers = np.exp(scores[kept] - scores[kept].max(-1, keepdims=True))
    p = np.rint(255 * powers)
    out[kept] = p @ v[kept] / p.sum(-1, keepdims=True) * scale
    out *= computed_rows(mask)[:, None, :, None]
    return out.transpose(0, 2, 1, 3).reshape(texts, tokens, three // 3)
