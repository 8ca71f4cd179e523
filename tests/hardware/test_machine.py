"""What a machine says of itself is read right, in each of the ways it may say it, and no probe can stop the others."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import subprocess
import sys
from typing import Any

import pytest

from sqat.hardware import machine
from sqat.hardware.machine import Gpu, Processor, describe_machine, parse_processor, query_driver

EPYC = """processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 9654 96-Core Processor
flags\t\t: fpu sse2 avx2 avx512f avx512_vnni
"""
GRAVITON = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd asimddp i8mm
CPU implementer\t: 0x41
"""
APPLE = """machdep.cpu.brand_string: Apple M2
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_I8MM: 0
"""


@pytest.mark.parametrize(("text", "name", "features"), [
    (EPYC, "AMD EPYC 9654 96-Core Processor", {"avx2", "avx512", "avx512_vnni"}),
    (GRAVITON, "", {"dotprod", "i8mm"}),
    (APPLE, "Apple M2", {"dotprod"}),
    ("model name : X\nflags : amx_int8 avx_vnni", "X", {"amx_int8", "avx_vnni"}),
    ("", "", set()),
])  # fmt: skip
def test_processors(text: str, name: str, features: set[str]) -> None:
    assert parse_processor(text) == (name, frozenset(features))


@pytest.mark.parametrize(("features", "exact"), [
    ({"avx2", "avx512"}, False), ({"avx512_vnni"}, True), ({"avx_vnni"}, True), ({"amx_int8"}, True),
    ({"dotprod"}, True), (set(), False),
])  # fmt: skip
def test_int8_dot_products(features: set[str], exact: bool) -> None:
    assert Processor(features=frozenset(features)).has_int8_dot == exact


class Driver:
    """CUDA's driver interface over a list of GPUs."""

    def __init__(self, gpus: list[Gpu], initialised: int = 0) -> None:
        self.gpus = gpus
        self.initialised = initialised

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.initialised

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.gpus)
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = 10 + index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = self.gpus[device.value - 10].name.encode()[: size - 1]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = self.gpus[device.value - 10].capability[{75: 0, 76: 1}[attribute]]
        return 0


def test_the_driver_is_asked_gpu_by_gpu() -> None:
    gpus = [Gpu("NVIDIA A10", (8, 6)), Gpu("Tesla T4", (7, 5))]
    assert query_driver(Driver(gpus)) == tuple(gpus)
    assert query_driver(Driver(gpus, initialised=100)) == ()
    with pytest.raises(OSError, match="CUDA driver error 999"):
        query_driver(Driver(gpus, initialised=999))


def no_library(name: str) -> Any:
    raise OSError(f"{name}: cannot open shared object file")


def test_no_gpu_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", no_library)
    assert describe_machine().gpus == ()
    assert describe_machine().unknown == ()


def test_the_best_gpu_counts() -> None:
    found = machine.Machine(gpus=(Gpu("a", (7, 5)), Gpu("b", (12, 0)), Gpu("c", (8, 9))))
    assert found.gpu == Gpu("b", (12, 0))
    assert machine.Machine().gpu is None


def test_packages_are_those_of_this_environment() -> None:
    found = describe_machine()
    assert found.versions["torch"] == importlib.metadata.version("torch")
    assert "CPUExecutionProvider" in found.providers
    assert found.processor.machine == platform.machine()
    assert found.processor.cores >= 1


def failing(*_: Any) -> Any:
    raise RuntimeError("out of order\nin two lines")


PROBES = {
    "find_gpus": "NVIDIA driver",
    "installed_versions": "packages",
    "describe_processor": "processor",
    "execution_providers": "onnxruntime",
    "torch_has_cusparselt": "torch",
}


@pytest.mark.parametrize("probe", PROBES)
def test_a_probe_that_fails_is_named_and_stops_nothing(monkeypatch: pytest.MonkeyPatch, probe: str) -> None:
    monkeypatch.setattr(machine, "find_gpus", lambda: (Gpu("NVIDIA A10", (8, 6)),))
    monkeypatch.setattr(machine, probe, failing)
    assert describe_machine().unknown == (f"{PROBES[probe]}: RuntimeError out of order",)


def test_looking_loads_nothing_heavy() -> None:
    code = "import sys, sqat.hardware.auto_target, sqat.hardware.machine; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "onnx", "onnxruntime", "pydantic", "transformers"} & set(loaded)
