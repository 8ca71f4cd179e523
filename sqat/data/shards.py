"""Shards: the files of one data set, cut into pieces that can be read alone and in any order.

A piece is a row group of Parquet, a record batch of Arrow, or a run of lines of JSONL. Another file (CSV, gzip) is
one piece. Metadata gives the pieces of Parquet and Arrow; other files are read through once.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sqat.data.arrow_files import Extent, read_arrow, read_parquet, record_batches, row_groups
from sqat.data.text_files import Placed, line_runs, read_jsonl, read_rows
from sqat.errors import SqatError
from sqat.files.read import is_file

ROWS = 3  # column of a table of pieces


@dataclass(frozen=True)
class Shard:
    """One file: a path or an address that fsspec opens, and what it is called in places."""

    path: str
    source_name: str

    @property
    def format(self) -> Format:
        """How it is cut and read, by its suffix."""
        name = self.path.lower()
        return next((how for ending, how in FORMATS.items() if name.endswith(ending)), WHOLE)


@dataclass(frozen=True)
class Format:
    """How a kind of file is cut into pieces and read.

    Attributes:
        cut: the pieces of a file, given its path and what it is called.
        read: (place, row) for the rows of a piece but the first few.
    """

    cut: Callable[[str, str], Iterator[Extent]]
    read: Callable[[str, str, Extent, int], Iterator[Placed]]


@dataclass(frozen=True)
class Pieces:
    """The pieces of some shards in order: int64 [P, 4] of shard, where it begins, number of its first row, rows."""

    shards: list[Shard]
    table: NDArray[np.int64]

    @property
    def rows(self) -> int:
        """Rows of all pieces."""
        return int(self.table[:, ROWS].sum())

    def read(self, number: int, skip: int = 0) -> Iterator[Placed]:
        """Yield (place, row) for the rows of a piece, but the first ``skip``."""
        number_of_shard, where, first, rows = self.table[number].tolist()
        shard = self.shards[number_of_shard]
        return islice(shard.format.read(shard.path, shard.source_name, (where, first, rows), skip), rows - skip)


def shard_paths(pattern: str, folder: Path) -> list[Path]:
    """Return the file of this name, else all that match, sorted by name.

    Args:
        pattern: path or glob, relative to ``folder``.

    Raises:
        SqatError: there is none.
    """
    names = [pattern] if is_file(folder / pattern) else sorted(glob.glob(pattern, root_dir=folder))
    paths = [folder / name for name in names if is_file(folder / name)]
    if not paths:
        raise SqatError(
            "no file is called so or matches it", "paths are relative to the recipe", pattern, code="missing-file"
        )
    return paths


def local_shards(pattern: str, folder: Path) -> list[Shard]:
    """Return the shards that a recipe's path names; errors as of `shard_paths`."""
    return [Shard(str(path), path.relative_to(folder).as_posix()) for path in shard_paths(pattern, folder)]


def find_pieces(shards: list[Shard], limit: int | None = None) -> Pieces:
    """Find the pieces of shards.

    Args:
        limit: first rows that count.

    Raises:
        SqatError: a shard cannot be read, or there is no row at all.
    """
    found: list[tuple[int, ...]] = []
    room = limit
    for number, shard in enumerate(shards):
        for where, first, rows in shard.format.cut(shard.path, shard.source_name) if room != 0 else ():
            kept = rows if room is None else min(rows, room)
            room = None if room is None else room - kept
            found += [(number, where, first, kept)] if kept else []
    if not found:
        raise SqatError("no rows", "the split must hold at least one", shards[0].source_name, code="no-rows")
    return Pieces(shards, np.array(found, dtype=np.int64))


def read_lines(path: str, source_name: str, piece: Extent, skip: int) -> Iterator[Placed]:
    """Yield the rows of a run of JSONL lines."""
    where, first, _ = piece
    return islice(read_jsonl(Path(path), source_name, where, first), skip, None)


def count_rows(path: str, source_name: str) -> Iterator[Extent]:
    """Yield a whole file as one piece."""
    yield 0, 1, sum(1 for _ in read_rows(Path(path), source_name))


def read_whole(path: str, source_name: str, piece: Extent, skip: int) -> Iterator[Placed]:
    """Yield the rows of a whole file."""
    return islice(read_rows(Path(path), source_name), skip, None)


WHOLE = Format(count_rows, read_whole)
FORMATS = {
    ".parquet": Format(row_groups, read_parquet),
    ".arrow": Format(record_batches, read_arrow),
    ".jsonl": Format(line_runs, read_lines),
    ".json": Format(line_runs, read_lines),
}
