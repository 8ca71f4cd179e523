"""Calibrated 2:4 checkpoints of tiny encoders, of any placement, and their packed folders."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sqat.checkpoint.manifest import LayerRecord, Manifest, SiteRecord
from sqat.checkpoint.store import Checkpoint
from sqat.compress.calibrate import share_amax
from sqat.data.tokens import TextProcessor
from sqat.export.quantized_model import quantize_model
from sqat.export.targets.semi_structured import write_packed
from sqat.models.attention import use_hooked_attention
from sqat.models.layer_selection import choose_layers, encoder_blocks
from sqat.models.loading import serialize_model
from sqat.modules.hooks import hook_sites
from sqat.modules.site_discovery import discover_sites
from sqat.quantization.placement import PLACEMENTS
from sqat.recipe.stages import Layers
from sqat.sparsity.masks import apply_mask, nm_mask
from sqat.sparsity.pattern import parse_pattern

VOCABULARY = 65
MakeCheckpoint = Callable[..., Checkpoint]
WriteFolder = Callable[[Checkpoint], Path]
FOLDER = "semi-structured"


def texts(rows: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Random texts, the first of all ``tokens``, the others shorter and padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, tokens), generator=generator)
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    lengths[0] = tokens
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def calibrate(model: Any, tokenizer: Any, placement: str) -> Checkpoint:
    """Prune every block's linears 2:4 and quantize them; bounds are 0.9 of the largest |x| of one batch, so that
    something is clipped."""
    choice = choose_layers(model, Layers(), "prune")
    masks = {}
    for name in choice.chosen:
        linear = model.get_submodule(name)
        masks[name] = nm_mask(linear.weight.detach().abs(), parse_pattern("2:4"))
        linear.weight.data = apply_mask(linear.weight.detach(), masks[name])
    if placement != "linear":
        use_hooked_attention(model, placement)
    blocks, batch = encoder_blocks(model), texts(3, 12)
    sites = discover_sites(model, batch, choice.chosen, blocks, PLACEMENTS[placement])
    largest: dict[str, float] = {}

    def watch(site: str, x: Tensor) -> Tensor:
        largest[site] = max(largest.get(site, 0.0), 0.9 * float(x.abs().max()))
        return x

    hooks = hook_sites(model, watch, dict.fromkeys(sites.shared_with.values()), blocks)
    with torch.no_grad():
        model(**batch)
    hooks.remove()
    leaders, amax = share_amax(sites, largest)
    files, weights = serialize_model(model, TextProcessor(tokenizer))
    layers = {name: LayerRecord(pattern="2:4", quantized=True) for name in choice.chosen}
    layers |= {name: LayerRecord(dense_because=why, float_because=why) for name, why in choice.skipped.items()}
    records = {site: SiteRecord(shared_with=leader, saturated=0.0) for site, leader in leaders.items()}
    manifest = Manifest(stage="qat", type="qat", fingerprint="k" * 16, base_model="tiny", seed=0, placement=placement,
                        layers=layers, sites=records)  # fmt: skip
    return Checkpoint(manifest, files, weights, masks, {site: torch.tensor(a) for site, a in amax.items()})


@pytest.fixture(scope="session")
def calibrated(make_model: Callable[..., Any], tokenizer: Any) -> MakeCheckpoint:
    """`calibrated(family, placement, **settings)`: the calibrated checkpoint of a tiny model."""

    @cache
    def make(family: str = "bert", placement: str = "linear", **settings: Any) -> Checkpoint:
        return calibrate(make_model(family, **settings), tokenizer, placement)

    return make


@pytest.fixture
def write_folder(tmp_path: Path) -> WriteFolder:
    """`write_folder(checkpoint)`: the folder of packed weights that the target writes."""

    def write(checkpoint: Checkpoint) -> Path:
        write_packed(checkpoint, quantize_model(checkpoint), tmp_path / FOLDER)
        return tmp_path / FOLDER

    return write


@pytest.fixture
def packed_folder(calibrated: MakeCheckpoint, write_folder: WriteFolder) -> Path:
    """The folder of the tiny BERT, placement linear."""
    return write_folder(calibrated())
