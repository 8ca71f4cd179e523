"""Fake quantization to int8: values on the integer grid, with straight-through gradients.

Q(x) = clamp(round_half_even(x / s), lo, hi) * s with s = amax / 127. Activations: per tensor, lo = -128 or -127;
weights: per output channel, lo = -127. Computed in float32 (float64 for float64), returned in the input's type.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sqat.runtime import kernels

ACTIVATION_LOW, HIGH = -128, 127  # weights use -HIGH..HIGH
FP32_NOISE = 3e-7  # relative error of a sum in float32, which runtimes round each in its own way
SMALLEST_AMAX = 2.0**-40  # of a fully pruned row or a learned amax driven to 0: 1 / scale stays finite


def _widen(x: Tensor) -> Tensor:
    """Return a tensor in the type that is computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _step_through(grad: Tensor, x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
    """Return ``grad`` where x / scale lies strictly within (low, high), else 0."""
    grad, x = _widen(grad), _widen(x)
    if x.is_cpu and not torch.compiler.is_compiling():
        step = float(scale)
    else:  # to read the scale would wait for the device, or break a compiled graph
        x, step = x / scale, 1.0
    inside: Tensor = torch.ops.aten.hardtanh_backward(grad, x, low * step, high * step)  # one pass
    return inside


class _FakeQuantize(torch.autograd.Function):
    # The compiled kernel keeps a byte a value. Else a chain of plain operators rather than torch's fused one, which
    # branches on each element on a CPU. The gradient passes where the rounded value lies in the range.
    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor, low: int) -> Tensor:
        if kernels.is_supported(x) and amax.dtype == torch.float32:
            y, inside = kernels.fake_quantize(x, amax, low)
            ctx.save_for_backward(inside)
            return y
        ctx.save_for_backward(x, amax)
        ctx.low = low
        return _to_grid(x, amax / HIGH, low)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        saved = ctx.saved_tensors  # once: checkpointing makes them anew at every look
        if len(saved) == 1:
            return kernels.zero_outside(grads[0], saved[0]), None, None
        x, amax = saved
        inside = _step_through(grads[0], x, amax / HIGH, ctx.low - 0.5, HIGH + 0.5)
        return inside.to(x.dtype), None, None


def _to_grid(x: Tensor, scale: Tensor, low: int) -> Tensor:
    """Return the values on the grid; like torch, x is multiplied by 1 / scale."""
    y = _widen(x) * (1 / scale)
    return y.round_().clamp_(low, HIGH).mul_(scale).to(x.dtype)


def fake_quantize(x: Tensor, amax: Tensor, low: int = ACTIVATION_LOW) -> Tensor:
    """Round activations to the int8 grid of one scale, with a straight-through gradient.

    Args:
        x: floats of any shape.
        amax: float32, 0-d, on the device of ``x``. `check_amax` checks it once; here that would wait for the device.
        low: lowest integer, -128 or -127.

    Returns:
        Tensor of the shape and type of ``x``. NaN stays NaN; small negative values become -0.0.
    """
    y: Tensor = _FakeQuantize.apply(x, amax, low)  # type: ignore[no-untyped-call]
    return y


def check_amax(amax: Tensor, place: str = "amax") -> None:
    """Raise ValueError unless ``amax`` is 0-d float, positive and finite; ``place`` begins the message."""
    if amax.dim() or not amax.is_floating_point():
        raise ValueError(f"{place}: must be a 0-d float tensor, got {amax.dtype} {tuple(amax.shape)}")
    if not (math.isfinite(amax) and amax > 0):
        raise ValueError(f"{place}: must be positive and finite, got {float(amax)}")


class _FakeQuantizeLearned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor, low: int) -> Tensor:
        y = _to_grid(x, amax.clamp(min=SMALLEST_AMAX) / HIGH, low)
        ctx.save_for_backward(x, y, amax)  # the layer that reads y keeps it anyway
        ctx.low = low
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, y, amax = ctx.saved_tensors
        scale = amax.clamp(min=SMALLEST_AMAX) / HIGH
        grad = _widen(grads[0])
        inside = _step_through(grad, x, scale, ctx.low, HIGH)
        # times scale: the sum of grad * (round(v) - v) inside and of grad * limit outside, where v = x / scale
        total = _dot(grad, _widen(y)) - _dot(inside, _widen(x))
        share = 1 / math.sqrt(x[0].numel() * HIGH)
        return inside.to(x.dtype), (total / scale * (share / HIGH)).to(amax.dtype), None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))


def fake_quantize_learned(x: Tensor, amax: Tensor, low: int = ACTIVATION_LOW) -> Tensor:
    """Round activations to the int8 grid of a learned scale (LSQ, arXiv:1902.08153).

    With v = x / s, x gets the gradient where -128 < v < 127; s gets round(v) - v there, -128 or 127 elsewhere, times
    1 / sqrt(127 N) with N the values of one sample. amax = 127 s.

    Args:
        x: floats [samples, ...].
        amax: float, 0-d, learned; below 2**-40 it acts as 2**-40.
        low: lowest integer, -128 or -127 (then also instead of -128 above).
    """
    y: Tensor = _FakeQuantizeLearned.apply(x, amax, low)  # type: ignore[no-untyped-call]
    return y


class _RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def round_straight_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes unchanged."""
    y: Tensor = _RoundStraightThrough.apply(x)  # type: ignore[no-untyped-call]
    return y


def _row_scale(weight: Tensor) -> Tensor:
    """Return amax / 127 of each output channel, positive even for a row of zeros, shaped to broadcast."""
    rows = weight.flatten(1)
    amax = torch.maximum(rows.amax(1), rows.amin(1).neg_()).clamp_(min=SMALLEST_AMAX)
    return amax.div_(HIGH).view(-1, *[1] * (weight.dim() - 1))


class _FakeQuantizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(mask)
        if weight.dim() > 1 and kernels.is_supported(weight, mask):
            return kernels.fake_quantize_rows(weight, mask)
        y = _widen(weight)
        y = y.clone() if mask is None else mask.view(torch.uint8).to(y.dtype).mul_(y)
        scale = _row_scale(y)
        # |w| / s is at most 127 within rounding, so that nothing is clamped; + 0.0 turns -0.0 into +0.0
        return y.mul_(1 / scale).round_().mul_(scale).add_(0.0).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        if mask is None:
            return grads[0], None
        return kernels.mask_gradient(grads[0], mask), None


def fake_quantize_weight(weight: Tensor, mask: Tensor | None) -> Tensor:
    """Mask a weight and round it to the int8 grid of each output channel; the gradient is ``grad * mask``.

    The scale of a row is its largest unpruned |w| over 127, so that nothing is clipped.

    Args:
        weight: finite floats [out, ...].
        mask: bool of the same shape, True where kept; None keeps all.

    Returns:
        Tensor of the shape and type of ``weight``; zeros are +0.0.
    """
    if mask is not None and (mask.shape != weight.shape or mask.dtype != torch.bool):
        raise ValueError(
            f"mask {mask.dtype} {tuple(mask.shape)} must be bool of the weight's shape {tuple(weight.shape)}"
        )
    y: Tensor = _FakeQuantizeWeight.apply(weight, mask)  # type: ignore[no-untyped-call]
    return y


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the integers and scales to which `fake_quantize_weight` rounds a (masked) weight.

    Args:
        weight: finite floats [out, ...].

    Returns:
        int8 tensor of the shape of ``weight`` in [-127, 127], and float scales [out], all positive.
    """
    w = _widen(weight.detach())
    scale = _row_scale(w)
    return w.mul(1 / scale).round_().to(torch.int8), scale.flatten()


def sqnr_db(x: Tensor, y: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio of ``y`` for ``x`` in dB; inf where they are equal."""
    signal, noise = x.double().square().sum(), (x.double() - y.double()).square().sum()
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
