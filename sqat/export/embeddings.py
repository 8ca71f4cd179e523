"""Embedding tables stored in 16 or 8 bits; what comes out of a lookup keeps its type.

What: a stored float table that is read by lookups (Gather of rows) alone becomes float16 with a Cast behind the
lookup, or int8 with a scale for every row. The error of a value is at most half a step of its row, amax / 254.

Why two forms of int8: engines differ in what they keep small. ``rows`` looks up int8 and scales and multiplies
them, so that only the rows asked for are ever widened: ONNX Runtime would compute a DequantizeLinear of the whole
table anew at every call. ``table`` is that DequantizeLinear, before the lookup: TensorRT takes an int8 constant
nowhere else, and keeps it in 8 bits there.
Left out: tables that something else reads, which would have to be stored twice; scales per column.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor

from sqat.errors import SqatError
from sqat.export.float16 import half
from sqat.export.onnx_edit import Array, Rewriting, module, stored
from sqat.quantization.fake_quant import HIGH, SMALLEST_AMAX

TableForm = Literal["fp16", "int8"]
Widened = Literal["rows", "table"]
SMALLEST_ROW = 16
FLOAT = ir.DataType.FLOAT
FLOATS = (FLOAT, ir.DataType.FLOAT16)


def store_embeddings(model: ModelProto, form: TableForm, widened: Widened = "rows") -> ModelProto:
    """Store the embedding tables of a graph in fewer bits.

    Args:
        model: float graph, or one with Q/DQ pairs, or one in float16; left as it is.
        form: ``fp16``, or ``int8`` with a float32 scale for every row.
        widened: of int8, what becomes float: the ``rows`` looked up (ONNX Runtime), or, in the graph, the
            ``table`` (TensorRT).

    Raises:
        SqatError: the graph looks up no float table, or a table does not fit float16.
    """
    rewriting = Rewriting(model)
    tables = tables_of(rewriting)
    if not tables:
        raise SqatError("the model looks up no embedding table", "leave embeddings at fp32")
    for table, array in tables:
        if form == "fp16":
            store_half(rewriting, table, array)
        else:
            INT8[widened](rewriting, table, *quantize_rows(array))
    return rewriting.finish()


def stored_tables(model: ModelProto, form: TableForm | Literal["fp32"]) -> dict[str, Tensor]:
    """What the tables of a float graph hold once `store_embeddings` has stored them.

    Returns:
        Name of the initializer, which is the parameter's, -> float32 [V, H]; nothing for ``fp32``.
    """
    if form == "fp32":
        return {}
    tables = {str(table.name): array for table, array in tables_of(Rewriting(model))}
    return {name: torch.from_numpy(rounded(array, form)) for name, array in tables.items()}


def rounded(array: Array, form: TableForm) -> NDArray[np.float32]:
    """A table after a round trip through what is stored of it."""
    if form == "fp16":
        return half(array, "table").astype(np.float32)
    rows_VH, scale_V1 = quantize_rows(array)  # noqa: N806
    return (rows_VH * scale_V1).astype(np.float32)


def tables_of(rewriting: Rewriting) -> list[tuple[ir.Value, Array]]:
    """The tables of a graph that can be stored in fewer bits, and what they hold."""
    values = [value for value in rewriting.graph.initializers.values() if is_table(value)]
    return [(value, array) for value in values if (array := stored(value)) is not None]


def is_table(value: ir.Value) -> bool:
    """Whether a stored tensor is a matrix of floats that only lookups of its rows read."""
    rows = all(
        use.node.op_type == "Gather" and use.idx == 0 and axis_of(use.node) == 0 and not value.is_graph_output()
        for use in value.uses()
    )
    return rows and bool(value.uses()) and value.dtype in FLOATS and value.shape is not None and is_matrix(value.shape)


def is_matrix(shape: ir.Shape) -> bool:
    """Whether a shape has rows that are long enough to gain (not so: the scales of a table, biases per head)."""
    return len(shape) == 2 and isinstance(shape[1], int) and shape[1] >= SMALLEST_ROW


def axis_of(lookup: ir.Node) -> int:
    """Axis along which a Gather picks."""
    return lookup.attributes["axis"].as_int() if "axis" in lookup.attributes else 0


def quantize_rows(array: Array) -> tuple[Array, Array]:
    """Round each row to its own int8 grid.

    Args:
        array: floats [V, H].

    Returns:
        int8 [V, H] in [-127, 127] and float32 scales [V, 1], 1 for a row of zeros.
    """
    amax = np.abs(array.astype(np.float32)).max(axis=1, keepdims=True)
    scale = np.where(amax > SMALLEST_AMAX, amax / np.float32(HIGH), np.float32(1)).astype(np.float32)
    return np.clip(np.rint(array / scale), -HIGH, HIGH).astype(np.int8), scale


def store_half(rewriting: Rewriting, table: ir.Value, array: Array) -> None:
    """Store a table in float16; lookups are cast to the type they had."""
    smaller = rewriting.constant(str(table.name), half(array, str(table.name)))
    for lookup in readers(table):
        replace(rewriting, lookup, look_up(rewriting, smaller, lookup))


def widen_rows(rewriting: Rewriting, table: ir.Value, rows_VH: Array, scale_V1: Array) -> None:  # noqa: N803
    """Look up int8 rows and their scales, and multiply."""
    rows = rewriting.constant(f"{table.name}_int8", rows_VH)
    scales = rewriting.constant(f"{table.name}_scale", scale_V1)
    for lookup in readers(table):
        wide = beside(rewriting, "Cast", [look_up(rewriting, rows, lookup)], lookup, {"to": FLOAT})
        replace(rewriting, lookup, beside(rewriting, "Mul", [wide, look_up(rewriting, scales, lookup)], lookup))


def widen_table(rewriting: Rewriting, table: ir.Value, rows_VH: Array, scale_V1: Array) -> None:  # noqa: N803
    """Put a DequantizeLinear between an int8 table and its lookups."""
    wide = rewriting.node(
        "DequantizeLinear",
        [
            rewriting.constant(f"{table.name}_int8", rows_VH),
            rewriting.constant(f"{table.name}_scale", scale_V1[:, 0]),
            rewriting.constant(f"{table.name}_zero_point", np.zeros(len(scale_V1), np.int8)),
        ],
        module(readers(table)[0]),
        dtype=FLOAT,
        shape=table.shape,
        attributes={"axis": 0},
    )
    for lookup in readers(table):
        replace(rewriting, lookup, look_up(rewriting, wide, lookup))


def readers(table: ir.Value) -> list[ir.Node]:
    """The lookups of a table."""
    return [use.node for use in table.uses()]


def look_up(rewriting: Rewriting, table: ir.Value, lookup: ir.Node) -> ir.Value:
    """The rows of another table that a lookup picks."""
    assert table.shape is not None
    picked = lookup.outputs[0].shape
    shape = None if picked is None else ir.Shape([*picked[:-1], table.shape[1]])
    return rewriting.node(
        "Gather", [table, lookup.inputs[1]], module(lookup), before=lookup, dtype=table.dtype, shape=shape
    )


def beside(
    rewriting: Rewriting, op: str, inputs: list[ir.Value], lookup: ir.Node, attributes: dict[str, int] | None = None
) -> ir.Value:
    """A float32 node of the shape of a lookup, beside it."""
    shape = lookup.outputs[0].shape
    return rewriting.node(op, inputs, module(lookup), before=lookup, dtype=FLOAT, shape=shape, attributes=attributes)


def replace(rewriting: Rewriting, lookup: ir.Node, value: ir.Value) -> None:
    """Let a lookup's readers read something else, in the type they had."""
    old = lookup.outputs[0]
    if old.dtype is not None and value.dtype != old.dtype:
        attributes = {"to": old.dtype}
        value = rewriting.node(
            "Cast", [value], module(lookup), before=lookup, dtype=old.dtype, shape=old.shape, attributes=attributes
        )
    old.replace_all_uses_with(value, replace_graph_outputs=True)


INT8: dict[Widened, Callable[[Rewriting, ir.Value, Array, Array], None]] = {"rows": widen_rows, "table": widen_table}
