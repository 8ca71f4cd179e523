"""Read ONNX files."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import ModelProto
from onnx.external_data_helper import load_external_data_for_model

from sqat.errors import SqatError


def read_onnx(path: Path) -> ModelProto:
    """Read a model and its external data.

    Raises:
        SqatError: the file is missing, no ONNX file or cut short, or its external data is missing.
    """
    place = str(path)
    if not path.is_file():
        raise SqatError("no such file", place=place, code="missing-file")
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise SqatError("not an ONNX file, or cut short", "export it again", place, code="unreadable-file") from error
    if not model.graph.node or not model.opset_import:
        raise SqatError("not an ONNX file: it holds no graph", "export it again", place, code="unreadable-file")
    try:
        load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise SqatError(f"its external data cannot be read: {' '.join(str(error).split())}", "keep it beside the file",
                        place, code="unreadable-file") from error  # fmt: skip
    return model
