"""What the names in an ONNX graph of ours say: the module of a node, and whose operators they are.

Apart from `sqat.export.graph`, which gives nodes their names, since who reads them needs no torch.
"""

from __future__ import annotations

import re

from onnx import ModelProto, NodeProto

KERNELS = "sqat"  # domain of the operators in `sqat.runtime`
WEIGHTED = ("MatMul", "Gemm", "Conv")


def node_name(module: str, op: str) -> str:
    """``bert.layer.0.query`` + ``MatMul`` -> ``/bert/layer.0/query/MatMul``; `module_of` is its inverse."""
    return f"/{re.sub(r'[.](?![0-9])', '/', module)}/{op}" if module else f"/{op}"


def module_of(node: NodeProto) -> str:
    """Dotted module name in a node's name, empty where the name holds none."""
    return module_named(node.name)


def module_named(name: str) -> str:
    """``/bert/layer.0/query/MatMul`` -> ``bert.layer.0.query``."""
    return name.rpartition("/")[0].lstrip("/").replace("/", ".")


def needs_kernels(model: ModelProto) -> bool:
    """Whether a graph is of target cpu-sparse: it has nodes that only `sqat.runtime` computes."""
    return any(entry.domain == KERNELS for entry in model.opset_import)
