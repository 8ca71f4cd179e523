"""Which layers of a file run sparse in its engine, and why the others do not.

A TensorRT engine fails if no layer runs sparse. An engine that TensorRT-RTX built ahead of time has no kernels yet:
there the proof is that its weights are still int8.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from onnx import ModelProto, helper

from sqat.errors import GateError
from sqat.lint.graph_view import GraphView
from sqat.tensorrt.build_log import BuildLog
from sqat.tensorrt.rows import EngineRow, engine_rows
from sqat.tensorrt.tracing import trace

BYTES_PER_NODE = 32  # of constants that TensorRT adds, and alignment
RELATIVE_SLACK = 0.01


@dataclass(frozen=True)
class EngineReport:
    """What the file and the build say of an engine.

    Attributes:
        engine: the engine file, None for another machine's log.
        log: the build log, None where there is only layer information.
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        log_eligible: engine layers that the log counts as eligible, None without ``(Sparsity)`` lines.
        log_chosen: engine layers that it counts as chosen, likewise.
        engine_bytes: of the weights in the engine, None where the build does not say.
        file_bytes: of the weights in the file, quantized ones as int8.
        slack: bytes by which the engine's weights may be more.
        untraced: chosen engine layers that are not in the file.
        notes: further lines for the user.
        seconds: of the build, None for another machine's log.
    """

    model: Path
    engine: Path | None
    log: Path | None
    backend: str
    rows: tuple[EngineRow, ...]
    log_eligible: int | None
    log_chosen: int | None
    engine_bytes: int | None
    file_bytes: int
    slack: int
    untraced: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float | None = None

    @property
    def chosen_later(self) -> bool:
        """Whether the GPU chooses kernels, after the build."""
        return self.backend == "tensorrt-rtx"

    @property
    def chosen(self) -> int:
        """Layers of the file that are known to run sparse."""
        return sum(row.chosen is True for row in self.rows)

    @property
    def expanded_rows(self) -> list[EngineRow]:
        """Int8 layers whose weight has a larger type in the engine."""
        return [row for row in self.rows if row.int8 and row.weight_type not in ("", "int8")]

    @property
    def excess_bytes(self) -> int:
        """Bytes of weights in the engine beyond those of the file and the slack."""
        return max(0, (self.engine_bytes or 0) - self.file_bytes - self.slack)

    def summary(self) -> str:
        """One line: how many layers run sparse, or may."""
        sparse = [row for row in self.rows if row.sparse]
        if self.chosen_later:
            eligible = sum(row.eligible for row in sparse)
            return (f"{eligible} of {len(sparse)} sparse layers are eligible for a sparse kernel; TensorRT-RTX chooses "
                    "when the engine first runs on the GPU")  # fmt: skip
        if self.log_chosen and not self.chosen:
            return f"{self.log_chosen} of {self.log_eligible} eligible engine layers chose a sparse kernel"
        return f"{self.chosen} of {len(sparse)} sparse layers chose a sparse kernel"

    def weights(self) -> str:
        """One line on the bytes of the weights, empty where the build does not say."""
        if self.engine_bytes is None:
            return ""
        typed = [row for row in self.rows if row.int8 and row.weight_type]
        int8 = sum(row.weight_type == "int8" for row in typed)
        text = f"weights: {show_bytes(self.engine_bytes)} in the engine, {show_bytes(self.file_bytes)} in the file"
        text += f"; {int8} of {len(typed)} int8 layers kept int8 weights" if typed else ""
        more = " (tables or float layers were expanded)" if self.excess_bytes and not self.expanded_rows else ""
        return text + more

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self).items()}
        return {**plain, "rows": [vars(row) for row in self.rows], "chosen": self.chosen, "summary": self.summary()}

    def require(self) -> None:
        """Refuse an engine without the sparse kernels or the int8 weights that it was built for.

        Raises:
            GateError: no layer runs sparse, or int8 weights were expanded.
        """
        self.require_int8_weights()
        if self.chosen or self.log_chosen or (self.chosen_later and any(row.eligible for row in self.rows)):
            return
        place = str(self.model)
        if not self.chosen_later and self.log_chosen is None and all(row.chosen is None for row in self.rows):
            raise GateError(
                "the build does not say which layers run sparse", "give its log with --log", place, code="dense-layer"
            )
        reasons = Counter(row.reason for row in self.rows if row.sparse and row.reason)
        most_common = reasons.most_common(1)[0][0] if reasons else "no layer has 2:4 weights"
        problem = "no layer can run sparse" if self.chosen_later else "TensorRT chose no sparse kernel"
        raise GateError(problem, most_common, place, code="dense-layer")

    def require_int8_weights(self) -> None:
        """Refuse an engine that holds int8 weights in a larger type."""
        place = str(self.model)
        if rows := self.expanded_rows:
            types = ", ".join(sorted({row.weight_type for row in rows}))
            raise GateError(
                f"the engine holds the weights of {len(rows)} int8 layers as {types}, {rows[0].name} first",
                place=place,
                code="broken-rule",
            )
        if self.chosen_later and self.excess_bytes and any(row.int8 and not row.weight_type for row in self.rows):
            raise GateError(
                f"the engine's weights are {show_bytes(self.excess_bytes)} larger than the file's: int8 was expanded",
                place=place,
                code="broken-rule",
            )


def make_report(path: Path, model: ModelProto, log: BuildLog) -> EngineReport:
    """Put a file and what its build says together.

    Args:
        path: the ONNX file, for messages.

    Raises:
        SqatError: the file has no layers, or the log is of another model.
    """
    view = GraphView(model)
    rows = engine_rows(view, log, str(path))
    names = log.choice.chosen_names if log.choice else ()
    untraced = trace(names, {layer.name: layer for layer in log.layers}, {row.node for row in rows})[1]
    file_bytes = weight_bytes(view)
    return EngineReport(
        model=path,
        engine=None,
        log=None,
        backend="tensorrt-rtx" if log.chosen_later else "tensorrt",
        rows=tuple(rows),
        log_eligible=log.choice.eligible if log.choice else None,
        log_chosen=log.choice.chosen if log.choice else None,
        engine_bytes=log.weight_bytes,
        file_bytes=file_bytes,
        slack=int(RELATIVE_SLACK * file_bytes) + BYTES_PER_NODE * len(view.nodes),
        untraced=tuple(untraced),
        notes=(f"the log holds {log.builds} builds, this is the last",) if log.builds > 1 else (),
    )


def weight_bytes(view: GraphView) -> int:
    """Bytes of the file's weights as an engine should hold them: those behind Q/DQ as int8, the rest as stored."""
    quantized = {weight.stored.name for weight in view.all_weights if weight.dequantizer is not None}
    return sum(
        prod(tensor.dims)
        * (1 if name in quantized else int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize))
        for name, tensor in view.constants.items()
    )


def show_bytes(size: int) -> str:
    """``25.4 kB`` or ``1.2 MB``."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
