"""A model and its loss on all ranks: replicated (DDP), sharded (FSDP, `sqat.training.fsdp`), or on one rank alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from sqat.compat import BatchNorm
from sqat.data.batch import Batch
from sqat.distributed import all_reduce_sum, uses_fsdp
from sqat.models.layer_selection import encoder_blocks
from sqat.training.fsdp import Shards, set_gradient_sync_, shard_model

Loss = Callable[[nn.Module, Batch], dict[str, Tensor]]

# Buffers are equal on all ranks after every step (`BatchNormStatistics`). A loss may not reach every parameter; where
# torch looks for those, it does not rebuild its buckets after the first step either, so that sums keep their order.
REPLICAS = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)


class Objective(nn.Module):
    """The loss as a module, so that DDP and FSDP see which parameters it reaches."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.loss(self.model, batch)


@dataclass(frozen=True)
class ParallelModel:
    """The objective on all ranks.

    Attributes:
        module: computes the loss parts of a batch.
        shards: where FSDP shards the model.
    """

    objective: Objective
    module: nn.Module
    accelerator: Accelerator
    shards: Shards | None

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Only accumulate gradients while open: another micro-batch of the step follows."""
        if self.shards is None:
            with self.accelerator.no_sync(self.module):
                yield
            return
        set_gradient_sync_(self.objective, False)
        yield
        set_gradient_sync_(self.objective, True)


@contextmanager
def data_parallel(objective: Objective, accelerator: Accelerator) -> Iterator[ParallelModel]:
    """Replicate or shard a model over the ranks while open; afterwards each rank has the whole model."""
    if not uses_fsdp():
        yield ParallelModel(objective, accelerator.prepare(objective), accelerator, None)
        return
    model = objective.model
    with shard_model(objective, model, encoder_blocks(model)) as shards:
        yield ParallelModel(objective, objective, accelerator, shards)


class BatchNormStatistics:
    """Running statistics of a model's batch norms, updated once a step by the mean over its batches on all ranks.

    A batch norm updates at each forward pass: one rank with all batches of a step would move it further than several
    ranks with one batch each.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, BatchNorm) and module.track_running_stats]
        self.counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
        buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
        self.statistics = [buffer for buffer in buffers if buffer is not None]
        self.before = [buffer.clone() for buffer in (*self.statistics, *self.counts)]
        self.means = [torch.zeros_like(buffer) for buffer in self.statistics]

    def accumulate_(self, share: float) -> None:
        """Add a batch's statistics by its share of the step, and set the model's back."""
        for buffer, mean in zip(self.statistics, self.means, strict=True):
            mean.add_(buffer, alpha=share)
        for buffer, before in zip((*self.statistics, *self.counts), self.before, strict=True):
            buffer.copy_(before)

    def apply_(self) -> None:
        """Set the model's statistics to the accumulated ones, the same on all ranks."""
        if not self.statistics:
            return
        mean = all_reduce_sum(torch.cat(self.means))
        for buffer, part in zip(self.statistics, mean.split([len(each) for each in self.statistics]), strict=True):
            buffer.copy_(part)
        for count in self.counts:
            count.add_(1)
