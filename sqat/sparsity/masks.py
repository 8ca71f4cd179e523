"""N:M masks: which weights of each group of M are kept, how a mask is applied, and masks as bits.

A group is M neighbours along one dimension (1 of Linear [out, in] and Conv [out, in, kh, kw]), aligned to its start.
The N largest scores are kept; ties keep the lower index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sqat.runtime import kernels
from sqat.sparsity.pattern import Pattern

FOUR = 4  # group size of the compiled `rank_fours`
LANES = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # an integer with one byte for each score of a group


def split_groups(tensor: Tensor, m: int, dim: int) -> Tensor:
    """Return ``tensor`` with dimension ``dim`` split in (groups, m); ValueError if m does not divide it."""
    shape = tensor.shape
    if not 0 <= dim < len(shape):
        raise ValueError(f"a tensor of shape {tuple(shape)} has no dimension {dim}")
    if shape[dim] % m:
        raise ValueError(f"dimension {dim} of shape {tuple(shape)} is not a multiple of {m}")
    return tensor.reshape(*shape[:dim], shape[dim] // m, m, *shape[dim + 1 :])


def rank_groups(scores: Tensor, m: int, dim: int = 1) -> Tensor:
    """Rank the scores of each group: 0 for the largest, m - 1 for the smallest, lower index first.

    Args:
        scores: any shape whose dimension ``dim`` is a multiple of ``m``.

    Returns:
        uint8 tensor of the shape of ``scores``.

    Raises:
        ValueError: the size does not fit, or a score is NaN.
    """
    groups = split_groups(scores.detach(), m, dim).movedim(dim + 1, -1)
    if scores.numel() and bool(scores.max().isnan()):  # max passes NaN on and is far cheaper than isnan
        raise ValueError(f"{int(scores.isnan().sum())} of {scores.numel()} scores are NaN")
    ranks = _rank_by_shifts(groups, m) if m in LANES else _rank_by_sort(groups)
    return ranks.movedim(-1, dim + 1).flatten(dim, dim + 1)


def _rank_by_shifts(groups: Tensor, m: int) -> Tensor:
    """Count in byte i of a group's integer how many scores of the group beat score i, without a branch or a sort.

    Score i beats j = i + shift if it is not smaller. Byte i starts at m - 1 - i, as if every later score won. Each
    "not smaller" takes one from byte i and adds one to byte j: it adds (256**shift - 1) * 256**i. Carries cancel,
    since the counts end within 0..m-1. Bytes are little-endian.
    """
    flat = groups.reshape(-1)
    if m == FOUR and kernels.is_supported(flat):
        return kernels.rank_fours(flat).view(groups.shape)
    wins = torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
    lanes = wins.view(LANES[m])
    ranks = torch.full_like(lanes, sum((m - 1 - i) << 8 * i for i in range(m)))
    for shift in range(1, m):
        torch.ge(flat[:-shift], flat[shift:], out=wins[:-shift])
        lanes.bitwise_and_((1 << 8 * (m - shift)) - 1)  # drop comparisons across groups
        ranks.add_(lanes, alpha=(1 << 8 * shift) - 1)
    return ranks.view(torch.uint8).view(groups.shape)


def _rank_by_sort(groups: Tensor) -> Tensor:
    """Rank groups of any size along the last dimension."""
    order = groups.sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(groups.shape[-1], dtype=torch.uint8, device=groups.device).expand_as(order)
    return torch.empty(order.shape, dtype=torch.uint8, device=groups.device).scatter_(-1, order, places)


def nm_mask(scores: Tensor, pattern: Pattern, dim: int = 1) -> Tensor:
    """Keep the ``n`` largest scores of each aligned group of ``m`` along ``dim``.

    Args:
        scores: any shape whose dimension ``dim`` is a multiple of ``pattern.m``.

    Returns:
        Bool tensor of the shape of ``scores``, True where kept; ties keep the lower index.

    Raises:
        ValueError: the size does not fit, or a score is NaN.
    """
    return rank_groups(scores, pattern.m, dim).lt_(pattern.n).view(torch.bool)


def mark_smallest(losses: Tensor, count: int) -> Tensor:
    """Return a bool tensor, True at the ``count`` smallest losses; the lower index comes first among equals."""
    marks = torch.zeros(losses.numel(), dtype=torch.bool, device=losses.device)
    marks[losses.flatten().sort(stable=True).indices[:count]] = True
    return marks.view(losses.shape)


def count_violations(weight_or_mask: Tensor, pattern: Pattern, dim: int = 1) -> int:
    """Count the groups that hold more than ``pattern.n`` non-zeros."""
    kept = split_groups(weight_or_mask != 0, pattern.m, dim).sum(dim + 1, dtype=torch.uint8)
    return int((kept > pattern.n).sum())


class _ApplyMask(torch.autograd.Function):
    # Without the compiled kernel, a product with the mask as numbers: torch.where and masked_fill branch on each
    # element, and a CPU cannot predict the branches of a mask.
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        if kernels.is_supported(weight, mask):
            return kernels.multiply_mask(weight, mask)
        return mask.view(torch.uint8).to(weight.dtype).mul_(weight).add_(0.0)  # -0.0 + 0.0 is +0.0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return kernels.mask_gradient(grads[0], mask), None


class _ApplyMaskStraightThrough(_ApplyMask):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def apply_mask(weight: Tensor, mask: Tensor, straight_through: bool = False) -> Tensor:
    """Set the pruned weights to +0.0; they get no gradient.

    Args:
        weight: finite floats (a product, so 0 * inf would be NaN).
        mask: bool, shape of ``weight``, True where kept.
        straight_through: pruned weights get the gradient of the zero in their place.
    """
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask {mask.dtype} {tuple(mask.shape)} must be bool of the weight's shape {tuple(weight.shape)}"
        )
    function = _ApplyMaskStraightThrough if straight_through else _ApplyMask
    masked: Tensor = function.apply(weight, mask)  # type: ignore[no-untyped-call]
    return masked


def pack_bits(mask: Tensor) -> Tensor:
    """Return a bool tensor of any shape as uint8 [ceil(numel / 8)], the first weight in the lowest bit.

    Safetensors has no type of one bit. Spare bits of the last byte are 0.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask must be bool, got {mask.dtype}")
    bits = mask.reshape(-1).to(torch.uint8)
    bits = pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits << shifts).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the bool tensor of ``shape`` that `pack_bits` packed; ValueError where the bytes cannot be its packing."""
    size = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (math.ceil(size / 8),):
        raise ValueError(
            f"a mask of shape {tuple(shape)} packs to {math.ceil(size / 8)} uint8, "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(1) >> shifts & 1).view(-1)
    if bool(bits[size:].any()):
        raise ValueError(f"spare bits after a mask of {size} bits must be 0")
    return bits[:size].to(torch.bool).view(tuple(shape))
