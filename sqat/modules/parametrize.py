"""Masks and fake quantizers on weights, as one parametrization per layer with its inverse.

The optimizer trains the original weight, and pruned entries get no gradient. `remove_weights_` leaves plain weights,
pruned ones +0.0. One parametrization does both, first the mask, then the quantizer: composed ones take another pass.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sqat.quantization.fake_quant import fake_quantize_weight
from sqat.sparsity.masks import apply_mask


class WeightTransform(nn.Module):
    """Parametrization of a weight [out,in] or [out,in,h,w]: mask, then per-channel fake quantization.

    With ``straight_through`` (and no quantization) pruned weights get a gradient too, that of the zero in their place.
    """

    mask: Tensor | None

    def __init__(self, mask: Tensor | None, quantize: bool, straight_through: bool = False) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.quantize, self.straight_through = quantize, straight_through

    def forward(self, weight: Tensor) -> Tensor:
        if self.quantize:
            return fake_quantize_weight(weight, self.mask)
        return weight if self.mask is None else apply_mask(weight, self.mask, self.straight_through)


def is_ours(module: nn.Module) -> bool:
    """Say whether a mask or fake quantizer of ours is on a module's weight."""
    return any(isinstance(transform, WeightTransform) for transform in weight_transforms(module))


def weight_transforms(module: nn.Module) -> list[nn.Module]:
    """Return the parametrizations of a module's weight, whoever registered them."""
    parametrizations: Any = module.parametrizations if parametrize.is_parametrized(module, "weight") else None
    return [] if parametrizations is None else list(parametrizations.weight)


def foreign_weight(module: nn.Module) -> str:
    """Say from what a module computes its weight, such as a weight norm; empty for a plain weight, or one of ours."""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if "weight" in own or is_ours(module):
        return ""
    transforms = [type(transform).__name__.lstrip("_") for transform in weight_transforms(module)]
    return ", ".join(transforms or own)


def get_layer(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    """Return the linear layer or convolution of a name; TypeError where it is neither."""
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear | nn.Conv2d):
        raise TypeError(f"{name} is a {type(module).__name__}, neither a Linear nor a Conv2d")
    return module


def get_linear(model: nn.Module, name: str) -> nn.Linear:
    """Return the linear layer of a name; TypeError where it is none."""
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}, not a Linear")
    return module


def original_weight(module: nn.Module) -> Tensor:
    """Return the trained weight under the parametrization."""
    parametrizations: Any = module.parametrizations
    original: Tensor = parametrizations.weight.original
    return original


def insert_weights_(
    model: nn.Module, masks: Mapping[str, Tensor], quantized: Iterable[str], straight_through: Collection[str] = ()
) -> dict[str, WeightTransform]:
    """Put copies of masks and fake quantizers on the weights of layers.

    Args:
        quantized: names of the layers with a fake quantizer.
        straight_through: names of layers whose pruned weights get gradients too.

    Raises:
        AttributeError, TypeError: no such layer, or it is neither a linear nor a convolution; nothing is changed.
    """
    quantized = set(quantized)
    layers = {name: get_layer(model, name) for name in dict.fromkeys((*masks, *sorted(quantized)))}
    transforms = {}
    for name, module in layers.items():
        mask = masks[name].to(module.weight.device, copy=True) if name in masks else None
        transforms[name] = WeightTransform(mask, name in quantized, name in straight_through)
    for name, module in layers.items():
        parametrize.register_parametrization(module, "weight", transforms[name], unsafe=True)
    return transforms


def remove_weights_(model: nn.Module, transforms: Mapping[str, WeightTransform]) -> dict[str, Tensor]:
    """Take the parametrizations off, leave plain masked weights, and return the masks."""
    masks = {}
    for name, transform in transforms.items():
        module = get_layer(model, name)
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        if transform.mask is not None:
            masks[name] = transform.mask
            with torch.no_grad():
                module.weight.copy_(apply_mask(module.weight, transform.mask))
    return masks
