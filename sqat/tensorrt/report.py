"""Which layers of a file run sparse in its engine, and why the others do not.

What: what the file itself says of each layer (pattern, types, sizes, graph rules) beside what the build says of it
(eligible, chosen, the type its weight is kept in). An engine of TensorRT in which no layer runs sparse is a failure.
An engine that TensorRT-RTX built ahead of time has no kernels yet: there the proof is that its weights are still int8,
layer by layer and in the sum of their bytes. Left out: speed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from onnx import ModelProto, TensorProto

from sqat.errors import GateError
from sqat.lint.wiring import Wiring
from sqat.tensorrt.build_log import BuildLog
from sqat.tensorrt.rows import EngineRow, engine_rows
from sqat.tensorrt.tracing import trace

BYTES_PER_NODE = 32
LARGER = 0.01


@dataclass(frozen=True)
class EngineReport:
    """What is known of an engine.

    Attributes:
        engine: the engine file, None for a log from elsewhere.
        log: the build log, None where only layer information was given.
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        told_eligible: engine layers that the log counts as eligible, None without ``(Sparsity)`` lines.
        told_chosen: likewise chosen.
        engine_bytes: of the weights in the engine, None where not told.
        file_bytes: of the weights in the file, quantized ones as int8.
        slack: bytes by which the engine's weights may be more: constants that TensorRT adds, and alignment.
        untraced: chosen engine layers whose place in the file is not known.
        notes: what else there is to say.
        seconds: of the build, None for a log from elsewhere.
    """

    model: Path
    engine: Path | None
    log: Path | None
    backend: str
    rows: tuple[EngineRow, ...]
    told_eligible: int | None
    told_chosen: int | None
    engine_bytes: int | None
    file_bytes: int
    slack: int
    untraced: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float | None = None

    @property
    def chosen_later(self) -> bool:
        """Whether kernels are chosen on the GPU, after the build."""
        return self.backend == "tensorrt-rtx"

    @property
    def chosen(self) -> int:
        """Layers of the file that are known to run sparse."""
        return sum(row.chosen is True for row in self.rows)

    @property
    def expanded(self) -> list[EngineRow]:
        """Int8 layers whose weight is something larger in the engine."""
        return [row for row in self.rows if row.int8 and row.weight_type not in ("", "int8")]

    @property
    def larger_by(self) -> int:
        """Bytes of weights in the engine beyond what the file and the slack explain."""
        return max(0, (self.engine_bytes or 0) - self.file_bytes - self.slack)

    def summary(self) -> str:
        """One line: how many layers run sparse, or may."""
        sparse = [row for row in self.rows if row.sparse]
        if self.chosen_later:
            eligible = sum(row.eligible for row in sparse)
            return (f"{eligible} of {len(sparse)} sparse layers are eligible for a sparse kernel; TensorRT-RTX chooses "
                    "when the engine first runs on the GPU")  # fmt: skip
        if self.told_chosen and not self.chosen:
            return f"{self.told_chosen} of {self.told_eligible} eligible engine layers chose a sparse kernel"
        return f"{self.chosen} of {len(sparse)} sparse layers chose a sparse kernel"

    def weights(self) -> str:
        """One line on the bytes of the weights, empty where the build tells nothing of them."""
        if self.engine_bytes is None:
            return ""
        known = [row for row in self.rows if row.int8 and row.weight_type]
        kept = sum(row.weight_type == "int8" for row in known)
        text = f"weights: {megabytes(self.engine_bytes)} in the engine, {megabytes(self.file_bytes)} in the file"
        text += f"; {kept} of {len(known)} int8 layers kept int8 weights" if known else ""
        more = " (tables or float layers were expanded)" if self.larger_by and not self.expanded else ""
        return text + more

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self).items()}
        return {**plain, "rows": [vars(row) for row in self.rows], "chosen": self.chosen, "summary": self.summary()}

    def require(self) -> None:
        """Refuse an engine that cannot be what it was built for.

        Raises:
            GateError: no layer runs sparse, or int8 weights were expanded.
        """
        if self.expanded:
            types = ", ".join(sorted({row.weight_type for row in self.expanded}))
            raise GateError(
                f"the engine holds the weights of {len(self.expanded)} int8 layers as {types}, {self.expanded[0].name} "
                "first",
                place=str(self.model),
            )
        untold = any(row.int8 and not row.weight_type for row in self.rows)
        if self.chosen_later and self.larger_by and untold:
            raise GateError(
                f"the engine's weights are {megabytes(self.larger_by)} larger than the file's: int8 was expanded",
                place=str(self.model),
            )
        if self.chosen or self.told_chosen or (self.chosen_later and any(row.eligible for row in self.rows)):
            return
        if not self.chosen_later and self.told_chosen is None and all(row.chosen is None for row in self.rows):
            raise GateError(
                "the build does not say which layers run sparse", "give its log with --log", str(self.model)
            )
        reasons = Counter(row.reason for row in self.rows if row.sparse and row.reason)
        most = reasons.most_common(1)[0][0] if reasons else "no layer has 2:4 weights"
        what = "no layer can run sparse" if self.chosen_later else "TensorRT chose no sparse kernel"
        raise GateError(what, most, str(self.model))


def make_report(path: Path, model: ModelProto, log: BuildLog) -> EngineReport:
    """Bring a file and what its build said together.

    Args:
        path: the ONNX file, for messages.

    Raises:
        SqatError: the file has no layers, or the log is of another model.
    """
    wiring = Wiring(model)
    found = engine_rows(wiring, log, str(path))
    names = log.choice.chosen_names if log.choice else ()
    untraced = trace(names, {layer.name: layer for layer in log.layers}, {row.node for row in found})[1]
    file_bytes = stored_bytes(wiring)
    return EngineReport(
        model=path,
        engine=None,
        log=None,
        backend="tensorrt-rtx" if log.chosen_later else "tensorrt",
        rows=tuple(found),
        told_eligible=log.choice.eligible if log.choice else None,
        told_chosen=log.choice.chosen if log.choice else None,
        engine_bytes=log.weight_bytes,
        file_bytes=file_bytes,
        slack=int(LARGER * file_bytes) + BYTES_PER_NODE * len(wiring.nodes),
        untraced=tuple(untraced),
    )


def stored_bytes(wiring: Wiring) -> int:
    """Bytes of the file's weights as an engine should hold them: those behind Q/DQ as int8, the rest as stored."""
    quantized = {weight.stored.name for weight in wiring.layers if weight.dequantizer is not None}
    return sum(
        prod(tensor.dims) * (1 if name in quantized else SIZES.get(tensor.data_type, 1))
        for name, tensor in wiring.tensors.items()
    )


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


SIZES = {
    TensorProto.DOUBLE: 8,
    TensorProto.INT64: 8,
    TensorProto.FLOAT: 4,
    TensorProto.INT32: 4,
    TensorProto.FLOAT16: 2,
    TensorProto.BFLOAT16: 2,
}
