"""`sqat doctor`: what is installed, what this machine is, and what each target and backend has or lacks here.

What: `diagnose` asks the machine; the tables at the foot name a pure function for each backend that could compute a
model here and each target that could be served here, from the answers to a verdict, with the command that installs
what is missing.

Why a verdict in words and no exit code: an installation without TensorRT is not broken, and what is lacking for one
target is no matter for another. Versions come from the packages' metadata: nothing is imported but ONNX Runtime, whose
build alone knows its providers, and torch where there is a GPU.
Left out: trying each backend out, which `sqat bench` does on the model itself.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqat import __version__, runtime
from sqat.errors import SqatError
from sqat.hardware.choosing import FP16, INSTALL_TENSORRT, SPARSE, title
from sqat.hardware.machine import Machine, describe_machine, memory_bytes, version_of

READY, PARTLY, LACKING = "ready", "partly", "no"


@dataclass(frozen=True)
class Verdict:
    """Whether one target or backend can be used here.

    Attributes:
        state: ``ready``, ``partly`` (it works, but not as fast or not all of it) or ``no``.
        has: what is here, or what it would be good for.
        lacks: what is not here, empty where nothing is missing.
        install: the command that gets it, empty where no command does.
    """

    name: str
    state: str
    has: str
    lacks: str = ""
    install: str = ""


@dataclass(frozen=True)
class Kernels:
    """sqat's own CPU runtime: the instruction set it would choose, or why it has none and what to do."""

    instruction_set: str = ""
    problem: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All that was found.

    Attributes:
        versions: distribution -> version, empty for one that is not installed.
        memory: total and available bytes, None where the system does not tell.
        load: processes of the last minute, None where the system does not tell.
    """

    machine: Machine
    kernels: Kernels
    python: str
    system: str
    versions: Mapping[str, str]
    memory: tuple[int | None, int | None]
    load: float | None
    backends: tuple[Verdict, ...]
    targets: tuple[Verdict, ...]

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        processor = asdict(self.machine.processor)
        gpus = [{**asdict(gpu), "sparse_tensor_cores": gpu.capability >= SPARSE} for gpu in self.machine.gpus]
        return {
            "sqat": __version__,
            "python": self.python,
            "system": self.system,
            "versions": {name: version or None for name, version in self.versions.items()},
            "processor": {**processor, "features": sorted(self.machine.processor.features)},
            "memory": dict(zip(("total_bytes", "available_bytes"), self.memory, strict=True)),
            "load": self.load,
            "gpus": gpus,
            "runtime": asdict(self.kernels),
            "providers": list(self.machine.providers),
            "unknown": list(self.machine.unknown),
            "backends": [asdict(verdict) for verdict in self.backends],
            "targets": [asdict(verdict) for verdict in self.targets],
        }


def diagnose() -> Diagnosis:
    """Ask this machine; never fails."""
    machine, kernels = describe_machine(), find_kernels()
    return Diagnosis(
        machine=machine,
        kernels=kernels,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        versions={name: version_of(name) for name in (*REQUIRED, *OPTIONAL)},
        memory=memory_bytes(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        backends=tuple(judge(machine, kernels) for judge in BACKENDS.values()),
        targets=tuple(judge(machine, kernels) for judge in TARGETS.values()),
    )


def find_kernels() -> Kernels:
    """Load sqat's CPU runtime and ask what it would use."""
    try:
        return Kernels(instruction_set=runtime.instruction_set())
    except SqatError as error:
        return Kernels(problem=error.problem, remedy=error.hint)


def remedies(diagnosis: Diagnosis) -> dict[str, list[str]]:
    """Command -> the targets and backends it is for, in the order of the tables."""
    found: dict[str, list[str]] = {}
    for verdict in (*diagnosis.backends, *diagnosis.targets):
        if verdict.install:
            found.setdefault(verdict.install, []).append(verdict.name)
    for name, extra in OPTIONAL.items():
        if extra and not diagnosis.versions.get(name):
            found.setdefault(f"pip install 'sqat[{extra}]'", []).append(name)
    return found


def torch_backend(machine: Machine, kernels: Kernels) -> Verdict:
    version = machine.versions.get("torch")
    if version is None:
        return Verdict("torch", LACKING, "checkpoints as they were trained", "torch", "pip install torch")
    if machine.gpus and "+cpu" in version:
        return Verdict("torch", PARTLY, "the CPU", "this build of torch knows no GPU", REINSTALL_TORCH)
    return Verdict("torch", READY, "GPU and CPU" if machine.gpus else "the CPU")


def onnxruntime_backend(machine: Machine, kernels: Kernels) -> Verdict:
    if "onnxruntime" not in machine.versions:
        return Verdict("onnxruntime", LACKING, "ONNX files", "ONNX Runtime", "pip install onnxruntime")
    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in machine.providers)
    if not machine.processor.has_int8_dot and machine.processor.is_x86:
        return Verdict("onnxruntime", PARTLY, f"providers {providers}", "VNNI, with which int8 is fastest")
    return Verdict("onnxruntime", READY, f"providers {providers}" if providers else "ONNX files")


def openvino_backend(machine: Machine, kernels: Kernels) -> Verdict:
    if "openvino" not in machine.versions:
        return Verdict("openvino", LACKING, "ONNX files on CPUs", "OpenVINO", "pip install openvino")
    if not machine.processor.has_int8_dot and machine.processor.is_x86:
        return Verdict("openvino", PARTLY, "ONNX files on CPUs", "VNNI, without which its int8 saturates")
    return Verdict("openvino", READY, "ONNX files on CPUs")


def tensorrt_backend(machine: Machine, kernels: Kernels) -> Verdict:
    gpu = machine.gpu
    if not machine.has_tensorrt:
        lacks = "TensorRT" if gpu else "TensorRT, and an NVIDIA GPU"
        install = INSTALL_TENSORRT if gpu else INSTALL_RTX
        return Verdict("tensorrt", LACKING, "GPUs; TensorRT-RTX builds engines without one", lacks, install)
    name = "TensorRT" if machine.trtexec or "tensorrt" in machine.versions else "TensorRT-RTX"
    if gpu is None:
        can = "builds engines ahead of time" if name == "TensorRT-RTX" else "installed"
        return Verdict("tensorrt", PARTLY if name == "TensorRT-RTX" else LACKING, f"{name} {can}", NO_GPU)
    if gpu.capability < SPARSE:
        return Verdict("tensorrt", PARTLY, name, f"sparse tensor cores: {title(gpu)}, 8.0 is the first")
    return Verdict("tensorrt", READY, f"{name} on {title(gpu)}")


def sqat_backend(machine: Machine, kernels: Kernels) -> Verdict:
    if not kernels.instruction_set:
        return Verdict("sqat.runtime", LACKING, "2:4 int8 encoders on x86 CPUs", kernels.problem, kernels.remedy)
    if kernels.instruction_set == "scalar":
        return Verdict("sqat.runtime", PARTLY, "scalar kernels, for correctness only", "AVX2 or AVX-512 VNNI")
    return Verdict("sqat.runtime", READY, f"{kernels.instruction_set} kernels that skip the zeros")


def onnx_target(machine: Machine, kernels: Kernels) -> Verdict:
    return served_by(onnxruntime_backend(machine, kernels), "onnx-int8", "ONNX Runtime")


def float_target(machine: Machine, kernels: Kernels) -> Verdict:
    verdict = onnxruntime_backend(machine, kernels)
    state = LACKING if verdict.state == LACKING else READY
    return Verdict("onnx-fp32", state, "ONNX Runtime", verdict.lacks if state == LACKING else "", verdict.install)


def half_target(machine: Machine, kernels: Kernels) -> Verdict:
    if machine.gpu is None:
        return Verdict("onnx-fp16", PARTLY, "ONNX Runtime, without gain on a CPU", NO_GPU)
    if machine.gpu.capability < FP16:
        return Verdict("onnx-fp16", PARTLY, title(machine.gpu), "fp16 tensor cores, which came with 7.0")
    return served_by(tensorrt_backend(machine, kernels), "onnx-fp16", "TensorRT")


def tensorrt_target(machine: Machine, kernels: Kernels) -> Verdict:
    return served_by(tensorrt_backend(machine, kernels), "tensorrt", "TensorRT")


def sparse_cpu_target(machine: Machine, kernels: Kernels) -> Verdict:
    return served_by(sqat_backend(machine, kernels), "cpu-sparse", "sqat.runtime")


def packed_target(machine: Machine, kernels: Kernels) -> Verdict:
    name, anywhere = "torch-semi-structured", "torch, by the slow reference backend"
    gpu = machine.gpu
    if gpu is None:
        return Verdict(name, PARTLY, anywhere, NO_GPU)
    if gpu.capability < SPARSE:
        return Verdict(name, PARTLY, anywhere, f"sparse tensor cores: {title(gpu)}, 8.0 is the first")
    if not machine.cusparselt:
        return Verdict(name, PARTLY, anywhere, "torch with cuSPARSELt", REINSTALL_TORCH)
    return Verdict(name, READY, f"torch with cuSPARSELt on {title(gpu)}")


def compressed_target(machine: Machine, kernels: Kernels) -> Verdict:
    if "compressed_tensors" in machine.versions:
        return Verdict("compressed-tensors", READY, "transformers, computing in float")
    has, install = "sqat reads the folder back", "pip install 'sqat[compressed-tensors]'"
    return Verdict("compressed-tensors", PARTLY, has, "compressed-tensors, for transformers", install)


def served_by(backend: Verdict, target: str, through: str) -> Verdict:
    """The verdict of a target that a backend runs."""
    return Verdict(target, backend.state, through, backend.lacks, backend.install)


INSTALL_RTX = "pip install 'sqat[tensorrt-rtx]'"
REINSTALL_TORCH = "pip install --force-reinstall torch"  # pip leaves a build for CPUs where it is
NO_GPU = "an NVIDIA GPU"
Judge = Callable[[Machine, Kernels], Verdict]
BACKENDS: dict[str, Judge] = {
    "torch": torch_backend,
    "onnxruntime": onnxruntime_backend,
    "openvino": openvino_backend,
    "tensorrt": tensorrt_backend,
    "sqat.runtime": sqat_backend,
}
TARGETS: dict[str, Judge] = {
    "onnx-int8": onnx_target,
    "tensorrt": tensorrt_target,
    "cpu-sparse": sparse_cpu_target,
    "onnx-fp16": half_target,
    "torch-semi-structured": packed_target,
    "compressed-tensors": compressed_target,
    "onnx-fp32": float_target,
}
# Distributions: those of pyproject.toml's dependencies, and the others with the extra that brings them.
REQUIRED = ("torch", "transformers", "datasets", "accelerate", "safetensors", "numpy", "pydantic", "pyyaml", "typer",
            "rich", "scikit-learn", "scipy", "onnx", "onnx-ir", "onnxscript", "onnxruntime")  # fmt: skip
OPTIONAL = {
    "openvino": "",
    "tensorrt": "",
    "tensorrt-rtx-cu13": "",
    "compressed-tensors": "",
    "diffusers": "diffusion",
    "pillow": "images",
    "bm25s": "bm25",
    "jinja2": "report",
    "matplotlib": "report",
    "sentence-transformers": "",
}
