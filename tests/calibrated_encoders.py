"""Calibrated 2:4 checkpoints of tiny encoders, without a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sqat.checkpoint.manifest import LayerRecord, Manifest, SiteRecord
from sqat.checkpoint.store import Checkpoint
from sqat.compress.calibrate import share_amax
from sqat.models.attention import use_hooked_attention
from sqat.models.layer_selection import choose_layers, encoder_blocks
from sqat.models.loading import serialize_model
from sqat.modules.hooks import hook_sites
from sqat.modules.site_discovery import discover_sites
from sqat.quantization.placement import PLACEMENTS
from sqat.recipe.stages import Layers
from sqat.sparsity.masks import apply_mask, nm_mask
from sqat.sparsity.pattern import parse_pattern


def calibrate(
    model: Any,
    processor: Any,
    inputs: dict[str, Tensor],
    placement: str,
    *,
    purpose: Literal["prune", "quantize"] = "prune",
    layers: Layers | None = None,
    dense: Sequence[str] = (),
) -> Checkpoint:
    """Prune linears to 2:4, quantize them, and take 0.9 of the largest |x| as amax, so that something is clipped.

    Args:
        purpose: for which the linears are chosen.
        dense: endings of the names of linears that are not pruned.
    """
    choice = choose_layers(model, layers or Layers(), purpose)
    masks = {}
    for name in choice.chosen:
        if not (dense and name.endswith(tuple(dense))):
            weight = model.get_submodule(name).weight
            masks[name] = nm_mask(weight.detach().abs(), parse_pattern("2:4"))
            weight.data = apply_mask(weight.detach(), masks[name])
    if placement != "linear":
        use_hooked_attention(model, placement)
    blocks = encoder_blocks(model)
    sites = discover_sites(model, inputs, choice.chosen, blocks, PLACEMENTS[placement])
    largest: dict[str, float] = {}

    def watch(site: str, x: Tensor) -> Tensor:
        largest[site] = max(largest.get(site, 0.0), float(0.9 * x.abs().max()))
        return x

    hooks = hook_sites(model, watch, dict.fromkeys(sites.shared_with.values()), blocks)
    with torch.no_grad():
        model(**inputs)
    hooks.remove()
    shared_with, amax = share_amax(sites, largest)
    files, weights = serialize_model(model, processor)
    records = {name: LayerRecord(pattern="2:4" if name in masks else "", quantized=True) for name in choice.chosen}
    records |= {name: LayerRecord(dense_because=why, float_because=why) for name, why in choice.skipped.items()}
    entries = {site: SiteRecord(shared_with=owner, saturated=0.0) for site, owner in shared_with.items()}
    manifest = Manifest(stage="qat", type="qat", fingerprint="k" * 16, base_model="tiny", seed=0, placement=placement,
                        layers=records, sites=entries)  # fmt: skip
    return Checkpoint(manifest, files, weights, masks, {site: torch.tensor(value) for site, value in amax.items()})
