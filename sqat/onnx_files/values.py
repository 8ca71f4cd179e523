"""The values of a model's tensors: as many as shape and type need, in the file or in a file beside it."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from google.protobuf.message import Message  # type: ignore[import-untyped]
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from sqat.errors import SqatError, first_line
from sqat.files.read import open_file

PACKED_BITS: dict[int, int] = {
    TensorProto.UINT4: 4,
    TensorProto.INT4: 4,
    TensorProto.FLOAT4E2M1: 4,
}  # the others take whole bytes
PACKED_BITS |= {getattr(TensorProto, name): 2 for name in ("UINT2", "INT2") if hasattr(TensorProto, name)}


def list_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Yield all tensors that store values: initializers and attributes, those in subgraphs and functions too."""
    graphs = [model.graph]
    nodes: list[NodeProto] = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        for attribute in nodes.pop().attribute if nodes else ():
            yield from stored_in(attribute)
            graphs += subgraphs_in(attribute)
        while graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes.extend(graph.node)


def stored_in(attribute: AttributeProto) -> list[TensorProto]:
    """List the tensors of an attribute."""
    own = [attribute.t] if attribute.HasField("t") else []
    sparse = [*([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []), *attribute.sparse_tensors]
    return [*own, *attribute.tensors, *(part for each in sparse for part in (each.values, each.indices))]


def subgraphs_in(attribute: AttributeProto) -> list[GraphProto]:
    """List the graphs of an attribute."""
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def has_broken_text(message: Message) -> bool:
    """Tell whether a name somewhere is not UTF-8; protobuf gives it as bytes."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING and any(isinstance(text, bytes) for text in as_list(value)):
            return True
        if field.type == field.TYPE_MESSAGE and any(has_broken_text(entry) for entry in as_list(value)):
            return True
    return False


def as_list(value: object) -> list[object]:
    """Make one value and several of them alike."""
    return [value] if isinstance(value, str | bytes | Message) else list(value)  # type: ignore[call-overload]


def value_fault(tensor: TensorProto) -> str:
    """Say in what way a tensor's values do not fit its shape and type; empty if they do, or lie outside."""
    name = f"tensor {tensor.name}"
    try:
        needed = count_bytes(tensor)
    except ValueError as error:
        return f"{name}: {error}"
    if tensor.data_location == TensorProto.EXTERNAL:
        return f"{name}: a tensor of texts cannot lie outside" if tensor.data_type == TensorProto.STRING else ""
    if tensor.HasField("raw_data"):
        held = len(tensor.raw_data)
        return "" if held == needed else f"{name}: holds {held} bytes, its shape and type need {needed}"
    try:
        numpy_helper.to_array(tensor)
    except Exception as error:  # each kind of broken field has its own
        return f"{name}: its values do not fit its shape {tuple(tensor.dims)} ({first_line(error)})"
    return ""


def count_bytes(tensor: TensorProto) -> int:
    """Return the bytes that shape and type of a tensor need; 0 for texts.

    Raises:
        ValueError: there is no such type, or a size is negative.
    """
    if any(side < 0 for side in tensor.dims):
        raise ValueError(f"its shape {tuple(tensor.dims)} has a negative size")
    if tensor.data_type == TensorProto.STRING:
        return 0
    count: int = prod(tensor.dims)
    if tensor.data_type in PACKED_BITS:
        return (count * PACKED_BITS[tensor.data_type] + 7) // 8
    try:
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError) as error:
        raise ValueError(f"ONNX has no type {tensor.data_type}") from error
    return count * int(itemsize)


def read_outside(tensor: TensorProto, path: Path, *, only_check: bool = False) -> None:
    """Read the values that a tensor stores in a file beside the model, into the tensor.

    Args:
        path: the model's.
        only_check: leave them where they are.

    Raises:
        SqatError: that file is no regular file beside the model, or does not hold what the tensor needs.
    """
    fields = {entry.key: entry.value for entry in tensor.external_data}
    location, needed = fields.get("location", ""), count_bytes(tensor)
    offset, length = (read_number(fields.get(key, str(usual))) for key, usual in (("offset", 0), ("length", needed)))
    if is_elsewhere(location):
        raise refuse_outside(path, f"{location!r} of tensor {tensor.name} is not a file beside the model")
    if length != needed or offset < 0:
        problem = f"tensor {tensor.name} needs {needed} bytes by its shape and type, and names {length} at {offset}"
        raise refuse_outside(path, problem)
    try:
        with open_file(path.parent / location, place=location, root=path.parent) as file:
            size = file.seek(0, 2)
            is_short = size < offset + length
            file.seek(0 if is_short else offset)
            content = b"" if only_check or is_short else file.read(length)
    except (SqatError, OSError) as error:
        raise refuse_outside(path, str(error)) from error
    if is_short:
        problem = f"{location} ends at byte {size}, tensor {tensor.name} needs {offset} to {offset + length}"
        raise refuse_outside(path, problem)
    if not only_check:
        tensor.raw_data = content
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]


def read_number(text: str) -> int:
    """Read a whole number of up to 18 digits; -1 for anything else."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else -1


def is_elsewhere(location: str) -> bool:
    """Tell whether a location is no relative path below the model's folder, on whichever system."""
    paths = PurePosixPath(location), PureWindowsPath(location)
    return not location or any(path.is_absolute() or path.anchor or ".." in path.parts for path in paths)


def refuse_outside(path: Path, problem: str) -> SqatError:
    """Make the error about values outside of a model's file."""
    return SqatError(
        f"its external data cannot be read: {problem}", "keep it beside the file", str(path), code="unreadable-file"
    )
