"""A model's logits for the rows of a split, on this process's device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sqat.data.batch import Batch, Processor, ordered_batches
from sqat.data.rows import Rows, column
from sqat.distributed import all_reduce_sum, assigned_indices, process_state

EVALUATION_BATCH = 64


def move_to_device(model: nn.Module, processor: Processor) -> tuple[nn.Module, Processor]:
    """Move a model to this process's device, and hand its processor on."""
    nn.Module.to(model, process_state().device)
    return model, processor


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [B, ...] of a torch model, on its own device."""
    device = next(model.parameters()).device
    logits: Tensor = model(**batch.to(device).inputs).logits
    return logits


def predict(forward: Callable[[Batch], Tensor], rows: Rows, processor: Processor) -> Tensor:
    """Compute float32 logits [N, ...] of every row, in the order of the rows, on the CPU; processes share the batches.

    Args:
        forward: logits of one batch, by torch or by any runtime.
    """
    batches = ordered_batches(column(rows, "length").tolist(), EVALUATION_BATCH)
    logits: Tensor | None = None
    with torch.no_grad():
        for number, counts in assigned_indices(len(batches)):
            output = forward(processor.collate(rows, batches[number])).float().cpu()
            if logits is None:
                logits = output.new_zeros(len(rows), *output.shape[1:])
            if counts:
                logits.index_copy_(0, torch.tensor(batches[number]), output)
    assert logits is not None  # a split has rows
    return all_reduce_sum(logits)
