"""What this machine is: processor, NVIDIA GPUs and the packages that run exported models.

What: `describe_machine` asks the operating system, the NVIDIA driver and the installed packages;
`sqat.hardware.choosing` says which export target fits what they answered.

Why the driver and not torch: a CPU build of torch sees no GPU that TensorRT could use, and a build for AMD calls
its GPUs cuda. Nothing heavy is imported by this module; torch and ONNX Runtime are imported by the probes that
need them. A probe that fails is named in `Machine.unknown` and stops nothing.
Left out: accelerators other than NVIDIA's, and any timing.
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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sqat import runtime

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Processor:
    """A CPU.

    Attributes:
        name: vendor and model as it calls itself, empty where it does not say.
        machine: ``x86_64``, ``aarch64``, ...
        cores: logical ones this process may use.
        features: those of `FEATURES` it has.
    """

    name: str = ""
    machine: str = ""
    cores: int = 1
    features: frozenset[str] = frozenset()

    @property
    def is_x86(self) -> bool:
        return self.machine.lower() in ("x86_64", "amd64")

    @property
    def has_int8_dot(self) -> bool:
        """Whether four int8 products are summed exactly in one instruction: VNNI, AMX, ARM dot product."""
        return bool(self.features & {"avx512_vnni", "avx_vnni", "amx_int8", "dotprod"})


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU and its compute capability (major, minor)."""

    name: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """What was found.

    Attributes:
        gpus: NVIDIA's, those the driver shows to this process.
        versions: module -> version of those of `PACKAGES` that are installed; empty where it is not told.
        providers: of ONNX Runtime.
        trtexec: whether TensorRT's command is on the PATH.
        cusparselt: whether torch can use cuSPARSELt here.
        kernels: whether this installation of sqat has the compiled kernels of target cpu-sparse.
        unknown: probes that failed, each with the reason.
    """

    processor: Processor = Processor()
    gpus: tuple[Gpu, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    providers: tuple[str, ...] = ()
    trtexec: bool = False
    cusparselt: bool = False
    kernels: bool = False
    unknown: tuple[str, ...] = ()

    @property
    def gpu(self) -> Gpu | None:
        """The GPU of the highest compute capability."""
        return max(self.gpus, key=lambda gpu: gpu.capability, default=None)

    @property
    def has_tensorrt(self) -> bool:
        """TensorRT for this machine's GPU, in any of its forms."""
        return self.trtexec or bool({"tensorrt", "tensorrt_rtx"} & set(self.versions))


def describe_machine() -> Machine:
    """Ask this machine what it is; never fails, takes about a second where torch must be asked."""
    unknown: list[str] = []

    def ask(what: str, probe: Callable[[], Answer], otherwise: Answer) -> Answer:
        try:
            return probe()
        except Exception as error:  # a broken driver or package must not keep anyone from exporting
            lines = str(error).splitlines() or [""]
            unknown.append(f"{what}: {type(error).__name__} {lines[0]}".rstrip())
            return otherwise

    nothing: dict[str, str] = {}
    nobody: tuple[Gpu, ...] = ()
    gpus = ask("NVIDIA driver", find_gpus, nobody)
    versions = ask("packages", installed_versions, nothing)
    asks_torch = bool(gpus) and "torch" in versions
    return Machine(
        processor=ask("processor", describe_processor, Processor()),
        gpus=gpus,
        versions=versions,
        providers=ask("onnxruntime", execution_providers, ()) if "onnxruntime" in versions else (),
        trtexec=shutil.which("trtexec") is not None,
        cusparselt=asks_torch and ask("torch", torch_has_cusparselt, False),
        kernels=runtime.LIBRARY.is_file(),
        unknown=tuple(unknown),
    )


def describe_processor() -> Processor:
    """Name, cores and features of the CPU, from where the operating system tells them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if sys.platform == "darwin":
        text = run("sysctl", "machdep.cpu", "hw.optional")
    else:
        path = Path("/proc/cpuinfo")
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    name, features = parse_processor(text)
    return Processor(name or platform.processor(), platform.machine(), cores, features)


def parse_processor(text: str) -> tuple[str, frozenset[str]]:
    """Name and features in /proc/cpuinfo or in the output of sysctl, both lines of ``key: value``."""
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    name = next((entries[key] for key in ("model name", "machdep.cpu.brand_string") if key in entries), "")
    words = {word.lower() for key in ("flags", "Features") for word in entries.get(key, "").split()}
    words |= {key.lower() for key, value in entries.items() if key.startswith("hw.optional") and value == "1"}
    return name, frozenset(FEATURES[word] for word in words & set(FEATURES))


def memory_bytes() -> tuple[int | None, int | None]:
    """Bytes of memory in all and available, as Linux counts them; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None, None
    return parse_memory(lines, "MemTotal"), parse_memory(lines, "MemAvailable")


def parse_memory(lines: list[str], key: str) -> int | None:
    """Bytes of an entry ``key:  N kB``."""
    words = next((line.split() for line in lines if line.startswith(f"{key}:")), [])
    return 1024 * int(words[1]) if len(words) > 1 and words[1].isdecimal() else None


def find_gpus() -> tuple[Gpu, ...]:
    """GPUs the NVIDIA driver shows; through its command where the library cannot be loaded; none without either."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        if shutil.which("nvidia-smi") is None:
            return ()
        return parse_smi(run("nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"))
    return query_driver(driver)


def query_driver(driver: Any) -> tuple[Gpu, ...]:
    """GPUs by CUDA's driver interface, whose functions return 0 where they succeed."""
    count = ctypes.c_int()
    if (code := driver.cuInit(0)) or (code := driver.cuDeviceGetCount(ctypes.byref(count))):
        if code == NO_DEVICE:
            return ()
        raise OSError(f"CUDA driver error {code}")
    return tuple(describe_gpu(driver, index) for index in range(count.value))


def describe_gpu(driver: Any, index: int) -> Gpu:
    """One GPU by its number."""
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


def parse_smi(text: str) -> tuple[Gpu, ...]:
    """GPUs in the lines ``NVIDIA A10, 8.6`` of nvidia-smi."""
    rows = [line.rpartition(",") for line in text.splitlines() if "," in line]
    parts = [(name.strip(), capability.strip().partition(".")) for name, _, capability in rows]
    return tuple(Gpu(name, (int(major), int(minor))) for name, (major, _, minor) in parts)


def run(*command: str) -> str:
    """Output of a command that may take 10 seconds."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout


def version_of(distribution: str) -> str:
    """Version of an installed distribution by its metadata, empty where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def installed_versions() -> dict[str, str]:
    """Versions of those of `PACKAGES` that can be imported, without importing them."""
    present = [name for name in PACKAGES if importlib.util.find_spec(name) is not None]
    owners = importlib.metadata.packages_distributions()
    return {name: importlib.metadata.version(owners[name][0]) if name in owners else "" for name in present}


def execution_providers() -> tuple[str, ...]:
    """What ONNX Runtime's installed build can run on."""
    return tuple(importlib.import_module("onnxruntime").get_available_providers())


def torch_has_cusparselt() -> bool:
    """Whether torch is built with cuSPARSELt and finds it."""
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
