"""The training kernels of a library, against NumPy: every size around the width of a vector, every odd value.

    python -m tests.runtime.kernel_oracle LIBRARY

Its own program for a library built with sanitizers; the tests call `check`. The oracle is written from what the kernels
are for, value by value where a vector could go wrong (ranks, counts), in float32 where bits are compared.
"""

from __future__ import annotations

import ctypes
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqat.runtime import kernels

Floats = NDArray[np.float32]
SIZES = (*range(1, 36), 63, 64, 65, 1000)
BOUNDS = (31.75, 1.0, 2.0**-40, 3e35)
ODD = (0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1e-45, 3e38, -3e38)
BINS = 8192


def opened(library: Path) -> ctypes.CDLL:
    """Return the library with the types of its kernels."""
    loaded = ctypes.CDLL(str(library))
    for name, arguments in kernels.ARGUMENTS.items():
        function = getattr(loaded, name)  # kept by the library, unlike loaded[name]
        function.argtypes, function.restype = arguments, ctypes.c_float if name == "SqatLargest" else None
    return loaded


def same_bits(got: NDArray[Any], want: NDArray[Any]) -> None:
    """NaN is NaN, whatever its other bits; -0 is not +0."""
    nan = np.isnan(want) if want.dtype == np.float32 else np.zeros(want.shape, bool)
    np.testing.assert_array_equal(got[~nan].view(np.uint8), want[~nan].view(np.uint8))
    assert np.isnan(got[nan]).all()


def called(function: Any, *arguments: Any) -> Any:
    """Arrays are given by their addresses, numbers as Python's."""
    plain = (each.item() if isinstance(each, np.floating) else each for each in arguments)
    return function(*(each.ctypes.data if isinstance(each, np.ndarray) else each for each in plain))


def quantized(x: Floats, step: np.float32, low: int) -> Floats:
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.clip(np.rint(x * (np.float32(1) / step)), np.float32(low), np.float32(127))
        return np.asarray(steps * step, np.float32)


def check_grid(loaded: ctypes.CDLL, x: Floats, amax: np.float32, low: int) -> None:
    step = amax / np.float32(127)
    least, most = (np.float32(float(edge) * float(step)) for edge in (low - 0.5, 127.5))
    y, inside = np.empty_like(x), np.empty(x.shape, bool)
    called(loaded.SqatFakeQuantize, x, x.size, amax, low, y, inside)
    same_bits(y, quantized(x, step, low))
    np.testing.assert_array_equal(inside, (x > least) & (x < most))


def check_rows(loaded: ctypes.CDLL, x: Floats, kept: NDArray[np.bool_] | None) -> None:
    """A row of zeros has the smallest step; one that holds no number is none."""
    left = x if kept is None else x * kept.astype(np.float32)
    step = np.maximum(np.abs(left).max(1, keepdims=True), np.float32(2.0**-40)) / np.float32(127)
    with np.errstate(invalid="ignore"):
        want = np.rint(left * (np.float32(1) / step)) * step + np.float32(0)
    y = np.empty_like(x)
    called(loaded.SqatFakeQuantizeRows, x, 0 if kept is None else kept, *x.shape, y)
    same_bits(y, want)


def check_mask(loaded: ctypes.CDLL, x: Floats, kept: NDArray[np.bool_]) -> None:
    y = np.empty_like(x)
    for added in map(np.float32, (0.0, -0.0)):
        called(loaded.SqatMask, x, kept, x.size, added, y)
        with np.errstate(invalid="ignore"):
            same_bits(y, x * kept.astype(np.float32) + added)
    called(loaded.SqatSelect, x, kept, x.size, y)
    same_bits(y, np.where(kept, x, np.float32(0)))


def check_ranks(loaded: ctypes.CDLL, scores: Floats) -> None:
    """Counts, for each, those before it in a stable order."""
    ranks = np.empty(scores.shape, np.uint8)
    called(loaded.SqatRankFours, scores, scores.size, ranks)
    for four, found in zip(scores.reshape(-1, 4), ranks.reshape(-1, 4), strict=True):
        order = sorted(range(4), key=lambda i: (-four[i], i))
        assert [order.index(i) for i in range(4)] == found.tolist()


def check_histogram(loaded: ctypes.CDLL, x: Floats, width: float) -> None:
    counts, want = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    for value in x.ravel().tolist():
        want[min(int(abs(value) / width), BINS - 1)] += 1
    called(loaded.SqatCountBins, x, x.size, 1 / width, BINS, counts)
    np.testing.assert_array_equal(counts, want)


def check_largest(loaded: ctypes.CDLL, x: Floats) -> None:
    assert called(loaded.SqatLargest, x, x.size) == np.abs(x).max(initial=0)
    for odd in (np.nan, np.inf, -np.inf):
        spoiled = x.copy()
        spoiled[-1] = odd
        assert not math.isfinite(called(loaded.SqatLargest, spoiled, spoiled.size))


def check(library: Path) -> int:
    """Try every kernel at every size, and return how many sizes were tried."""
    loaded, random = opened(library), np.random.default_rng(0)
    bounds = [*BOUNDS, *np.abs(random.normal(size=20)).astype(np.float32)]
    for size in SIZES:
        x = random.normal(size=size).astype(np.float32)
        kept = random.random(size) < 0.5
        halves = (random.integers(-260, 260, size) / 2).astype(np.float32)  # half to even, and beyond both ends
        odd = random.choice(np.array(ODD, np.float32), size)
        for amax in map(np.float32, bounds):
            for low in (-128, -127):
                for values in (x, halves * (amax / np.float32(127)), odd):
                    check_grid(loaded, values, amax, low)
        for values in (x, odd):
            check_mask(loaded, values, kept)
        for rows in (1, 3):
            block = random.normal(size=(rows, size)).astype(np.float32)
            block[-1] *= np.float32(1e-14)
            check_rows(loaded, block, None)
            check_rows(loaded, block, random.random(block.shape) < 0.5)
            check_rows(loaded, block, np.zeros(block.shape, bool))
            block[0, size // 2] = random.choice(np.array([np.nan, np.inf], np.float32))
            check_rows(loaded, block, random.random(block.shape) < 0.5)
        scores = random.integers(-2, 3, 4 * size).astype(np.float32)
        check_ranks(loaded, scores)
        check_ranks(loaded, random.choice(np.array([0.0, -0.0, np.inf, -np.inf, 1.0], np.float32), 4 * size))
        for width in (2.0**-10, 2.0**-12, 2.0**-100):  # without and with values beyond the last bin
            check_histogram(loaded, x, width)
        check_largest(loaded, x)
    return len(SIZES)


if __name__ == "__main__":
    print(f"{check(Path(sys.argv[1]))} sizes")
