"""A batch, what makes batches of rows, and plans of which rows share a batch.

A plan is a function of lengths, groups, batch size, seed and epoch, so every process and every resumed run makes the
same one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sqat.data.rows import Rows
from sqat.errors import SqatError

WINDOW = 50  # batches whose rows are sorted by length together


@dataclass(frozen=True)
class Batch:
    """What one forward pass and its loss need.

    Attributes:
        inputs: of the model by name; of texts input_ids, attention_mask (and token_type_ids), int64 [B, T].
        labels: [B], int64 for classes, float32 otherwise; [B, ...] where a model returns more than scores.
        groups: int64 [B], number of the query; -1 where there is none.
        teacher_inputs: of a teacher with a tokenizer of its own; None where it reads the student's.
        teacher_outputs: [B, C], where they are stored.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    groups: Tensor
    teacher_inputs: dict[str, Tensor] | None = None
    teacher_outputs: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Batch:
        """Copy to a device."""

        def copy(value: Tensor) -> Tensor:
            return value.to(device, non_blocking=True)

        return Batch(
            {name: copy(value) for name, value in self.inputs.items()},
            copy(self.labels),
            copy(self.groups),
            self.teacher_inputs and {name: copy(value) for name, value in self.teacher_inputs.items()},
            None if self.teacher_outputs is None else copy(self.teacher_outputs),
        )


class Processor(Protocol):
    """Turns checked rows into what a model reads; its files lie beside the model in a checkpoint."""

    def prepare(self, rows: Rows, max_length: int) -> Rows:
        """Add the columns that `collate` reads, and ``length``, by which rows of similar size share a batch."""

    def collate(self, rows: Rows, indices: list[int]) -> Batch:
        """Make one batch of prepared, encoded rows."""

    def save(self, folder: Path) -> None:
        """Write the files that rebuild the processor."""


def plan_batches(
    lengths: list[int], groups: list[list[int]], batch_size: int, seed: int, epoch: int, part: int = 0
) -> list[list[int]]:
    """Plan the batches of one epoch: in random order, each of rows of similar length.

    Groups are shuffled, sorted by length within windows of 50 batches, packed whole into batches of at most
    ``batch_size`` rows, and the batches are shuffled.

    Args:
        lengths: tokens of every row.
        groups: rows that must share a batch.
        part: number of the part, where an epoch is planned in parts.

    Raises:
        SqatError: a group has more rows than a batch.
    """
    check_group_size(max(map(len, groups), default=0), batch_size)
    random = np.random.default_rng((seed, epoch, 0, part))  # zeros at the end change nothing: as (seed, epoch)
    shuffled = [groups[i] for i in random.permutation(len(groups))]
    windows = pack(shuffled, WINDOW * batch_size)
    by_length = (sorted(window, key=lambda group: max(lengths[i] for i in group)) for window in windows)
    batches = [list(chain(*batch)) for window in by_length for batch in pack(window, batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def check_group_size(largest: int, batch_size: int) -> None:
    """Raise SqatError if the rows of the largest group do not fit into a batch."""
    if largest > batch_size:
        problem = f"a query has {largest} passages, which must share a batch, but batch_size is {batch_size}"
        hint = f"set task.candidates to {batch_size} or less, or batch_size to {largest} or more"
        raise SqatError(problem, hint, code="recipe-conflict")


def pack(groups: list[list[int]], size: int) -> list[list[list[int]]]:
    """Cut a list of groups into runs of at most ``size`` rows, each as long as it can be."""
    packs: list[list[list[int]]] = []
    room = 0
    for group in groups:
        if len(group) > room:
            packs.append([])
            room = size
        packs[-1].append(group)
        room -= len(group)
    return packs


def ordered_batches(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Plan batches for evaluation: every row once, sorted by length, shortest first."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
