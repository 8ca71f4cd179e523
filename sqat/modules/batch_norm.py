"""Batch norms folded into the convolutions before them, and convolution biases rounded, as runtimes do both.

The convolution's weight absorbs gamma / sqrt(var + eps) per output channel; a `FoldedNorm` adds what remains. Masks
keep: zeros times a factor are zeros. Calibration folds first, since scales belong to the folded weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from sqat.modules.parametrize import is_ours, original_weight
from sqat.quantization.fake_quant import HIGH, quantize_weight

LARGEST_BIAS = 2**30  # steps of an int32 sum; the rest is for the products


class FoldedNorm(nn.Module):
    """What remains of a folded batch norm [B,C,H,W]: a bias per channel.

    Its state is that of a batch norm of mean 0, variance 1 and weight sqrt(1 + eps): the model's files load into
    transformers' classes and compute the same, and folding once more changes no bit.

    Attributes:
        convolution: name of the convolution that absorbed the rest.
    """

    weight: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: nn.BatchNorm2d, bias: Tensor, convolution: str) -> None:
        super().__init__()
        self.convolution = convolution
        self.eps = norm.eps
        self.bias = nn.Parameter(bias)
        neutral = torch.ones_like(bias)
        self.register_buffer("weight", (neutral + norm.eps).sqrt())
        self.register_buffer("running_mean", torch.zeros_like(bias))
        self.register_buffer("running_var", neutral)
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64, device=bias.device))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias[:, None, None]


def find_foldable_norms(model: nn.Module) -> dict[str, str]:
    """Return the names of batch norms that can be folded -> the convolution before each.

    It is the child registered right before the norm in the same module, of as many channels: every family of
    transformers writes it so, and calibration compares the model's output.
    """
    pairs = {}
    for path, module in model.named_modules():
        for (first, before), (second, norm) in pairwise(module.named_children()):
            if not (isinstance(norm, nn.BatchNorm2d) and norm.affine and norm.track_running_stats):
                continue
            if isinstance(before, nn.Conv2d) and before.out_channels == norm.num_features:
                pairs[join_names(path, second)] = join_names(path, first)
    return pairs


def join_names(path: str, name: str) -> str:
    """Return the dotted name of a child."""
    return f"{path}.{name}" if path else name


def fold_batch_norms_(model: nn.Module) -> dict[str, str]:
    """Fold every batch norm that follows a convolution, and return norm -> convolution.

    In evaluation mode the model computes what it did, up to float rounding. A folded model stays as it is.
    """
    pairs = find_foldable_norms(model)
    with torch.no_grad():
        for name, source in pairs.items():
            norm, convolution = model.get_submodule(name), model.get_submodule(source)
            assert isinstance(norm, nn.BatchNorm2d)
            assert isinstance(convolution, nn.Conv2d)
            replace_module_(model, name, fold_norm_(norm, convolution, source))
    return pairs


def fold_norm_(norm: nn.BatchNorm2d, convolution: nn.Conv2d, name: str) -> FoldedNorm:
    """Scale a convolution by a norm's factors, and return what remains of the norm."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    factor = norm.weight / (variance + norm.eps).sqrt()  # exactly 1 for what `FoldedNorm` writes
    convolution.weight.mul_(factor.view(-1, 1, 1, 1)).add_(0.0)  # -0.0 becomes +0.0
    bias = norm.bias - mean * factor
    if convolution.bias is not None:
        bias = bias + convolution.bias * factor
        convolution.bias.zero_()
    return FoldedNorm(norm, bias.clone(), name).train(norm.training)


def find_folded_norms(model: nn.Module) -> dict[str, str]:
    """Return convolution -> its folded norm, by name: the layer's output is the norm's."""
    return {module.convolution: name for name, module in model.named_modules() if isinstance(module, FoldedNorm)}


def absorb_folded_norms_(model: nn.Module) -> None:
    """Add each folded norm's bias to that of its convolution and remove the norm; an export does, without way back."""
    for source, name in find_folded_norms(model).items():
        norm, convolution = model.get_submodule(name), model.get_submodule(source)
        assert isinstance(norm, FoldedNorm)
        assert isinstance(convolution, nn.Conv2d)
        bias = torch.zeros_like(norm.bias) if convolution.bias is None else convolution.bias.detach()
        convolution.bias = nn.Parameter(bias + norm.bias.detach())
        replace_module_(model, name, nn.Identity())


def round_conv_biases_(
    model: nn.Module,
    layers: Iterable[str],
    amax: Mapping[str, Tensor],
    shared_with: Mapping[str, str],
    masks: Mapping[str, Tensor],
) -> None:
    """Round the biases of quantized convolutions (those of folded norms too) to the grid of their int32 sums.

    Engines add such a bias to the int32 sum, as a multiple of input scale times weight scale. After this the torch
    model computes what they compute. The bias of a linear stays: it is added in float, behind the product.

    Args:
        layers: names of quantized layers; their weights, masks applied, give the scales.
        amax: site -> amax.
        shared_with: site -> the site whose amax it uses.
        masks: layer -> bool mask of its weight's shape, True where kept.
    """
    norms = find_folded_norms(model)
    for name in layers:
        convolution = model.get_submodule(name)
        bias = model.get_submodule(norms.get(name, name)).bias
        if not isinstance(convolution, nn.Conv2d) or not isinstance(bias, Tensor):
            continue
        with torch.no_grad():
            input_scale = amax[shared_with[f"{name}:input"]].to(bias.device) / HIGH
            raise_small_channels_(convolution, bias, input_scale, masks.get(name))
            _, scale_O = quantize_weight(convolution.weight)  # noqa: N806
            step_O = (scale_O * input_scale).double()  # noqa: N806
            bias.copy_((bias.double() / step_O).round() * step_O)


def raise_small_channels_(layer: nn.Conv2d, bias: Tensor, input_scale: Tensor, mask: Tensor | None) -> None:
    """Raise the largest weight of each channel whose bias is too many steps for an int32 sum, a dead channel's.

    It stays so small that what it adds to the sum is below 1e-5 of the bias.
    """
    own = original_weight(layer) if is_ours(layer) else layer.weight
    needed_O = (bias.abs() * HIGH / (LARGEST_BIAS * input_scale)).to(own.dtype)  # noqa: N806
    sizes_OI = layer.weight.abs().flatten(1)  # noqa: N806
    if mask is not None:
        sizes_OI = sizes_OI.masked_fill(~mask.to(own.device).flatten(1), -1)  # noqa: N806
    largest_O, index_O = sizes_OI.max(1)  # noqa: N806
    for row in (largest_O < needed_O).nonzero().flatten().tolist():
        entry = own[row].view(-1)[index_O[row]]
        entry.copy_(torch.where(entry < 0, -needed_O[row], needed_O[row]))


def replace_module_(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the named one."""
    path, _, own = name.rpartition(".")
    model.get_submodule(path).add_module(own, module)
