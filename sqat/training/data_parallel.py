"""A model and its loss over the processes of a run: replicas (DDP), shares (FSDP, `sqat.training.fsdp`), or one alone.

Each process takes whole batches of a step, and the gradients are averaged. Left out: splitting a layer or a batch.
"""

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
from sqat.training.fsdp import Shards, send_gradients_, sharded_

Loss = Callable[[nn.Module, Batch], dict[str, Tensor]]

# Buffers are equal in all processes after every step (`Norms`). A loss may not reach every parameter; where
# torch looks for those, it does not deal gradients anew after the first step either, so that sums keep their order.
REPLICAS = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)


class Objective(nn.Module):
    """The loss as a module, so that what spreads it over processes sees which parameters the loss reaches."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.loss(self.model, batch)


@dataclass(frozen=True)
class ParallelModel:
    """The objective over all processes: each holds a replica of the model (DDP), or its shares (FSDP), or is alone.

    Attributes:
        called: computes the loss parts of a batch.
    """

    objective: Objective
    called: nn.Module
    accelerator: Accelerator
    shards: Shards | None

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """While open, gradients are only gathered: another batch of the step follows."""
        if self.shards is None:
            with self.accelerator.no_sync(self.called):
                yield
            return
        send_gradients_(self.objective, False)
        yield
        send_gradients_(self.objective, True)


@contextmanager
def data_parallel(objective: Objective, accelerator: Accelerator) -> Iterator[ParallelModel]:
    """ParallelModel a model over the processes; afterwards each has the whole of it."""
    if not uses_fsdp():
        yield ParallelModel(objective, accelerator.prepare(objective), accelerator, None)
        return
    model = objective.model
    with sharded_(objective, model, encoder_blocks(model)) as shards:
        yield ParallelModel(objective, objective, accelerator, shards)


class Norms:
    """What a model's batch norms have seen: moved once a step, by the mean over its batches in all processes.

    A norm moves at each forward pass: batch by batch it would move further in one process that has all batches of a
    step than in several that have one each.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, BatchNorm) and module.track_running_stats]
        self.counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
        found = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
        self.seen = [buffer for buffer in found if buffer is not None]
        self.before = [buffer.clone() for buffer in (*self.seen, *self.counts)]
        self.means = [torch.zeros_like(buffer) for buffer in self.seen]

    def accumulate_(self, share: float) -> None:
        """Keep where a batch has moved them, by its share of the step, and move them back."""
        for buffer, mean in zip(self.seen, self.means, strict=True):
            mean.add_(buffer, alpha=share)
        for buffer, before in zip((*self.seen, *self.counts), self.before, strict=True):
            buffer.copy_(before)

    def apply_(self) -> None:
        """Move them, in all processes alike."""
        if not self.seen:
            return
        mean = all_reduce_sum(torch.cat(self.means))
        for buffer, part in zip(self.seen, mean.split([len(buffer) for buffer in self.seen]), strict=True):
            buffer.copy_(part)
        for count in self.counts:
            count.add_(1)
