"""Target `onnx-int8`: int8 weights and a Q/DQ pair at every activation site."""

from __future__ import annotations

from pathlib import Path

from sqat.export.card import ONNX_USAGE
from sqat.export.qdq import insert_qdq
from sqat.export.source import Source, TargetFile, shrink_embeddings, write_graph


def write(source: Source, path: Path) -> TargetFile:
    """Write the int8 ONNX file."""
    reference = source.portable_checkpoint
    graph = insert_qdq(source.graph, source.quantized.keep_sites(reference.manifest.sites), join_outputs=True)
    return write_graph(source, path, shrink_embeddings(source, graph), reference, "onnx-int8")


USAGE = f"""{ONNX_USAGE}On x86 processors without VNNI, set the session option `session.x64quantprecision` to `1`: ONNX
Runtime's default int8 kernel saturates there. So do OpenVINO's, and they have no such option.
"""
