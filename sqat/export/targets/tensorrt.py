"""Target `tensorrt`: int8 in and out of every linear, and the files that build an engine of it.

The recipe's ``tensorrt`` options choose the form of weights, 1x1 convolutions and float16.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sqat.export.conv1x1 import to_conv1x1
from sqat.export.engine_files import make_engine_files
from sqat.export.float16 import to_float16
from sqat.export.folding import fold_attention_scale
from sqat.export.opset17 import to_opset17
from sqat.export.qdq import insert_qdq
from sqat.export.source import FP16_NOISE, Source, TargetFile, shrink_embeddings, write_graph
from sqat.quantization.fake_quant import FP32_NOISE

USAGE = """`bash build_engine.sh` (trtexec) or `python build_engine.py` builds the engine with sparse weights
enabled and the optimization profile of the recipe; `sqat engine {file}` also tells which layers chose a sparse kernel.
"""


def write(source: Source, path: Path) -> TargetFile:
    """Write the ONNX file and its engine files."""
    options, config = source.config.tensorrt, source.config
    conv1x1 = options.layers == "conv1x1"
    version_8 = conv1x1 and options.weights == "qdq"
    fp16 = options.precision == "fp16" and not version_8  # a flag lets version 8 use float16
    graph = fold_attention_scale(insert_qdq(source.graph, source.quantized, options.weights))
    graph = shrink_embeddings(source, to_conv1x1(graph) if conv1x1 else graph, "table")
    if version_8:
        graph = to_opset17(graph)
    if fp16:
        graph = to_float16(graph)
    # ONNX Runtime computes convolutions in int8 only with int8 outputs, and float16 in float32
    result = write_graph(source, path, graph, source.checkpoint, "tensorrt-8" if version_8 else "tensorrt",
                         rounding=FP16_NOISE if fp16 else FP32_NOISE, runs_in_int8=not (fp16 or conv1x1))  # fmt: skip
    shapes = {name: input_shape(tensor) for name, tensor in source.inputs.items()}
    files = make_engine_files(path.name, inputs=shapes, batch=config.batch_range, sequence=source.sequence,
                        precision=options.precision, layers=options.layers, weights=options.weights)  # fmt: skip
    for name, content in files.items():
        path.with_name(name).write_bytes(content)
    return result


def input_shape(tensor: Tensor) -> tuple[int | str, ...]:
    """Shape of an input in the graph, free sizes by name: of images the batch, of tokens the sequence too."""
    return ("batch", *tensor.shape[1:]) if tensor.is_floating_point() else ("batch", "sequence")
