"""sqat: sparse quantization-aware training of transformers, from one recipe to an int8 2:4 ONNX file.

For loops of one's own, `sqat.library` has the same things as functions; they are names of this package too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqat.errors import GateError, SqatError
    from sqat.library.distilling import distillation_loss
    from sqat.library.exporting import export_onnx
    from sqat.library.pruning import Masks, Pruner, masked, prune
    from sqat.library.quantizing import Scales, calibrate, quantized
    from sqat.library.trainer import SparseCallback

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
    "Masks": "sqat.library.pruning",
    "Pruner": "sqat.library.pruning",
    "masked": "sqat.library.pruning",
    "prune": "sqat.library.pruning",
    "Scales": "sqat.library.quantizing",
    "calibrate": "sqat.library.quantizing",
    "quantized": "sqat.library.quantizing",
    "distillation_loss": "sqat.library.distilling",
    "export_onnx": "sqat.library.exporting",
    "SparseCallback": "sqat.library.trainer",
}
