"""Measuring a finished artifact as it will be served: a checkpoint in torch, or an ONNX file in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqat.artifacts import config_of, is_export, open_artifact
from sqat.checkpoint import Checkpoint, load_checkpoint
from sqat.data import SplitName
from sqat.errors import SqatError
from sqat.insertion.quantized import quantized_
from sqat.insertion.quantizers import Quantizers
from sqat.job import Splits, logits_of, on_device, predict
from sqat.layers import encoder_blocks
from sqat.models import PreTrainedModel, build, check_head, load_tokenizer, use_taps
from sqat.training import Figures

LAST_BITS = 3e-7


def quantizers_of(checkpoint: Checkpoint, learned: bool = False) -> Quantizers:
    """Activation quantizers of a calibrated checkpoint."""
    leaders = {site: record.leader for site, record in checkpoint.manifest.sites.items()}
    return Quantizers(checkpoint.amax, leaders, learned)


def quantized_layers(checkpoint: Checkpoint) -> list[str]:
    """Layers whose weights are int8."""
    return [name for name, record in checkpoint.manifest.layers.items() if record.quantized]


@contextmanager
def served_model(checkpoint: Checkpoint) -> Iterator[tuple[PreTrainedModel, Any]]:
    """Model and tokenizer of a checkpoint; with fake quantization inside the block where it is calibrated."""
    model, tokenizer = on_device(*build(checkpoint))
    if not checkpoint.amax:
        yield model, tokenizer
        return
    if checkpoint.manifest.profile != "linear":
        use_taps(model)
    blocks, layers = encoder_blocks(model), quantized_layers(checkpoint)
    with quantized_(model, checkpoint.masks, layers, quantizers_of(checkpoint), blocks):
        yield model, tokenizer


@contextmanager
def rounded_otherwise(model: nn.Module, size: float = LAST_BITS) -> Iterator[None]:
    """While open, every norm's output is off by ``size`` (the last bits of a float), as in another runtime.

    A fake-quantized network turns such a difference into whole quantization steps where a value lies near a tie, and
    later layers multiply them: how far the logits move is the noise that no comparison of two runtimes gets below.
    """
    generator = torch.Generator().manual_seed(0)

    def shake(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=generator).to(output.device)
        return output * (1 + size * noise)

    handles = [module.register_forward_hook(shake) for module in model.modules() if "Norm" in type(module).__name__]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def evaluate_artifact(artifact: Path, splits: Splits, split: SplitName) -> Figures:
    """The task's metrics of a checkpoint folder, or of an exported file or folder (with its tokenizer beside it).

    Raises:
        SqatError: no such artifact, or a folder that holds only exported files.
    """
    task = splits.task
    if artifact.suffix == ".onnx" or is_export(artifact):
        if (config := config_of(artifact)).is_file():
            check_head(config.read_bytes(), task.outputs, task.config_fields, str(artifact))
        forward, tokenizer = open_artifact(artifact), load_tokenizer(config.parent)
        rows = splits.tokens(split, tokenizer)
        return task.metrics(predict(forward, rows, tokenizer), rows)
    checkpoint = load_checkpoint(artifact)
    if not checkpoint.weights:
        files = ", ".join(sorted({name.partition("/")[0] for name in checkpoint.files if is_model(name)}))
        raise SqatError("the folder is an export without torch weights", f"name what is in it: {files}", str(artifact))
    check_head(checkpoint.files["config.json"], task.outputs, task.config_fields, str(artifact))
    with served_model(checkpoint) as (model, tokenizer):
        rows = splits.tokens(split, tokenizer)
        return task.metrics(predict(lambda batch: logits_of(model.eval(), batch), rows, tokenizer), rows)


def is_model(name: str) -> bool:
    """Whether a file of an export is an ONNX file, or in a folder of a runtime."""
    return name.endswith(".onnx") or "/" in name
