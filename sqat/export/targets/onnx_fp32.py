"""Target `onnx-fp32`: the float graph as it is, with the zeros of pruned weights."""

from __future__ import annotations

from pathlib import Path

from sqat.export.card import ONNX_USAGE as USAGE
from sqat.export.source import Source, TargetFile, shrink_embeddings, write_graph

__all__ = ["USAGE", "write"]


def write(source: Source, path: Path) -> TargetFile:
    """Write the float32 ONNX file."""
    return write_graph(source, path, shrink_embeddings(source, source.graph), source.float_checkpoint, "onnx-fp32")
