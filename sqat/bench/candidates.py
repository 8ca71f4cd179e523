"""Candidates: each artifact in each backend that runs it here, as a function from inputs to an output.

torch         folders; int8 layers in float
onnxruntime   ONNX files on the CPU, with exact int8
openvino      ONNX files on the CPU
tensorrt      ONNX files in ONNX Runtime's TensorRT provider
sqat          files of target cpu-sparse, with sqat's kernels
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
from sqat.errors import SqatError, first_line
from sqat.files.read import try_read_object

Run = Callable[[Feeds], NDArray[Any]]


class Artifact(NamedTuple):
    """A folder or file to measure.

    Attributes:
        needs_kernels: whether it needs sqat's own kernels.
        inputs: empty if unknown.
    """

    label: str
    path: Path
    needs_kernels: bool
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
    """Read artifacts given as ``PATH`` or ``NAME=PATH``; without a name, the last parts of the path are the name."""
    pairs = [split_name(word) for word in words]
    names = short_names([path for _, path in pairs])
    labels = [label or name for (label, _), name in zip(pairs, names, strict=True)]
    for label in labels:
        if labels.count(label) > 1:
            raise SqatError(f"two artifacts are called {label!r}", "name them, e.g. dense=PATH", code="usage")
    return [read_artifact(label, path) for label, (_, path) in zip(labels, pairs, strict=True)]


def split_name(word: str) -> tuple[str, Path]:
    """Split ``NAME=PATH``; a word that is itself a path has no name."""
    name, equals, path = word.partition("=")
    if not equals or Path(word).exists():
        return "", Path(word)
    return name, Path(path)


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the last parts of each path, as few as keep the paths different, without ``model.`` and ``.onnx``."""
    resolved = [path.resolve() for path in paths]
    names: list[str] = []
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-depth:]).removesuffix(".onnx") for path in resolved]
        if len(set(names)) == len(set(resolved)):
            break
    return [name.removeprefix("model.") for name in names]


def read_artifact(label: str, path: Path) -> Artifact:
    """Read an artifact; the inputs of a file are in its graph, those of a folder follow from its config."""
    if path.suffix == ".onnx" and path.is_file():
        needs_own_kernels, inputs = describe_graph(path)
        return Artifact(label, path, needs_own_kernels, inputs, try_read_object(path.with_name("config.json")))
    if path.is_dir():
        config = try_read_object(path / "config.json")
        try:
            inputs = tuple(inputs_of_config(config, str(path)))
        except SqatError:
            inputs = ()
        return Artifact(label, path, False, inputs, config)
    if not path.exists():
        raise SqatError("no such file or folder", place=str(path), code="missing-file")
    raise SqatError("is neither a checkpoint folder nor an .onnx file", place=str(path), code="unreadable-file")


def describe_graph(path: Path) -> tuple[bool, tuple[Input, ...]]:
    """Return whether an ONNX file needs sqat's kernels, and its inputs; its weights are not kept."""
    from sqat.export.names import needs_kernels
    from sqat.onnx_files.read import read_graph

    model = read_graph(path)
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = []
    for entry in model.graph.input:
        if entry.name not in stored:
            tensor = entry.type.tensor_type
            shape = tuple(size.dim_value if size.HasField("dim_value") else None for size in tensor.shape.dim)
            inputs.append(Input(entry.name, shape, numpy_type(tensor.elem_type, entry.name, path)))
    return needs_kernels(model), tuple(inputs)


def numpy_type(element_type: int, name: str, path: Path) -> str:
    """Return NumPy's name of an input's type.

    Raises:
        SqatError: the input is no tensor of numbers.
    """
    from onnx import helper

    try:
        return str(np.dtype(helper.tensor_dtype_to_np_dtype(element_type)).name)
    except KeyError as error:
        raise SqatError(f"input {name} is no tensor of numbers", "bench measures encoders", str(path),
                        code="unsupported-model") from error  # fmt: skip


def find_candidates(artifacts: Sequence[Artifact], backends: Sequence[str]) -> tuple[list[Candidate], dict[str, str]]:
    """Return the candidates of this machine, and name -> reason of the skipped ones.

    Args:
        backends: those to measure, of `OPENERS`; all if empty.

    Raises:
        SqatError: a backend does not exist or cannot be used, or there is no candidate.
    """
    for name in backends:
        if name not in OPENERS:
            raise SqatError(f"no backend {name!r}", f"allowed: {', '.join(OPENERS)}", "--backend", code="unknown-name")
        if reason := why_unavailable(name):
            raise SqatError(f"backend {name} cannot be used: {reason}", place="--backend", code="missing-hardware")
    candidates, skipped = [], {}
    for artifact in artifacts:
        for backend in backends_of(artifact):
            candidate, reason = Candidate(artifact, backend), why_unavailable(backend)
            if backends and backend not in backends:
                continue
            if reason:
                skipped[candidate.name] = reason
            else:
                candidates.append(candidate)
    if not candidates:
        reason = next(iter(skipped.values()), "")
        raise SqatError("nothing to measure: no backend here runs these artifacts", reason, code="missing-hardware")
    return candidates, skipped


def backends_of(artifact: Artifact) -> tuple[str, ...]:
    """Return the backends that can run an artifact."""
    if not artifact.is_graph:
        return ("torch",)
    return ("sqat",) if artifact.needs_kernels else ("onnxruntime", "openvino", "tensorrt")


def why_unavailable(backend: str) -> str:
    """Return why a backend cannot be used on this machine; empty if it can."""
    if backend == "tensorrt":
        return why_no_tensorrt()
    if backend == "openvino" and find_spec("openvino") is None:
        return "OpenVINO is not installed (pip install openvino)"
    if backend == "sqat" and not runtime.LIBRARY.is_file():
        return f"this installation of sqat has no compiled runtime ({runtime.install_hint()})"
    return ""


def why_no_tensorrt() -> str:
    """Return why ONNX Runtime's TensorRT provider cannot be used; empty if it can."""
    from sqat.hardware.machine import execution_providers, find_gpus

    try:
        gpus = find_gpus()
    except Exception as error:  # a broken driver is a reason in the report
        return f"the NVIDIA driver does not work ({' '.join(str(error).split())})"
    if not gpus:
        return "it needs an NVIDIA GPU"
    missing = "TensorrtExecutionProvider" not in execution_providers()
    return "ONNX Runtime here has no TensorRT provider (pip install onnxruntime-gpu)" if missing else ""


def open_candidate(candidate: Candidate, threads: int, stack: ExitStack) -> Run:
    """Open an artifact in its backend.

    Args:
        stack: closes what must stay open until the end.

    Raises:
        SqatError: the backend cannot open it.
    """
    try:
        return OPENERS[candidate.backend](candidate.artifact.path, threads, stack)
    except SqatError:
        raise
    except Exception as error:  # each library has its own classes
        problem, place = f"{candidate.backend} cannot open it: {first_line(error)}", str(candidate.artifact.path)
        raise SqatError(problem, place=place, code="unreadable-file") from error


def open_all(
    candidates: Sequence[Candidate], required: Collection[str], threads: int, stack: ExitStack
) -> tuple[dict[str, Run], dict[str, str]]:
    """Open candidates; return the open ones, and name -> reason of those that failed.

    Args:
        required: backends and candidates that must open, beside `REQUIRED_BACKENDS`.

    Raises:
        SqatError: a required one fails.
    """
    runs, failed = {}, {}
    for candidate in candidates:
        try:
            runs[candidate.name] = open_candidate(candidate, threads, stack)
        except SqatError as error:  # noqa: PERF203
            if {candidate.backend, candidate.name} & {*REQUIRED_BACKENDS, *required}:
                raise
            failed[candidate.name] = error.problem
    return runs, failed


def open_torch(path: Path, threads: int, stack: ExitStack) -> Run:
    """Open a checkpoint or an exported folder on the device of torch."""
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
    """Open an ONNX file in ONNX Runtime on the CPU."""
    from sqat.runtime.sessions import session

    return session_run(session(path, threads=threads))


def open_sqat(path: Path, threads: int, stack: ExitStack) -> Run:
    """Open a file of target cpu-sparse in ONNX Runtime with sqat's kernels."""
    return session_run(runtime.session(path, threads=threads))


def open_tensorrt(path: Path, threads: int, stack: ExitStack) -> Run:
    """Open an ONNX file in ONNX Runtime's TensorRT provider; a fall back to another provider is an error."""
    import onnxruntime

    from sqat.runtime.sessions import SILENT

    options = {"trt_fp16_enable": True, "trt_int8_enable": True, "trt_sparsity_enable": True}
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = SILENT
    session = onnxruntime.InferenceSession(str(path), settings, providers=[("TensorrtExecutionProvider", options)])
    if session.get_providers()[0] != "TensorrtExecutionProvider":
        raise SqatError("ONNX Runtime could not start TensorRT", place=str(path), code="missing-hardware")
    return session_run(session)


def session_run(session: Any) -> Run:
    """Return a function from inputs, of which the session takes its own, to its first output."""
    names = [each.name for each in session.get_inputs()]
    output = session.get_outputs()[0].name
    return lambda feeds: np.asarray(session.run([output], {name: feeds[name] for name in names})[0])


@cache
def openvino_core() -> Any:
    """Return the OpenVINO core of this process, which is never freed."""
    # Its CPU plugin gives the loading thread an alternate signal stack for Python's signal handlers, and frees that
    # memory with the last object. If another thread frees it, the next Ctrl-C is a segmentation fault.
    import openvino

    return openvino.Core()


def open_openvino(path: Path, threads: int, stack: ExitStack) -> Run:
    """Open an ONNX file in OpenVINO on the CPU."""
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
REQUIRED_BACKENDS = ("torch", "onnxruntime", "sqat")  # an artifact that fails in one of them is an error
