"""Measuring a finished artifact as it will be served: a checkpoint in torch, or an ONNX file in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqat.checkpoint.store import Checkpoint, load_checkpoint, quantized_layers
from sqat.compress.quantize import quantized_model
from sqat.data.dataset import Processor, SplitName
from sqat.errors import SqatError
from sqat.evaluation.artifacts import config_of, is_export, open_artifact
from sqat.evaluation.inference import logits_of, on_device, predict
from sqat.models.loading import build, check_head, load_processor
from sqat.modules.activation_quantizers import Quantizers
from sqat.modules.sites import is_activation
from sqat.quantization.fake_quant import LAST_BITS
from sqat.tasks.splits import Splits
from sqat.training.loop import Metrics


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
    """Model and processor of a checkpoint; with fake quantization inside the block where it is calibrated."""
    model, processor = on_device(*build(checkpoint))
    with quantize_as_calibrated(model, checkpoint) if checkpoint.amax else nullcontext():
        yield model, processor


@contextmanager
def rounded_otherwise(model: nn.Module, size: float = LAST_BITS, seed: int = 0) -> Iterator[None]:
    """While open, what every layer, norm and activation function puts out is off by ``size``, a float's last bits.

    A fake-quantized network turns such a difference into whole quantization steps where a value lies near a tie, and
    later layers multiply them: how far the logits move is the noise that no comparison of two runtimes gets below.
    """
    generator = torch.Generator().manual_seed(seed)

    def shake(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=generator).to(output.device)
        return output * (1 + size * noise)

    shaken = [module for module in model.modules() if computes(module)]
    handles = [module.register_forward_hook(shake, prepend=True) for module in shaken]  # before its quantizer
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def computes(module: nn.Module) -> bool:
    """Whether a module's own sums are what runtimes round each in its own way."""
    return isinstance(module, nn.Linear | nn.Conv2d) or "Norm" in type(module).__name__ or is_activation(module)


def evaluate_artifact(artifact: Path, splits: Splits, split: SplitName) -> Metrics:
    """The task's metrics of a checkpoint folder, or of an exported file or folder (with its processor beside it).

    Raises:
        SqatError: no such artifact, or a folder that holds only exported files.
    """
    task = splits.task
    if artifact.suffix == ".onnx" or is_export(artifact):
        if (config := config_of(artifact)).is_file():
            check_head(config.read_bytes(), task.outputs, task.config_fields, str(artifact))
        forward, processor = open_artifact(artifact), load_processor(config.parent)
        rows = splits.prepared(split, processor)
        return task.metrics(predict(forward, rows, processor), rows)
    checkpoint = load_checkpoint(artifact)
    if not checkpoint.weights:
        files = ", ".join(sorted({name.partition("/")[0] for name in checkpoint.files if is_model(name)}))
        raise SqatError("the folder is an export without torch weights", f"name what is in it: {files}", str(artifact))
    check_head(checkpoint.files["config.json"], task.outputs, task.config_fields, str(artifact))
    with served_model(checkpoint) as (model, processor):
        rows = splits.prepared(split, processor)
        return task.metrics(predict(lambda batch: logits_of(model.eval(), batch), rows, processor), rows)


def is_model(name: str) -> bool:
    """Whether a file of an export is an ONNX file, or in a folder of a runtime."""
    return name.endswith(".onnx") or "/" in name
