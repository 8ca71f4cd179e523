"""The names in an exported ONNX graph: the module of a node, and the domain of its operator."""

from __future__ import annotations

import re
from pathlib import Path

from onnx import ModelProto, NodeProto

from sqat.errors import SqatError
from sqat.onnx_files.read import parse_onnx

KERNELS = "sqat"  # domain of the operators in `sqat.runtime`
WEIGHTED = ("MatMul", "Gemm", "Conv")
PRODUCT = ".product"  # a layer's product of constants is stored under the layer's name and this


def node_name(module: str, op: str) -> str:
    """Name a node: ``bert.layer.0.query`` + ``MatMul`` -> ``/bert/layer.0/query/MatMul``."""
    return f"/{re.sub(r'[.](?![0-9])', '/', module)}/{op}" if module else f"/{op}"


def module_of(node: NodeProto) -> str:
    """Get the dotted module name of a node, empty where its name holds none."""
    return module_in_name(node.name)


def module_in_name(name: str) -> str:
    """Invert `node_name`: ``/bert/layer.0/query/MatMul`` -> ``bert.layer.0.query``."""
    return name.rpartition("/")[0].lstrip("/").replace("/", ".")


def needs_kernels(model: ModelProto) -> bool:
    """Whether a graph is of target cpu-sparse: only `sqat.runtime` computes its nodes."""
    return any(entry.domain == KERNELS for entry in model.opset_import)


def file_needs_kernels(path: Path) -> bool:
    """Whether an ONNX file is of target cpu-sparse; False for what is no ONNX file."""
    try:
        return needs_kernels(parse_onnx(path))
    except SqatError:
        return False
