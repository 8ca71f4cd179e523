"""Streaming: a train split that is read while it is trained on, so that memory does not grow with its rows.

The pieces of the shards (`sqat.data.shards`) are put in a new order in every epoch and read one after the other; each
window of that sequence, ``buffer`` rows, is checked, shuffled and cut into batches of like length as a whole split
would be (arXiv:2206.05830 is about how near this comes to shuffling all rows). Pieces, windows and batches are
functions of (seed, epoch, number), and how many batches an epoch has follows from the number of rows alone: a resumed
run, or one of several processes, opens the very piece it needs. Batches are made of like numbers of characters and
tokenized one by one, so that a process tokenizes only its own. Left out: rows that must share a batch (queries), and
reading ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow.compute as pc

from sqat.data.batch import plan_batches
from sqat.data.hub import hub_files, with_class_names
from sqat.data.rows import Rows, take_rows
from sqat.data.shards import ROWS, Pieces, Shard, cut, local_shards
from sqat.data.sources import split_place
from sqat.data.text_files import Placed
from sqat.errors import SqatError
from sqat.recipe.inputs import SplitConfig

ORDER = 2  # of an epoch's pieces: other numbers than plan_batches and the tasks draw


@dataclass
class Stream:
    """The rows of a split in an order of their own for every epoch.

    Attributes:
        check: rows as read to rows as `sqat.data.rows` has them.
        buffer: rows that are shuffled together.
    """

    pieces: Pieces
    seed: int
    buffer: int
    check: Callable[[Iterator[Placed]], Rows]
    position: tuple[int, int] = (-1, 0)
    source: Iterator[Placed] = field(default_factory=lambda: iter(()))

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return self.pieces.rows

    def read(self, epoch: int, start: int, count: int) -> Rows:
        """Rows from ``start`` on of an epoch, ``count`` or as many as it has; reading on from there is quick.

        Raises:
            SqatError: at the first bad row, or where a shard has changed since its pieces were counted.
        """
        if (epoch, start) != self.position:
            self.source = self.placed(epoch, start)
        count = min(count, self.rows - start)
        rows = self.check(islice(self.source, count))
        if len(rows) != count:
            raise SqatError(
                f"{count - len(rows)} rows are not there any more",
                "a shard has changed: run again",
                code="invalid-data",
            )
        self.position = (epoch, start + count)
        return rows

    def placed(self, epoch: int, start: int) -> Iterator[Placed]:
        """Rows from ``start`` on of an epoch as they are read."""
        order = np.random.default_rng((self.seed, epoch, ORDER)).permutation(len(self.pieces.table))
        ends = self.pieces.table[order, ROWS].cumsum()
        first = int(np.searchsorted(ends, start, side="right"))
        skip = start - int(ends[first - 1]) if first else start
        for number in order[first:]:
            yield from self.pieces.read(int(number), skip)
            skip = 0


def stream_split(split: SplitConfig, folder: Path, seed: int, check: Callable[[Iterator[Placed]], Rows]) -> Stream:
    """Find the shards and pieces of a train split; of large files little more than their metadata is read.

    Args:
        folder: that relative paths start from, the recipe's.
        check: makes checked rows of rows as they are read.

    Raises:
        SqatError: no such files, or they cannot be read.
    """
    names: dict[str, list[str]] = {}
    if split.path is not None:
        shards = local_shards(split.path, folder)
    else:
        place = split_place(split, "train")
        addresses, names = hub_files(split, "train", place)
        shards = [Shard(address, f"{place}/{address.rpartition('/')[2]}") for address in addresses]
    pieces = cut(shards, split.limit)
    return Stream(pieces, seed, split.buffer, lambda source: check(with_class_names(source, names)))


class StreamedBatches:
    """The batches of a stream: plans of epochs, and the rows of a batch by their numbers.

    Args:
        encode: checked rows to rows with numeric labels.
        at_once: batches that are planned before the first of them is used up.
    """

    def __init__(self, stream: Stream, size: int, encode: Callable[[Rows], Rows], at_once: int = 1) -> None:
        self.stream, self.size, self.encode = stream, size, encode
        self.window = -(-stream.buffer // size) * size  # so that only the last batch of an epoch may be smaller
        kept = 2 + at_once * size // self.window
        self.rows_of = lru_cache(kept)(self._rows_of)
        self.plan_of = lru_cache(kept)(self._plan_of)

    def plan(self, epoch: int) -> Plan:
        """The batches of an epoch, each a list of numbers for `pick`; none is made before it is asked for."""
        return Plan(self, epoch)

    def pick(self, numbers: list[int]) -> Rows:
        """The rows of a batch, encoded."""
        epoch, row = divmod(numbers[0], self.stream.rows)
        window = row // self.window
        start = epoch * self.stream.rows + window * self.window
        return take_rows(self.rows_of(epoch, window), [number - start for number in numbers])

    def _rows_of(self, epoch: int, window: int) -> Rows:
        return self.encode(self.stream.read(epoch, window * self.window, self.window))

    def _plan_of(self, epoch: int, window: int) -> list[list[int]]:
        rows = self.rows_of(epoch, window)
        start = epoch * self.stream.rows + window * self.window
        units = [[row] for row in range(len(rows))]
        planned = plan_batches(characters(rows), units, self.size, self.stream.seed, epoch, window)
        return [[start + row for row in batch] for batch in planned]


@dataclass(frozen=True)
class Plan(Sequence[list[int]]):
    """The batches of an epoch from ``start`` on, made window by window."""

    batches: StreamedBatches
    epoch: int
    start: int = 0

    def __len__(self) -> int:
        return max(0, -(-self.batches.stream.rows // self.batches.size) - self.start)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...

    @overload
    def __getitem__(self, index: slice) -> Plan: ...

    def __getitem__(self, index: int | slice) -> list[int] | Plan:
        if isinstance(index, slice):
            return Plan(self.batches, self.epoch, range(len(self))[index].start + self.start)
        if not 0 <= index < len(self):
            raise IndexError(index)
        window, number = divmod(self.start + index, self.batches.window // self.batches.size)
        return self.batches.plan_of(self.epoch, window)[number]


def characters(rows: Rows) -> list[int]:
    """Characters of every row's texts."""
    table = rows.data.table
    texts = [table[name] for name in ("text", "text_pair") if name in table.column_names]
    lengths: list[int] = np.sum([pc.utf8_length(text).to_numpy() for text in texts], axis=0).tolist()
    return lengths
