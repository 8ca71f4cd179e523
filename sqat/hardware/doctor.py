"""`sqat doctor`: this machine, its packages, and what each backend and target lacks on it.

It runs no backend (`sqat bench` does) and always exits with 0: a missing package for one target is no error for
another.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqat import __version__
from sqat.hardware.machine import Machine, describe_machine, version_of
from sqat.hardware.targets import BACKENDS, SPARSE_CORES, TARGETS, Verdict, check


@dataclass(frozen=True)
class Diagnosis:
    """What `sqat doctor` prints.

    Attributes:
        versions: distribution -> version, empty for one that is not installed.
        memory: total and available bytes.
        load: processes at work, mean of the last minute.
    """

    machine: Machine
    python: str
    system: str
    versions: Mapping[str, str]
    memory: tuple[int, int]
    load: float
    backends: tuple[Verdict, ...]
    targets: tuple[Verdict, ...]

    def as_json(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        processor = asdict(self.machine.processor)
        gpus = [{**asdict(gpu), "sparse_tensor_cores": gpu.capability >= SPARSE_CORES} for gpu in self.machine.gpus]
        return {
            "sqat": __version__,
            "python": self.python,
            "system": self.system,
            "versions": {name: version or None for name, version in self.versions.items()},
            "processor": {**processor, "features": sorted(self.machine.processor.features)},
            "memory": dict(zip(("total_bytes", "available_bytes"), self.memory, strict=True)),
            "load": self.load,
            "gpus": gpus,
            "runtime": asdict(self.machine.kernels),
            "providers": list(self.machine.providers),
            "unknown": list(self.machine.unknown),
            "backends": [asdict(verdict) for verdict in self.backends],
            "targets": [asdict(verdict) for verdict in self.targets],
        }

    def remedies(self) -> dict[str, list[str]]:
        """Return command -> the backends, targets and packages that it is for."""
        commands: dict[str, list[str]] = {}
        for verdict in (*self.backends, *self.targets):
            if verdict.install:
                commands.setdefault(verdict.install, []).append(verdict.name)
        for name, extra in OPTIONAL.items():
            if extra and not self.versions.get(name):
                commands.setdefault(f"pip install 'sqat[{extra}]'", []).append(name)
        return commands


def diagnose() -> Diagnosis:
    """Describe this machine and check every backend and target on it."""
    import psutil

    machine, memory = describe_machine(), psutil.virtual_memory()
    return Diagnosis(
        machine=machine,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        versions={name: version_of(name) for name in (*REQUIRED, *OPTIONAL)},
        memory=(memory.total, memory.available),
        load=psutil.getloadavg()[0],
        backends=tuple(check(name, subject, machine) for name, subject in BACKENDS.items()),
        targets=tuple(check(name, subject, machine) for name, subject in TARGETS.items()),
    )


# Distributions: the dependencies in pyproject.toml, and the optional ones with the extra that installs them.
REQUIRED = ("torch", "transformers", "datasets", "accelerate", "safetensors", "numpy", "pydantic", "pyyaml", "typer",
            "rich", "psutil", "scikit-learn", "scipy", "onnx", "onnx-ir", "onnxscript", "onnxruntime")  # fmt: skip
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
