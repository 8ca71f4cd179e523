"""What each backend and export target needs of a machine: the one table behind `sqat doctor` and `--target auto`.

What a target needs of the model is in `sqat.recipe.targets`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqat.hardware.machine import Machine

SPARSE_CORES = (8, 0)  # compute capability of the first sparse tensor cores (Ampere)
INT8_CORES = (7, 2)  # of the first int8 tensor cores
FP16_CORES = (7, 0)  # of the first fp16 tensor cores
READY, PARTLY, MISSING = "ready", "partly", "no"


@dataclass(frozen=True)
class Need:
    """One thing that a backend or target needs.

    Attributes:
        text: its name; may hold fields of the machine, as a format string.
        install: the command that gets it, empty if no command does; may hold fields of the machine.
        is_optional: whether the backend or target works without it, slower or in part.
    """

    text: str
    is_met: Callable[[Machine], bool]
    install: str = ""
    is_optional: bool = False


@dataclass(frozen=True)
class Subject:
    """A backend or a target and its needs.

    Attributes:
        about: what a backend runs, or what a target is served by.
        needs: in order of importance.
    """

    about: str
    needs: tuple[Need, ...]


@dataclass(frozen=True)
class Verdict:
    """Whether a backend or target can be used on a machine.

    Attributes:
        state: ``ready``, ``partly`` (an optional need is missing) or ``no``.
        has: what the backend runs, or what the target is served by.
        lacks: the missing need, empty if there is none.
        install: the command that gets it, empty if no command does.
    """

    name: str
    state: str
    has: str
    lacks: str = ""
    install: str = ""


def check(name: str, subject: Subject, machine: Machine) -> Verdict:
    """Check the needs of a backend or target on a machine; the first missing one that is not optional counts."""
    missing = sorted((need for need in subject.needs if not need.is_met(machine)), key=lambda need: need.is_optional)
    if not missing:
        return Verdict(name, READY, subject.about)
    state = PARTLY if missing[0].is_optional else MISSING
    text, install = (part.format(machine=machine) for part in (missing[0].text, missing[0].install))
    return Verdict(name, state, subject.about, text, install)


def has_capability(machine: Machine, capability: tuple[int, int]) -> bool:
    """Return whether the best GPU has at least a compute capability."""
    return machine.gpu is not None and machine.gpu.capability >= capability


def package(module: str, distribution: str, *, is_optional: bool = False) -> Need:
    """Return the need for an installed package."""
    return Need(module, lambda machine: module in machine.versions, f"pip install {distribution}", is_optional)


def tensor_cores(kind: str, capability: tuple[int, int]) -> Need:
    """Return the need for a GPU with a kind of tensor cores."""
    text = f"a GPU with {kind} tensor cores ({capability[0]}.{capability[1]} or later)"
    return Need(text, lambda machine: has_capability(machine, capability), is_optional=True)


def has_exact_int8(machine: Machine) -> bool:
    """Return whether the CPU sums int8 products exactly; CPUs other than x86 do not saturate."""
    return machine.processor.has_int8_dot or not machine.processor.is_x86


INSTALL_TENSORRT = "pip install tensorrt"
REINSTALL_TORCH = "pip install --force-reinstall torch"  # pip keeps an installed build for CPUs
SPARSE_GPU, FP16_GPU = tensor_cores("sparse", SPARSE_CORES), tensor_cores("fp16", FP16_CORES)
TENSORRT_NEEDS = (
    Need("TensorRT", lambda machine: machine.gpu is None or machine.has_tensorrt, INSTALL_TENSORRT),
    Need("TensorRT-RTX, which builds engines without a GPU",
         lambda machine: machine.gpu is not None or machine.has_tensorrt, "pip install 'sqat[tensorrt-rtx]'"),
    Need("an NVIDIA GPU", lambda machine: machine.gpu is not None or machine.builds_ahead),
    SPARSE_GPU,
)  # fmt: skip
ONNXRUNTIME = package("onnxruntime", "onnxruntime")
VNNI = Need("VNNI: int8 is slow without it", has_exact_int8, is_optional=True)
RUNTIME_NEEDS = (
    Need("compiled kernels ({machine.kernels.problem})", lambda machine: bool(machine.kernels.instruction_set),
         "{machine.kernels.remedy}"),
    Need("AVX2 or AVX-512 VNNI: the scalar kernels are slow",
         lambda machine: machine.kernels.instruction_set != "scalar", is_optional=True),
)  # fmt: skip
BACKENDS: dict[str, Subject] = {
    "torch": Subject(
        "checkpoints",
        (
            package("torch", "torch"),
            Need("a torch build for this GPU", lambda machine: not machine.torch_misses_gpu, REINSTALL_TORCH, True),
        ),
    ),
    "onnxruntime": Subject("ONNX files", (ONNXRUNTIME, VNNI)),
    "openvino": Subject(
        "ONNX files on CPUs",
        (
            package("openvino", "openvino"),
            Need("VNNI: int8 saturates without it", has_exact_int8, is_optional=True),
        ),
    ),
    "tensorrt": Subject("ONNX files on NVIDIA GPUs", TENSORRT_NEEDS),
    "sqat.runtime": Subject("2:4 int8 encoders on CPUs", RUNTIME_NEEDS),
}
TARGETS: dict[str, Subject] = {
    "onnx-int8": Subject("ONNX Runtime", (ONNXRUNTIME, VNNI)),
    "tensorrt": Subject("TensorRT", TENSORRT_NEEDS),
    "cpu-sparse": Subject("sqat.runtime", RUNTIME_NEEDS),
    "onnx-fp16": Subject(
        "TensorRT, ONNX Runtime",
        (
            FP16_GPU,
            Need(
                "TensorRT",
                lambda machine: machine.has_tensorrt or not has_capability(machine, FP16_CORES),
                INSTALL_TENSORRT,
            ),
            SPARSE_GPU,
        ),
    ),
    "torch-semi-structured": Subject(
        "torch",
        (SPARSE_GPU, Need("torch with cuSPARSELt", lambda machine: machine.cusparselt, REINSTALL_TORCH, True)),
    ),
    "compressed-tensors": Subject(
        "transformers, in float",
        (package("compressed_tensors", "'sqat[compressed-tensors]'", is_optional=True),),
    ),
    "onnx-fp32": Subject("ONNX Runtime", (ONNXRUNTIME,)),
}
