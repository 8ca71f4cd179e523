"""Rows out of Parquet and Arrow files, all of them or a piece: a row group, a record batch.

A source is a path, or an address that fsspec opens (``hf://...``). Rows are numbered from 1 within the file. At most a
row group is in memory, and 4,096 rows of it as Python's own values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from sqat.errors import SqatError

Placed = tuple[str, dict[str, Any]]
Extent = tuple[int, int, int]  # row group, batch or byte that a piece begins at; number of its first row; its rows

AT_ONCE = 4096  # rows
FILE_MARK = b"ARROW1"  # what Arrow's random access format begins with; a stream has none


def read_parquet(source: str, shown: str, piece: Extent | None = None, skip: int = 0) -> Iterator[Placed]:
    """Yield (place, row) for the rows of a file or of one row group, but the first ``skip``.

    Raises:
        SqatError: it cannot be read.
    """
    group, first, _ = piece or (None, 1, 0)
    with told("Parquet", shown), opened(source) as file, pq.ParquetFile(file) as parquet:
        batches = parquet.iter_batches(AT_ONCE, row_groups=None if group is None else [group])
        yield from numbered(batches, shown, first, skip)


def row_groups(source: str, shown: str) -> Iterator[Extent]:
    """The row groups of a file, by its metadata alone."""
    with told("Parquet", shown), opened(source) as file, pq.ParquetFile(file) as parquet:
        first = 1
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            yield group, first, rows
            first += rows


def parquet_schema(source: str, shown: str) -> Any:
    """The Arrow schema of a Parquet file."""
    with told("Parquet", shown), opened(source) as file, pq.ParquetFile(file) as parquet:
        return parquet.schema_arrow


def read_arrow(source: str, shown: str, piece: Extent | None = None, skip: int = 0) -> Iterator[Placed]:
    """Yield (place, row) for the rows of an Arrow file or stream or of one of its batches, but the first ``skip``.

    Raises:
        SqatError: it cannot be read.
    """
    where, first, _ = piece or (None, 1, 0)
    with told("Arrow", shown), opened(source) as file:
        if has_mark(file):
            reader = pa.ipc.open_file(file)
            chosen = range(reader.num_record_batches) if where is None else [where]
            batches: Iterable[Any] = (reader.get_batch(number) for number in chosen)
        else:
            stream = pa.ipc.open_stream(file)
            batches = stream if where is None else [batch_at(file, where, stream.schema)]
        yield from numbered(batches, shown, first, skip)


def record_batches(source: str, shown: str) -> Iterator[Extent]:
    """The record batches of an Arrow file (by number) or stream (by the byte each begins at).

    Raises:
        SqatError: it cannot be read, or is a stream with dictionaries, whose batches do not stand alone.
    """
    first = 1
    with told("Arrow", shown), opened(source) as file:
        if has_mark(file):
            reader = pa.ipc.open_file(file)
            numbers = range(reader.num_record_batches)
            sizes: Iterator[tuple[int, int]] = ((number, reader.get_batch(number).num_rows) for number in numbers)
        else:
            sizes = batches_of_stream(file, shown)
        for where, rows in sizes:
            yield where, first, rows
            first += rows


def batches_of_stream(file: Any, shown: str) -> Iterator[tuple[int, int]]:
    """First byte and rows of each batch of an Arrow stream."""
    stream = pa.ipc.open_stream(file)
    if any(pa.types.is_dictionary(field.type) for field in stream.schema):
        problem = "the batches of an Arrow stream with dictionaries do not stand alone"
        raise SqatError(
            problem, "write it as an Arrow file (pyarrow.ipc.new_file) or as Parquet", shown, code="unreadable-file"
        )
    where = file.tell()
    for batch in stream:
        yield where, batch.num_rows
        where = file.tell()


def batch_at(file: Any, where: int, schema: Any) -> Any:
    """The batch of an Arrow stream that begins at a byte."""
    file.seek(where)
    return pa.ipc.read_record_batch(pa.ipc.read_message(file), schema)


def numbered(batches: Iterable[Any], shown: str, first: int, skip: int) -> Iterator[Placed]:
    """Rows of batches as Python's own values, with their places."""
    for batch in batches:
        for start in range(min(skip, batch.num_rows), batch.num_rows, AT_ONCE):
            for number, row in enumerate(batch.slice(start, AT_ONCE).to_pylist(), first + start):
                yield f"{shown}:row {number}", row
        skip, first = max(0, skip - batch.num_rows), first + batch.num_rows


def has_mark(file: Any) -> bool:
    """Whether an open Arrow file is one for random access; it is left at its beginning."""
    found = file.read(len(FILE_MARK)) == FILE_MARK
    file.seek(0)
    return bool(found)


def opened(source: str) -> Any:
    """An Arrow handle of a path or an address, to be closed."""
    return pa.PythonFile(fsspec.open(source, "rb").open()) if "://" in source else pa.OSFile(source)


@contextmanager
def told(kind: str, shown: str) -> Iterator[None]:
    """What the library finds wrong with a file, as a user's mistake."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise SqatError(f"not {'an' if kind[0] in 'AEIOU' else 'a'} {kind} file: {problem}", "is the ending right?",
                        shown, code="unreadable-file") from None  # fmt: skip
