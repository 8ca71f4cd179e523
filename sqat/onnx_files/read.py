"""The door for ONNX files from outside: read with limits, then checked by ONNX, before anything walks over them.

What ONNX's checker or its strict shape inference refuses is told in their words. A custom operator is no fault: they
skip it, and a rule of `sqat.lint` names it.
"""

from __future__ import annotations

from pathlib import Path

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import ModelProto, TensorProto

from sqat.errors import SqatError
from sqat.files.read import read_bytes
from sqat.onnx_files.check_process import check_apart
from sqat.onnx_files.checks import is_large, light_copy
from sqat.onnx_files.values import has_broken_text, list_tensors, read_outside, value_fault

LARGEST_FILE = (1 << 31) - 1  # bytes of one protobuf


def read_onnx(path: Path) -> ModelProto:
    """Read a model with its external data.

    Raises:
        SqatError: see `read_graph`.
    """
    model = read_graph(path)
    for tensor in list_tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            read_outside(tensor, path)
    return model


def read_graph(path: Path) -> ModelProto:
    """Read a model without its weights in another file, which are only checked.

    Raises:
        SqatError: the file is missing, no ONNX file or cut short; ONNX refuses the model; or a tensor's values do not
            fit its shape, or its external data is missing, too short or not beside the file.
    """
    model, place = parse_onnx(path), str(path)
    if has_broken_text(model):
        raise refuse("holds a name that is not UTF-8 text", place)
    weights = {id(tensor): tensor for tensor in model.graph.initializer if is_large(tensor)}
    outside = [tensor for tensor in list_tensors(model) if tensor.data_location == TensorProto.EXTERNAL]
    for tensor in outside:
        if fault := value_fault(tensor):
            raise refuse(fault, place)
        read_outside(tensor, path, only_check=id(tensor) in weights)
    if fault := check_apart(light_copy(model)) or next(filter(None, map(value_fault, list_tensors(model))), ""):
        raise refuse(f"ONNX refuses it: {fault}", place)
    return model


def parse_onnx(path: Path) -> ModelProto:
    """Read a file without a look at its graph.

    Raises:
        SqatError: the file is missing, no ONNX file or cut short.
    """
    try:
        model: ModelProto = ModelProto.FromString(read_bytes(path, limit=LARGEST_FILE))
    except DecodeError as error:
        raise SqatError("not an ONNX file, or cut short", "export it again", str(path),
                        code="unreadable-file") from error  # fmt: skip
    if not model.graph.node or not model.opset_import:
        raise SqatError("not an ONNX file: it holds no graph", "export it again", str(path), code="unreadable-file")
    return model


def refuse(problem: str, place: str) -> SqatError:
    """Make the error about a model that breaks ONNX's own rules."""
    return SqatError(problem, "export it again", place, code="invalid-onnx")
