"""sqat: sparse quantization-aware training of transformers, from one recipe to an int8 2:4 ONNX file.

For loops of one's own, `sqat.api` has the same things as functions; they are names of this package too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqat.api.callback import SparseCallback
    from sqat.api.distil import distillation_loss
    from sqat.api.export import export_onnx
    from sqat.api.prune import Masks, Pruner, masked, prune
    from sqat.api.quantize import Scales, calibrate, quantized
    from sqat.errors import GateError, SqatError

__version__ = "0.1.0"
__all__ = [
    "GateError",
    "Masks",
    "Pruner",
    "Scales",
    "SparseCallback",
    "SqatError",
    "calibrate",
    "distillation_loss",
    "export_onnx",
    "masked",
    "prune",
    "quantized",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for: `import sqat` alone loads nothing heavy."""
    if name not in HOMES:
        raise AttributeError(f"module 'sqat' has no attribute {name!r}")
    found: object = getattr(import_module(HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


HOMES = {
    "GateError": "sqat.errors",
    "SqatError": "sqat.errors",
    "Masks": "sqat.api.prune",
    "Pruner": "sqat.api.prune",
    "masked": "sqat.api.prune",
    "prune": "sqat.api.prune",
    "Scales": "sqat.api.quantize",
    "calibrate": "sqat.api.quantize",
    "quantized": "sqat.api.quantize",
    "distillation_loss": "sqat.api.distil",
    "export_onnx": "sqat.api.export",
    "SparseCallback": "sqat.api.callback",
}
