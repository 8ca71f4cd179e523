"""Biases of quantized convolutions on the grid of their int32 sums.

An int8 convolution adds its bias to the int32 sum, so engines round it to whole multiples of input scale times weight
scale. Rounded here, at the end of the stage that sets the scales, the torch model computes what they compute, and the
float bias in a file says the very integer. Linears are left alone: their bias is added in float, behind the product.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sqat.modules.batch_norm import folded_norms
from sqat.quantization.fake_quant import HIGH, quantize_weight


def snap_biases_(
    model: nn.Module, layers: Iterable[str], amax: Mapping[str, Tensor], leaders: Mapping[str, str]
) -> None:
    """Round the biases (those of folded norms too) of the convolutions among ``layers``.

    Args:
        layers: names of quantized layers; their weights, masks applied, give the scales.
        amax: leader site -> bound.
        leaders: site -> leader.
    """
    norms = folded_norms(model)
    for name in layers:
        convolution = model.get_submodule(name)
        bias = model.get_submodule(norms.get(name, name)).bias
        if not isinstance(convolution, nn.Conv2d) or not isinstance(bias, Tensor):
            continue
        with torch.no_grad():
            _, scale_O = quantize_weight(convolution.weight)  # noqa: N806
            step_O = (scale_O * (amax[leaders[f"{name}:input"]].to(scale_O.device) / HIGH)).double()  # noqa: N806
            bias.copy_((bias.double() / step_O).round() * step_O)
