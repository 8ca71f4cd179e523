"""What a file is by its first bytes, where its ending says something else."""

from __future__ import annotations

from pathlib import Path

from sqat.errors import SqatError
from sqat.files.read import open_file

HEAD = 4096  # bytes that are looked at
ENDING = "let its name end in {}"
# First bytes -> what the file is, and what to do.
SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "a gzip file", ENDING.format(".gz, for instance .jsonl.gz")),
    (b"PAR1", "a Parquet file", ENDING.format(".parquet")),
    (b"ARROW1", "an Arrow file", ENDING.format(".arrow")),
    (b"\xff\xff\xff\xff", "an Arrow stream", ENDING.format(".arrow")),
    (b"FEA1", "a Feather file of version 1", "write it as Parquet"),
    (b"ORC", "an ORC file", "write it as Parquet"),
    (b"Obj\x01", "an Avro file", "write it as Parquet"),
    (b"\x89HDF", "an HDF5 file", "write it as Parquet"),
    (b"SQLite format 3\x00", "an SQLite database", "write its table as CSV or Parquet"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook", "save its sheet as CSV"),
    (b"BZh", "a bzip2 file", "unpack it, or pack it with gzip"),
    (b"\xfd7zXZ", "an xz file", "unpack it, or pack it with gzip"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", "unpack it, or pack it with gzip"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (b"\x93NUMPY", "a single NumPy array", "write it with numpy.savez_compressed(file, x=images, y=labels)"),
    (b"\x80\x02", "a pickle", "write it as JSONL or Parquet; sqat opens no pickles"),
    (b"\x80\x03", "a pickle", "write it as JSONL or Parquet; sqat opens no pickles"),
    (b"\x80\x04", "a pickle", "write it as JSONL or Parquet; sqat opens no pickles"),
    (b"\x80\x05", "a pickle", "write it as JSONL or Parquet; sqat opens no pickles"),
    (b"%PDF-", "a PDF", "name the file with the rows"),
    (b"\x89PNG", "an image", "name the file with the rows"),
    (b"\xff\xd8\xff", "an image", "name the file with the rows"),
    (b"\xff\xfe\x00\x00", "UTF-32 text", "save it as UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32 text", "save it as UTF-8"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch the file itself: git lfs pull"),
    (b"<!DOCTYPE", "an HTML page", "download the file itself"),
    (b"<!doctype", "an HTML page", "download the file itself"),
    (b"<html", "an HTML page", "download the file itself"),
    (b"<?xml", "an XML file", "write it as JSONL or CSV"),
)
CONTROL = bytes([*range(9), *range(14, 32)])
TEXT = ("a text file", "is the ending right?")


def real_format(head: bytes) -> tuple[str, str]:
    """Return what a file is by its first bytes and what to do; nothing for text."""
    if head.startswith(b"PK\x03\x04"):
        if b"xl/" in head or b"[Content_Types].xml" in head:
            return "an Excel workbook", "save its sheet as CSV"
        if b".npy" in head:
            return "a .npz of arrays", ENDING.format(".npz")
        return "a zip archive", "unpack it"
    for start, what, advice in SIGNATURES:
        if head.startswith(start):
            return what, advice
    if head.count(b"\x00") * 3 > len(head):  # every second byte of plain text in UTF-16
        return "UTF-16 text", "save it as UTF-8"
    is_binary = len(head.translate(None, CONTROL)) < 0.9 * len(head)
    return ("a binary file", "name a file of text") if is_binary else ("", "")


def check_text(head: bytes, source_name: str) -> None:
    """Refuse what is no text with lines.

    Raises:
        SqatError: it says what the file is.
    """
    what, advice = real_format(head)
    if not what and b"\r" in head and b"\n" not in head:
        what, advice = "text whose lines end in CR alone", "save it with LF or CRLF line ends"
    if what:
        raise SqatError(f"is {what}", advice, source_name, code="unreadable-file")


def check_binary(path: Path, source_name: str, expected: tuple[str, ...]) -> None:
    """Refuse a file that is evidently none of the expected formats.

    Args:
        expected: what `real_format` may say.

    Raises:
        SqatError: it says what the file is; or the file cannot be read.
    """
    with open_file(path, place=source_name) as file:
        head = file.read(HEAD)
    what, advice = real_format(head)
    if not what and head:
        what, advice = TEXT
    if what and what not in expected and what != "a binary file":
        raise SqatError(f"is {what}", advice, source_name, code="unreadable-file")
