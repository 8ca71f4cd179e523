"""`sqat inspect` of a checkpoint: what was done to every linear layer, measured on the weights themselves."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sqat.checkpoint.manifest import WEIGHTS, LayerRecord, damaged
from sqat.checkpoint.store import Checkpoint, load_checkpoint, require_weights
from sqat.lint.layer_row import LayerRow
from sqat.models.loading import layer_names
from sqat.quantization.fake_quant import quantize_weight, sqnr_db
from sqat.sparsity.masks import count_violations
from sqat.sparsity.pattern import parse_pattern

PATTERNS = ("1:4", "2:4", "4:8")


def inspect_checkpoint(directory: Path) -> list[LayerRow]:
    """List a row for each linear and convolution of a checkpoint, in the model's order.

    Raises:
        SqatError: the checkpoint is damaged, or holds only exported files.
    """
    checkpoint = load_checkpoint(directory)
    require_weights(checkpoint, directory)
    names = layer_names(checkpoint, str(directory))
    if absent := [name for name in names if f"{name}.weight" not in checkpoint.weights]:
        raise damaged(f"holds no weight of {absent[0]}, which its config.json describes", directory / WEIGHTS)
    return [layer_row(checkpoint, name) for name in names]


def layer_row(checkpoint: Checkpoint, name: str) -> LayerRow:
    """Make the row of one layer."""
    weight = checkpoint.weights[f"{name}.weight"]
    record = checkpoint.manifest.layers.get(name, LayerRecord(dense_because="no prune stage yet"))
    site = checkpoint.manifest.sites.get(f"{name}:input")
    scale, sqnr = None, None
    if record.quantized:
        integers, scales = quantize_weight(weight)
        scale = (float(scales.min()), float(scales.max()))
        sqnr = sqnr_db(weight, integers * scales.reshape(-1, *[1] * (integers.dim() - 1)))
    return LayerRow(
        name=name,
        shape=tuple(weight.shape),
        pattern=measure_pattern(weight, record.pattern),
        zeros=float((weight == 0).double().mean()),
        weight_scale=scale,
        input_amax=None if site is None else float(checkpoint.amax[site.shared_with]),
        sqnr_db=sqnr,
        saturated=None if site is None else site.saturated,
        reason=skip_reasons(record),
        method="" if site is None else site.method,
    )


def measure_pattern(weight: Tensor, claimed: str) -> str:
    """Return the sparsest N:M that a weight keeps, of the common patterns and ``claimed``; else ``dense``."""
    patterns = [parse_pattern(text) for text in dict.fromkeys((claimed, *PATTERNS)) if text]
    for pattern in sorted(patterns, key=lambda pattern: -pattern.sparsity):
        if weight.shape[1] % pattern.m == 0 and not count_violations(weight, pattern):
            return str(pattern)
    return "dense"


def skip_reasons(record: LayerRecord) -> str:
    """Join the reasons why a layer is dense or float."""
    reasons = []
    if not record.pattern and record.dense_because:
        reasons.append(f"dense: {record.dense_because}")
    if not record.quantized and record.float_because:
        reasons.append(f"float: {record.float_because}")
    return "; ".join(reasons)
