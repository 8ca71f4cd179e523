"""`sqat engine`: build an engine, or read the log of another machine's build, and report on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from onnx import ModelProto, TensorProto

from sqat.errors import SqatError
from sqat.export.engine_files import Range, Shapes, parse_range, profile_shapes, read_settings
from sqat.export.names import needs_kernels
from sqat.hardware.machine import find_gpus
from sqat.onnx_files.read import read_onnx
from sqat.tensorrt.backends import TENSORRT, build_engine, choose_backend, sparse_kernel_problem
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
        batch: smallest, usual and largest, ``1,8,32``; default: as ``build_engine.json`` beside the model says.
        sequence: smallest, usual and largest number of tokens.
        say: receives a line of progress.

    Raises:
        SqatError: nothing here can build, a range is wrong, or TensorRT refuses the file.
    """
    batch_option = parse_range(batch, "--batch") if batch else None
    sequence_option = parse_range(sequence, "--sequence") if sequence else None
    settings = read_settings(path)
    target = output or path.with_suffix(".engine")
    check_output(target, path)
    model = read_model(path)
    library = choose_backend(backend)
    shapes = profile_shapes(
        free_inputs(model),
        batch_option or (settings.batch_range if settings else BATCH),
        sequence_option or (settings.sequence_range if settings else SEQUENCE),
    )
    say(f"building with {library} for {show_shapes(shapes)}")
    # Another model beside the same settings has its ranges, but not its precision.
    half = settings.precision == "fp16" if settings and settings.file == path.name else holds_half(model)
    built = build_engine(path, target, shapes, backend=library, half=half)
    report = make_report(path, model, read_build(built.log, built.layers))
    note = sparse_kernel_problem(find_gpus()) if library == TENSORRT else ""
    return replace(report, engine=built.engine, log=built.log, backend=library, seconds=built.seconds,
                   notes=(*report.notes, *([note] if note else [])))  # fmt: skip


def check_output(target: Path, model: Path) -> None:
    """Raise SqatError unless an engine can be written to a path: a new file, or an older engine."""
    place = str(target)
    try:
        if target.is_dir() or not target.name:
            raise SqatError("is a folder", "give the name of a file in it", place, code="unwritable-file")
        if target.exists() and target.samefile(model):
            raise SqatError("the engine would be written over the model", place="--output", code="output-exists")
        if target.suffix == ".onnx":
            raise SqatError("is the name of a model, not of an engine", "give it another name", place, code="usage")
        if target.exists() and not target.is_file():
            raise SqatError("is no regular file", "give the name of a file", place, code="unwritable-file")
        above = next(folder for folder in target.absolute().parents if folder.exists())
    except OSError as error:
        raise SqatError(f"cannot be written: {error.strerror}", "give another name", place,
                        code="unwritable-file") from error  # fmt: skip
    if not above.is_dir():
        raise SqatError("is a file, so that no engine can lie in it", "name a folder", str(above),
                        code="unwritable-file")  # fmt: skip


def read_report(path: Path, log: Path | None, layers: Path | None) -> EngineReport:
    """Report on another machine's build from its log, its layer information, or both.

    Raises:
        SqatError: a file is missing, cut short, without the details, or of another model.
    """
    return replace(make_report(path, read_model(path), read_build(log, layers)), log=log)


def read_model(path: Path) -> ModelProto:
    """Read an ONNX file that TensorRT may accept.

    Raises:
        SqatError: the file cannot be read, or is of target cpu-sparse.
    """
    model = read_onnx(path)
    if needs_kernels(model):
        raise SqatError(
            "is of target cpu-sparse: its layers are operators of sqat, which TensorRT lacks",
            "export the target tensorrt",
            str(path),
            code="unsupported-target",
        )
    return model


def read_build(log: Path | None, layers: Path | None) -> BuildLog:
    """Read a log and layer information, of which one may be missing."""
    information = read_layers(layers) if layers else None
    return merge(read_log(log, alone=information is None) if log else None, information)


def free_inputs(model: ModelProto) -> dict[str, tuple[int | str, ...]]:
    """Shapes of the inputs, with free sizes as text."""
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
    smallest, usual, largest = ("x".join(str(size) for size in sizes) for sizes in next(iter(shapes.values())))
    return f"{smallest} to {largest}, usually {usual}"
