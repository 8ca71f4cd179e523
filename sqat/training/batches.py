"""The micro-batches of an optimizer step, and which rank takes them.

Random numbers of a batch (crops, noise, dropout) are a function of the seed and the batch's number: the same on
whichever rank, and after however many stops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch

from sqat.data.batch import Batch
from sqat.distributed import assigned_indices, process_state, uses_fsdp
from sqat.errors import SqatError


@dataclass
class Batches:
    """Training batches: ``plan(epoch)`` gives the row indices of each batch, ``collate`` makes one."""

    plan: Callable[[int], Sequence[list[int]]]
    collate: Callable[[list[int]], Batch]

    def stream(self, start: int) -> Iterator[list[int]]:
        """Yield the row indices of batch ``start`` and all after it, over the epochs."""
        epoch = 0
        while True:
            batches = self.plan(epoch)
            if not batches:
                raise SqatError("no batch of training rows is left", "look at data.train and task", code="no-rows")
            yield from batches[start:]
            start = max(0, start - len(batches))
            epoch += 1


@dataclass(frozen=True)
class MicroBatch:
    """One batch of an optimizer step.

    Attributes:
        batch: on this rank's device.
        share: of the step's rows; 0 where another rank has the batch and this one only keeps step.
        seeds: of the model's random numbers.
    """

    batch: Batch
    share: float
    seeds: tuple[int, ...]


def iterate_steps(
    batches: Batches, accumulation_steps: int, seed: int, device: torch.device, step: int
) -> Iterator[tuple[list[MicroBatch], int]]:
    """Yield this rank's micro-batches of each optimizer step from ``step`` on, and the step's rows on all ranks."""
    stream = batches.stream(step * accumulation_steps)
    for first in count(step * accumulation_steps, accumulation_steps):
        planned = [next(stream) for _ in range(accumulation_steps)]
        rows, micro_batches = sum(map(len, planned)), []
        for index, counts in assigned_indices(accumulation_steps):
            seed_torch(seed, first + index, 0)
            batch = batches.collate(planned[index]).to(device)
            share = len(planned[index]) / rows if counts else 0.0
            micro_batches.append(MicroBatch(batch, share, (seed, first + index, 1)))
        yield micro_batches, rows


def seed_torch(*numbers: int) -> None:
    """Seed torch's generators on every device by a function of the numbers."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def describe_sharing(accumulation_steps: int, accumulation: int) -> str:
    """Describe how ranks share a step's batches; empty where one rank takes as many as the recipe says."""
    world = process_state().num_processes
    if world == 1 and accumulation_steps == accumulation:
        return ""
    kept = "" if accumulation_steps == accumulation * world else f" as when it began, not {accumulation * world}"
    how = " that share the model out (FSDP)" if uses_fsdp() else ""
    ranks = f"{world} process{'es' if world > 1 else ''}{how}"
    return f"{ranks}, an optimizer step sums up {accumulation_steps} batches{kept}"
