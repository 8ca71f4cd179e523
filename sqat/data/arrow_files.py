"""Rows of Parquet and Arrow files: all of them, or one row group or record batch.

A source is a path, or an address that fsspec opens (``hf://...``). Rows are numbered from 1 within the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from sqat.data.real_format import check_binary
from sqat.data.wording import check_columns
from sqat.errors import SqatError

Placed = tuple[str, dict[str, Any]]
Extent = tuple[int, int, int]  # row group, batch or byte that a piece begins at; number of its first row; its rows

AT_ONCE = 4096  # rows
REAL = {"Parquet": ("a Parquet file",), "Arrow": ("an Arrow file", "an Arrow stream")}
FILE_MARK = b"ARROW1"  # what Arrow's random access format begins with; a stream has none


def read_parquet(source: str, source_name: str, piece: Extent | None = None, skip: int = 0) -> Iterator[Placed]:
    """Yield (place, row) for the rows of a file or of one row group, but the first ``skip``.

    Raises:
        SqatError: it cannot be read.
    """
    group, first, _ = piece or (None, 1, 0)
    with (
        arrow_errors("Parquet", source_name),
        open_source(source, source_name) as file,
        pq.ParquetFile(file) as parquet,
    ):
        batches = parquet.iter_batches(AT_ONCE, row_groups=None if group is None else [group])
        yield from placed_rows(batches, source_name, first, skip)


def row_groups(source: str, source_name: str) -> Iterator[Extent]:
    """Yield the row groups of a file, by its metadata."""
    with (
        arrow_errors("Parquet", source_name),
        open_source(source, source_name) as file,
        pq.ParquetFile(file) as parquet,
    ):
        first = 1
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            yield group, first, rows
            first += rows


def parquet_schema(source: str, source_name: str) -> Any:
    """Return the Arrow schema of a Parquet file."""
    with (
        arrow_errors("Parquet", source_name),
        open_source(source, source_name) as file,
        pq.ParquetFile(file) as parquet,
    ):
        return parquet.schema_arrow


def read_arrow(source: str, source_name: str, piece: Extent | None = None, skip: int = 0) -> Iterator[Placed]:
    """Yield (place, row) for the rows of an Arrow file or stream or of one of its batches, but the first ``skip``.

    Raises:
        SqatError: it cannot be read.
    """
    where, first, _ = piece or (None, 1, 0)
    with arrow_errors("Arrow", source_name), open_source(source, source_name) as file:
        if has_mark(file):
            reader = pa.ipc.open_file(file)
            chosen = range(reader.num_record_batches) if where is None else [where]
            batches: Iterable[Any] = (reader.get_batch(number) for number in chosen)
        else:
            stream = pa.ipc.open_stream(file)
            batches = stream if where is None else [batch_at(file, where, stream.schema)]
        yield from placed_rows(batches, source_name, first, skip)


def record_batches(source: str, source_name: str) -> Iterator[Extent]:
    """Yield the record batches of an Arrow file (by number) or stream (by the byte that each begins at).

    Raises:
        SqatError: it cannot be read, or is a stream with dictionaries, whose batches do not stand alone.
    """
    first = 1
    with arrow_errors("Arrow", source_name), open_source(source, source_name) as file:
        if has_mark(file):
            reader = pa.ipc.open_file(file)
            numbers = range(reader.num_record_batches)
            sizes: Iterator[tuple[int, int]] = ((number, reader.get_batch(number).num_rows) for number in numbers)
        else:
            sizes = batches_of_stream(file, source_name)
        for where, rows in sizes:
            yield where, first, rows
            first += rows


def batches_of_stream(file: Any, source_name: str) -> Iterator[tuple[int, int]]:
    """Yield the first byte and the number of rows of each batch of an Arrow stream."""
    stream = pa.ipc.open_stream(file)
    if any(pa.types.is_dictionary(field.type) for field in stream.schema):
        problem = "the batches of an Arrow stream with dictionaries do not stand alone"
        raise SqatError(
            problem,
            "write it as an Arrow file (pyarrow.ipc.new_file) or as Parquet",
            source_name,
            code="unreadable-file",
        )
    where = file.tell()
    for batch in stream:
        yield where, batch.num_rows
        where = file.tell()


def batch_at(file: Any, where: int, schema: Any) -> Any:
    """Read the batch of an Arrow stream that begins at a byte."""
    file.seek(where)
    return pa.ipc.read_record_batch(pa.ipc.read_message(file), schema)


def placed_rows(batches: Iterable[Any], source_name: str, first: int, skip: int) -> Iterator[Placed]:
    """Yield the rows of batches as Python values, with their places."""
    for batch in batches:
        check_columns(batch.schema.names, source_name)
        batch.validate(full=True)  # what a damaged file holds is told, not walked
        for start in range(min(skip, batch.num_rows), batch.num_rows, AT_ONCE):
            for number, row in enumerate(batch.slice(start, AT_ONCE).to_pylist(), first + start):
                yield f"{source_name}:row {number}", row
        skip, first = max(0, skip - batch.num_rows), first + batch.num_rows


def has_mark(file: Any) -> bool:
    """Say whether an open Arrow file is one for random access; the position is set back to the beginning."""
    is_marked = file.read(len(FILE_MARK)) == FILE_MARK
    file.seek(0)
    return bool(is_marked)


def open_source(source: str, source_name: str) -> Any:
    """Open a path or an address as an Arrow file."""
    if "://" not in source:
        check_binary(Path(source), source_name, REAL["Parquet" if source.lower().endswith(".parquet") else "Arrow"])
    return pa.PythonFile(fsspec.open(source, "rb").open()) if "://" in source else pa.OSFile(source)


@contextmanager
def arrow_errors(kind: str, source_name: str) -> Iterator[None]:
    """Raise the library's errors as `SqatError`."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise SqatError(f"not {'an' if kind[0] in 'AEIOU' else 'a'} {kind} file: {problem}", "is the ending right?",
                        source_name, code="unreadable-file") from None  # fmt: skip
