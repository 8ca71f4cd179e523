"""Rows out of every format, every mistake with its line, tokens, plans of batches, and padding."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sqat.data import text_files as readers
from sqat.data.batch import ordered_batches, plan_batches
from sqat.data.fields import grade_range
from sqat.data.rows import CHUNK, Rows, SplitName, column
from sqat.data.sources import split_digest
from sqat.data.tokens import collate, tokenize
from sqat.errors import SqatError
from sqat.recipe.inputs import Columns, SplitConfig
from sqat.recipe.tasks import ClassificationTask, RegressionTask, RelevanceTask, TaskSettings
from sqat.tasks.splits import load_rows

NESTED = Columns(candidates="candidates", group="qid")
FLAT = Columns(passage="passage", group="qid")
CLASSES, SCORES, GRADES = ClassificationTask(), RegressionTask(), RelevanceTask()
REAL = Path(os.environ.get("SQAT_DATA", Path(__file__).parents[3] / "shared" / "data"))


def jsonl(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read(path: Path, columns: Columns, task: TaskSettings, name: SplitName = "train", **more: Any) -> Rows:
    return load_rows(SplitConfig(path=path.name, **more), name, columns, task, path.parent)


def query(qid: str, *labels: float) -> dict[str, Any]:
    candidates = [{"text": f"passage {i} of {qid}", "label": label} for i, label in enumerate(labels)]
    return {"qid": qid, "query": f"about {qid}", "candidates": candidates}


TEXTS = [
    {"text": "good, really", "label": "yes"},
    {"text": 'two\nlines "quoted"', "label": "no"},
    {"text": "ö", "label": "yes"},
]


def write_any(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The same flat rows in the format of the path's ending."""
    plain = path.name.removesuffix(".gz")
    if plain.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if plain.endswith(".csv"):
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    return path


ENDINGS = ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "parquet"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    rows = read(write_any(tmp_path / f"rows.{ending}", TEXTS), Columns(), CLASSES)
    assert rows["text"][:] == [row["text"] for row in TEXTS]
    assert rows["label"][:] == ["yes", "no", "yes"]
    assert "text_pair" not in rows.column_names


@pytest.mark.parametrize("ending", ENDINGS)
def test_places_are_the_lines_a_record_begins_at(tmp_path: Path, ending: str) -> None:
    places = read(write_any(tmp_path / f"rows.{ending}", TEXTS), Columns(), CLASSES)["place"][:]
    kind = ending.removesuffix(".gz")
    ends = {"csv": ["2", "3", "5"], "parquet": ["row 1", "row 2", "row 3"]}.get(kind, ["1", "2", "3"])
    assert places == [f"rows.{ending}:{end}" for end in ends]


def test_a_byte_order_mark_and_empty_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + jsonl(TEXTS[0]) + b"\n  \n" + jsonl(TEXTS[1]))
    assert read(path, Columns(), CLASSES)["place"][:] == ["a.jsonl:1", "a.jsonl:4"]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_scores_are_numbers_whatever_the_format(tmp_path: Path, ending: str) -> None:
    rows = [{"a": "x", "b": "y", "score": 1}, {"a": "z", "b": "w", "score": 3}]
    columns = Columns(text="a", text_pair="b", label="score")
    found = read(write_any(tmp_path / f"rows.{ending}", rows), columns, SCORES)
    assert found["label"][:] == [1.0, 3.0]
    assert found["text_pair"][:] == ["y", "w"]


def test_class_numbers_are_their_digits(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl({"text": "a", "label": 1}, {"text": "b", "label": 2.0}, {"text": "c", "label": "x"}))
    assert read(path, Columns(), CLASSES)["label"][:] == ["1", "2", "x"]


def test_nested_candidates_are_flattened(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(query("q1", 1, 0), query("q2", 0, 2, 0)))
    rows = read(path, NESTED, GRADES)
    assert rows["text"][:] == ["about q1"] * 2 + ["about q2"] * 3
    assert rows["text_pair"][3] == "passage 1 of q2"
    assert rows["label"][:] == [1.0, 0.0, 0.0, 2.0, 0.0]
    assert rows["group"][:] == [0, 0, 1, 1, 1]
    assert rows["place"][4] == "a.jsonl:2"


FLAT_ROWS = [
    {"qid": qid, "query": f"about {qid}", "passage": f"p{number}", "label": number % 2}
    for number, qid in enumerate(["b", "a", "b", "c", "a", "b"])
]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_flat_rows_of_a_query_are_brought_together(tmp_path: Path, ending: str) -> None:
    rows = read(write_any(tmp_path / f"rows.{ending}", FLAT_ROWS), FLAT, GRADES)
    assert rows["text_pair"][:] == ["p0", "p2", "p5", "p1", "p4", "p3"]
    assert rows["group"][:] == [0, 0, 0, 1, 1, 2]


def test_without_a_group_column_the_query_text_ties_rows(tmp_path: Path) -> None:
    path = write_any(tmp_path / "rows.jsonl", FLAT_ROWS)
    rows = read(path, Columns(passage="passage"), GRADES)
    assert rows["group"][:] == [0, 0, 0, 1, 1, 2]


def test_limit_counts_rows_and_stops_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(*TEXTS) + b"broken\n")
    assert len(read(path, Columns(), CLASSES, limit=2)) == 2


def test_limit_counts_queries_also_where_their_rows_are_apart(tmp_path: Path) -> None:
    rows = read(write_any(tmp_path / "rows.jsonl", FLAT_ROWS), FLAT, GRADES, limit=2)
    assert rows["text_pair"][:] == ["p0", "p2", "p5", "p1", "p4"]


def test_more_rows_than_a_chunk(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    count = 2 * CHUNK + 7
    path.write_bytes(jsonl(*({"text": f"t{i}", "label": i % 2} for i in range(count))))
    rows = read(path, Columns(), CLASSES)
    assert rows["text"][:] == [f"t{i}" for i in range(count)]


# One mistake each: file name, content, columns, task, and the line the user sees (its beginning, where it ends
# in "..." because the rest is a library's).
GOOD = {"text": "fine", "label": "x"}
PAIR = Columns(text_pair="other")
POINTWISE = RelevanceTask(loss="pointwise")
MEND = "mend the row or set data.columns.label"
CLASS = 'a.jsonl:1: "label" must be a class (a text or a whole number), got'
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
    ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not JSON: ..."),
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
    ("a.parquet", jsonl(GOOD), "a.parquet: not a Parquet file: ..."),
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
    (one("x", True), Columns(), CLASSES, f"{CLASS} true; {MEND}"),
    (one("x", 0.5), Columns(), CLASSES, f"{CLASS} the number 0.5; {MEND}"),
    (one("x", float("nan")), Columns(), CLASSES, f"{CLASS} the number nan; {MEND}"),
    (one("x", ""), Columns(), CLASSES, f"{CLASS} an empty text; {MEND}"),
    (one("x", "high"), Columns(), SCORES, f'{NUMBER} the text "high"; {MEND}'),
    (one("x", float("nan")), Columns(), SCORES, f"{NUMBER} the number nan; {MEND}"),
    (one("x", False), Columns(), SCORES, f"{NUMBER} false; {MEND}"),
    (one("x", 10**400), Columns(), SCORES, f"{NUMBER} a whole number; {MEND}"),
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
    with pytest.raises(SqatError, match=r'trian.jsonl.gz: no such file; did you mean "train.jsonl.gz"\?'):
        load_rows(split, "train", Columns(), CLASSES, tmp_path)
    with pytest.raises(SqatError, match="there is no folder"):
        load_rows(SplitConfig(path="nowhere/a.csv"), "train", Columns(), CLASSES, tmp_path)
    with pytest.raises(SqatError, match=r"trian\.jsonl\.gz: cannot be read: No such file"):
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


def test_dev_may_have_one_class_only(tmp_path: Path) -> None:
    path = tmp_path / "dev.jsonl"
    path.write_bytes(jsonl(GOOD, GOOD))
    assert len(read(path, Columns(), CLASSES, "dev")) == 2


# The hub, without a network.
HUB = SplitConfig(hub="someone/set", config="en", revision="abc")
FEATURES = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})


def test_hub_rows_have_class_names_and_places(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*place: Any, **options: Any) -> Rows:
        asked.append((place, options))
        return datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, FEATURES)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_rows(HUB, "dev", Columns(), CLASSES, Path())
    assert asked == [(("someone/set", "en"), {"revision": "abc", "split": "dev"})]
    assert rows["label"][:] == ["good", "bad"]
    assert rows["place"][:] == ["someone/set[dev]:row 1", "someone/set[dev]:row 2"]


def test_hub_rows_without_a_label_are_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = datasets.Dataset.from_dict({"text": ["a"], "label": [-1]}, FEATURES)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hidden)
    with pytest.raises(SqatError, match=r'someone/set\[test\]:row 1: "label" must be a class .* got null'):
        load_rows(HUB, "test", Columns(), CLASSES, Path())


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no network"),
        datasets.exceptions.DatasetNotFoundError("no network"),
        ValueError("no network"),
    ],
)
def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    line = "cannot be loaded from the hub: no network; check name, config, split and network, or give a path"
    with pytest.raises(SqatError) as caught:
        load_rows(HUB, "dev", Columns(), CLASSES, Path())
    assert str(caught.value) == f"someone/set[dev]: {line}"
    with pytest.raises(SqatError) as caught:
        split_digest(HUB, Path())
    assert str(caught.value) == f"someone/set: {line}"


def test_the_digest_follows_bytes_and_limit_only(tmp_path: Path) -> None:
    for name, content in {"a.csv": b"x", "b.csv": b"x", "c.csv": b"y"}.items():
        (tmp_path / name).write_bytes(content)
    digests = [split_digest(SplitConfig(path=f"{name}.csv"), tmp_path) for name in "abc"]
    assert digests[0] == digests[1] != digests[2]
    assert split_digest(SplitConfig(path="a.csv", limit=5), tmp_path) != digests[0]
    assert all(len(digest) == 64 for digest in digests)


def test_the_digest_of_the_hub_follows_its_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    class Builder:
        hash = "one"

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: Builder)
    first = split_digest(HUB, Path())
    assert first == split_digest(HUB, Path()) != split_digest(SplitConfig(hub="x"), Path())
    Builder.hash = "two"
    assert split_digest(HUB, Path()) != first


# Tokens.
def small_tokenizer(side: str = "right", types: bool = True) -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(50))]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", padding_side=side, model_input_names=names, pad_token_type_id=7
    )


def words(count: int) -> str:
    return " ".join(f"w{i}" for i in range(count))


def pair_rows(*sizes: tuple[int, int]) -> Rows:
    return datasets.Dataset.from_dict(
        {
            "text": [words(first) for first, _ in sizes],
            "text_pair": [words(second) for _, second in sizes],
            "label": [float(i) for i in range(len(sizes))],
            "group": list(range(len(sizes))),
        }
    )


def test_tokens_are_those_of_the_tokenizer_unpadded() -> None:
    rows = pair_rows((2, 5), (1, 1), (3, 0))
    found = tokenize(rows, small_tokenizer(), 32)
    wanted = small_tokenizer()(rows["text"][:], rows["text_pair"][:])
    assert found["input_ids"][:] == wanted["input_ids"]
    assert found["token_type_ids"][:] == wanted["token_type_ids"]
    assert found["length"][:] == [10, 5, 6]
    assert found["text"][:] == rows["text"][:]


def test_no_token_types_where_the_tokenizer_has_none() -> None:
    found = tokenize(pair_rows((2, 5)).remove_columns("text_pair"), small_tokenizer(types=False), 32)
    assert "token_type_ids" not in found.column_names
    assert found["length"][:] == [4]


@pytest.mark.parametrize(("sizes", "kept"), [((3, 40), (3, 10)), ((40, 40), (6, 7)), ((40, 3), (10, 3))])
def test_the_longer_text_is_cut_first(sizes: tuple[int, int], kept: tuple[int, int]) -> None:
    found = tokenize(pair_rows(sizes), small_tokenizer(), 16)
    types = found["token_type_ids"][0]
    assert found["length"][0] == 16
    assert (types.count(0) - 2, types.count(1) - 1) == kept


def test_a_tokenizer_that_cannot_pad_is_a_mistake() -> None:
    tokenizer = small_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(SqatError, match="the tokenizer has no padding token"):
        tokenize(pair_rows((1, 1)), tokenizer, 16)


def test_tokenizing_leaves_no_file_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(*TEXTS))
    tokenize(read(path, Columns(), CLASSES), small_tokenizer(), 16)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("types", [True, False])
def test_padding_is_that_of_the_tokenizer(side: str, types: bool) -> None:
    tokenizer = small_tokenizer(side, types)
    rows = tokenize(pair_rows((2, 5), (9, 9), (1, 1), (3, 4)), tokenizer, 32)
    indices = [3, 0, 2]
    batch = collate(rows, indices, tokenizer)
    names = [name for name in ("input_ids", "token_type_ids") if name in rows.column_names]
    wanted = tokenizer.pad({name: [rows[i][name] for i in indices] for name in names}, return_tensors="pt")
    assert set(batch.inputs) == set(wanted)
    for name, value in wanted.items():
        assert batch.inputs[name].dtype == torch.int64
        assert torch.equal(batch.inputs[name], value), name
    assert batch.labels.dtype == torch.float32
    assert batch.labels.tolist() == [3.0, 0.0, 2.0]
    assert batch.groups.tolist() == indices
    assert len(batch) == 3


def test_classes_stay_whole_and_rows_without_queries_have_no_group() -> None:
    rows = pair_rows((1, 1), (2, 2)).remove_columns(["label", "group"]).add_column("label", [4, 2])
    batch = collate(tokenize(rows, small_tokenizer(), 16), [0, 1], small_tokenizer())
    assert batch.labels.dtype == torch.int64
    assert batch.groups.tolist() == [-1, -1]


def test_a_batch_moves_as_a_whole() -> None:
    rows = tokenize(pair_rows((1, 1)), small_tokenizer(), 16)
    moved = collate(rows, [0], small_tokenizer()).to("meta")
    assert {value.device.type for value in (*moved.inputs.values(), moved.labels, moved.groups)} == {"meta"}


# Plans of batches.
@st.composite
def plans(draw: st.DrawFn) -> tuple[list[int], list[list[int]], int]:
    """Lengths, units of neighbouring rows, and a batch size no unit exceeds."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=60))
    starts = np.cumsum([0, *sizes])
    units = [list(range(start, start + size)) for start, size in zip(starts.tolist(), sizes, strict=False)]
    lengths = draw(st.lists(st.integers(3, 128), min_size=sum(sizes), max_size=sum(sizes)))
    return lengths, units, draw(st.integers(5, 16))


@settings(max_examples=100, deadline=None)
@given(plans(), st.integers(0, 2**32 - 1), st.integers(0, 9))
def test_a_plan_has_every_row_once_units_whole_and_batches_within_size(
    plan: tuple[list[int], list[list[int]], int], seed: int, epoch: int
) -> None:
    lengths, units, size = plan
    batches = plan_batches(lengths, units, size, seed, epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(0 < len(batch) <= size for batch in batches)
    batch_of = {row: number for number, batch in enumerate(batches) for row in batch}
    assert all(len({batch_of[row] for row in unit}) == 1 for unit in units)
    assert batches == plan_batches(lengths, units, size, seed, epoch)


def test_plans_differ_by_seed_and_epoch() -> None:
    lengths, units = [5] * 100, [[i] for i in range(100)]
    found = {str(plan_batches(lengths, units, 8, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(found) == 9


def test_batches_of_single_rows_are_full_but_for_one() -> None:
    batches = plan_batches(list(range(1001)), [[i] for i in range(1001)], 8, 0, 0)
    assert Counter(map(len, batches)) == {8: 125, 1: 1}


def test_bucketing_by_length_saves_padding() -> None:
    lengths = np.random.default_rng(0).integers(5, 128, 4000).tolist()

    def padded(batches: list[list[int]]) -> int:
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)

    plain = [list(range(start, start + 32)) for start in range(0, 4000, 32)]
    planned = plan_batches(lengths, [[i] for i in range(4000)], 32, 0, 0)
    assert padded(planned) < 1.05 * sum(lengths)
    assert padded(plain) > 1.7 * sum(lengths)


def test_a_query_larger_than_a_batch_is_a_mistake() -> None:
    with pytest.raises(SqatError) as caught:
        plan_batches([5] * 9, [[0, 1], list(range(2, 9))], 4, 0, 0)
    assert str(caught.value) == (
        "a query has 7 passages, which must share a batch, but batch_size is 4; "
        "set task.candidates to 4 or less, or batch_size to 7 or more"
    )


def test_no_units_make_no_batches() -> None:
    assert plan_batches([], [], 4, 0, 0) == []


@given(st.lists(st.integers(1, 99), max_size=50), st.integers(1, 9))
def test_ordered_batches_have_every_row_once_by_length(lengths: list[int], size: int) -> None:
    rows = [row for batch in ordered_batches(lengths, size) for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths)
    assert rows == sorted(rows, key=lambda row: (lengths[row], row))


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
    assert readers.kind(value) == told


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
