"""Batch norm folded into the convolution before it, as runtimes do, with the checkpoint left as it was.

What: the convolution's weight absorbs gamma / sqrt(var + eps) per output channel, and a `FoldedNorm` in the norm's
place adds what remains, one number a channel. It holds that number under the norm's own names, as a batch norm of
mean 0, variance 1 and weight sqrt(1 + eps): the model's files load into transformers' classes as ever and compute
the same, and folding once more changes nothing, bit by bit. Masks keep: zeros times a channel's factor are zeros.

Why at calibration: scales belong to the folded weight, which is what an engine multiplies. From then on the norm is
frozen: it knows no batch statistics, in training mode either. `absorb_` moves the number into the convolution's
bias, for the exporter.

Which convolution: the child registered right before the norm in the same module, of as many channels, which is how
every family of transformers writes it; the calibrate stage proves it by the model's output. Left out: norms before
convolutions, and batch norm behind linears.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class FoldedNorm(nn.Module):
    """What is left of a folded batch norm [B,C,H,W]: a bias per channel; its state is a plain batch norm's.

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


def foldable(model: nn.Module) -> dict[str, str]:
    """Batch norms with weights and statistics of their own, by name, and the convolution each follows."""
    found = {}
    for path, module in model.named_modules():
        for (first, before), (second, norm) in pairwise(module.named_children()):
            if not (isinstance(norm, nn.BatchNorm2d) and norm.affine and norm.track_running_stats):
                continue
            if isinstance(before, nn.Conv2d) and before.out_channels == norm.num_features:
                found[joined(path, second)] = joined(path, first)
    return found


def joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def fold_batch_norms_(model: nn.Module) -> dict[str, str]:
    """Fold every batch norm that follows a convolution; returns norm -> convolution.

    In evaluation mode the model computes what it did, up to float rounding. A folded model is left as it is.
    """
    pairs = foldable(model)
    with torch.no_grad():
        for name, source in pairs.items():
            norm, convolution = model.get_submodule(name), model.get_submodule(source)
            assert isinstance(norm, nn.BatchNorm2d)
            assert isinstance(convolution, nn.Conv2d)
            replace_(model, name, folded(norm, convolution, source))
    return pairs


def folded(norm: nn.BatchNorm2d, convolution: nn.Conv2d, name: str) -> FoldedNorm:
    """Scale a convolution by a norm's factors and return what remains of the norm."""
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


def folded_norms(model: nn.Module) -> dict[str, str]:
    """Convolution -> its folded norm, by name: the layer's output is the norm's."""
    return {module.convolution: name for name, module in model.named_modules() if isinstance(module, FoldedNorm)}


def absorb_(model: nn.Module) -> None:
    """Make each folded norm's number its convolution's bias, the last step before an export; there is no way back."""
    for source, name in folded_norms(model).items():
        norm, convolution = model.get_submodule(name), model.get_submodule(source)
        assert isinstance(norm, FoldedNorm)
        assert isinstance(convolution, nn.Conv2d)
        kept = torch.zeros_like(norm.bias) if convolution.bias is None else convolution.bias.detach()
        convolution.bias = nn.Parameter(kept + norm.bias.detach())
        replace_(model, name, nn.Identity())


def replace_(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in another's place."""
    path, _, own = name.rpartition(".")
    model.get_submodule(path).add_module(own, module)
