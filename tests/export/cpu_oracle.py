"""The ops of the domain `sqat` in numpy, written from their description: an oracle for the exporter and the kernels.

Integers are int64, floats float32 where a kernel rounds to float32; the sums of norms are float64. Runs whole graphs
through ONNX's reference evaluator.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import sqat

Array = NDArray[Any]
F32 = np.float32


def unpack(values: Array, positions: Array | None, outputs: int, inputs: int) -> Array:
    """The weight [N,K] of packed bytes, element by element."""
    tiles, steps = values.shape[:2]
    weight = np.zeros((tiles * 16, steps * (4 if positions is None else 8)), np.int64)
    for tile, step, byte in np.ndindex(values.shape):
        row, j = tile * 16 + byte // 4, byte % 4
        if positions is None:
            weight[row, step * 4 + j] = values[tile, step, byte]
            continue
        both = int(positions[tile, step // 2, byte])
        place = both & 15 if step % 2 == 0 else both >> 4
        assert place < 8
        weight[row, step * 8 + place] += values[tile, step, byte]
    assert not weight[outputs:].any(), "padding is zero"
    assert not weight[:, inputs:].any(), "padding is zero"
    return weight[:outputs, :inputs]


def to_bytes(y: Array, scale: float | Array) -> Array:
    """Floats as bytes around 128, never 0."""
    return (np.clip(np.rint(y.astype(F32) * (F32(1) / F32(scale))), -127, 127) + 128).astype(np.uint8)


def normed(x: Array, gamma: Array, beta: Array, epsilon: float) -> Array:
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    return (centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * gamma + beta).astype(F32)


def activated(x: Array, name: str) -> Array:
    if name in GELUS:
        coefficients, bound = kernel_polynomial(name)
        inside = np.clip(x.astype(np.float64), -bound, bound)
        half = inside * np.polynomial.polynomial.polyval(inside**2, coefficients)
        return (x * np.clip(half + 0.5, 0, 1)).astype(F32)
    return {"none": x, "relu": np.maximum(x, 0)}[name]


def gelu(x: Array, name: str) -> Array:
    """The functions that the polynomials stand for, in float64."""
    wide = x.astype(np.float64)
    if name == "gelu":
        return wide * 0.5 * (1 + np.vectorize(math.erf)(wide / math.sqrt(2)))
    return wide * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))


@cache
def kernel_polynomial(name: str) -> tuple[list[float], float]:
    """Coefficients and bound as the kernels' source has them."""
    source = (Path(sqat.__file__).parent / "runtime" / "source" / "vector_math.h").read_text(encoding="utf-8")
    found = re.search(rf"{GELUS[name]}\[\] = {{(.*?)}}", source, re.DOTALL)
    bound = re.search(rf"gelu\(x, {GELUS[name]}, ([0-9.]+)f\)", source)
    assert found is not None
    assert bound is not None
    return [float(number.strip().rstrip("f")) for number in found[1].split(",")], float(bound[1])


GELUS = {"gelu": "kErf", "gelu_tanh": "kTanh"}


def without_padding(rows: Array, mask: Array | None, zero: int) -> Array:
    """Rows [texts,tokens,...], those of padding zero; a text's first row is never padding."""
    if mask is None:
        return rows
    computed = mask != 0
    computed[:, :1] = True
    return np.where(computed.reshape(*mask.shape, *[1] * (rows.ndim - 2)), rows, rows.dtype.type(zero))


class Linear(OpRun):
    op_domain = "sqat"

    def _run(self, x: Array, values: Array, positions: Array | None, scale: Array, bias: Array,
             residual: Array | None = None, gamma: Array | None = None, beta: Array | None = None,
             steps: Array | None = None, mask: Array | None = None,
             activation: str = "none", y_scale: float = 1.0, epsilon: float = 1e-12) -> tuple[Array, ...]:  # fmt: skip
        assert x.dtype == np.uint8
        assert x.min(initial=1) >= 1
        weight = unpack(values, positions, len(scale), x.shape[-1])
        total = (x.astype(np.int64) - 128) @ weight.T
        y = activated(total.astype(F32) * scale + bias, activation)
        y = y if residual is None else y + residual
        y = y if gamma is None else normed(y, gamma, beta, epsilon)
        bytes_ = without_padding(to_bytes(y, y_scale if steps is None else steps), mask, 128)
        return (without_padding(y, mask, 0), bytes_)[: len(self.onnx_node.output)]


class Attention(OpRun):
    op_domain = "sqat"

    def _run(
        self, qkv: Array, mask: Array, heads: int, score_scale: float, value_scale: float, y_scale: float, **_: Any
    ) -> tuple[Array]:  # the evaluator adds the attributes of ONNX's own Attention
        batch, length, width = qkv.shape
        parts = (qkv.astype(np.int64) - 128).reshape(batch, length, 3, heads, width // 3 // heads)
        out = np.zeros((batch, length, heads, width // 3 // heads))
        for row, head in np.ndindex(batch, heads):
            kept = mask[row] != 0
            query, key, value = parts[row, :, 0, head], parts[row, kept, 1, head], parts[row, kept, 2, head]
            if not kept.any():
                continue
            scores = (query @ key.T).astype(F32) * F32(score_scale)
            weights = np.rint(255 * np.exp(scores - scores.max(-1, keepdims=True), dtype=F32)).astype(np.int64)
            out[row, :, head] = (weights @ value) / weights.sum(-1, keepdims=True)
        return (without_padding(to_bytes(out * value_scale, y_scale).reshape(batch, length, -1), mask, 128),)


class Embed(OpRun):
    op_domain = "sqat"

    def _run(self, ids: Array, types: Array | None, places: Array | None, word: Array, position: Array,
             type_: Array | None, gamma: Array, beta: Array, y_scale: float = 1.0,
             epsilon: float = 1e-12) -> tuple[Array, ...]:  # fmt: skip
        return embedded(self, word[ids], ids, types, places, position, type_, gamma, beta, y_scale, epsilon)


class EmbedInt8(OpRun):
    op_domain = "sqat"

    def _run(self, ids: Array, types: Array | None, places: Array | None, word: Array, word_scale: Array,
             position: Array, type_: Array | None, gamma: Array, beta: Array, y_scale: float = 1.0,
             epsilon: float = 1e-12) -> tuple[Array, ...]:  # fmt: skip
        assert word.dtype == np.int8
        words = word[ids].astype(F32) * word_scale[ids][..., None]
        return embedded(self, words, ids, types, places, position, type_, gamma, beta, y_scale, epsilon)


class MeanPool(OpRun):
    op_domain = "sqat"

    def _run(self, states: Array, mask: Array) -> tuple[Array]:
        weights = mask.astype(np.float64)[..., None]
        return (((states * weights).sum(1) / np.maximum(weights.sum(1), 1e-9)).astype(F32),)


def embedded(op: OpRun, words: Array, ids: Array, types: Array | None, places: Array | None, position: Array,
             type_: Array | None, gamma: Array, beta: Array, y_scale: float,
             epsilon: float) -> tuple[Array, ...]:  # fmt: skip
    x = words + (position[: words.shape[1]] if places is None else position[places])
    x = x if type_ is None else x + type_[np.zeros_like(ids) if types is None else types]
    y = normed(x, gamma, beta, epsilon)
    return (y, to_bytes(y, y_scale))[: len(op.onnx_node.output)]


def interpret(model: ModelProto, inputs: Mapping[str, Array]) -> list[Array]:
    """Outputs of a graph for inputs by name; those it does not take are left out."""
    names = [value.name for value in model.graph.input]
    evaluator = ReferenceEvaluator(named_outputs(model), new_ops=[Linear, Attention, Embed, EmbedInt8, MeanPool])
    outputs: list[Array] = evaluator.run(None, {name: inputs[name] for name in names})
    return outputs


def named_outputs(model: ModelProto) -> ModelProto:
    """A copy whose unread outputs have names: the evaluator would hand on a nameless one as every missing input."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for number, node in enumerate(copy.graph.node):
        node.output[:] = [name or f"unread {number}" for name in node.output]
    return copy
