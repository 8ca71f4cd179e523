"""Elementwise passes of training in one go on a CPU, by sqat's compiled library.

A chain of torch's operators reads and writes a tensor once for every operator; here masking and fake quantization read
it once, and keep a byte a value for the backward pass where torch's keep a float. The bits are those of the chain, a
test compares them. So nothing but time depends on whether they are used: `fit` says when they can be, which is where a
process computes with one thread (as it does with one process for each core), for the library's passes know no threads.

Left out: GPUs, other types than float32, compiled graphs. There the callers' own chains are taken.
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
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where it is missing, broken or older than these passes."""
    try:
        runtime.instruction_set()
        loaded = runtime.load()
        for name, arguments in ARGUMENTS.items():
            function = getattr(loaded, name)  # kept by the library
            function.argtypes, function.restype = arguments, FLOAT if name == "SqatLargest" else None
    except (SqatError, AttributeError, OSError):
        return None
    return loaded


def fit(x: Tensor, kept: Tensor | None = None) -> bool:
    """Whether the passes can take a tensor and its mask: float32 and bool, on the CPU, without gaps, one thread."""
    if torch.compiler.is_compiling() or torch.get_num_threads() != 1 or library() is None or is_tracing():
        return False
    return lies_plain(x, torch.float32) and (kept is None or lies_plain(kept, torch.bool))


def lies_plain(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the bytes at a tensor's address are its values, of this type, one after the other."""
    plain = type(x) is Tensor or type(x) is nn.Parameter
    plain = plain and x.dtype == dtype and x.is_cpu and x.is_contiguous() and not x.is_neg()
    return plain and has_storage(x) and (x.data_ptr() != 0 or not x.numel())  # wrapped ones have no memory


def loaded() -> ctypes.CDLL:
    """The library, after `fit` has said yes."""
    known = library()
    assert known is not None
    return known


def mask(x: Tensor, kept: Tensor) -> Tensor:
    """``x * kept + 0.0``, so that no zero is negative; both of one shape."""
    return times(x, kept, 0.0)


def times(x: Tensor, kept: Tensor, added: float) -> Tensor:
    """``x * kept + added``; adding -0.0 changes nothing."""
    y = torch.empty_like(x)
    loaded().SqatMask(x.data_ptr(), kept.data_ptr(), x.numel(), added, y.data_ptr())
    return y


def times_mask(grad: Tensor, kept: Tensor) -> Tensor:
    """``grad * kept``; by torch where the gradient of this gradient is asked for."""
    if not torch.is_grad_enabled() and fit(grad, kept):
        return times(grad, kept, -0.0)
    return kept.view(torch.uint8).to(grad.dtype).mul_(grad)


def select(grad: Tensor, inside: Tensor) -> Tensor:
    """``grad`` where ``inside``, else 0; by torch where the gradient of this gradient is asked for."""
    if torch.is_grad_enabled() or not fit(grad, inside):
        return torch.where(inside, grad, 0.0)
    y = torch.empty_like(grad)
    loaded().SqatSelect(grad.data_ptr(), inside.data_ptr(), grad.numel(), y.data_ptr())
    return y


def fake_quantize(x: Tensor, amax: Tensor, low: int) -> tuple[Tensor, Tensor]:
    """``clamp(round(x * 1 / s), low, 127) * s`` with s = amax / 127, and where the gradient passes (bool)."""
    y, inside = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
    loaded().SqatFakeQuantize(x.data_ptr(), x.numel(), float(amax), low, y.data_ptr(), inside.data_ptr())
    return y, inside


def fake_quantize_rows(x: Tensor, kept: Tensor | None) -> Tensor:
    """Rows of ``x`` [out, ...] masked and rounded, each by its own largest |x| / 127 (2**-40 / 127 at least)."""
    y = torch.empty_like(x)
    rows = x.shape[0]
    mask = None if kept is None else kept.data_ptr()
    loaded().SqatFakeQuantizeRows(x.data_ptr(), mask, rows, x.numel() // max(1, rows), y.data_ptr())
    return y


def rank_fours(x: Tensor) -> Tensor:
    """Ranks (uint8) of a tensor's values in fours of neighbours: 0 for the largest, the first of equal ones."""
    ranks = torch.empty_like(x, dtype=torch.uint8)
    loaded().SqatRankFours(x.data_ptr(), x.numel(), ranks.data_ptr())
    return ranks


def largest(x: Tensor) -> float:
    """Of |x|; NaN or infinity where there is one."""
    return float(loaded().SqatLargest(x.data_ptr(), x.numel()))


def count_bins_(counts: Tensor, x: Tensor, width: float) -> None:
    """Add to int64 ``counts`` how many |x| lie in each bin of this width, what lies beyond the last in that."""
    loaded().SqatCountBins(x.data_ptr(), x.numel(), 1 / width, counts.numel(), counts.data_ptr())
