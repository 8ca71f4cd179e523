"""GPT-2's Conv1D as a linear, for as long as sqat works on a model.

A Conv1D is a linear with a transposed weight. As linears they are pruned, quantized and exported like any other; the
files of a checkpoint have them as transformers does (`sqat.checkpoint.manifest.LAYOUT`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def linears_for_conv1d(model: nn.Module) -> Iterator[None]:
    """Put linears in the place of every Conv1D while a block of code runs, in a model that is not ours.

    The parameters stay the same objects, so that an optimizer keeps them. State dicts stay those of the Conv1D.
    """
    replaced = {name: module for name, module in model.named_modules() if isinstance(module, Conv1D)}
    if not replaced:
        yield
        return
    weights = [f"{name}.weight" for name in replaced]

    def transpose_state(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        for name in weights:
            if prefix + name in state:
                state[prefix + name] = state[prefix + name].t().contiguous()

    for name, module in replaced.items():
        transpose_(module.weight)
        linear = LinearOfConv1D(module.nx, module.nf, device="meta")
        linear.weight, linear.bias = module.weight, module.bias
        model.set_submodule(name, linear.train(module.training))
    root: Any = model
    handles = [root.register_state_dict_post_hook(transpose_state), root.register_load_state_dict_pre_hook(
        transpose_state)]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, module in replaced.items():
            used: Any = model.get_submodule(name)
            module.weight, module.bias = used.weight, used.bias  # moved to another device, they are new objects
            transpose_(module.weight)
            model.set_submodule(name, module.train(used.training))


@torch.no_grad()
def transpose_(parameter: nn.Parameter) -> None:
    """Swap rows and columns of a parameter and of its gradient, in place."""
    gradient, parameter.grad = parameter.grad, None
    parameter.data = parameter.data.t().contiguous()
    parameter.grad = None if gradient is None else gradient.t().contiguous()
