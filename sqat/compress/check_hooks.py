"""Check that hooks at the activation sites of a model change nothing: whatever they change, quantizers would train on.

This needs no knowledge of a family. It finds attention that gets more than sqat passes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sqat.compress.eval_mode import eval_mode
from sqat.compress.quantize import attention_for
from sqat.errors import SqatError
from sqat.models.attention import current_attention, use_attention, use_eager
from sqat.models.layer_selection import encoder_blocks
from sqat.modules.hooks import Hooks
from sqat.modules.outputs import floats_in
from sqat.modules.site_discovery import hook_candidates
from sqat.modules.sites import Site
from sqat.quantization.placement import PLACEMENTS

# Of the largest output, in units of its type's precision. The operators are the same, so that most models differ by
# nothing; hooks keep some modules of torch from their fused kernels, which add in another order.
TOLERANCE = 64

Inputs = Mapping[str, Tensor]


def check_hooks(model: nn.Module, inputs: Inputs, layers: Sequence[str], placement: str) -> None:
    """Run a batch with hooks and without quantizers, and compare its outputs with those of the plain model.

    A placement that quantizes attention is compared with the family's own eager attention.

    Args:
        inputs: arguments of the model's forward.
        layers: linears and convolutions that are quantized.

    Raises:
        SqatError: the outputs differ by more than the last bits.
    """
    before = current_attention(model)
    try:
        if PLACEMENTS[placement].attention:
            use_eager(model)
        plain = run(model, inputs)
        hooked = run_hooked(model, inputs, layers, placement)
        difference = largest_difference(plain, hooked)
        if difference > TOLERANCE:  # rare: does the plain model repeat itself?
            difference -= 2 * largest_difference(plain, run(model, inputs))
    finally:
        if before is not None:
            use_attention(model, before)
    if difference > TOLERANCE:
        share = difference * torch.finfo(plain[0].dtype).eps
        raise SqatError(
            f"{type(model).__name__} computes something else with hooks where placement {placement} quantizes: "
            f"its outputs differ by {share:.1e} of the largest",
            "calibrate with placement linear" if placement != "linear" else "exclude layers from quantization",
            code="unsupported-model",
        )


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return the floats that a model returns in eval mode; each run draws the same random numbers."""
    with eval_mode(model), torch.no_grad():
        return list(floats_in(model(**inputs)))


def run_hooked(model: nn.Module, inputs: Inputs, layers: Sequence[str], placement: str) -> list[Tensor]:
    """Do as `run`, with a hook at every place that can be a site."""

    def hook(site: Site, x: Tensor) -> Tensor:
        return x

    hooks = Hooks()
    with attention_for(model, placement, compare=True):
        try:
            hook_candidates(model, hook, layers, encoder_blocks(model), PLACEMENTS[placement], hooks)
            return run(model, inputs)
        finally:
            hooks.remove()


def largest_difference(plain: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the largest difference of two outputs, in units of the precision of each tensor's largest value."""
    if [x.shape for x in plain] != [x.shape for x in other]:
        return math.inf
    return max((difference_of(x, y) for x, y in zip(plain, other, strict=True)), default=0.0)


def difference_of(plain: Tensor, other: Tensor) -> float:
    """Return the largest difference of two tensors; equal infinities and NaN are none."""
    differs = (plain != other) & ~(plain.isnan() & other.isnan())
    if not differs.any():
        return 0.0
    if not (plain[differs].isfinite() & other[differs].isfinite()).all():
        return math.inf
    largest = float(plain[plain.isfinite()].abs().max())
    return float((plain - other)[differs].abs().max()) / (torch.finfo(plain.dtype).eps * max(largest, 1e-30))
