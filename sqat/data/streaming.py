"""Training batches from a stream of rows that need not fit into memory.

The pieces of the shards have a random order in every epoch. Each window of that sequence, ``buffer`` rows, is checked,
shuffled and cut into batches of similar length. Each depends on seed, epoch and window
number, so a resumed run opens the right piece.
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
from sqat.data.shards import ROWS, Pieces, Shard, find_pieces, local_shards
from sqat.data.sources import split_place
from sqat.data.text_files import Placed
from sqat.errors import SqatError
from sqat.recipe.inputs import SplitConfig

ORDER = 2  # of an epoch's pieces: other numbers than plan_batches and the tasks draw


@dataclass
class Stream:
    """The rows of a split, in another random order in every epoch.

    Attributes:
        check: makes checked rows of rows as they are read.
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
        """Return ``count`` rows of an epoch from ``start`` on, or as many as it has; reading on from there is quick.

        Raises:
            SqatError: at the first bad row, or where a shard has changed since its pieces were counted.
        """
        if (epoch, start) != self.position:
            self.source = self.rows_from(epoch, start)
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

    def rows_from(self, epoch: int, start: int) -> Iterator[Placed]:
        """Yield the rows of an epoch from ``start`` on as they are read."""
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
    pieces = find_pieces(shards, split.limit)
    return Stream(pieces, seed, split.buffer, lambda source: check(with_class_names(source, names)))


class StreamedBatches:
    """The batches of a stream: plans of epochs, and the rows of a batch by their numbers.

    Args:
        encode: checked rows to rows with numeric labels.
        at_once: batches that are planned before the first of them is used.
    """

    def __init__(self, stream: Stream, size: int, encode: Callable[[Rows], Rows], at_once: int = 1) -> None:
        self.stream, self.size, self.encode = stream, size, encode
        self.window = -(-stream.buffer // size) * size  # so that only the last batch of an epoch may be smaller
        kept = 2 + at_once * size // self.window
        self.rows_of = lru_cache(kept)(self._rows_of)
        self.plan_of = lru_cache(kept)(self._plan_of)

    def plan(self, epoch: int) -> Plan:
        """Return the batches of an epoch, each a list of numbers for `pick`; they are planned when asked for."""
        return Plan(self, epoch)

    def pick(self, numbers: list[int]) -> Rows:
        """Return the rows of a batch, encoded."""
        epoch, row = divmod(numbers[0], self.stream.rows)
        window = row // self.window
        start = epoch * self.stream.rows + window * self.window
        return take_rows(self.rows_of(epoch, window), [number - start for number in numbers])

    def _rows_of(self, epoch: int, window: int) -> Rows:
        return self.encode(self.stream.read(epoch, window * self.window, self.window))

    def _plan_of(self, epoch: int, window: int) -> list[list[int]]:
        rows = self.rows_of(epoch, window)
        start = epoch * self.stream.rows + window * self.window
        alone = [[row] for row in range(len(rows))]
        planned = plan_batches(characters(rows), alone, self.size, self.stream.seed, epoch, window)
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
    """Return the number of characters of every row."""
    table = rows.data.table
    texts = [table[name] for name in ("text", "text_pair") if name in table.column_names]
    lengths: list[int] = np.sum([pc.utf8_length(text).to_numpy() for text in texts], axis=0).tolist()
    return lengths
