"""Compare a repaired file with the original in ONNX Runtime, on random inputs, before it is kept."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from sqat.errors import SqatError, first_line
from sqat.lint.graph_view import GraphView, op_type
from sqat.runtime.sessions import session

Feeds = dict[str, NDArray[Any]]
# Free sizes of the first axis and of the others: what is too small for one graph is too large for another.
SIZES = ((2, 8), (1, 16), (1, 1), (1, 64), (1, 224))
SECONDS = 60.0  # of one run, after which it is stopped
ROUNDING = 0.01  # share of the mean value by which a factor that moved into a scale may change the outputs


def require_equal(original: Path, repaired: Path, model: ModelProto, *, is_exact: bool) -> None:
    """Run two files on the same inputs.

    Args:
        model: the original, for names and shapes of its inputs.
        is_exact: whether the outputs must be equal to the bit.

    Raises:
        ValueError: one of the files does not run, or their outputs differ.
    """
    feeds, expected = run_original(original, GraphView(model))
    actual = run(repaired, feeds, "the repaired file")
    for before, after in zip(expected, actual, strict=True):
        if not are_equal(before, after, is_exact=is_exact):
            raise ValueError("the repaired file computes other numbers")


def run_original(path: Path, view: GraphView) -> tuple[Feeds, list[NDArray[Any]]]:
    """Find inputs on which a file runs; returns them and its outputs."""
    problem = ""
    for sizes in SIZES:
        feeds = draw_inputs(view, sizes)
        try:
            return feeds, run(path, feeds, "the file itself")
        except ValueError as error:
            problem = problem or str(error)
    raise ValueError(problem)


def run(path: Path, feeds: Mapping[str, NDArray[Any]], name: str) -> list[NDArray[Any]]:
    """Compute a file's outputs, operator by operator as the graph says.

    Raises:
        ValueError: it cannot be loaded, does not run, or does not come to an end.
    """
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    timer = threading.Timer(SECONDS, setattr, (options, "terminate", True))
    try:
        opened = session(path, threads=1, optimize=False)
        timer.start()
        return [np.asarray(output) for output in opened.run(None, feeds, options)]
    except SqatError as error:
        raise ValueError(f"{name} cannot be compared: {error.problem}") from error
    except Exception as error:  # onnxruntime's own classes are private and differ between versions
        raise ValueError(f"{name} does not run in ONNX Runtime: {first_line(error)}") from error
    finally:
        timer.cancel()


def are_equal(before: NDArray[Any], after: NDArray[Any], *, is_exact: bool) -> bool:
    """Tell whether two outputs are equal, or for floats nearly so."""
    if before.dtype != after.dtype or before.shape != after.shape:
        return False
    if before.dtype.kind != "f":
        return bool(np.array_equal(before, after))
    if is_exact:
        return bool(np.array_equal(before, after, equal_nan=True))
    finite = np.isfinite(before)
    if not np.array_equal(finite, np.isfinite(after)):
        return False
    difference = np.abs(before[finite].astype(np.float64) - after[finite].astype(np.float64))
    return bool(difference.sum() <= ROUNDING * np.abs(before[finite].astype(np.float64)).sum())


def draw_inputs(view: GraphView, sizes: tuple[int, int]) -> Feeds:
    """Draw a value for each input; whole numbers within the rows of the table that they index, or 0 and 1.

    Args:
        sizes: for free sizes, of the first axis and of the others; one name has one size.
    """
    random = np.random.default_rng(0)
    named: dict[str, int] = {}
    feeds: Feeds = {}
    for value in view.model.graph.input:
        if value.name in view.constants:
            continue
        tensor_type = value.type.tensor_type
        shape = []
        for axis, size in enumerate(tensor_type.shape.dim):
            free = named.setdefault(size.dim_param or f"{value.name}:{axis}", sizes[min(axis, 1)])
            shape.append(int(size.dim_value) if size.HasField("dim_value") else free)
        dtype = helper.tensor_dtype_to_np_dtype(tensor_type.elem_type or TensorProto.FLOAT)
        if dtype.kind in "iub":
            feeds[value.name] = random.integers(0, table_rows(view, value.name), shape).astype(dtype)
        else:
            feeds[value.name] = random.standard_normal(shape).astype(dtype)
    return feeds


def table_rows(view: GraphView, name: str) -> int:
    """Rows of the smallest stored table that an input indexes; 2 without one."""
    rows = []
    for node in view.nodes:
        if op_type(node) == "Gather" and view.layout_source(node.input[1]) == name:
            shape = view.shapes.get(node.input[0], ())
            rows += [size for size in shape[:1] if isinstance(size, int) and size > 0]
    return min(rows, default=2)
