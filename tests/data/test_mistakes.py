"""Every mistake in a file is one error with its place, and says what to do."""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from sqat.data import text_files as readers
from sqat.data.fields import grade_range
from sqat.data.rows import SplitName, column
from sqat.data.sources import split_digest
from sqat.data.wording import kind
from sqat.errors import SqatError
from sqat.recipe.inputs import Columns, SplitConfig
from sqat.recipe.tasks import RelevanceTask, TaskSettings
from sqat.tasks.splits import load_rows
from tests.data.files import CLASSES, GOOD, GRADES, NESTED, SCORES, TEXTS, jsonl, query, read, write_any

REAL = Path(os.environ.get("SQAT_DATA", Path(__file__).parents[3] / "shared" / "data"))


PAIR = Columns(text_pair="other")


POINTWISE = RelevanceTask(loss="pointwise")


MEND = "mend the row or set data.columns.label"


CLASS = 'a.jsonl:1: "label" must be a class (a text or a number), got'


NUMBER = 'a.jsonl:1: "label" must be a finite number, got'


TRAIN = "train needs at least two; is data.columns.label right, is limit too low?"


QUERIES = "are data.columns.group and label right, is limit too low?"


LABEL = "is data.columns.label right, is limit too low?"


NO_LIST = "for one passage a row leave data.columns.candidates out"


Bad = tuple[str, bytes, Columns, TaskSettings, str]


def one(text: Any, label: Any) -> bytes:
    return jsonl({"text": text, "label": label})


def listed(candidates: Any) -> bytes:
    return jsonl({"qid": "q", "query": "q", "candidates": candidates})


BAD_FILES: list[tuple[str, bytes, str]] = [
    ("a.txt", b"x", f"a.txt: cannot tell the format from the ending; it must be {readers.ENDINGS}"),
    (
        "a.jsonl",
        jsonl(GOOD) + b'{"text": x}\n',
        "a.jsonl:2: not JSON: Expecting value at column 10; the file must hold one JSON object a line",
    ),
    (
        "a.jsonl",
        b"[1, 2]\n",
        "a.jsonl:1: a line must hold a JSON object, this one holds a list; write one object a line",
    ),
    ("a.jsonl", b"[" * 100_000, "a.jsonl:1: holds lists and objects more than 100 deep; write it flatter"),
    ("a.jsonl", b"", "a.jsonl: no rows; the split must hold at least one"),
    (
        "a.csv",
        b'text,label\n"two\nlines",x\na,b,c\n',
        "a.csv:4: 3 fields under a header of 2; put text with commas or line ends in double quotes",
    ),
    (
        "a.csv",
        b"text,text\na,b\n",
        'a.csv:1: the header has "text" more than once; give each column its own name',
    ),
    ("a.csv", b'text,label\n"a"b,c\n', "a.csv:2: not CSV: ..."),
    ("a.csv", b'text,label\na,b\n"never closed,c\n', "a.csv:3: not CSV: ..."),
    ("a.csv", b"text,label\n", "a.csv: no rows; the split must hold at least one"),
    (
        "a.csv",
        "text,label\nfine,x\nKäse,y\n".encode("latin-1"),
        "a.csv:3: byte 0xe4 at column 2 is not UTF-8; save the file as UTF-8",
    ),
    (
        "a.jsonl.gz",
        gzip.compress(jsonl(GOOD))[:-6],
        "a.jsonl.gz:2: the gzip stream ends too early; the file is cut short; copy it again",
    ),
    ("a.jsonl.gz", jsonl(GOOD), "a.jsonl.gz:1: not a gzip file: ..."),
    ("a.parquet", jsonl(GOOD), "a.parquet: is a text file; is the ending right?"),
    ("a.parquet", b"PAR1" + b"x" * 20, "a.parquet: not a Parquet file: ..."),
]


BAD_ROWS: list[tuple[bytes, Columns, TaskSettings, str]] = [
    (
        jsonl(GOOD, {"txt": "x", "label": 1}),
        Columns(),
        CLASSES,
        'a.jsonl:2: no column "text"; did you mean "txt"? (data.columns.text)',
    ),
    (
        jsonl({"text": "x", "target": 1}),
        Columns(),
        CLASSES,
        'a.jsonl:1: no column "label"; there is "target", "text" (data.columns.label)',
    ),
    (
        jsonl(GOOD),
        PAIR,
        CLASSES,
        'a.jsonl:1: no column "other"; there is "label", "text" (data.columns.text_pair)',
    ),
    (
        one(3, 1),
        Columns(),
        CLASSES,
        'a.jsonl:1: "text" must be a text, got a whole number; set data.columns.text',
    ),
    (one(None, 1), Columns(), CLASSES, 'a.jsonl:1: "text" must be a text, got null; set data.columns.text'),
    (one(["a"], 1), Columns(), CLASSES, 'a.jsonl:1: "text" must be a text, got a list; set data.columns.text'),
    (
        jsonl(GOOD, GOOD) + one("  \t", 1),
        Columns(),
        CLASSES,
        'a.jsonl:3: "text" is empty; give it a text or leave the row out',
    ),
    (
        one("\ud83d", 1),
        Columns(),
        CLASSES,
        'a.jsonl:1: "text" holds half of a surrogate pair; write the character whole',
    ),
    (one("x", None), Columns(), CLASSES, f"{CLASS} null; {MEND}"),
    (one("x", float("nan")), Columns(), CLASSES, f"{CLASS} the number nan; {MEND}"),
    (one("x", ""), Columns(), CLASSES, f"{CLASS} an empty text; {MEND}"),
    (one("x", "high"), Columns(), SCORES, f'{NUMBER} the text "high"; {MEND}'),
    (one("x", float("nan")), Columns(), SCORES, f"{NUMBER} the number nan; {MEND}"),
    (one("x", False), Columns(), SCORES, f"{NUMBER} false; {MEND}"),
    (one("x", 10**400), Columns(), SCORES, f"{NUMBER} a whole number of 401 digits; {MEND}"),
    (jsonl(GOOD, GOOD), Columns(), CLASSES, f'a.jsonl: all 2 rows have the same class "x"; {TRAIN}'),
    (one("x", 2), Columns(), SCORES, f'a.jsonl: all 1 rows have the same score "2.0"; {TRAIN}'),
    (
        jsonl(query("q", 1, 0), query("r", 0, -1)),
        NESTED,
        GRADES,
        'a.jsonl:2: "candidates[1].label" is -1, a grade must be 0 or more; 0 is not relevant',
    ),
    (
        listed({"text": "p"}),
        NESTED,
        GRADES,
        f'a.jsonl:1: "candidates" must be a list of objects, got an object; {NO_LIST}',
    ),
    (
        listed([]),
        NESTED,
        GRADES,
        'a.jsonl:1: "candidates" is empty; give the query a passage or leave the row out',
    ),
    (
        listed(["p"]),
        NESTED,
        GRADES,
        'a.jsonl:1: "candidates[0]" must be an object, got the text "p"; with "text" and "label" in it',
    ),
    (
        listed([{"text": "p"}]),
        NESTED,
        GRADES,
        'a.jsonl:1: no column "candidates[0].label"; there is "text" (data.columns.label)',
    ),
    (
        jsonl({"query": "q", "candidates": []}),
        NESTED,
        GRADES,
        'a.jsonl:1: no column "qid"; there is "candidates", "query" (data.columns.group)',
    ),
    (
        jsonl(query("q", 0, 0), query("r", 1)),
        NESTED,
        GRADES,
        f"a.jsonl: none of the 2 queries has passages of two different grades (task.loss pairwise); {QUERIES}",
    ),
    (
        jsonl(query("q", 1, 1), query("r", 1)),
        NESTED,
        POINTWISE,
        f"a.jsonl: all 3 passages of 2 queries have the grade 1; there must be two grades; {LABEL}",
    ),
]


BAD: list[Bad] = [(name, content, Columns(), CLASSES, line) for name, content, line in BAD_FILES]


BAD += [("a.jsonl", *bad) for bad in BAD_ROWS]


@pytest.mark.parametrize(
    ("name", "content", "columns", "task", "line"), BAD, ids=[f"{i}-{bad[0]}" for i, bad in enumerate(BAD)]
)
def test_every_mistake_is_told_with_its_place(
    tmp_path: Path, name: str, content: bytes, columns: Columns, task: TaskSettings, line: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SqatError) as caught:
        read(tmp_path / name, columns, task)
    told = str(caught.value)
    assert told.startswith(line.removesuffix("...")) if line.endswith("...") else told == line
    assert "\n" not in told


def test_a_truncated_gzip_file_is_told_at_the_line_it_ends_in(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    noise = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(2000)]
    path.write_bytes(gzip.compress(jsonl(*({"text": text, "label": i % 2} for i, text in enumerate(noise))))[:-1000])
    with pytest.raises(SqatError, match="the gzip stream ends too early") as caught:
        read(path, Columns(), CLASSES)
    assert 1900 < int(caught.value.place.split(":")[1]) < 2000


def test_a_bad_row_of_parquet_is_told_by_its_number(tmp_path: Path) -> None:
    write_any(tmp_path / "a.parquet", [*TEXTS, {"text": "", "label": "no"}])
    with pytest.raises(SqatError, match=r'a\.parquet:row 4: "text" is empty'):
        read(tmp_path / "a.parquet", Columns(), CLASSES)


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl.gz").touch()
    split = SplitConfig(path="trian.jsonl.gz")
    with pytest.raises(SqatError, match=r"trian.jsonl.gz: no such file; did you mean .*train.jsonl.gz\?"):
        load_rows(split, "train", Columns(), CLASSES, tmp_path)
    with pytest.raises(SqatError, match="there is no folder"):
        load_rows(SplitConfig(path="nowhere/a.csv"), "train", Columns(), CLASSES, tmp_path)
    with pytest.raises(SqatError, match=r"trian\.jsonl\.gz: no such file"):
        split_digest(split, tmp_path)


def test_dev_needs_a_query_on_both_sides_of_relevant_from(tmp_path: Path) -> None:
    path = tmp_path / "dev.jsonl"
    path.write_bytes(jsonl(query("q", 1, 0), query("r", 0)))
    assert len(read(path, NESTED, GRADES, "dev")) == 3
    with pytest.raises(SqatError, match=r"no passage of 2 queries has a grade of at least 2; the highest is 1"):
        read(path, NESTED, RelevanceTask(relevant_from=2), "dev")
    path.write_bytes(jsonl(query("q", 1, 0), query("r", 2)))
    with pytest.raises(SqatError, match=r"has passages of a grade of at least 2 \(task.relevant_from\)"):
        read(path, NESTED, RelevanceTask(relevant_from=2), "dev")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "null"),
        (True, "true"),
        (2.5, "the number 2.5"),
        (3, "a whole number"),
        ("x" * 50, f'the text "{"x" * 40}..."'),
        ({}, "an object"),
        ([], "a list"),
        (b"", "a bytes"),
    ],
)
def test_values_are_told_in_the_words_of_the_file(value: object, told: str) -> None:
    assert kind(value) == told


@pytest.mark.skipif(not (REAL / "wikiqa").is_dir(), reason=f"no {REAL}/wikiqa (set SQAT_DATA)")
@pytest.mark.parametrize(
    ("name", "queries", "pairs", "mixed"),
    [("train", 2118, 20360, 857), ("dev", 296, 2733, 122), ("test", 633, 6165, 237)],
)
def test_real_relevance_data(name: SplitName, queries: int, pairs: int, mixed: int) -> None:
    split = SplitConfig(path=f"wikiqa/{name}.jsonl.gz")
    rows = load_rows(split, name, NESTED, GRADES, REAL)
    assert len(rows) == pairs
    assert rows["group"][-1] == queries - 1
    lowest, highest = grade_range(column(rows, "label"), column(rows, "group"))
    assert int((lowest < highest).sum()) == mixed
