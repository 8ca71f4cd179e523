"""Target `onnx-fp16`: the float graph in float16; attention scores are scaled before the product where they fit."""

from __future__ import annotations

from pathlib import Path

from sqat.export.card import ONNX_USAGE as USAGE
from sqat.export.float16 import to_float16
from sqat.export.folding import fold_attention_scale
from sqat.export.source import FP16_NOISE, Source, TargetFile, shrink_embeddings, write_graph

__all__ = ["USAGE", "write"]


def write(source: Source, path: Path) -> TargetFile:
    """Write the float16 ONNX file."""
    graph = to_float16(fold_attention_scale(shrink_embeddings(source, source.graph, "table")))
    # ONNX Runtime's CPU kernels compute float16 in float32
    return write_graph(source, path, graph, source.float_checkpoint, "onnx-fp16", rounding=FP16_NOISE,
                       runs_in_int8=False)  # fmt: skip
