"""Blockwise reconstruction of a model of your own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from sqat.api.arguments import Inputs, model_inputs
from sqat.api.prune import Masks, masked
from sqat.api.quantize import Scales, quantized
from sqat.compress.eval_mode import eval_mode
from sqat.compress.reconstruct import AFTER, BEFORE, Reconstruction, without_dropout
from sqat.data.batch import Batch
from sqat.errors import SqatError
from sqat.models.conv1d import linears_for_conv1d

NUM_EXAMPLES = 8  # batches on which blocks are measured


def reconstruct(
    model: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Inputs],
    masks: Masks | None,
    scales: Scales | None = None,
    *,
    steps_per_block: int = 128,
    learning_rate: float = 1e-3,
) -> Mapping[str, tuple[float, float]]:
    """Let block after block of a sparse model learn to give the dense block's output from its own input.

    Masks and scales stay; kept weights, biases and norms of the blocks change, with Adam and a cosine in each block.

    Args:
        teacher: the dense model, in eval mode.
        batches: arguments of the model's forward, read in turn; ``labels`` are ignored, padding does not count.
        masks: of `prune`; None for a dense model with scales.
        scales: of `calibrate`: the blocks learn while they are fake-quantized.

    Returns:
        Block -> mean relative squared error of its output on the first batches, before and after it has learned.

    Raises:
        SqatError: no batches, a teacher in training mode or of other shapes, a model without encoder blocks, a loss
            that is not finite, or masks and scales of another model.
    """
    if isinstance(batches, Mapping) or not isinstance(batches, Sequence) or not batches:
        raise SqatError("reconstruct reads its batches several times", "give a list of batches", code="usage")
    if teacher is model or teacher.training:
        raise SqatError("the teacher is the model, or in training mode", "teach with copy.deepcopy(model).eval(), made "
                        "before pruning", code="usage")  # fmt: skip
    if scales is None and masks is None:
        raise SqatError("there are neither masks nor scales", "give those of sqat.prune", code="usage")
    device, unused = next(model.parameters()).device, torch.empty(0)
    numbered = [
        Batch(model_inputs(batch, device), torch.tensor([number]), unused) for number, batch in enumerate(batches)
    ]
    inserted = quantized(model, masks, scales) if scales is not None else masked(model, masks)  # type: ignore[arg-type]
    with inserted, linears_for_conv1d(teacher), eval_mode(model), without_dropout(model):
        blocks = Reconstruction(model, teacher, numbered[:NUM_EXAMPLES], steps_per_block)
        return train_blocks(blocks, numbered, learning_rate)


def train_blocks(
    blocks: Reconstruction, batches: Sequence[Batch], learning_rate: float
) -> dict[str, tuple[float, float]]:
    """Train block after block; returns the errors of each before and after."""
    errors = {}
    optimizer = torch.optim.Adam(blocks.model.parameters(), lr=learning_rate)
    optimizer.zero_grad()  # what a loop before left would move embeddings and head
    for step in range(blocks.steps):
        blocks.before_step(step)
        share = step % blocks.steps_per_block / blocks.steps_per_block
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * share))
        loss = blocks.loss(blocks.model, batches[step % len(batches)])["reconstruction"]
        if not math.isfinite(float(loss.detach())):
            raise SqatError(f"the error of {blocks.block} is {float(loss.detach())} at step {step + 1}",
                            "lower learning_rate, or look at the batches", code="non-finite")  # fmt: skip
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % blocks.steps_per_block == 0:
            figures = blocks.measure()
            errors[blocks.block] = (figures[BEFORE], figures[AFTER])
    return errors
