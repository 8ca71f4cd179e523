"""ONNX files of any size: one protobuf below 2 GB, weights in a file beside it above.

What: `write_onnx` and `read_onnx`, and `check_file` for models that are too large to be checked in memory. Protobuf
messages end at 2 GB, so above that nothing may serialize a whole model: not ``SerializeToString``, and not the
ONNX checker or shape inference when they are given a ModelProto. Given a path they read the graph alone.

Written through `onnx_ir`, which leaves the caller's model alone (onnx's own writer moves the weights out of it).
Left out: more than one data file, and single tensors of 2 GB and more.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import ModelProto, TensorProto
from onnx.external_data_helper import load_external_data_for_model

from sqat.errors import SqatError

LARGEST = 2_000_000_000  # bytes of weights in one protobuf, which ends at 2^31 with all the rest


def write_onnx(model: ModelProto, path: Path, *, external: bool = False) -> None:
    """Write a model, its weights in ``<name>.data`` beside it if ``external``, or if one protobuf does not hold them.

    Both are written beside the files they replace and renamed when they are complete.

    Raises:
        OSError: the folder cannot be written.
    """
    data = data_path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        new, new_data = Path(folder) / path.name, Path(folder) / data.name
        if external or is_large(model):
            ir.save(ir.from_proto(model), new, external_data=data.name)
            flush(new_data)
        else:
            new.write_bytes(model.SerializeToString())
        flush(new)
        if new_data.exists():
            new_data.replace(data)
            new.replace(path)
        else:
            new.replace(path)
            data.unlink(missing_ok=True)


def read_onnx(path: Path) -> ModelProto:
    """Read a model and its external data.

    Raises:
        SqatError: no such file, not ONNX, cut short, or external data missing.
    """
    place = str(path)
    if not path.is_file():
        raise SqatError("no such file", place=place)
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise SqatError("not an ONNX file, or cut short", "export it again", place) from error
    if not model.graph.node or not model.opset_import:
        raise SqatError("not an ONNX file: it holds no graph", "export it again", place)
    try:
        load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise SqatError(
            f"its external data cannot be read: {' '.join(str(error).split())}", "keep it beside the file", place
        ) from error
    return model


def check_file(path: Path) -> Iterator[str]:
    """What the ONNX checker and strict shape inference find wrong in a file of any size, one line each."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
        with tempfile.TemporaryDirectory() as folder:
            inferred = str(Path(folder) / "inferred.onnx")
            onnx.shape_inference.infer_shapes_path(
                str(path), inferred, check_type=True, strict_mode=True, data_prop=True
            )
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        yield " ".join(str(error).split())


@contextmanager
def on_disk(model: ModelProto) -> Iterator[Path]:
    """A model as a temporary file, for what takes a path."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(model, path)
        yield path


def data_path(path: Path) -> Path:
    """``model.onnx`` -> ``model.onnx.data``."""
    return path.with_name(f"{path.name}.data")


def is_large(model: ModelProto) -> bool:
    """Whether the weights of a model are too large for one protobuf."""
    return sum(size(tensor) for tensor in model.graph.initializer) > LARGEST


def size(tensor: TensorProto) -> int:
    """Bytes of a tensor's values."""
    count = 1
    for side in tensor.dims:
        count *= side
    return count * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def flush(path: Path) -> None:
    """Make a written file outlast a crash."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
