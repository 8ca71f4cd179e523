"""One optimizer step: forward and backward passes of its micro-batches, checks, clipping, update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sqat.distributed import all_reduce_sum
from sqat.recipe.stages import TrainConfig
from sqat.training.batches import MicroBatch, seed_torch
from sqat.training.data_parallel import BatchNormStatistics, ParallelModel
from sqat.training.health import check_gradients, check_losses


def take_step(
    parallel: ParallelModel,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[MicroBatch],
    config: TrainConfig,
    step: int,
) -> dict[str, float]:
    """Take one optimizer step; returns the mean loss parts over the rows of all ranks.

    Raises:
        SqatError: NaN or Inf in a loss or gradient; no rank has changed a weight then.
    """
    totals: dict[str, Tensor] = {}
    model, norms = parallel.objective.model, BatchNormStatistics(parallel.objective.model)
    device, world = parallel.accelerator.device, parallel.accelerator.num_processes
    for index, micro_batch in enumerate(micro_batches):
        sync = parallel.no_sync() if index + 1 < len(micro_batches) else nullcontext()
        seed_torch(*micro_batch.seeds)
        with sync:
            with autocast(config.precision, device):
                parts = parallel.module(micro_batch.batch)
            weight = micro_batch.share * world  # the ranks' gradients are averaged
            parallel.accelerator.backward(torch.stack([*parts.values()]).sum() * weight)
        norms.accumulate_(micro_batch.share)
        for name, part in parts.items():
            totals[name] = totals.get(name, part.new_zeros(())) + part.detach() * micro_batch.share
    losses = dict(zip(totals, all_reduce_sum(torch.stack([*totals.values()])).tolist(), strict=True))
    check_losses(losses, model, partial(rerun_forward, parallel.objective, micro_batches), step)
    if parallel.shards is not None:
        parallel.shards.average_scalars_()
    norm = check_gradients(model, step)
    if config.max_grad_norm is not None:
        for group in optimizer.param_groups:  # by groups: shards and whole tensors do not mix
            nn.utils.clip_grads_with_norm_(group["params"], config.max_grad_norm, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    norms.apply_()
    return losses


def rerun_forward(objective: nn.Module, micro_batches: list[MicroBatch]) -> None:
    """Run the forward passes of a step again, with the same random numbers."""
    for micro_batch in micro_batches:
        seed_torch(*micro_batch.seeds)
        objective(micro_batch.batch)


@contextmanager
def autocast(precision: str, device: torch.device) -> Iterator[None]:
    """Autocast to bf16 where the recipe asks for it."""
    if precision != "bf16":
        yield
        return
    # On a CPU the backward pass of fused attention in bf16 is several times slower than that of plain products.
    attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    with torch.autocast(device.type, torch.bfloat16), attention:
        yield
