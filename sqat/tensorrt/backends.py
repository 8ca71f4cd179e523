"""Build an engine here: with TensorRT where it and a GPU are, ahead of time with TensorRT-RTX, or not at all.

`sqat.tensorrt.build_engine` does the work in a process of its own: a library that crashes ends only that process.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from sqat.errors import SqatError
from sqat.export.engine_files import Shapes
from sqat.hardware.machine import Gpu, find_gpus

TENSORRT, RTX = "tensorrt", "tensorrt-rtx"
BACKENDS = ("auto", TENSORRT, RTX)
HOME = Path(__file__).parents[2]  # -m imports from its folder first, and a user's may hold a tensorrt.py
SPARSE_CAPABILITY = (8, 0)
INSTALL_RTX = "pip install 'sqat[tensorrt-rtx]' builds ahead of time without a GPU"
BUILD_ELSEWHERE = "or build on the GPU machine and give its log with --log"


@dataclass(frozen=True)
class BuiltEngine:
    """An engine and the files beside it.

    Attributes:
        layers: TensorRT's layer information; None with TensorRT-RTX, which has none before the engine runs.
    """

    engine: Path
    log: Path
    layers: Path | None
    seconds: float


def choose_backend(name: str) -> str:
    """Choose the library that builds here.

    Args:
        name: ``tensorrt``, ``tensorrt-rtx``, or ``auto`` for the first of them that can build.

    Raises:
        SqatError: what is missing, and the line that installs it.
    """
    if name not in BACKENDS:
        raise SqatError(f"no backend {name!r}", f"allowed: {', '.join(BACKENDS)}", "--backend", code="unknown-name")
    has_rtx = is_installed("tensorrt_rtx")
    if name == RTX and not has_rtx:
        raise SqatError("TensorRT-RTX is not installed", f"{INSTALL_RTX}, {BUILD_ELSEWHERE}", code="missing-package")
    problem = "" if name == RTX else tensorrt_problem()
    if name == RTX or (name == "auto" and has_rtx and problem):
        return RTX
    if problem and name == "auto":
        raise SqatError(
            f"{problem}, and TensorRT-RTX is not installed",
            f"{INSTALL_RTX}, {BUILD_ELSEWHERE}",
            code="missing-hardware",
        )
    if problem:
        raise SqatError(problem, f"--backend {RTX} needs no GPU, {BUILD_ELSEWHERE}", code="missing-hardware")
    return TENSORRT


def is_installed(module: str) -> bool:
    """Whether a module can be imported; a folder of that name, which has no origin, is none."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def tensorrt_problem() -> str:
    """What keeps TensorRT from building here; empty where nothing does."""
    if not is_installed("tensorrt"):
        return "TensorRT is not installed (pip install tensorrt)"
    try:
        gpus = find_gpus()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"TensorRT needs an NVIDIA GPU, and the driver does not work ({' '.join(str(error).split())})"
    return "" if gpus else "TensorRT needs an NVIDIA GPU, and there is none here"


def sparse_kernel_problem(gpus: tuple[Gpu, ...]) -> str:
    """Why no GPU here has sparse kernels; empty where one has, or where there is none."""
    if not gpus or max(gpu.capability for gpu in gpus) >= SPARSE_CAPABILITY:
        return ""
    return f"{gpus[0].name} has no sparse tensor cores, which came with compute capability 8.0"


def build_engine(model: Path, output: Path, shapes: Shapes, *, backend: str, half: bool) -> BuiltEngine:
    """Build an engine from an ONNX file; an engine that was there stays if the build fails.

    Args:
        shapes: smallest, usual and largest shape of each input with free sizes.
        backend: from `choose_backend`.
        half: whether the file holds float16, which TensorRT 8 needs as a flag.

    Raises:
        SqatError: the parser refuses the file, the build fails, or the library crashes.
    """
    log, layers = output.with_suffix(".build.log"), output.with_suffix(".layers.json")
    layers.unlink(missing_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    precisions = ["INT8", "FP16"] if half else ["INT8"]
    files = {"--output": output, "--log": log, "--layers": layers}
    options = [part for name, path in files.items() for part in (name, path.absolute())]
    command = [sys.executable, "-m", "sqat.tensorrt.build_engine", model.absolute(), "--backend", backend, *options,
               "--shapes", json.dumps(shapes),
               "--precisions", *precisions]  # fmt: skip
    start = time.monotonic()
    words = [str(part) for part in command]
    process = subprocess.run(words, capture_output=True, text=True, errors="replace", cwd=HOME)
    if process.returncode:
        raise SqatError(
            f"{backend} builds no engine: {failure(process)}",
            f"its log is {log}",
            str(model),
            code="unsupported-target",
        )
    return BuiltEngine(output, log, layers if layers.exists() else None, time.monotonic() - start)


def failure(process: subprocess.CompletedProcess[str]) -> str:
    """Why the builder's process failed, one line."""
    if process.returncode < 0:
        return f"it crashed with signal {-process.returncode}"
    lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else f"it ended with code {process.returncode}"
