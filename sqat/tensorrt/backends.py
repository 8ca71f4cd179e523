"""Building an engine here: with TensorRT where it and a GPU are, ahead of time with TensorRT-RTX, or not at all.

The work is done by `sqat.export.builder`, the same script that is laid beside an exported file, in a process of its
own: a library that crashes takes only that process with it, an interrupt ends it at once, and its log is there
whatever happens. Left out: trtexec, which users run themselves (``build_engine.sh``).
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
from sqat.export.build_recipe import Shapes
from sqat.hardware.machine import Gpu, find_gpus

TENSORRT, RTX = "tensorrt", "tensorrt-rtx"
BACKENDS = ("auto", TENSORRT, RTX)
SPARSE_CAPABILITY = (8, 0)
INSTALL_RTX = "pip install 'sqat[tensorrt-rtx]' builds ahead of time without a GPU"
ELSEWHERE = "or build on the GPU machine and give its log with --log"


@dataclass(frozen=True)
class Built:
    """An engine that was built, and what was written beside it.

    Attributes:
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        layers: TensorRT's layer information, None with TensorRT-RTX, which has none before the engine runs.
    """

    engine: Path
    log: Path
    layers: Path | None
    backend: str
    seconds: float


def choose_backend(wanted: str) -> str:
    """The library that builds here.

    Args:
        wanted: ``tensorrt``, ``tensorrt-rtx``, or ``auto`` for the first of them that can.

    Raises:
        SqatError: what is missing, and the line that installs it.
    """
    if wanted not in BACKENDS:
        raise SqatError(f"no backend {wanted!r}", f"allowed: {', '.join(BACKENDS)}", "--backend")
    has_rtx = importlib.util.find_spec("tensorrt_rtx") is not None
    if wanted == RTX or (wanted == "auto" and has_rtx and missing_for_tensorrt()):
        if not has_rtx:
            raise SqatError("TensorRT-RTX is not installed", f"{INSTALL_RTX}, {ELSEWHERE}")
        return RTX
    missing = missing_for_tensorrt()
    if missing and wanted == "auto":
        raise SqatError(f"{missing}, and TensorRT-RTX is not installed", f"{INSTALL_RTX}, {ELSEWHERE}")
    if missing:
        raise SqatError(missing, f"--backend {RTX} needs no GPU, {ELSEWHERE}")
    return TENSORRT


def missing_for_tensorrt() -> str:
    """What keeps TensorRT from building here, empty where nothing does."""
    if importlib.util.find_spec("tensorrt") is None:
        return "TensorRT is not installed (pip install tensorrt)"
    try:
        gpus = find_gpus()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"TensorRT needs an NVIDIA GPU, and the driver does not work ({' '.join(str(error).split())})"
    return "" if gpus else "TensorRT needs an NVIDIA GPU, and there is none here"


def too_old(gpus: tuple[Gpu, ...]) -> str:
    """Why no GPU here has sparse kernels, empty where one has or there is none."""
    if not gpus or max(gpu.capability for gpu in gpus) >= SPARSE_CAPABILITY:
        return ""
    return f"{gpus[0].name} has no sparse tensor cores, which came with compute capability 8.0"


def build_engine(model: Path, output: Path, shapes: Shapes, *, backend: str, half: bool) -> Built:
    """Build an engine from an ONNX file and write it whole or not at all.

    Args:
        shapes: of each input with free sizes, smallest, usual and largest.
        backend: from `choose_backend`.
        half: whether the file holds float16, which TensorRT 8 must be told.

    Raises:
        SqatError: the parser refuses the file, with the node's name; the build failed; the library crashed.
    """
    log, layers = output.with_suffix(".build.log"), output.with_suffix(".layers.json")
    layers.unlink(missing_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    precisions = ["INT8", "FP16"] if half else ["INT8"]
    command = [sys.executable, "-m", "sqat.export.builder", model, "--backend", backend, "--output", output,
               "--log", log, "--layers", layers, "--shapes", json.dumps(shapes),
               "--precisions", *precisions]  # fmt: skip
    started = time.monotonic()
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SqatError(f"{backend} builds no engine: {problem(done)}", f"its log is {log}", str(model))
    return Built(output, log, layers if layers.exists() else None, backend, time.monotonic() - started)


def problem(done: subprocess.CompletedProcess[str]) -> str:
    """What the builder's process died of, one line."""
    if done.returncode < 0:
        return f"it crashed with signal {-done.returncode}"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else f"it ended with code {done.returncode}"
