"""Rows of files (JSONL, CSV, Parquet, Arrow, .npz), one at a time, each with its place.

A row is a dict as the file has it; its place is ``file:line``, or ``file:row N`` where there are no lines. A bad byte,
a broken object or a truncated gzip stream is reported at its own line.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sqat.data.real_format import HEAD, check_text
from sqat.data.wording import check_columns, kind
from sqat.errors import SqatError
from sqat.files.read import MAX_DEPTH, MEGABYTE, cannot_read, check_depth, open_file

Row = dict[str, Any]
Placed = tuple[str, Row]

LINES = 1024  # rows of a JSONL file that are sought as one
MAX_LINE = 64 * MEGABYTE  # bytes of a line, and characters of a field of CSV
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
JOINED = ("a byte order mark that does not begin the file", "remove it: were files joined?")
ENDINGS = ".jsonl, .jsonl.gz, .json, .json.gz, .csv, .csv.gz, .tsv, .tsv.gz, .parquet, .arrow or .npz"
RECORDS = 8  # of CSV that are read at once
LINE_ENDS = ("\n", "\r\n", "")
LONG_NUMBER = re.compile(r'"([^"\\]{1,100})"\s*:\s*-?[0-9]{4300}')


class RepeatedKeyError(ValueError):
    """A key that stands twice in a JSON object."""


def make_object(pairs: list[tuple[str, Any]]) -> Row:
    """Make an object, unless a key stands twice: one of its values would be lost."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise RepeatedKeyError(next(name for name in names if names.count(name) > 1))
    return row


DECODER = json.JSONDecoder()
STRICT_DECODER = json.JSONDecoder(object_pairs_hook=make_object)  # takes twice the time


def read_rows(path: Path, source_name: str) -> Iterator[Placed]:
    """Yield (place, row) for every row of a file; its ending gives the format.

    Args:
        path: the file.
        source_name: what the file is called in places, usually the path as the recipe has it.

    Raises:
        SqatError: no such file, an unknown ending, or the first thing in it that cannot be read.
    """
    open_file(path, place=source_name).close()
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    if name.endswith((".parquet", ".arrow")):
        from sqat.data import arrow_files as columnar  # only such a file needs pyarrow

        return (columnar.read_parquet if name.endswith(".parquet") else columnar.read_arrow)(str(path), source_name)
    if plain.endswith((".jsonl", ".json")):
        return read_jsonl(path, source_name)
    if is_csv(path):
        return read_csv(path, source_name)
    if name.endswith(".npz"):
        from sqat.data import image_files as images  # only such a file needs numpy

        return images.read_npz(path, source_name)
    raise SqatError(
        "cannot tell the format from the ending", f"it must be {ENDINGS}", source_name, code="unreadable-file"
    )


def is_csv(path: Path) -> bool:
    """Say whether a file is CSV by its ending."""
    return path.name.lower().removesuffix(".gz").endswith((".csv", ".tsv"))


def raw_lines(path: Path, source_name: str, where: int = 0, first: int = 1) -> Iterator[bytes]:
    """Yield the lines of a file, or of what a .gz holds, with their ends; an error names the number of its line."""
    number = first - 1
    is_packed = path.name.lower().endswith(".gz")
    try:
        with open_file(path, place=source_name) as file:
            stream = gzip.GzipFile(fileobj=file) if is_packed else file
            check_text(stream.peek(HEAD)[:HEAD], source_name)
            if where:
                stream.seek(where)
            for number, line in enumerate(iter(partial(stream.readline, MAX_LINE + 1), b""), first):
                if len(line) > MAX_LINE:
                    raise bad_line(f"a line of more than {MAX_LINE // MEGABYTE} MB", "are its line ends right?",
                                   source_name, number)  # fmt: skip
                yield line
    except EOFError:
        raise bad_line("the gzip stream ends too early", "the file is cut short; copy it again", source_name,
                       number + 1) from None  # fmt: skip
    except (gzip.BadGzipFile, zlib.error) as error:
        raise bad_line(f"not a gzip file: {error}", "is the ending right?", source_name, number + 1) from None
    except OSError as error:
        raise cannot_read(error, source_name) from None


def bad_line(problem: str, hint: str, source_name: str, number: int) -> SqatError:
    """Make the error of a line that cannot be read."""
    return SqatError(problem, hint, f"{source_name}:{number}", code="unreadable-file")


def text_lines(path: Path, source_name: str, where: int = 0, first: int = 1) -> Iterator[str]:
    """Yield decoded lines with their ends."""
    number = first
    try:
        for number, line in enumerate(raw_lines(path, source_name, where, first), first):
            yield line.decode() if number > 1 else line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        problem = f"byte 0x{byte:02x} at column {error.start + 1} is not UTF-8"
        raise bad_line(problem, "save the file as UTF-8", source_name, number) from None


def read_jsonl(path: Path, source_name: str, where: int = 0, first: int = 1) -> Iterator[Placed]:
    """Yield (place, row) for the lines from byte ``where`` on, which is where line ``first`` begins."""
    for number, line in enumerate(text_lines(path, source_name, where, first), first):
        if not line or line.isspace():  # a byte order mark alone leaves an empty line
            continue
        place = f"{source_name}:{number}"
        row = parse_line(line, place)
        if not isinstance(row, dict):
            raise SqatError(
                f"a line must hold a JSON object, this one holds {kind(row)}",
                "write one object a line",
                place,
                code="invalid-data",
            )
        yield place, row


def parse_line(line: str, place: str) -> Any:
    """Parse a line of JSON; whoever reads the value may walk it and encode its texts.

    Raises:
        SqatError: it is not JSON, too deep, or holds half of a surrogate pair or a number that Python does not read.
    """
    try:
        value = decode_flat(line) if line[0] == "{" and line.count("{") == 1 else STRICT_DECODER.decode(line)
        if line.count("[") + line.count("{") > MAX_DEPTH:
            check_depth(value)
    except json.JSONDecodeError as error:
        problem, hint = f"not JSON: {error.msg} at column {error.colno}", "the file must hold one JSON object a line"
        if line.startswith("\ufeff"):
            problem, hint = JOINED
    except RecursionError:
        problem, hint = f"holds lists and objects more than {MAX_DEPTH} deep", "write it flatter"
    except RepeatedKeyError as error:
        problem, hint = f'the key "{error}" is given twice', "keep one of the two"
    except ValueError:  # only Python's limit on digits
        match = LONG_NUMBER.search(line)
        what = f'"{match[1]}" is' if match else "it holds"
        problem, hint = f"{what} a number of more than 4300 digits", "write it as a text"
    else:
        if "\\" in line and ("\\ud" in line or "\\uD" in line):
            check_surrogates(value, place)
        return value
    raise SqatError(problem, hint, place, code="unreadable-file")


def decode_flat(line: str) -> Any:
    """Do as `STRICT_DECODER` with a line that has one object, in half the time."""
    value, end = DECODER.raw_decode(line)
    colons = line.count(":") - len(value)
    if colons:
        colons -= sum(text.count(":") for text in value.values() if isinstance(text, str))
    # A key that stands twice leaves a colon that no key and no text explains; u003a is one in a text.
    if colons or line[end:] not in LINE_ENDS or ("\\" in line and "\\u003" in line):
        return STRICT_DECODER.decode(line)
    return value


def check_surrogates(value: Any, place: str) -> None:
    """Refuse half of a surrogate pair, for which there is no UTF-8, in a name or a value of a row."""
    for name, item in value.items() if isinstance(value, dict) else [("the line", value)]:
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise SqatError(f'the name "{name}" holds half of a surrogate pair', "write the character whole", place,
                            code="invalid-data")  # fmt: skip
        try:
            json.dumps(item, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise SqatError(f'"{name}" holds half of a surrogate pair', "write the character whole", place,
                            code="invalid-data") from None  # fmt: skip


def line_runs(path: str, source_name: str, size: int = LINES) -> Iterator[tuple[int, int, int]]:
    """Yield runs of ``size`` rows of a JSONL file: byte and number of the first line, and the number of rows.

    Nothing is parsed, and lines without anything in them are no rows.
    """
    where, first, rows, byte = 0, 1, 0, 0
    for number, line in enumerate(raw_lines(Path(path), source_name), 1):
        if rows == size:
            yield where, first, rows
            where, first, rows = byte, number, 0
        rows += bool(line.decode("utf-8-sig" if number == 1 else "utf-8", "replace").strip())
        byte += len(line)
    yield where, first, rows


def read_csv(path: Path, source_name: str) -> Iterator[Placed]:
    """Yield a row per record; the place is the record's first line, also where a quoted field has several."""
    delimiter = find_delimiter(path, source_name)
    reader = csv.reader(csv_lines(path, source_name), strict=True, delimiter=delimiter)
    header: list[str] = []
    start = 1
    try:
        for line, fields in chain.from_iterable(read_records(reader)):
            place, start = f"{source_name}:{start}", line + 1
            if not fields:
                continue
            if not header:
                header = fields
                check_columns(header, place)
                continue
            if len(fields) != len(header):
                raise SqatError(
                    f"{len(fields)} fields under a header of {len(header)}",
                    f"put text with {DELIMITERS[delimiter]} or line ends in double quotes",
                    place,
                    code="invalid-data",
                )
            yield place, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        is_long = "field limit" in str(error)
        problem = f"a field of more than {MAX_LINE // MEGABYTE} MB" if is_long else f"not CSV: {error}"
        hint = "is a quotation mark never closed?" if is_long else "put fields with quotation marks in double quotes"
        raise bad_line(problem, hint, source_name, start) from None


def csv_lines(path: Path, source_name: str) -> Iterator[str]:
    """Yield the lines of a CSV file, in which every character counts."""
    for number, line in enumerate(text_lines(path, source_name), 1):
        if "\x00" in line:
            raise bad_line("a NUL byte", "remove it, or is this no text?", source_name, number)
        if line[0] == "\ufeff":
            raise bad_line(*JOINED, source_name, number)
        yield line


def read_records(reader: Any) -> Iterator[list[tuple[int, list[str]]]]:
    """Yield some records at a time, each with the number of its last line."""
    while True:
        records: list[tuple[int, list[str]]] = []
        before = csv.field_size_limit(MAX_LINE)  # the whole process's, so it is set back
        try:
            try:
                records.extend((reader.line_num, fields) for fields in islice(reader, RECORDS))
            finally:
                csv.field_size_limit(before)
        except (csv.Error, SqatError):
            yield records  # before what comes after them is told
            raise
        yield records
        if not records:
            return


def find_delimiter(path: Path, source_name: str) -> str:
    """Return what separates the fields of a CSV file: what cuts header and first record into most fields alike."""

    def count_fields(delimiter: str) -> tuple[bool, int]:
        reader = csv.reader(csv_lines(path, source_name), delimiter=delimiter)
        with suppress(csv.Error):  # reading the rows tells it
            records = [len(fields) for _, fields in next(read_records(reader))[:2] if fields]
            return len(set(records)) == 1 and records[0] > 1, records[0] if records else 0
        return False, 0

    return max(DELIMITERS, key=count_fields)


def describe_delimiter(path: Path, source_name: str) -> str:
    """Return a remark on a CSV file whose fields are not separated by commas; nothing for other files."""
    delimiter = find_delimiter(path, source_name) if is_csv(path) else ","
    return "" if delimiter == "," else f"{source_name}: read as fields separated by {DELIMITERS[delimiter]}"
