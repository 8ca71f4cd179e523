"""`sqat engine`: build an engine or read what another machine's build said, and report on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from onnx import ModelProto, TensorProto

from sqat.errors import SqatError
from sqat.export.build_recipe import Range, Shapes, parse_range, profile_shapes, written_half, written_ranges
from sqat.export.names import needs_kernels
from sqat.export.onnx_files import read_onnx
from sqat.hardware.machine import find_gpus
from sqat.tensorrt.backends import TENSORRT, build_engine, choose_backend, too_old
from sqat.tensorrt.build_log import BuildLog, merge, read_layers, read_log
from sqat.tensorrt.report import EngineReport, make_report

BATCH: Range = (1, 8, 32)
SEQUENCE: Range = (16, 128, 256)


def build_report(
    path: Path,
    *,
    output: Path | None = None,
    batch: str | None = None,
    sequence: str | None = None,
    backend: str = "auto",
    say: Callable[[str], None] = lambda text: None,
) -> EngineReport:
    """Build an engine from an ONNX file and report on it.

    Args:
        output: the engine file; default: beside the model. Log and layer information go beside it.
        batch: smallest, usual and largest, ``1,8,32``; default: as in the ``build_engine.py`` beside the model.
        sequence: the same of the tokens.
        say: told what is going on.

    Raises:
        SqatError: nothing here that could build, a wrong range, or a file that TensorRT refuses.
    """
    written = written_ranges(path)
    sizes = {name: parse_range(text, f"--{name}") for name, text in (("batch", batch), ("sequence", sequence)) if text}
    target = output or path.with_suffix(".engine")
    if target.resolve() == path.resolve():
        raise SqatError("the engine would be written over the model", place="--output")
    model = read_model(path)
    chosen = choose_backend(backend)
    shapes = profile_shapes(free_inputs(model), **{"batch": BATCH, "sequence": SEQUENCE, **written, **sizes})
    say(f"building with {chosen} for {show_shapes(shapes)}")
    half = written_half(path)
    built = build_engine(path, target, shapes, backend=chosen, half=holds_half(model) if half is None else half)
    log = read_build(built.log, built.layers)
    note = too_old(find_gpus()) if chosen == TENSORRT else ""
    report = make_report(path, model, log)
    return replace(report, engine=built.engine, log=built.log, backend=chosen, seconds=built.seconds,
                   notes=(note,) if note else ())  # fmt: skip


def read_report(path: Path, log: Path | None, layers: Path | None) -> EngineReport:
    """Report on a build that was done elsewhere, from its log, its layer information, or both.

    Raises:
        SqatError: a file that is missing, cut short, without the details, or of another model.
    """
    return replace(make_report(path, read_model(path), read_build(log, layers)), log=log)


def read_model(path: Path) -> ModelProto:
    """The model of a file that TensorRT may know.

    Raises:
        SqatError: no ONNX file that can be read, or one of the target cpu-sparse.
    """
    model = read_onnx(path)
    if needs_kernels(model):
        raise SqatError("is of target cpu-sparse: its layers are operators of sqat's own, which TensorRT lacks",
                        "export the target tensorrt", str(path))  # fmt: skip
    return model


def read_build(log: Path | None, layers: Path | None) -> BuildLog:
    """What a log and layer information say, of which one may be missing."""
    described = read_layers(layers) if layers else None
    return merge(read_log(log, alone=described is None) if log else None, described)


def free_inputs(model: ModelProto) -> dict[str, tuple[int | str, ...]]:
    """Shapes of the inputs, sizes that are not fixed as text."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return {
        value.name: tuple(size.dim_value or size.dim_param or "?" for size in value.type.tensor_type.shape.dim)
        for value in model.graph.input
        if value.name not in stored
    }


def holds_half(model: ModelProto) -> bool:
    """Whether weights of the file are float16."""
    return any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)


def show_shapes(shapes: Shapes) -> str:
    """``1x16 to 32x256, usually 8x128`` of the first input."""
    if not shapes:
        return "its fixed shapes"
    ends = next(iter(shapes.values()))
    smallest, usual, largest = ("x".join(str(size) for size in sizes) for sizes in ends)
    return f"{smallest} to {largest}, usually {usual}"
