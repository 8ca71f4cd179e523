"""Store embedding tables in 16 or 8 bits; what leaves a lookup keeps its type.

An int8 table has a scale for every row. ONNX Runtime widens the rows after the lookup: a DequantizeLinear of the whole
table would run at every call. TensorRT takes an int8 constant only before a DequantizeLinear, so there the table is
widened.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor

from sqat.errors import SqatError
from sqat.export.float16 import to_half
from sqat.export.onnx_edit import Array, GraphEditor, constant_value, module_name
from sqat.quantization.fake_quant import HIGH, SMALLEST_AMAX

TableForm = Literal["fp16", "int8"]
Widen = Literal["rows", "table"]
SMALLEST_ROW = 16  # shorter rows gain nothing: scales of a table, biases per head
FLOAT = ir.DataType.FLOAT
FLOATS = (FLOAT, ir.DataType.FLOAT16)


def store_embeddings(model: ModelProto, form: TableForm, widen: Widen = "rows") -> ModelProto:
    """Store the embedding tables of a graph in fewer bits.

    Args:
        model: float32 or float16 graph, with or without Q/DQ pairs; is not changed.
        form: ``fp16``, or ``int8`` with a float32 scale for every row.
        widen: what of int8 becomes float in the graph: the ``rows`` (ONNX Runtime) or the ``table`` (TensorRT).

    Raises:
        SqatError: the graph looks up no float table, or a table does not fit float16.
    """
    editor = GraphEditor(model)
    tables = find_tables(editor)
    if not tables:
        raise SqatError("the model looks up no embedding table", "leave embeddings at fp32", code="unsupported-model")
    for table, array in tables:
        if form == "fp16":
            store_fp16(editor, table, array)
        elif widen == "rows":
            store_int8_rows(editor, table, *quantize_rows(array))
        else:
            store_int8_table(editor, table, *quantize_rows(array))
    return editor.finish()


def stored_tables(model: ModelProto, form: TableForm | Literal["fp32"]) -> dict[str, Tensor]:
    """Compute what the tables of a float graph hold after `store_embeddings`.

    Returns:
        Name of the initializer, which is the parameter's, -> float32 [V, H]; nothing for ``fp32``.
    """
    if form == "fp32":
        return {}
    tables = {str(table.name): array for table, array in find_tables(GraphEditor(model))}
    return {name: torch.from_numpy(round_table(array, form)) for name, array in tables.items()}


def round_table(array: Array, form: TableForm) -> NDArray[np.float32]:
    """Round a table to the values that its stored form holds."""
    if form == "fp16":
        return to_half(array, "table").astype(np.float32)
    rows_VH, scale_V1 = quantize_rows(array)  # noqa: N806
    return (rows_VH * scale_V1).astype(np.float32)


def find_tables(editor: GraphEditor) -> list[tuple[ir.Value, Array]]:
    """List the tables of a graph that can be stored in fewer bits, with their arrays."""
    values = [value for value in editor.graph.initializers.values() if is_table(value)]
    return [(value, array) for value in values if (array := constant_value(value)) is not None]


def is_table(value: ir.Value) -> bool:
    """Whether a stored tensor is a float matrix that only lookups of its rows read."""
    shape = value.shape
    if shape is None or len(shape) != 2 or not isinstance(shape[1], int) or shape[1] < SMALLEST_ROW:
        return False
    only_lookups = all(
        use.node.op_type == "Gather" and use.idx == 0 and gather_axis(use.node) == 0 for use in value.uses()
    )
    return only_lookups and bool(value.uses()) and not value.is_graph_output() and value.dtype in FLOATS


def gather_axis(lookup: ir.Node) -> int:
    """Get the axis along which a Gather picks."""
    return lookup.attributes["axis"].as_int() if "axis" in lookup.attributes else 0


def quantize_rows(array: Array) -> tuple[Array, Array]:
    """Round each row to an int8 grid of its own.

    Args:
        array: floats [V, H].

    Returns:
        int8 [V, H] in [-127, 127] and float32 scales [V, 1], 1 for a row of zeros.
    """
    amax = np.abs(array.astype(np.float32)).max(axis=1, keepdims=True)
    scale = np.where(amax > SMALLEST_AMAX, amax / np.float32(HIGH), np.float32(1)).astype(np.float32)
    return np.clip(np.rint(array / scale), -HIGH, HIGH).astype(np.int8), scale


def store_fp16(editor: GraphEditor, table: ir.Value, array: Array) -> None:
    """Store a table in float16; cast its lookups to the type that they had."""
    smaller = editor.add_constant(str(table.name), to_half(array, str(table.name)))
    for lookup in readers(table):
        replace_lookup(editor, lookup, add_lookup(editor, smaller, lookup))


def store_int8_rows(editor: GraphEditor, table: ir.Value, rows_VH: Array, scale_V1: Array) -> None:  # noqa: N803
    """Store a table in int8; look up rows and their scales, and multiply."""
    rows = editor.add_constant(f"{table.name}_int8", rows_VH)
    scales = editor.add_constant(f"{table.name}_scale", scale_V1)
    for lookup in readers(table):
        wide = add_float_node(editor, "Cast", [add_lookup(editor, rows, lookup)], lookup, {"to": FLOAT})
        scale = add_lookup(editor, scales, lookup)
        replace_lookup(editor, lookup, add_float_node(editor, "Mul", [wide, scale], lookup))


def store_int8_table(editor: GraphEditor, table: ir.Value, rows_VH: Array, scale_V1: Array) -> None:  # noqa: N803
    """Store a table in int8, with a DequantizeLinear before its lookups."""
    constants = {"int8": rows_VH, "scale": scale_V1[:, 0], "zero_point": np.zeros(len(scale_V1), np.int8)}
    wide = editor.add_node(
        "DequantizeLinear",
        [editor.add_constant(f"{table.name}_{name}", array) for name, array in constants.items()],
        module_name(readers(table)[0]),
        dtype=FLOAT,
        shape=table.shape,
        attributes={"axis": 0},
    )
    for lookup in readers(table):
        replace_lookup(editor, lookup, add_lookup(editor, wide, lookup))


def readers(table: ir.Value) -> list[ir.Node]:
    """List the lookups of a table."""
    return [use.node for use in table.uses()]


def add_lookup(editor: GraphEditor, table: ir.Value, lookup: ir.Node) -> ir.Value:
    """Look up the same rows in another table."""
    assert table.shape is not None
    old = lookup.outputs[0].shape
    shape = None if old is None else ir.Shape([*old[:-1], table.shape[1]])
    inputs = [table, lookup.inputs[1]]
    return editor.add_node("Gather", inputs, module_name(lookup), before=lookup, dtype=table.dtype, shape=shape)


def add_float_node(
    editor: GraphEditor, op: str, inputs: list[ir.Value], lookup: ir.Node, attributes: dict[str, int] | None = None
) -> ir.Value:
    """Add a float32 node of a lookup's shape beside it."""
    shape = lookup.outputs[0].shape
    return editor.add_node(op, inputs, module_name(lookup), before=lookup, dtype=FLOAT, shape=shape,
                           attributes=attributes)  # fmt: skip


def replace_lookup(editor: GraphEditor, lookup: ir.Node, value: ir.Value) -> None:
    """Let a lookup's readers read another value, in the type that they had."""
    old = lookup.outputs[0]
    if old.dtype is not None and value.dtype != old.dtype:
        value = editor.add_node("Cast", [value], module_name(lookup), before=lookup, dtype=old.dtype, shape=old.shape,
                                attributes={"to": old.dtype})  # fmt: skip
    old.replace_all_uses_with(value, replace_graph_outputs=True)
