"""A weight as a matrix [O,C], and the inputs of its layer in the same order of columns.

O outputs, C columns: the inputs of a linear, or the unfolded window of a convolution [out,in,h,w] in the order
(h, w, in): M neighbouring columns are M neighbouring input channels. Grouped convolutions have no masks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from sqat.compat import padding_widths


def to_columns(weight: Tensor) -> Tensor:
    """Return a tensor in the shape of a weight, [out,in] or [out,in,h,w], as [O,C]."""
    return weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1).flatten(1)


def from_columns(columns: Tensor, shape: torch.Size) -> Tensor:
    """Return a matrix [O,C] in the shape of the weight."""
    if len(shape) == 2:
        return columns
    outputs, inputs, height, width = shape
    return columns.reshape(outputs, height, width, inputs).permute(0, 3, 1, 2).contiguous()


def input_windows(module: nn.Conv2d, x: Tensor) -> Tensor:
    """Return what a convolution multiplies with its weight: a row [C] for each position of the output, [N,C].

    Args:
        module: without groups.
        x: [B,in,h,w].
    """
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(x, padding_widths(module), mode=mode)
    size = (module.kernel_size[0], module.kernel_size[1])
    windows = functional.unfold(padded, size, dilation=module.dilation, stride=module.stride)
    split = windows.unflatten(1, (x.shape[1], size[0] * size[1]))
    rows: Tensor = split.permute(0, 3, 2, 1).flatten(0, 1).flatten(1)
    return rows
