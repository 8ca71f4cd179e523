"""What an ONNX file says about its layers, whoever wrote it: a row per product that has a weight.

The weight is read through Q, DQ and Transpose; its pattern is the N:M that the stored values themselves have.
Left out: quantization error and saturation, which need the float weight and the data that the file left behind.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import ModelProto
from onnx.external_data_helper import load_external_data_for_model

from sqat.errors import SqatError
from sqat.export.graph import module_of
from sqat.export.wiring import DEQUANTIZE, Weight, Wiring
from sqat.report_row import LayerReport
from sqat.sparsity.masks import Pattern

GROUPS = (4, 8, 16, 32)
HIGH = 127
SMALLEST_SIDE = 16


def inspect_onnx(path: Path) -> list[LayerReport]:
    """Report every MatMul, Gemm and Conv with a weight of an ONNX file, in order of execution.

    Raises:
        SqatError: no such file, not ONNX, cut short, external data missing, or no layer in it.
    """
    wiring = Wiring(load(path))
    weights = wiring.weights
    if not weights:
        raise SqatError("holds no MatMul, Gemm or Conv with a constant weight, so no layer to inspect", place=str(path))
    return [report(wiring, weight) for weight in weights]


def load(path: Path) -> ModelProto:
    """Read a model and its external data, with one clear line for each way that can fail."""
    place = str(path)
    if not path.is_file():
        raise SqatError("no such file", place=place)
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise SqatError("not an ONNX file, or cut short", "export it again", place) from error
    if not model.graph.node or not model.opset_import:
        raise SqatError("not an ONNX file: it holds no graph", "export it again", place)
    try:
        load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise SqatError(
            f"its external data cannot be read: {' '.join(str(error).split())}", "keep it beside the file", place
        ) from error
    return model


def report(wiring: Wiring, weight: Weight) -> LayerReport:
    """One row."""
    values = weight.values
    pattern = find_pattern(values, weight.reduction)
    scale = wiring.constant(weight.dequantizer.input[1]) if weight.dequantizer is not None else None
    amax = input_amax(wiring, weight)
    return LayerReport(
        name=module_of(weight.node) or weight.node.name or weight.stored.name,
        shape=(weight.size[1], weight.size[0], *values.shape[2:]),
        pattern=pattern,
        zeros=float(np.equal(values, 0).mean()),
        weight_scale=None if scale is None else (float(scale.min()), float(scale.max())),
        input_amax=amax,
        sqnr_db=None,
        saturated=None,
        reason="; ".join([*why_float(weight, amax), *why_dense(weight, pattern)]),
    )


def find_pattern(values: NDArray[np.generic], reduction: int) -> str:
    """The N:M that every aligned group along an axis keeps, ``dense`` where there is none.

    Half or more of a group pruned counts before less, and a small group before a large one: a 2:4 weight also
    is 4:8, and rounding to int8 adds zeros by chance.
    """
    kept = np.moveaxis(np.not_equal(values, 0), reduction, -1)
    sizes = [m for m in GROUPS if kept.shape[-1] % m == 0]
    most = [(max(1, int(kept.reshape(-1, m).sum(1, dtype=np.int64).max())), m) for m in sizes]
    found = sorted(((n, m) for n, m in most if n < m), key=lambda pattern: pattern[0] * 2 > pattern[1])
    return str(Pattern(*found[0])) if found else "dense"


def input_amax(wiring: Wiring, weight: Weight) -> float | None:
    """Bound of the layer's input, from the scale of the DQ before it."""
    dequantizer = wiring.producer(weight.node.input[0], DEQUANTIZE)
    scale = wiring.constant(dequantizer.input[1]) if dequantizer is not None else None
    return float(scale.max()) * HIGH if scale is not None else None


def why_float(weight: Weight, amax: float | None) -> list[str]:
    """Why a layer does not run in int8, as far as the file tells."""
    if weight.dequantizer is not None and amax is not None:
        return []
    if weight.dequantizer is not None:
        return ["float: its input has no Q/DQ pair"]
    if min(weight.size) < SMALLEST_SIDE:
        return [f"float: {min(weight.size)} channels are fewer than {SMALLEST_SIDE}"]
    return ["float: its weight has no DequantizeLinear"]


def why_dense(weight: Weight, pattern: str) -> list[str]:
    """Why a layer has no pattern, as far as the file tells."""
    if pattern != "dense":
        return []
    if weight.size[0] % 4:
        return [f"dense: {weight.size[0]} inputs are not a multiple of 4"]
    return ["dense: no N:M pattern in its weight"]
