"""GPT-2's Conv1D as a linear, for as long as sqat works on a model.

A Conv1D is a linear with a transposed weight. As linears they are pruned, quantized and exported like any other; the
files of a checkpoint have them as transformers does (`sqat.checkpoint.manifest.LAYOUT`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Conv1D

from sqat.models.layer_selection import LinearOfConv1D


def to_linears_(model: nn.Module) -> None:
    """Put a linear in the place of every Conv1D; `to_conv1d_` is the way back."""
    for name, module in [*model.named_modules()]:
        if isinstance(module, Conv1D):
            model.set_submodule(name, linear_of(module))


def to_conv1d_(model: nn.Module) -> None:
    """Put the Conv1D back in the place of every linear that was one."""
    for name, module in [*model.named_modules()]:
        if isinstance(module, LinearOfConv1D):
            model.set_submodule(name, conv1d_of(module))


def linear_of(module: Conv1D) -> LinearOfConv1D:
    """The linear of a Conv1D, with its bias and the transpose of its weight."""
    linear = LinearOfConv1D(module.nx, module.nf, device="meta")  # which draws no random numbers
    linear.weight, linear.bias = transposed(module.weight), module.bias
    return linear.train(module.training)


def conv1d_of(module: LinearOfConv1D) -> Conv1D:
    """The Conv1D of a linear."""
    with torch.device("meta"):
        convolution = Conv1D(module.out_features, module.in_features)
    convolution.weight, convolution.bias = transposed(module.weight), module.bias
    return convolution.train(module.training)


def transposed(weight: Tensor) -> nn.Parameter:
    """A weight of its own, rows as columns."""
    return nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
