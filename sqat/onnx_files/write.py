"""Write ONNX files of any size: one protobuf below 2 GB, above that with the weights in a file beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import ModelProto, TensorProto

from sqat.files.replace import sync

LARGEST = 2_000_000_000  # bytes of weights in one protobuf, which ends at 2^31


def write_onnx(
    model: ModelProto, path: Path, *, external: bool = False, check: Callable[[Path], None] | None = None
) -> None:
    """Write a model whole or not at all.

    Args:
        external: put the weights in ``<name>.data`` beside it, as weights that do not fit one protobuf always are.
        check: sees the written file before it takes its place; what it raises leaves the old files.

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
        if check is not None:
            check(new)
        if new_data.exists():
            new_data.replace(data)
            new.replace(path)
        else:
            new.replace(path)
            data.unlink(missing_ok=True)


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
