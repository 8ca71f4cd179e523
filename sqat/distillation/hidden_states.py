"""SquareHead (arXiv:2310.06927): the hidden states after each block, each layer's error relative to its size.

Shapes: B samples, T tokens, H width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask: Tensor | None) -> Tensor:
    """Return the sum over layers of MSE(student, teacher) / MSE(teacher, 0), a scalar; the teacher gets no gradient.

    Everything is computed in float32 at least, autocast or not.

    Args:
        student: hidden states of each layer, [B, T, H] for texts; the teacher's have the same shapes.
        attention_mask: [B, T], non-zero at real tokens; None where every position counts (images).

    Raises:
        ValueError: layers or shapes differ.
    """
    if len(student) != len(teacher):
        raise ValueError(f"hidden states need as many layers, got {len(student)} in the student and "
                         f"{len(teacher)} in the teacher")  # fmt: skip
    total = student[0].new_zeros((), dtype=torch.promote_types(student[0].dtype, torch.float32))
    with torch.autocast(student[0].device.type, enabled=False):
        for number, (x, target) in enumerate(zip(student, teacher, strict=True)):
            if x.shape != target.shape:
                raise ValueError(f"hidden states need equal shapes, got {list(x.shape)} in the student and "
                                 f"{list(target.shape)} in the teacher after block {number}")  # fmt: skip
            x, target = x.to(total.dtype), target.detach().to(total.dtype)
            if attention_mask is not None:
                padding = ~attention_mask.bool()[:, :, None]
                x, target = x.masked_fill(padding, 0.0), target.masked_fill(padding, 0.0)
            size = target.square().sum().clamp(min=torch.finfo(total.dtype).tiny)
            total = total + (x - target).square().sum() / size
    return total
