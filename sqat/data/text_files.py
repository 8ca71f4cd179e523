"""Rows of files (JSONL, CSV, Parquet, Arrow, .npz), one at a time, each with its place.

A row is a dict as the file has it; its place is ``file:line``, or ``file:row N`` where there are no lines. A bad byte,
a broken object or a truncated gzip stream is reported at its own line.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sqat.errors import SqatError

Row = dict[str, Any]
Placed = tuple[str, Row]

LINES = 1024  # rows of a JSONL file that are sought as one
ENDINGS = ".jsonl, .jsonl.gz, .json, .json.gz, .csv, .csv.gz, .parquet, .arrow or .npz"


def read_rows(path: Path, source_name: str) -> Iterator[Placed]:
    """Yield (place, row) for every row of a file; its ending gives the format.

    Args:
        path: the file.
        source_name: what the file is called in places, usually the path as the recipe has it.

    Raises:
        SqatError: no such file, an unknown ending, or the first thing in it that cannot be read.
    """
    if not path.is_file():
        raise SqatError("no such file", _nearest_file(path), source_name, code="missing-file")
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    if name.endswith((".parquet", ".arrow")):
        from sqat.data import arrow_files as columnar  # only such a file needs pyarrow

        return (columnar.read_parquet if name.endswith(".parquet") else columnar.read_arrow)(str(path), source_name)
    if plain.endswith((".jsonl", ".json")):
        return read_jsonl(path, source_name)
    if plain.endswith(".csv"):
        return _read_csv(path, source_name)
    if name.endswith(".npz"):
        from sqat.data import image_files as images  # only such a file needs numpy

        return images.read_npz(path, source_name)
    raise SqatError(
        "cannot tell the format from the ending", f"it must be {ENDINGS}", source_name, code="unreadable-file"
    )


def _nearest_file(path: Path) -> str:
    if path.is_dir():
        return "it is a folder; name the file in it"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}; paths are relative to the recipe"
    names = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    near = get_close_matches(path.name, names, n=1)
    return f'did you mean "{near[0]}"?' if near else f"paths are relative to the recipe; looked in {path.parent}"


def _lines(path: Path, source_name: str, where: int = 0, first: int = 1) -> Iterator[str]:
    """Yield decoded lines with their ends; an error names the number of its line."""
    number = first - 1
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            file.seek(where)
            for number, line in enumerate(file, first):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise SqatError(
            f"byte 0x{byte:02x} at column {error.start + 1} is not UTF-8",
            "save the file as UTF-8",
            f"{source_name}:{number}",
            code="unreadable-file",
        ) from None
    except EOFError:
        raise SqatError(
            "the gzip stream ends too early",
            "the file is cut short; copy it again",
            f"{source_name}:{number + 1}",
            code="unreadable-file",
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise SqatError(
            f"not a gzip file: {error}", "is the ending right?", f"{source_name}:{number + 1}", code="unreadable-file"
        ) from None
    except OSError as error:
        raise SqatError(
            f"cannot be read: {error.strerror or error}", "check its permissions", source_name, code="unreadable-file"
        ) from None


def read_jsonl(path: Path, source_name: str, where: int = 0, first: int = 1) -> Iterator[Placed]:
    """Yield (place, row) for the lines from byte ``where`` on, which is where line ``first`` begins."""
    for number, line in enumerate(_lines(path, source_name, where, first), first):
        place = f"{source_name}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip())
        except (ValueError, RecursionError) as error:
            at = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise SqatError(
                f"not JSON: {at}", "the file must hold one JSON object a line", place, code="unreadable-file"
            ) from None
        if not isinstance(row, dict):
            raise SqatError(
                f"a line must hold a JSON object, this one holds {kind(row)}",
                "write one object a line",
                place,
                code="invalid-data",
            )
        yield place, row


def line_runs(path: str, source_name: str, size: int = LINES) -> Iterator[tuple[int, int, int]]:
    """Yield runs of ``size`` rows of a JSONL file: byte and number of the first line, and the number of rows.

    Nothing is parsed, and lines without anything in them are no rows.
    """
    where, first, rows, byte = 0, 1, 0, 0
    for number, line in enumerate(_raw_lines(Path(path), source_name), 1):
        if rows == size:
            yield where, first, rows
            where, first, rows = byte, number, 0
        rows += bool(line.decode("utf-8-sig" if number == 1 else "utf-8", "replace").strip())
        byte += len(line)
    yield where, first, rows


def _raw_lines(path: Path, source_name: str) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise SqatError(
            f"cannot be read: {error.strerror or error}", "check its permissions", source_name, code="unreadable-file"
        ) from None


def _read_csv(path: Path, source_name: str) -> Iterator[Placed]:
    """Yield a row per record; the place is the record's first line, also where a quoted field has several."""
    reader = csv.reader(_lines(path, source_name), strict=True)
    header: list[str] = []
    start = 1
    try:
        for fields in reader:
            place, start = f"{source_name}:{start}", reader.line_num + 1
            if not fields:
                continue
            if not header:
                header = _checked_header(fields, place)
                continue
            if len(fields) != len(header):
                raise SqatError(
                    f"{len(fields)} fields under a header of {len(header)}",
                    "put text with commas or line ends in double quotes",
                    place,
                    code="invalid-data",
                )
            yield place, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise SqatError(
            f"not CSV: {error}", "use commas and double quotes", f"{source_name}:{start}", code="unreadable-file"
        ) from None


def _checked_header(fields: list[str], place: str) -> list[str]:
    twice = {name for name in fields if fields.count(name) > 1}
    if twice:
        raise SqatError(
            f"the header has {listed(twice)} more than once",
            "give each column its own name",
            place,
            code="invalid-data",
        )
    return fields


def listed(names: set[str] | list[str]) -> str:
    """Join names in quotes: ``"a", "b"``."""
    return ", ".join(f'"{name}"' for name in sorted(names))


def kind(value: object) -> str:
    """Describe a value in the words of the file: ``null``, ``true``, ``the number 3``, ``the text "x"``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"the number {value:.6g}" if isinstance(value, float) else "a whole number"
    if isinstance(value, str):
        return f'the text "{value[:40]}{"..." if len(value) > 40 else ""}"'
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, list) else f"a {type(value).__name__}"
