"""sqat: sparse quantization-aware training of transformers, from one recipe to an int8 2:4 ONNX file.

For loops of one's own, `sqat.api` has the same things as functions; they are names of this package too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqat.api.distilling import distillation_loss
    from sqat.api.exporting import export_onnx
    from sqat.api.pruning import Masks, Pruner, masked, prune
    from sqat.api.quantizing import Scales, calibrate, quantized
    from sqat.api.trainer import SparseCallback
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
    "Masks": "sqat.api.pruning",
    "Pruner": "sqat.api.pruning",
    "masked": "sqat.api.pruning",
    "prune": "sqat.api.pruning",
    "Scales": "sqat.api.quantizing",
    "calibrate": "sqat.api.quantizing",
    "quantized": "sqat.api.quantizing",
    "distillation_loss": "sqat.api.distilling",
    "export_onnx": "sqat.api.exporting",
    "SparseCallback": "sqat.api.trainer",
}
