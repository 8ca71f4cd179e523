"""ONNX files of any size: one protobuf below 2 GB, above that with the weights in a file beside it.

Nothing may serialize a whole model above 2 GB, so ONNX's checker and shape inference get a path.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import ModelProto, TensorProto
from onnx.external_data_helper import load_external_data_for_model

from sqat.checkpoint.atomic_write import sync
from sqat.errors import SqatError

LARGEST = 2_000_000_000  # bytes of weights in one protobuf, which ends at 2^31


def write_onnx(model: ModelProto, path: Path, *, external: bool = False) -> None:
    """Write a model whole or not at all.

    Args:
        external: put the weights in ``<name>.data`` beside it, as weights that do not fit one protobuf always are.

    Raises:
        OSError: the folder cannot be written.
    """
    data = data_path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        new, new_data = Path(folder) / path.name, Path(folder) / data.name
        if external or is_large(model):
            ir.save(ir.from_proto(model), new, external_data=data.name)  # onnx's writer would move weights out of it
            sync(new_data)
        else:
            new.write_bytes(model.SerializeToString())
        sync(new)
        if new_data.exists():
            new_data.replace(data)
            new.replace(path)
        else:
            new.replace(path)
            data.unlink(missing_ok=True)


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


def check_file(path: Path) -> Iterator[str]:
    """Yield what the ONNX checker and strict shape inference find wrong in a file of any size."""
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
    """Write a model to a temporary file for as long as the block runs."""
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
