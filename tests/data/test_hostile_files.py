"""Broken and hostile files: one line says where, what the file holds and what to do; nothing hangs or fills memory."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pickle
import resource
import sqlite3
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sqat.data import text_files
from sqat.data.rows import Rows
from sqat.data.sources import split_digest
from sqat.data.text_files import describe_delimiter, read_rows
from sqat.errors import SqatError
from sqat.recipe.inputs import Columns, SplitConfig
from sqat.recipe.tasks import RelevanceTask
from sqat.tasks.splits import open_stream
from tests.data.files import CLASSES, NESTED, TEXTS, jsonl, read
from tests.errors import raises_code

ROWS = [{"text": f"text {number}", "label": ("yes", "no")[number % 2]} for number in range(8)]


def labels(path: Path) -> list[str]:
    found: list[str] = read(path, Columns(), CLASSES)["label"][:]
    return found


def error_of(path: Path) -> SqatError:
    with pytest.raises(SqatError) as caught:
        list(read_rows(path, path.name))
    assert caught.value.exit_code == 2
    assert len(str(caught.value)) < 1000
    return caught.value


def read_all(folder: Path, name: str, *, streaming: bool) -> None:
    if streaming:
        open_stream(SplitConfig(path=name, streaming=True), Columns(), CLASSES, folder, 0)
    else:
        list(read_rows(folder / name, name))


def table_bytes(write: Callable[[pa.Table, io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    write(pa.Table.from_pylist(ROWS), buffer)
    return buffer.getvalue()


def write_arrow(table: pa.Table, buffer: io.BytesIO) -> None:
    with pa.ipc.new_file(buffer, table.schema) as writer:
        writer.write_table(table)


def zip_bytes(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "x")
    return buffer.getvalue()


def sqlite_bytes() -> bytes:
    base = sqlite3.connect(":memory:")
    base.execute("create table rows (text, label)")
    return base.serialize()


TEXT = jsonl(*ROWS)
FORMATS: dict[str, bytes] = {
    "a gzip file": gzip.compress(TEXT),
    "a Parquet file": table_bytes(pq.write_table),
    "an Arrow file": table_bytes(write_arrow),
    "an Excel workbook": zip_bytes("xl/workbook.xml"),
    "a .npz of arrays": zip_bytes("x.npy"),
    "a zip archive": zip_bytes("train.jsonl"),
    "an SQLite database": sqlite_bytes(),
    "a pickle": pickle.dumps(ROWS),
    "UTF-16 text": TEXT.decode().encode("utf-16"),
    "UTF-32 text": TEXT.decode().encode("utf-32"),
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "an HTML page": b"<!DOCTYPE html>\n<p>Not found</p>\n",
    "a text file": TEXT,
    "text whose lines end in CR alone": TEXT.replace(b"\n", b"\r"),
}
OWN = {".jsonl": {"a text file"}, ".csv": {"a text file"}, ".parquet": {"a Parquet file"}, ".arrow": {"an Arrow file"}}


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".jsonl.gz", ".parquet", ".arrow"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_real_format_is_told_where_the_ending_lies(tmp_path: Path, name: str, ending: str) -> None:
    if name in OWN.get(ending.removesuffix(".gz"), set()) or (name == "an Arrow file" and ending == ".arrow"):
        return
    if name.startswith("text whose") and ending in (".parquet", ".arrow"):
        name = "a text file"
    path = tmp_path / f"train{ending}"
    content = FORMATS.get(name, TEXT)
    path.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    error = error_of(path)
    assert (error.code, error.place, error.problem) == ("unreadable-file", path.name, f"is {name}")
    assert error.hint


def test_utf_16_without_a_mark_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text,label\na,b\n".encode("utf-16-le"))
    assert error_of(tmp_path / "a.csv").problem == "is UTF-16 text"


# JSON: what the row holds, and what the error says.
DIGITS = "1" * 400
BAD_LINES = [
    (f'{{"text": "a", "label": {"9" * 5000}}}', "unreadable-file", '"label" is a number of more than 4300 digits'),
    (f"[{'9' * 5000}]", "unreadable-file", "it holds a number of more than 4300 digits"),
    ('{"text": "a", "label": "\\ud800"}', "invalid-data", '"label" holds half of a surrogate pair'),
    ('{"text": "a\\uDFFF", "label": "b"}', "invalid-data", '"text" holds half of a surrogate pair'),
    ('{"text": "a", "\\udc00": 1}', "invalid-data", 'the name "\\udc00" holds half of a surrogate pair'),
    ('{"text": "a", "more": [{"deep": "\\ud83d"}]}', "invalid-data", '"more" holds half of a surrogate pair'),
    ('{"text": ' + "[" * 300 + "]" * 300 + "}", "unreadable-file", "lists and objects more than 100 deep"),
    ('{"text": ' + "[" * 100_000, "unreadable-file", "lists and objects more than 100 deep"),
    ('{"a": ' * 5000 + "1" + "}" * 5000, "unreadable-file", "lists and objects more than 100 deep"),
    ('{"text": "a\x00b"}', "unreadable-file", "not JSON: Invalid control character"),
    ('\ufeff{"text": "a"}', "unreadable-file", "a byte order mark that does not begin the file"),
    ('"text"', "invalid-data", "a line must hold a JSON object"),
]


@pytest.mark.parametrize("ending", [".jsonl", ".json.gz"])
@pytest.mark.parametrize(("line", "code", "problem"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_of_json_is_told_with_its_key(
    tmp_path: Path, line: str, code: str, problem: str, ending: str
) -> None:
    content = jsonl(*ROWS) + line.encode() + b"\n"
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    error = error_of(path)
    assert (error.code, error.place) == (code, f"{path.name}:9")
    assert problem in error.problem
    assert error.hint


def test_whole_surrogate_pairs_and_nul_escapes_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "\U0001f600 a\x00b", "label": "1"}, {"text": "b", "label": "2"}))
    assert read(tmp_path / "a.jsonl", Columns(), CLASSES)["text"][0] == "\U0001f600 a\x00b"


@pytest.mark.parametrize("candidates", ["a text", 3, None, True, {}, {"text": "a"}, [], ["a"], [3], [None], [[]]])
def test_candidates_of_another_shape_are_told(tmp_path: Path, candidates: object) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl({"qid": "q", "query": "q", "candidates": candidates}))
    with raises_code("invalid-data", match=r"a\.jsonl:1: .*candidates"):
        read(tmp_path / "a.jsonl", NESTED, RelevanceTask())


@pytest.mark.parametrize("size", [131_071, 131_072, 131_073, 3_000_000])
@pytest.mark.parametrize("quoted", [True, False])
def test_a_field_of_csv_may_be_long(tmp_path: Path, size: int, quoted: bool) -> None:
    mark = '"' if quoted else ""
    (tmp_path / "a.csv").write_text(f"text,label\n{mark}{'x' * size}{mark},a\n{'y ' * 9},b\n")
    before = csv.field_size_limit()
    rows = read(tmp_path / "a.csv", Columns(), CLASSES)
    assert [len(text) for text in rows["text"][:]] == [size, 18]
    assert csv.field_size_limit() == before


def test_a_field_above_the_limit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_LINE", text_files.MEGABYTE)
    (tmp_path / "a.csv").write_text('text,label\na,b\n"' + "x\n" * text_files.MEGABYTE)
    assert (error := error_of(tmp_path / "a.csv")).problem == "a field of more than 1 MB"
    assert (error.place, "never closed" in error.hint) == ("a.csv:3", True)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.jsonl"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_line_of_a_gigabyte_fills_no_memory(tmp_path: Path, name: str, streaming: bool) -> None:
    opener = gzip.open if name.endswith(".gz") else open
    with opener(tmp_path / name, "wb") as file:
        if name.endswith(".gz"):
            for _ in range(100):
                file.write(b" " * 1_000_000)
        else:
            file.truncate(1 << 30)
            file.seek(0)
            file.write(b"{" * 5000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SqatError) as caught:
        read_all(tmp_path, name, streaming=streaming)
    assert caught.value.problem == "a line of more than 64 MB"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kilobytes"


def test_a_million_columns_are_told_at_once(tmp_path: Path) -> None:
    names = ",".join(f"c{number}" for number in range(1_000_000))
    (tmp_path / "a.csv").write_text(f"{names}\n{names}\n")
    start = time.process_time()
    error = error_of(tmp_path / "a.csv")
    assert (error.code, error.place) == ("invalid-data", "a.csv:1")
    assert "1000000 columns" in error.problem
    assert time.process_time() - start < 5


def test_many_columns_of_one_name_are_told_briefly(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",".join(f"c{number // 2}" for number in range(9000)) + "\n")
    assert "and 4480 more" in error_of(tmp_path / "a.csv").problem


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_two_columns_of_one_name_are_told_in_every_format(tmp_path: Path, ending: str) -> None:
    table = pa.table([pa.array(["a", "b"]), pa.array(["c", "d"])], names=["text", "text"])
    buffer = io.BytesIO()
    (pq.write_table if ending == ".parquet" else write_arrow)(table, buffer)
    (tmp_path / f"a{ending}").write_bytes(buffer.getvalue())
    assert '"text" more than once' in error_of(tmp_path / f"a{ending}").problem


@pytest.mark.parametrize(("separator", "name"), [(",", ""), (";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
@pytest.mark.parametrize("file_name", ["a.csv", "a.tsv", "a.csv.gz"])
def test_the_separator_is_found_in_the_header(tmp_path: Path, separator: str, name: str, file_name: str) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=separator)
    writer.writerow(["label", "text", "a, b; c"])
    writer.writerows([[row["label"], row["text"], "1"] for row in TEXTS])
    path, content = tmp_path / file_name, buffer.getvalue().encode()
    path.write_bytes(gzip.compress(content) if file_name.endswith(".gz") else content)
    assert read(path, Columns(), CLASSES)["text"][:] == [row["text"] for row in TEXTS]
    assert describe_delimiter(path, "a") == (f"a: read as fields separated by {name}" if name else "")


def test_a_comma_in_the_header_counts_first_and_one_column_is_one(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,a;b;c\nx,y\n")
    assert list(read_rows(tmp_path / "a.csv", "a")) == [("a:2", {"text": "x", "a;b;c": "y"})]
    (tmp_path / "b.csv").write_text("text\nx;y\n")
    assert list(read_rows(tmp_path / "b.csv", "b")) == [("b:2", {"text": "x;y"})]


def test_nul_bytes_and_marks_within_csv_are_told(tmp_path: Path) -> None:
    head = "text,label\n" + "a,b\n" * 5000
    for number, line in enumerate(("a\x00,b\n", "\ufefftext,label\n")):
        (tmp_path / f"{number}.csv").write_text(head + line)
        error = error_of(tmp_path / f"{number}.csv")
        assert (error.code, error.place) == ("unreadable-file", f"{number}.csv:5002")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["pipe.jsonl", "folder.jsonl", "device.jsonl", "pipe.parquet", "x" * 300 + ".jsonl"])
def test_what_is_no_file_never_blocks(tmp_path: Path, name: str, streaming: bool) -> None:
    path = tmp_path / name
    if name.startswith("pipe"):
        os.mkfifo(path)
    elif name.startswith("folder"):
        path.mkdir()
    elif name.startswith("device"):
        path.symlink_to("/dev/zero")
    split = SplitConfig(path=name, streaming=streaming)
    with pytest.raises(SqatError) as caught:
        read_all(tmp_path, name, streaming=streaming)
    assert caught.value.code in ("unreadable-file", "missing-file")
    with raises_code(caught.value.code):
        split_digest(split, tmp_path)


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".npz"])
def test_damaged_binary_files_are_one_line(tmp_path: Path, ending: str) -> None:
    """Every tenth byte is another: the rows are read, or one line says why not."""
    buffer = io.BytesIO()
    if ending == ".npz":
        np.savez_compressed(buffer, x=np.zeros((4, 8, 8), np.uint8), y=np.arange(4))
        buffer.name = "a"
    else:
        (pq.write_table if ending == ".parquet" else write_arrow)(pa.Table.from_pylist(ROWS), buffer)
    content, path, told = buffer.getvalue(), tmp_path / f"a{ending}", 0
    for at in range(8, len(content), 10):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        try:
            list(read_rows(path, path.name))
        except SqatError as error:
            told += error.code in ("unreadable-file", "invalid-data")
    assert told > 10


VALUES = [
    ("1", 1, "1"), ("1.0", 1.0, "1"), ("-2.0", -2.0, "-2"), ("0.5", 0.5, "0.5"), ("true", True, "true"),
    ("false", False, "false"), ("a", "a", "a"), ("007", "007", "007"), (DIGITS, int(DIGITS), DIGITS),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value", "name"), VALUES, ids=[text[:9] for text, _, _ in VALUES])
def test_a_class_has_one_name_in_every_format(tmp_path: Path, text: str, value: object, name: str) -> None:
    (tmp_path / "a.csv").write_text(f"text,label\na,{text}\nb,other\n")
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "a", "label": value}, {"text": "b", "label": "other"}))
    found = [labels(tmp_path / "a.csv")[0], labels(tmp_path / "a.jsonl")[0]]
    if not isinstance(value, int) or abs(value) < 2**63:
        pq.write_table(pa.table({"text": ["a", "b"], "label": [value, value]}), tmp_path / "a.parquet")
        found.append(read(tmp_path / "a.parquet", Columns(), CLASSES, "dev")["label"][0])
    assert set(found) == {name}


def grades(path: Path) -> list[float]:
    rows: Rows = read(path, Columns(passage="passage"), RelevanceTask())
    found: list[float] = rows["label"][:]
    return found


@pytest.mark.parametrize(("yes", "no"), [("true", "false"), ("True", "False"), (True, False), ("1.0", "0.0"), (1, 0)])
def test_a_grade_may_be_a_truth_value(tmp_path: Path, yes: object, no: object) -> None:
    rows = [{"query": "q", "passage": f"p{number}", "label": (no, yes)[number % 2]} for number in range(4)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(*rows))
    (tmp_path / "a.csv").write_text("query,passage,label\n" + "".join(f"q,{r['passage']},{r['label']}\n" for r in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [grades(tmp_path / f"a.{ending}") for ending in ("jsonl", "csv", "parquet")] == [[0.0, 1.0, 0.0, 1.0]] * 3


def test_json_is_read_as_jsons_own_reader_does(tmp_path: Path) -> None:
    rows = [{"text": "ü \U0001f600 \\ud", "n": [1, 2.5e300, None, {"a": True}]}, {"a": -1}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, indent=None) for row in rows))
    assert [row for _, row in read_rows(tmp_path / "a.jsonl", "a")] == rows
