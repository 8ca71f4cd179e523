"""Measure a finished artifact as it is served: a checkpoint in torch, or an exported file in its runtime."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from torch import Tensor, nn

from sqat.checkpoint.store import Checkpoint, load_checkpoint, quantized_layers, require_weights
from sqat.compress.quantize import quantized_model
from sqat.data.batch import Processor
from sqat.data.rows import Rows, SplitName
from sqat.evaluation.artifacts import config_of, is_export, open_artifact
from sqat.evaluation.inference import logits_of, move_to_device, predict
from sqat.files.read import read_bytes
from sqat.models.loading import build, check_head, load_processor
from sqat.modules.activation_quantizers import Quantizers
from sqat.onnx_files.read import read_graph
from sqat.tasks.splits import Splits
from sqat.training.resume import Metrics


def quantize_as_calibrated(
    model: nn.Module, checkpoint: Checkpoint, learned: bool = False
) -> AbstractContextManager[Quantizers]:
    """Insert the masks and fake quantizers of a calibrated checkpoint for as long as a block of code runs."""
    manifest = checkpoint.manifest
    shared_with = {site: record.shared_with for site, record in manifest.sites.items()}
    layers = quantized_layers(checkpoint)
    return quantized_model(model, checkpoint.masks, layers, checkpoint.amax, shared_with, manifest.placement, learned)


@contextmanager
def served_model(checkpoint: Checkpoint) -> Iterator[tuple[nn.Module, Processor]]:
    """Build a checkpoint's model and processor; inside the block, a calibrated model is fake-quantized."""
    model, processor = move_to_device(*build(checkpoint))
    with quantize_as_calibrated(model, checkpoint) if checkpoint.amax else nullcontext():
        yield model, processor


def predict_artifact(artifact: Path, splits: Splits, split: SplitName) -> tuple[Tensor, Rows]:
    """Compute the outputs of a checkpoint folder, or of an exported file or folder with its processor.

    Returns:
        outputs [N, ...], and the rows [N] that the metrics depend on.

    Raises:
        SqatError: the artifact is missing or damaged, or a folder of exported files only.
    """
    task = splits.task
    if artifact.suffix == ".onnx":
        read_graph(artifact)  # what ONNX refuses may keep ONNX Runtime busy for ever
    if artifact.suffix == ".onnx" or is_export(artifact):
        if os.path.lexists(config := config_of(artifact)):
            check_head(read_bytes(config), task.outputs, task.config_fields, str(artifact))
        forward, processor = open_artifact(artifact), load_processor(config.parent)
        rows = splits.prepared(split, processor)
        return predict(forward, rows, processor), rows
    checkpoint = load_checkpoint(artifact)
    require_weights(checkpoint, artifact)
    check_head(checkpoint.files["config.json"], task.outputs, task.config_fields, str(artifact))
    with served_model(checkpoint) as (model, processor):
        rows = splits.prepared(split, processor)
        return predict(lambda batch: logits_of(model.eval(), batch), rows, processor), rows


def evaluate_artifact(artifact: Path, splits: Splits, split: SplitName) -> Metrics:
    """Compute the task's metrics of an artifact; see `predict_artifact`."""
    return splits.task.metrics(*predict_artifact(artifact, splits, split))
