"""ONNX Runtime on the CPU: sessions that check an exported file, and the operators of the graph that they run."""

from __future__ import annotations

import platform
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import GraphProto

from sqat.errors import SqatError, first_line

Array = NDArray[np.generic]
EXTERNAL_DATA = "session.optimized_model_external_initializers_file_name"
SILENT = 4  # only what ends the process is logged; every failure is an exception, and its line stands in our own
FUSED_SCALE = "/MatMulScaleFusion/"  # what ONNX Runtime appends to a product's name
FLOAT_PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Conv", "FusedConv")


def session(
    model: Path | str | bytes, *, threads: int = 0, optimized: Path | None = None, optimize: bool = True
) -> onnxruntime.InferenceSession:
    """Load a model for the CPU.

    Args:
        model: file (with its external data beside it), or the bytes of a serialized ModelProto.
        threads: of one operator; 0 = one per core.
        optimized: file for the graph as ONNX Runtime rewrites it; large weights go beside it.
        optimize: False runs operator by operator as the graph says.

    Raises:
        SqatError: ONNX Runtime cannot load it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = SILENT
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if int8_saturates():
        # The product of uint8 activations and int8 weights would saturate in 16 bits: make the weights uint8 too.
        # With VNNI this would choose the slower kernel.
        options.add_session_config_entry("session.x64quantprecision", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry(EXTERNAL_DATA, f"{optimized.name}.data")
    source = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes are private and differ between versions
        place = "" if isinstance(model, bytes) else str(model)
        raise SqatError(
            f"ONNX Runtime cannot load the model: {first_line(error)}", place=place, code="invalid-onnx"
        ) from error


def run_batches(session: onnxruntime.InferenceSession, batches: Iterable[Mapping[str, Array]]) -> NDArray[np.float32]:
    """Return the logits [N, labels] of all batches in order; inputs that the model does not have are ignored."""
    names = [entry.name for entry in session.get_inputs()]
    outputs = [session.run(None, {name: batch[name] for name in names})[0] for batch in batches]
    return np.concatenate(outputs).astype(np.float32, copy=False)


def parity(reference_logits: Array, onnx_logits: Array) -> float:
    """Return the largest absolute difference of two arrays of logits; infinite where one holds NaN."""
    if reference_logits.shape != onnx_logits.shape:
        raise ValueError(f"logits of shape {reference_logits.shape} against {onnx_logits.shape}")
    difference = np.abs(reference_logits.astype(np.float64) - onnx_logits.astype(np.float64))
    return float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0))


def int8_saturates() -> bool:
    """Whether this CPU multiplies uint8 by int8 in 16 bits: x86 without VNNI, or with unknown flags."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return False
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8", errors="replace").split() if cpuinfo.exists() else []
    return not {"avx512_vnni", "avx_vnni"} & set(flags)


def optimized_graph(model: Path | str | bytes) -> GraphProto:
    """Return the graph as ONNX Runtime rewrites it on this CPU, without large weights."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session(model, optimized=optimized)
        return onnx.load(optimized, load_external_data=False).graph


def find_float_products(optimized: GraphProto, exported: GraphProto | None = None) -> list[str]:
    """Return the MatMul, Gemm and Conv nodes with quantized operands that ONNX Runtime computes otherwise (O21).

    It does so in float, or it quantizes the other operand anew (MatMulNBits).

    A convolution counts only if its output is quantized too: ONNX Runtime has no int8 one with a float output. None
    counts whose output several nodes quantize: it has no int8 form of those.

    Args:
        optimized: from `optimized_graph`; every quantized product should be an int8 operator in it.
        exported: the same graph as it was written. A product whose operands are split into heads behind their DQ is
            float there, wherever ONNX Runtime moves the DQ (B12).
    """
    dequantized = dequantized_tensors(optimized)
    split = set[str]()
    if exported is not None:
        operands = dequantized_tensors(exported)
        split = {node.name for node in exported.node if not set(node.input[:2]) <= operands}
    quantized = Counter(node.input[0] for node in optimized.node if node.op_type == "QuantizeLinear")
    return [
        node.name
        for node in optimized.node
        if node.op_type in FLOAT_PRODUCTS
        and node.name.removesuffix(FUSED_SCALE) not in split
        and set(node.input[:2]) <= dequantized
        and quantized[node.output[0]] in ((1,) if "Conv" in node.op_type else (0, 1))
    ] + [node.name for node in optimized.node if node.op_type == "MatMulNBits"]


def dequantized_tensors(graph: GraphProto) -> set[str]:
    """Return the outputs of the DequantizeLinear nodes of a graph."""
    return {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
