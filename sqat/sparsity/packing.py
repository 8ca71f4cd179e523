"""Masks as bits: eight weights a byte, the first in the lowest bit, rows running on without padding.

Safetensors has no type of one bit, and a bool costs a byte. Left out: the 2-bit metadata of a hardware's
2:4 format, which belongs to the export.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a bool tensor of any shape to uint8 [ceil(numel / 8)]; spare bits of the last byte are 0."""
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask must be bool, got {mask.dtype}")
    bits = mask.reshape(-1).to(torch.uint8)
    bits = pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits << shifts).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `pack_bits` into a bool tensor of ``shape``; ValueError if the bytes cannot be its packing."""
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
