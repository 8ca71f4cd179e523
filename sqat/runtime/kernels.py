"""The compiled kernels of training, called on tensors: masking, fake quantization, ranks and histograms on a CPU.

A chain of torch's operators reads and writes a tensor for each operator; a kernel does once, with the same bits. Where
`is_supported` says no (a GPU, another type, a compiled graph, several threads), the callers run the chain.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor, nn

from sqat import runtime
from sqat.compat import has_storage, is_tracing
from sqat.errors import SqatError

ADDRESS, SIZE, FLOAT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float
ARGUMENTS = {
    "SqatMask": (ADDRESS, ADDRESS, SIZE, FLOAT, ADDRESS),
    "SqatSelect": (ADDRESS, ADDRESS, SIZE, ADDRESS),
    "SqatFakeQuantize": (ADDRESS, SIZE, FLOAT, FLOAT, ADDRESS, ADDRESS),
    "SqatFakeQuantizeRows": (ADDRESS, ADDRESS, SIZE, SIZE, ADDRESS),
    "SqatRankFours": (ADDRESS, SIZE, ADDRESS),
    "SqatLargest": (ADDRESS, SIZE),
    "SqatCountBins": (ADDRESS, SIZE, FLOAT, SIZE, ADDRESS),
}


@cache
def load_kernels() -> ctypes.CDLL | None:
    """Return the compiled library, or None where it is missing, broken or older than these kernels."""
    try:
        runtime.instruction_set()
        library = runtime.load()
        for name, arguments in ARGUMENTS.items():
            function = getattr(library, name)  # ctypes keeps it
            function.argtypes, function.restype = arguments, FLOAT if name == "SqatLargest" else None
    except (SqatError, AttributeError, OSError):
        return None
    return library


def is_supported(x: Tensor, mask: Tensor | None = None) -> bool:
    """Whether the kernels can take a float32 tensor and its bool mask: on the CPU, contiguous, one thread, eager."""
    if torch.compiler.is_compiling() or torch.get_num_threads() != 1 or load_kernels() is None or is_tracing():
        return False
    return is_contiguous_cpu(x, torch.float32) and (mask is None or is_contiguous_cpu(mask, torch.bool))


def is_contiguous_cpu(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the bytes at a tensor's address are its values, of this type, one after the other."""
    plain = type(x) is Tensor or type(x) is nn.Parameter
    plain = plain and x.dtype == dtype and x.is_cpu and x.is_contiguous() and not x.is_neg()
    return plain and has_storage(x) and (x.data_ptr() != 0 or not x.numel())  # wrapper subclasses have no memory


def kernels() -> ctypes.CDLL:
    """Return the library, after `is_supported` has said yes."""
    library = load_kernels()
    assert library is not None
    return library


def multiply_mask(x: Tensor, mask: Tensor, addend: float = 0.0) -> Tensor:
    """Return ``x * mask + addend``: 0.0 makes negative zeros positive, -0.0 changes nothing."""
    y = torch.empty_like(x)
    kernels().SqatMask(x.data_ptr(), mask.data_ptr(), x.numel(), addend, y.data_ptr())
    return y


def mask_gradient(grad: Tensor, mask: Tensor) -> Tensor:
    """Return ``grad * mask``; by torch where the gradient of this gradient is needed."""
    if not torch.is_grad_enabled() and is_supported(grad, mask):
        return multiply_mask(grad, mask, -0.0)
    return mask.view(torch.uint8).to(grad.dtype).mul_(grad)


def zero_outside(grad: Tensor, inside: Tensor) -> Tensor:
    """Return ``grad`` where ``inside``, else 0; by torch where the gradient of this gradient is needed."""
    if torch.is_grad_enabled() or not is_supported(grad, inside):
        return torch.where(inside, grad, 0.0)
    y = torch.empty_like(grad)
    kernels().SqatSelect(grad.data_ptr(), inside.data_ptr(), grad.numel(), y.data_ptr())
    return y


def fake_quantize(x: Tensor, amax: Tensor, low: int) -> tuple[Tensor, Tensor]:
    """Return ``clamp(round(x * 1 / s), low, 127) * s`` with s = amax / 127, and where the gradient passes (bool)."""
    y, inside = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
    kernels().SqatFakeQuantize(x.data_ptr(), x.numel(), float(amax), low, y.data_ptr(), inside.data_ptr())
    return y, inside


def fake_quantize_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``x`` [out, ...] masked and rounded, each row by its largest |x| / 127 (2**-40 / 127 at least)."""
    y = torch.empty_like(x)
    rows = x.shape[0]
    mask_address = None if mask is None else mask.data_ptr()
    kernels().SqatFakeQuantizeRows(x.data_ptr(), mask_address, rows, x.numel() // max(1, rows), y.data_ptr())
    return y


def rank_fours(x: Tensor) -> Tensor:
    """Return the ranks (uint8) of values in groups of four neighbours: 0 for the largest, the first of equal ones."""
    ranks = torch.empty_like(x, dtype=torch.uint8)
    kernels().SqatRankFours(x.data_ptr(), x.numel(), ranks.data_ptr())
    return ranks


def abs_max(x: Tensor) -> float:
    """Return the largest |x|; NaN or infinity where there is one."""
    return float(kernels().SqatLargest(x.data_ptr(), x.numel()))


def count_bins_(counts: Tensor, x: Tensor, width: float) -> None:
    """Add to int64 ``counts`` how many |x| lie in each bin of this width; values beyond the last bin count there."""
    kernels().SqatCountBins(x.data_ptr(), x.numel(), 1 / width, counts.numel(), counts.data_ptr())
