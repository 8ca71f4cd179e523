"""Types of a graph that TensorRT builds as it stands (T18): every precision is in the file, nothing is converted
silently.

Types come from the file and ONNX's inference; a tensor of unknown type is not judged.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, TensorProto, numpy_helper

from sqat.lint.findings import Problem
from sqat.lint.inference import is_standard
from sqat.lint.weights import FLOATS, HALF
from sqat.lint.wiring import DEQUANTIZE, QUANTIZE, Array, Wiring, attribute, label, operator

SMALLEST_HALF_SCALE, LARGEST_HALF = 6.2e-5, 65504.0
CONVERTING = ("Cast", "CastLike", "Resize", "If", "Loop", "Scan", QUANTIZE, DEQUANTIZE)


def quantizer_types(wiring: Wiring) -> Iterator[Problem]:
    """A Q's scale has the type of its input, a DQ's that of what reads it."""
    for node in wiring.nodes:
        if operator(node) == QUANTIZE:
            yield from differing(wiring, node, node.input[0], "its input is")
        if operator(node) == DEQUANTIZE:
            for reader in wiring.following(node):
                if operator(reader) not in CONVERTING:
                    for other in reader.input:
                        if other not in node.output and wiring.types.get(other) in FLOATS:
                            yield from differing(wiring, node, other, f"{reader.op_type} behind it reads")


def differing(wiring: Wiring, node: NodeProto, other: str, words: str) -> Iterator[Problem]:
    """A problem if a Q's or DQ's scale and another tensor have different float types."""
    scale, wanted = wiring.types.get(node.input[1]), wiring.types.get(other)
    if scale in FLOATS and wanted in FLOATS and scale != wanted:
        yield Problem(label(node), f"scale is {spelled(scale)}, {words} {spelled(wanted)}")


def half_scales(wiring: Wiring) -> Iterator[Problem]:
    """Scales in float16 are normal numbers: what is smaller loses its digits or becomes zero."""
    for node in wiring.nodes:
        scale = wiring.constant(node.input[1]) if operator(node) in (QUANTIZE, DEQUANTIZE) else None
        if scale is not None and scale.dtype == np.float16 and np.less(scale, SMALLEST_HALF_SCALE).any():
            yield Problem(label(node), f"float16 scale {scale.min():.2g}, must be at least {SMALLEST_HALF_SCALE}")


def mixed_types(wiring: Wiring) -> Iterator[Problem]:
    """No operator reads two float types."""
    for node in wiring.nodes:
        if not is_standard(node) or operator(node) in CONVERTING:
            continue
        found = sorted({kind for name in node.input if (kind := wiring.types.get(name)) in FLOATS and kind is not None})
        if len(found) > 1:
            yield Problem(label(node), f"{node.op_type} reads {' and '.join(spelled(kind) for kind in found)}")


def half_range(wiring: Wiring) -> Iterator[Problem]:
    """No constant is infinite, or becomes so in float16."""
    for name, tensor in wiring.tensors.items() if is_half(wiring) else []:
        if tensor.data_type not in FLOATS:
            continue
        values = numpy_helper.to_array(tensor).astype(np.float32)
        casts = [node for node in wiring.readers.get(name, ()) if operator(node) == "Cast"]
        halved = any(attribute(node, "to", 0) == TensorProto.FLOAT16 for node in casts)
        if not np.isfinite(values).all():
            yield Problem(name, "holds values that are not finite")
        elif halved and values.size and largest(values) > LARGEST_HALF:
            yield Problem(name, f"holds {largest(values):.3g}, which float16 cannot")


def largest(values: Array) -> float:
    """Largest absolute value."""
    return float(np.abs(values).max())


def is_half(wiring: Wiring) -> bool:
    """Whether a graph holds float16 or bfloat16 at all."""
    return any(kind in HALF for kind in wiring.types.values())


def spelled(kind: int | None) -> str:
    """``float16`` for TensorProto.FLOAT16."""
    return TensorProto.DataType.Name(kind).lower() if kind is not None else "unknown"
