"""sqat: sparse quantization-aware training of transformers, from one recipe to an int8 2:4 ONNX file.

The functions of `sqat.api`, for a training loop of your own, are also names of this package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqat.api.callback import SparseCallback as SparseCallback
    from sqat.api.distil import distillation_loss as distillation_loss
    from sqat.api.export import export_onnx as export_onnx
    from sqat.api.prune import Masks as Masks
    from sqat.api.prune import Pruner as Pruner
    from sqat.api.prune import masked as masked
    from sqat.api.prune import prune as prune
    from sqat.api.quantize import Scales as Scales
    from sqat.api.quantize import calibrate as calibrate
    from sqat.api.quantize import quantized as quantized
    from sqat.api.reconstruct import reconstruct as reconstruct
    from sqat.errors import GateError as GateError
    from sqat.errors import SqatError as SqatError

__version__ = "0.1.0"
PUBLIC_NAMES = {
    "sqat.api.callback": ("SparseCallback",),
    "sqat.api.distil": ("distillation_loss",),
    "sqat.api.export": ("export_onnx",),
    "sqat.api.prune": ("Masks", "Pruner", "masked", "prune"),
    "sqat.api.quantize": ("Scales", "calibrate", "quantized"),
    "sqat.api.reconstruct": ("reconstruct",),
    "sqat.errors": ("GateError", "SqatError"),
}
MODULES = {name: module for module, names in PUBLIC_NAMES.items() for name in names}
__all__ = sorted(MODULES)


def __getattr__(name: str) -> object:
    """Import a public name at its first use: `import sqat` alone loads nothing heavy."""
    if name not in MODULES:
        raise AttributeError(f"module 'sqat' has no attribute {name!r}")
    value: object = getattr(import_module(MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULES})
