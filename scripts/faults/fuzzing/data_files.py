"""Data files with hostile fields, keys, values and formats; `sqat init` reads them, and what it writes is planned."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from scripts.faults.fuzzing.case import HOSTILE_TEXTS, Action, cut, flip_bytes

Row = dict[str, Any]
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 0.5, 1.0, float("nan"), float("inf"), -0.0, 10**400, 2**70, 1e308, "1.0", "true"),
    *([], {}, [[]], [{}], [1, "a"], {"text": "a"}, [{"text": "a", "label": 1}], [None], "a text", ["\ud800"]),
)
PIECES = (
    *(b"\x00", b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\r\n", b"\n\n\n", b'"', b'""', b",", b";", b"\t", b"|", b"{"),
    *(b"[", b"}", b"]", b"\\ud83d", b"\\u0000", b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b"x" * 200_000, b"NaN"),
    *(b"\x1f\x8b\x08", b"PAR1", b"PK\x03\x04", b"ARROW1", b"\xc3", b"\xed\xa0\x80", b"null", b"'", b"\x1b[2J"),
)
RECIPES = {
    "classification": "task: classification",
    "regression": "task: regression",
    "relevance": "task: relevance\nCOLUMNS: {candidates: candidates}",
    "retrieval": "task: retrieval\nCOLUMNS: {passage: passage}",
}
NAMES = (
    "train.jsonl",
    "train.json",
    "train.csv",
    "train.tsv",
    "train.parquet",
    "train.arrow",
    "train.npz",
    "train.txt",
)

LABELS: dict[str, list[tuple[Any, ...]]] = {
    "classification": [("good", "bad"), (0, 1), (True, False), ("pos", "pos ", "neg")],
    "regression": [(0.5, 1.5, 2), ("0.25", "3")],
    "relevance": [(0, 1), (True, False), (0.0, 0.5), ("0", "2")],
    "retrieval": [(0, 1), (True, False), (0.0, 0.5), ("0", "2")],
}


def make_case(draw: random.Random, folder: Path) -> Sequence[Action]:
    """Write a data file, and a recipe that names it; init writes another recipe, and both are planned."""
    name = draw.choice(NAMES)
    if draw.random() < 0.4 and not name.endswith((".parquet", ".arrow", ".npz")):
        name += ".gz"
    path, task, streaming = folder / name, draw.choice(list(RECIPES)), draw.random() < 0.2
    if draw.random() < 0.02:
        draw.choice((os.mkfifo, os.mkdir, partial(os.symlink, "/dev/zero")))(path)
    else:
        path.write_bytes(content_of(draw, name, task))
    head, _, columns = RECIPES[task].partition("\nCOLUMNS")
    split = f"{{path: {name}, streaming: true}}" if streaming else name
    data = f"data: {{train: {split}, dev: {name}{', columns' + columns if columns else ''}}}"
    (folder / "fixed.yaml").write_text(f"model: {{source: x}}\n{head}\n{data}\nstages: {{train: {{}}}}\n")
    given = ["--task", task] if draw.random() < 0.5 else []
    init = ["init", name, "--model", "x", *given]
    return [init, ["run", "recipe.yaml", "--dry-run"], ["run", "fixed.yaml", "--dry-run"]]


def content_of(draw: random.Random, name: str, task: str) -> bytes:
    """Return the content of a file: rows in the format of its ending or another one, with up to three changes."""
    rows = make_rows(draw, task)
    plain = name.removesuffix(".gz")
    ending = plain.rpartition(".")[2] if draw.random() < 0.95 else draw.choice(list(WRITERS))
    content = WRITERS.get(ending, write_jsonl)(draw, rows)
    for _ in range(draw.choice((0, 0, 1, 1, 2, 3))):
        content = change(draw, content)
    is_packed = name.endswith(".gz") if draw.random() < 0.97 else not name.endswith(".gz")
    content = gzip.compress(content, 1) if is_packed else content
    if draw.random() < 0.1:
        content = cut(draw, content)
    return flip_bytes(draw, content) if draw.random() < 0.05 else content


def change(draw: random.Random, content: bytes) -> bytes:
    """Put a piece in, take one away, or write the text in another encoding."""
    at = draw.randint(0, len(content))
    match draw.randrange(6):
        case 0:
            return content[:at] + content[at + draw.choice((1, 5, 50)) :]
        case 1:
            return content.decode("latin-1").encode(draw.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig")))
        case 2:
            return content.replace(b"\n", draw.choice((b"\r", b"\r\n", b"\n\r", b" ")))
        case _:
            return content[:at] + draw.choice(PIECES) + content[at:]


def make_rows(draw: random.Random, task: str) -> list[Row]:
    """Return rows for a task, some of whose names and values are odd."""
    count = draw.choice((0, 1, 20, 20, 60, 60))
    labels = draw.choice(LABELS[task] if draw.random() < 0.8 else [VALUES])
    rows = [make_row(draw, task, number, labels) for number in range(count)]
    if rows and draw.random() < 0.3:
        old, new = draw.choice(list(rows[0])), draw.choice(HOSTILE_TEXTS)
        rows = [{new if name == old else name: value for name, value in row.items()} for row in rows]
    for _ in range(draw.choice((0, 0, 1, 2, 5)) if rows else 0):
        row = draw.choice(rows)
        name = draw.choice([*row, draw.choice(HOSTILE_TEXTS)])
        row[name] = draw.choice(VALUES) if draw.random() < 0.6 else draw.choice(HOSTILE_TEXTS)
    return rows


def make_row(draw: random.Random, task: str, number: int, labels: Sequence[Any]) -> Row:
    """Return a row that the task can read."""
    label = labels[number % len(labels)]
    if task == "relevance":
        count = draw.choice((2, 4, 40))
        candidates = [{"text": f"passage {i} of {number}", "label": labels[i % len(labels)]} for i in range(count)]
        return {"qid": number, "query": f"what is {number}", "candidates": candidates}
    if task == "retrieval":
        return {"query": f"what is {number // 5}", "passage": f"it is {number}", "label": label}
    return {"text": f"a few words {number}", "label": label}


def write_jsonl(draw: random.Random, rows: list[Row]) -> bytes:
    """Write rows as JSON lines, now and then as one list."""
    is_ascii = draw.random() < 0.5
    lines = [json.dumps(row, ensure_ascii=is_ascii) for row in rows]
    text = f"[{', '.join(lines)}]" if draw.random() < 0.03 else "\n".join(lines) + "\n"
    return text.encode("utf-8", "surrogatepass")


def write_csv(draw: random.Random, rows: list[Row]) -> bytes:
    """Write rows as CSV with some separator, now and then with thousands of columns."""
    buffer = io.StringIO(newline="")
    names = list(rows[0]) if rows else ["text", "label"]
    writer = csv.DictWriter(buffer, names, delimiter=draw.choice(",,,;\t|"), extrasaction="ignore", escapechar="\\",
                            quoting=draw.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)))  # fmt: skip
    writer.writeheader()
    writer.writerows(rows)
    text = buffer.getvalue()
    if draw.random() < 0.02:
        text = ",".join(f"c{number}" for number in range(draw.choice((9000, 20_000)))) + "\n" + text
    return text.encode("utf-8", "surrogatepass")


def as_table(draw: random.Random, rows: list[Row]) -> pa.Table:
    """Make a table of rows; a column that Arrow does not take becomes texts or bytes, or is twice there."""
    names = list(rows[0]) if rows else ["text", "label"]
    names += names[:1] if draw.random() < 0.03 else []
    columns = []
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            columns.append(pa.array(values))
        except (pa.ArrowException, OverflowError, ValueError, TypeError):
            texts = [ascii(value) for value in values]
            columns.append(pa.array(texts) if draw.random() < 0.8 else pa.array([text.encode() for text in texts]))
    return pa.table(columns, names=[name.encode("utf-8", "replace").decode() for name in names])


def write_parquet(draw: random.Random, rows: list[Row]) -> bytes:
    """Write rows as Parquet; bytes where it has no type for them."""
    buffer = io.BytesIO()
    try:
        pq.write_table(as_table(draw, rows), buffer, row_group_size=draw.choice((1, 7, 1000)))
    except (pa.ArrowException, ValueError):
        return b"PAR1"
    return buffer.getvalue()


def write_arrow(draw: random.Random, rows: list[Row]) -> bytes:
    """Write rows as an Arrow file or stream."""
    table, buffer = as_table(draw, rows), io.BytesIO()
    with draw.choice((pa.ipc.new_file, pa.ipc.new_stream))(buffer, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return buffer.getvalue()


WRITERS: dict[str, Callable[[random.Random, list[Row]], bytes]] = {
    "jsonl": write_jsonl,
    "json": write_jsonl,
    "csv": write_csv,
    "tsv": write_csv,
    "parquet": write_parquet,
    "arrow": write_arrow,
}
