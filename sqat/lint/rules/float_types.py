"""T18: TensorRT builds a graph with the types it stores, and converts nothing silently.

Types come from the file and from inference; a tensor of unknown type passes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, TensorProto, numpy_helper

from sqat.lint.findings import Problem
from sqat.lint.graph_view import DEQUANTIZE, QUANTIZE, GraphView, int_attribute, label, op_type
from sqat.lint.weight import FLOATS, HALF
from sqat.onnx_files.checks import is_standard

SMALLEST_HALF_SCALE, LARGEST_HALF = 6.2e-5, 65504.0
CONVERTING = ("Cast", "CastLike", "Resize", "If", "Loop", "Scan", QUANTIZE, DEQUANTIZE)


def check_quantizer_types(view: GraphView) -> Iterator[Problem]:
    """T18: a Q's scale has the type of its input, a DQ's that of its readers."""
    for node in view.nodes:
        if op_type(node) == QUANTIZE:
            yield from type_problems(view, node, node.input[0], "its input is")
        if op_type(node) == DEQUANTIZE:
            for reader in view.consumers_of(node):
                if op_type(reader) not in CONVERTING:
                    for other in reader.input:
                        if other not in node.output and view.types.get(other) in FLOATS:
                            yield from type_problems(view, node, other, f"{reader.op_type} behind it reads")


def type_problems(view: GraphView, node: NodeProto, other: str, words: str) -> Iterator[Problem]:
    """A problem if a Q's or DQ's scale and another tensor have different float types."""
    scale, required = view.types.get(node.input[1]), view.types.get(other)
    if scale in FLOATS and required in FLOATS and scale != required:
        yield Problem(label(node), f"scale is {type_name(scale)}, {words} {type_name(required)}")


def check_half_scales(view: GraphView) -> Iterator[Problem]:
    """T18: scales in float16 are normal numbers; smaller ones lose their digits or become zero."""
    for node in view.nodes:
        scale = view.constant_value(node.input[1]) if op_type(node) in (QUANTIZE, DEQUANTIZE) else None
        if scale is not None and scale.dtype == np.float16 and np.less(scale, SMALLEST_HALF_SCALE).any():
            yield Problem(label(node), f"float16 scale {scale.min():.2g}, must be at least {SMALLEST_HALF_SCALE}")


def check_mixed_types(view: GraphView) -> Iterator[Problem]:
    """T18: no operator reads two float types."""
    for node in view.nodes:
        if not is_standard(node) or op_type(node) in CONVERTING:
            continue
        types = sorted(
            {dtype for name in node.input if (dtype := view.types.get(name)) in FLOATS and dtype is not None}
        )
        if len(types) > 1:
            yield Problem(label(node), f"{node.op_type} reads {' and '.join(type_name(dtype) for dtype in types)}")


def check_half_range(view: GraphView) -> Iterator[Problem]:
    """T18: no constant is infinite, or becomes so in float16."""
    if not any(dtype in HALF for dtype in view.types.values()):
        return
    for name, tensor in view.constants.items():
        if tensor.data_type not in FLOATS:
            continue
        values = numpy_helper.to_array(tensor).astype(np.float32)
        casts = [node for node in view.consumers.get(name, ()) if op_type(node) == "Cast"]
        becomes_half = any(int_attribute(node, "to", 0) == TensorProto.FLOAT16 for node in casts)
        if not np.isfinite(values).all():
            yield Problem(name, "holds values that are not finite")
        elif becomes_half and values.size and (largest := float(np.abs(values).max())) > LARGEST_HALF:
            yield Problem(name, f"holds {largest:.3g}, which float16 cannot")


def type_name(dtype: int | None) -> str:
    """``float16`` for TensorProto.FLOAT16."""
    return TensorProto.DataType.Name(dtype).lower() if dtype is not None else "unknown"
