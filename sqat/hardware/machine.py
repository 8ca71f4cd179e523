"""What this machine is: CPU, NVIDIA GPUs, and the packages that run exported models.

GPUs come from the NVIDIA driver, not from torch: a CPU build of torch sees no GPU, and a build for AMD calls its GPUs
cuda. Only the probes that need torch or ONNX Runtime import them.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sqat import runtime
from sqat.errors import SqatError, first_line

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Processor:
    """A CPU.

    Attributes:
        name: vendor and model, empty if unknown.
        machine: ``x86_64``, ``aarch64``, ...
        cores: logical cores that this process may use.
        features: those of `FEATURES` that it has.
    """

    name: str = ""
    machine: str = ""
    cores: int = 1
    features: frozenset[str] = frozenset()

    @property
    def is_x86(self) -> bool:
        return self.machine.lower() in ("x86_64", "amd64")

    @property
    def int8_instructions(self) -> list[str]:
        """Features that sum four int8 products exactly in one instruction."""
        return [name for name in ("amx_int8", "avx512_vnni", "avx_vnni", "dotprod") if name in self.features]

    @property
    def has_int8_dot(self) -> bool:
        return bool(self.int8_instructions)


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU and its compute capability (major, minor)."""

    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


@dataclass(frozen=True)
class Kernels:
    """sqat's own CPU kernels: the instruction set that they use here, or why there are none and what to do."""

    instruction_set: str = ""
    problem: str = "no compiled sqat.runtime"
    remedy: str = ""


@dataclass(frozen=True)
class Machine:
    """A machine that runs models.

    Attributes:
        gpus: NVIDIA GPUs that the driver shows to this process.
        versions: module -> version of the installed ones of `PACKAGES`; empty if unknown.
        providers: execution providers of ONNX Runtime.
        trtexec: whether TensorRT's command is on the PATH.
        cusparselt: whether torch can use cuSPARSELt.
        unknown: probes that failed, each with the reason.
    """

    processor: Processor = Processor()
    gpus: tuple[Gpu, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    providers: tuple[str, ...] = ()
    trtexec: bool = False
    cusparselt: bool = False
    kernels: Kernels = Kernels()
    unknown: tuple[str, ...] = ()

    @property
    def gpu(self) -> Gpu | None:
        """The GPU of the highest compute capability."""
        return max(self.gpus, key=lambda gpu: gpu.capability, default=None)

    @property
    def has_tensorrt(self) -> bool:
        """Whether TensorRT is installed in any form."""
        return self.trtexec or bool({"tensorrt", "tensorrt_rtx"} & set(self.versions))

    @property
    def builds_ahead(self) -> bool:
        """Whether only TensorRT-RTX is installed, which builds engines without a GPU."""
        return "tensorrt_rtx" in self.versions and "tensorrt" not in self.versions and not self.trtexec

    @property
    def torch_misses_gpu(self) -> bool:
        """Whether torch is a build for CPUs on a machine with a GPU."""
        return bool(self.gpus) and "+cpu" in self.versions.get("torch", "")

    def paragraphs(self) -> Iterator[tuple[str, str]]:
        """Yield CPU, GPUs, packages and providers as label and text."""
        processor, kernels = self.processor, self.kernels
        features = ", ".join(sorted(processor.features)) or "no int8 or wide vector features known"
        features += "" if processor.has_int8_dot else "; no exact int8 dot product"
        cores = f"{processor.cores} core{'s' * (processor.cores > 1)}"
        yield "cpu", f"{processor.name or processor.machine or 'unknown'}, {cores}; {features}"
        yield "runtime", f"sqat.runtime: {kernels.instruction_set or kernels.problem}"
        yield "gpu", "; ".join(map(str, self.gpus)) or "no NVIDIA GPU"
        yield "packages", ", ".join(f"{name} {version}".strip() for name, version in self.versions.items()) or "none"
        if self.providers:
            yield "providers", ", ".join(name.removesuffix("ExecutionProvider") for name in self.providers)
        for problem in self.unknown:
            yield "unknown", problem


def describe_machine() -> Machine:
    """Describe this machine; a probe that fails is listed in ``unknown`` and raises nothing."""
    unknown: list[str] = []

    def ask(what: str, probe: Callable[[], Answer], default: Answer) -> Answer:
        try:
            return probe()
        except Exception as error:  # a broken driver or package must not stop an export
            unknown.append(f"{what}: {type(error).__name__} {first_line(error)}")
            return default

    no_versions: dict[str, str] = {}
    no_gpus: tuple[Gpu, ...] = ()
    gpus = ask("NVIDIA driver", find_gpus, no_gpus)
    versions = ask("packages", installed_versions, no_versions)
    asks_torch = bool(gpus) and "torch" in versions
    return Machine(
        processor=ask("processor", describe_processor, Processor()),
        gpus=gpus,
        versions=versions,
        providers=ask("onnxruntime", execution_providers, ()) if "onnxruntime" in versions else (),
        trtexec=shutil.which("trtexec") is not None,
        cusparselt=asks_torch and ask("torch", torch_has_cusparselt, False),
        kernels=describe_kernels(),
        unknown=tuple(unknown),
    )


def describe_kernels() -> Kernels:
    """Report the instruction set of sqat's CPU kernels, or why they cannot be loaded."""
    try:
        return Kernels(runtime.instruction_set(), problem="")
    except SqatError as error:
        return Kernels(problem=error.problem, remedy=error.hint)


def describe_processor() -> Processor:
    """Read name, cores and features of the CPU from /proc/cpuinfo or sysctl."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if sys.platform == "darwin":
        command = ("sysctl", "machdep.cpu", "hw.optional")
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    else:
        path = Path("/proc/cpuinfo")
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    name, features = parse_processor(text)
    return Processor(name or platform.processor(), platform.machine(), cores, features)


def parse_processor(text: str) -> tuple[str, frozenset[str]]:
    """Parse name and features in /proc/cpuinfo or the output of sysctl, both lines of ``key: value``."""
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    name = next((entries[key] for key in ("model name", "machdep.cpu.brand_string") if key in entries), "")
    words = {word.lower() for key in ("flags", "Features") for word in entries.get(key, "").split()}
    words |= {key.lower() for key, value in entries.items() if key.startswith("hw.optional") and value == "1"}
    return name, frozenset(FEATURES[word] for word in words & set(FEATURES))


def find_gpus() -> tuple[Gpu, ...]:
    """Find the GPUs that the NVIDIA driver shows to this process; none without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return ()
    return query_driver(driver)


def query_driver(driver: Any) -> tuple[Gpu, ...]:
    """List the GPUs by CUDA's driver API, whose functions return 0 on success."""
    count = ctypes.c_int()
    if (code := driver.cuInit(0)) or (code := driver.cuDeviceGetCount(ctypes.byref(count))):
        if code == NO_DEVICE:
            return ()
        raise OSError(f"CUDA driver error {code}")
    return tuple(describe_gpu(driver, index) for index in range(count.value))


def describe_gpu(driver: Any, index: int) -> Gpu:
    """Describe one GPU by its index."""
    device, name = ctypes.c_int(), ctypes.create_string_buffer(128)
    major, minor = ctypes.c_int(), ctypes.c_int()
    codes = [
        driver.cuDeviceGet(ctypes.byref(device), index),
        driver.cuDeviceGetName(name, len(name), device),
        driver.cuDeviceGetAttribute(ctypes.byref(major), CAPABILITY_MAJOR, device),
        driver.cuDeviceGetAttribute(ctypes.byref(minor), CAPABILITY_MINOR, device),
    ]
    if any(codes):
        raise OSError(f"CUDA driver error {max(codes)} of GPU {index}")
    return Gpu(name.value.decode(errors="replace"), (major.value, minor.value))


def version_of(distribution: str) -> str:
    """Return the version of a distribution by its metadata; empty if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def installed_versions() -> dict[str, str]:
    """Return the versions of the installed ones of `PACKAGES`, without importing them."""
    present = [name for name in PACKAGES if importlib.util.find_spec(name) is not None]
    owners = importlib.metadata.packages_distributions()
    return {name: importlib.metadata.version(owners[name][0]) if name in owners else "" for name in present}


def execution_providers() -> tuple[str, ...]:
    """Return the execution providers of the installed ONNX Runtime."""
    return tuple(importlib.import_module("onnxruntime").get_available_providers())


def torch_has_cusparselt() -> bool:
    """Return whether torch can use cuSPARSELt."""
    return bool(importlib.import_module("torch").backends.cusparselt.is_available())


NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
PACKAGES = ("torch", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "compressed_tensors")
FEATURES = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "amx_int8": "amx_int8",
    "asimddp": "dotprod",
    "hw.optional.arm.feat_dotprod": "dotprod",
    "i8mm": "i8mm",
    "hw.optional.arm.feat_i8mm": "i8mm",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512",
    "hw.optional.avx512vnni": "avx512_vnni",
}
