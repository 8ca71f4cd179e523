"""Put a quantized model together: attention, masks and fake quantizers, for as long as a block of code runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from sqat.models.attention import current_attention, use_attention, use_hooked_attention
from sqat.models.layer_selection import encoder_blocks
from sqat.modules.activation_quantizers import Quantizers, fake_quantized_
from sqat.modules.parametrize import insert_weights_, remove_weights_
from sqat.quantization.placement import PLACEMENTS


@contextmanager
def attention_for(model: nn.Module, placement: str, compare: bool = False) -> Iterator[bool]:
    """Switch to the attention that a placement quantizes; afterwards the model's own is back.

    Args:
        compare: compare that of the kernels to the family's own, which it then returns.

    Yields:
        Whether the model has it. Families outside transformers' attention interface keep float products.
    """
    if not PLACEMENTS[placement].attention:
        yield True
        return
    before, switched = current_attention(model), use_hooked_attention(model, placement, compare)
    try:
        yield switched
    finally:
        if switched and before is not None:
            use_attention(model, before)


@contextmanager
def masked_model(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Insert masks; afterwards weights are plain again, pruned ones +0.0."""
    transforms = insert_weights_(model, masks, ())
    try:
        yield
    finally:
        remove_weights_(model, transforms)


@contextmanager
def quantized_model(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    layers: Iterable[str],
    amax: Mapping[str, Tensor],
    shared_with: Mapping[str, str],
    placement: str,
    learned: bool = False,
) -> Iterator[Quantizers]:
    """Insert masks and fake quantizers; afterwards weights are plain floats again, pruned ones +0.0.

    Args:
        masks: layer -> bool mask of its weight's shape, True where kept.
        layers: layers whose weights are quantized.
        amax: site -> positive 0-d float32.
        shared_with: site -> the site whose amax it uses, itself for most.
        learned: train each amax with the LSQ gradient.
    """
    quantizers = Quantizers(amax, shared_with, learned, kernels=PLACEMENTS[placement].kernels)
    with attention_for(model, placement), fake_quantized_(model, masks, layers, quantizers, encoder_blocks(model)):
        yield quantizers
