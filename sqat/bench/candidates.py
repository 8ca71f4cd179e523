"""What is measured: artifacts times the backends that can run them here, each as a function from inputs to an output.

    torch         checkpoint folders (quantized layers fake-quantized, in float: a reference, not a speed), packed 2:4
                  folders, compressed-tensors folders
    onnxruntime   ONNX files on the CPU, with the options that make int8 exact
    openvino      ONNX files on the CPU, in float32 where they are not int8
    tensorrt      ONNX files through ONNX Runtime's TensorRT provider, sparse kernels allowed; needs an NVIDIA GPU and
                  has not been tried on one
    sqat          ONNX files of target cpu-sparse, with sqat's own kernels

All of them live in one process; a backend's library is imported when the first of its artifacts is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sqat import runtime
from sqat.bench.inputs import Feeds, Input, inputs_of_config
from sqat.checkpoint.atomic_write import read_json_object
from sqat.errors import SqatError, first_line

Run = Callable[[Feeds], NDArray[Any]]


class Artifact(NamedTuple):
    """A folder or file to measure; ``kernels``: it needs sqat's own; no ``inputs``: its config does not tell them."""

    label: str
    path: Path
    kernels: bool
    inputs: tuple[Input, ...]
    config: dict[str, Any]

    @property
    def is_graph(self) -> bool:
        return self.path.suffix == ".onnx"


@dataclass(frozen=True)
class Candidate:
    """An artifact in a backend, called ``label@backend``."""

    artifact: Artifact
    backend: str

    @property
    def name(self) -> str:
        return f"{self.artifact.label}@{self.backend}"


def read_artifacts(words: Sequence[str]) -> list[Artifact]:
    """Artifacts named ``PATH`` or ``NAME=PATH``; those without a name are called by as much of the path as differs.

    Raises:
        SqatError: no such file, neither folder nor ONNX, or two of one name.
    """
    pairs = [split_word(word) for word in words]
    shown = short_names([path for _, path in pairs])
    labels = [label or short for (label, _), short in zip(pairs, shown, strict=True)]
    for label in labels:
        if labels.count(label) > 1:
            raise SqatError(f"two artifacts are called {label!r}", "name them, e.g. dense=PATH")
    return [read_artifact(label, path) for label, (_, path) in zip(labels, pairs, strict=True)]


def split_word(word: str) -> tuple[str, Path]:
    """Name and path of ``NAME=PATH``; no name in a word that is itself a path."""
    name, found, path = word.partition("=")
    if not found or Path(word).exists():
        return "", Path(word)
    return name, Path(path)


def short_names(paths: Sequence[Path]) -> list[str]:
    """As few last parts of each path as tell all of them apart, without ``model.`` and ``.onnx``."""
    whole = [path.resolve() for path in paths]
    names: list[str] = []
    for depth in range(1, max(len(path.parts) for path in whole) + 1):
        names = ["/".join(path.parts[-depth:]).removesuffix(".onnx") for path in whole]
        if len(set(names)) == len(set(whole)):
            break
    return [name.removeprefix("model.") for name in names]


def read_artifact(label: str, path: Path) -> Artifact:
    """One artifact with its inputs; a file's are its own, a folder's by its config."""
    if path.suffix == ".onnx" and path.is_file():
        kernels, inputs = read_graph(path)
        return Artifact(label, path, kernels, inputs, read_json_object(path.with_name("config.json")))
    if path.is_dir():
        config = read_json_object(path / "config.json")
        try:
            inputs = tuple(inputs_of_config(config, str(path)))
        except SqatError:
            inputs = ()
        return Artifact(label, path, False, inputs, config)
    if not path.exists():
        raise SqatError("no such file or folder", place=str(path))
    raise SqatError("is neither a checkpoint folder nor an .onnx file", place=str(path))


def read_graph(path: Path) -> tuple[bool, tuple[Input, ...]]:
    """Whether an ONNX file needs sqat's kernels, and its inputs; its weights are not kept."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    from sqat.export.names import needs_kernels

    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except (OSError, DecodeError) as error:
        raise SqatError("cannot be read as ONNX", place=str(path)) from error
    if not model.graph.node:
        raise SqatError("holds no graph", "export it again", str(path))
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = []
    for entry in model.graph.input:
        if entry.name not in stored:
            tensor = entry.type.tensor_type
            shape = tuple(size.dim_value if size.HasField("dim_value") else None for size in tensor.shape.dim)
            inputs.append(Input(entry.name, shape, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name))
    return needs_kernels(model), tuple(inputs)


def candidates_of(artifacts: Sequence[Artifact], wanted: Sequence[str]) -> tuple[list[Candidate], dict[str, str]]:
    """Artifacts in the backends that are here, and what was left out with the reason.

    Args:
        wanted: backends to look at, each of `OPENERS`; all of them where it is empty.

    Raises:
        SqatError: a backend that does not exist or is not here, or nothing is left to measure.
    """
    for name in wanted:
        if name not in OPENERS:
            raise SqatError(f"no backend {name!r}", f"allowed: {', '.join(OPENERS)}", "--backend")
        if reason := why_absent(name):
            raise SqatError(f"backend {name} cannot be used: {reason}", place="--backend")
    found, left_out = [], {}
    for artifact in artifacts:
        for backend in backends_for(artifact):
            candidate, reason = Candidate(artifact, backend), why_absent(backend)
            if wanted and backend not in wanted:
                continue
            if reason:
                left_out[candidate.name] = reason
            else:
                found.append(candidate)
    if not found:
        raise SqatError("nothing to measure: no backend here runs what was named", next(iter(left_out.values()), ""))
    return found, left_out


def backends_for(artifact: Artifact) -> tuple[str, ...]:
    """Backends that can run an artifact at all."""
    if not artifact.is_graph:
        return ("torch",)
    return ("sqat",) if artifact.kernels else ("onnxruntime", "openvino", "tensorrt")


def why_absent(backend: str) -> str:
    """Why a backend cannot be used on this machine, empty where it can."""
    if backend == "tensorrt":
        return why_no_tensorrt()
    if backend == "openvino" and find_spec("openvino") is None:
        return "OpenVINO is not installed (pip install openvino)"
    if backend == "sqat" and not runtime.LIBRARY.is_file():
        return f"this installation of sqat has no compiled runtime ({runtime.how_to_get_it()})"
    return ""


def why_no_tensorrt() -> str:
    """Why ONNX Runtime's TensorRT provider cannot be used."""
    from sqat.hardware.machine import execution_providers, find_gpus

    try:
        gpus = find_gpus()
    except Exception as error:  # a broken driver is told in the report, whatever it raises
        return f"the NVIDIA driver does not work ({' '.join(str(error).split())})"
    if not gpus:
        return "it needs an NVIDIA GPU, and there is none here"
    missing = "TensorrtExecutionProvider" not in execution_providers()
    return "ONNX Runtime here has no TensorRT provider (pip install onnxruntime-gpu)" if missing else ""


def open_candidate(candidate: Candidate, threads: int, stack: ExitStack) -> Run:
    """Open an artifact in its backend.

    Args:
        stack: keeps what must stay open.

    Raises:
        SqatError: it cannot be opened.
    """
    try:
        return OPENERS[candidate.backend](candidate.artifact.path, threads, stack)
    except SqatError:
        raise
    except Exception as error:  # each library has classes of its own
        raise SqatError(f"{candidate.backend} cannot open it: {first_line(error)}",
                        place=str(candidate.artifact.path)) from error  # fmt: skip


def open_all(
    candidates: Sequence[Candidate], needed: Collection[str], threads: int, stack: ExitStack
) -> tuple[dict[str, Run], dict[str, str]]:
    """Open candidates; returns those that opened, and name -> reason of those that did not.

    Args:
        needed: backends and names of candidates that must open; those of `SOLE` must anyway.

    Raises:
        SqatError: one of those does not.
    """
    runs, failed = {}, {}
    for candidate in candidates:
        try:
            runs[candidate.name] = open_candidate(candidate, threads, stack)
        except SqatError as error:  # noqa: PERF203
            if candidate.backend in SOLE or {candidate.backend, candidate.name} & set(needed):
                raise
            failed[candidate.name] = error.problem
    return runs, failed


def open_torch(path: Path, threads: int, stack: ExitStack) -> Run:
    """A checkpoint, or a folder of an export, on the device torch has."""
    import torch

    from sqat.checkpoint.store import load_checkpoint, require_weights
    from sqat.data.batch import Batch
    from sqat.evaluation.artifacts import is_export, open_artifact
    from sqat.evaluation.evaluate import served_model
    from sqat.evaluation.inference import logits_of

    before = torch.get_num_threads()
    stack.callback(torch.set_num_threads, before)
    torch.set_num_threads(threads)
    if is_export(path):
        forward = open_artifact(path)
    else:
        checkpoint = load_checkpoint(path)
        require_weights(checkpoint, path)
        model, _ = stack.enter_context(served_model(checkpoint))
        model.eval()
        forward = lambda batch: logits_of(model, batch)  # noqa: E731

    def run(feeds: Feeds) -> NDArray[Any]:
        rows = torch.zeros(len(next(iter(feeds.values()))))
        batch = Batch({name: torch.from_numpy(value) for name, value in feeds.items()}, rows, rows)
        with torch.inference_mode():
            return np.asarray(forward(batch).float().cpu())

    return run


def open_onnxruntime(path: Path, threads: int, stack: ExitStack) -> Run:
    from sqat.runtime.sessions import session

    return feeding(session(path, threads=threads))


def open_sqat(path: Path, threads: int, stack: ExitStack) -> Run:
    return feeding(runtime.session(path, threads=threads))


def open_tensorrt(path: Path, threads: int, stack: ExitStack) -> Run:
    """TensorRT through ONNX Runtime, which may not fall back to another provider unseen."""
    import onnxruntime

    options = {"trt_fp16_enable": True, "trt_int8_enable": True, "trt_sparsity_enable": True}
    session = onnxruntime.InferenceSession(str(path), providers=[("TensorrtExecutionProvider", options)])
    if session.get_providers()[0] != "TensorrtExecutionProvider":
        raise SqatError("ONNX Runtime could not start TensorRT", place=str(path))
    return feeding(session)


def feeding(session: Any) -> Run:
    """An ONNX Runtime session's first output as a function of its own inputs among many."""
    names = [each.name for each in session.get_inputs()]
    output = session.get_outputs()[0].name
    return lambda feeds: np.asarray(session.run([output], {name: feeds[name] for name in names})[0])


@cache
def openvino_core() -> Any:
    """OpenVINO, one for the process and never closed.

    Its CPU plugin gives the thread that loads it an alternate signal stack, on which Python's signal handlers run, and
    frees that memory with the last object of it. Where the garbage collector does so in another thread, the next Ctrl-C
    ends the process with a segmentation fault.
    """
    import openvino

    return openvino.Core()


def open_openvino(path: Path, threads: int, stack: ExitStack) -> Run:
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino_core().compile_model(str(path), "CPU", settings)
    names = {name for each in model.inputs for name in each.names}
    request = model.create_infer_request()
    return lambda feeds: np.asarray(request.infer({name: feeds[name] for name in feeds.keys() & names})[0])


OPENERS: dict[str, Callable[[Path, int, ExitStack], Run]] = {
    "torch": open_torch,
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino,
    "tensorrt": open_tensorrt,
    "sqat": open_sqat,
}
SOLE = ("torch", "onnxruntime", "sqat")  # the backends that an artifact is for, or that every ONNX file should run in
