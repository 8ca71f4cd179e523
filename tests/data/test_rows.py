"""Files and data sets of the hub to checked rows, and the digest of what they hold."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest

from sqat.data.rows import CHUNK, Rows
from sqat.data.sources import split_digest
from sqat.data.text_files import RECORDS, parse_line, read_rows
from sqat.errors import SqatError
from sqat.recipe.inputs import Columns, SplitConfig
from sqat.tasks.splits import load_rows
from tests.data.files import CLASSES, GOOD, GRADES, NESTED, SCORES, TEXTS, jsonl, query, read, write_any
from tests.errors import raises_code

FLAT = Columns(passage="passage", group="qid")


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
    path.write_bytes(b"\xef\xbb\xbf")
    assert [*read_rows(path, "a.jsonl")] == []


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


TWICE = ('{"a": 1, "a": 2}', '{"a":1,"a" :2}', '{"b": ":", "a": "x", "a": "\\u003a"}', '{"b": {"a": 1, "a": 1}}',
         '[{"a": 1, "a": 1}]', '{"a": ":", "\\u0061": 2}', '{"a": [1], "b": "::", "a": null}')  # fmt: skip


@pytest.mark.parametrize("line", TWICE)
def test_a_key_that_is_given_twice_is_refused_at_its_line(line: str, tmp_path: Path) -> None:
    """One of the two values would be lost."""
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"a": "x: y"}}\n{line}\n')
    with raises_code("unreadable-file", r'a\.jsonl:2: the key "a" is given twice'):
        list(read_rows(path, "a.jsonl"))


def test_lines_are_objects_as_json_reads_them() -> None:
    """Whatever the line: the same object as the json module's, or the same refusal."""

    def reference(line: str) -> Any:
        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            if len(dict(pairs)) < len(pairs):
                raise KeyError
            return dict(pairs)

        try:
            return json.loads(line, object_pairs_hook=unique)
        except (KeyError, ValueError):
            return None

    draw, refused = random.Random(0), 0
    keys = ('"a"', '"b"', '"c:"', '"\\u0061"', '"d\\""', '"\\u003a"')
    values = ("1", '"x: y"', '"\\u003a"', '"\\u003A:"', '{"a": 1}', '{"a":1,"a":2}', "[1, {}]", '"{"', '":"', "", "}")
    for _ in range(20_000):
        entries = [
            draw.choice(keys) + draw.choice((":", ": ", " :", "\t:")) + draw.choice(values)
            for _ in range(draw.randint(0, 3))
        ]
        line = (
            draw.choice(("", "", "", " ")) + f"{{{', '.join(entries)}}}" + draw.choice(("\n", "\r\n", "", " \n", "x"))
        )
        expected = reference(line)
        refused += expected is None
        try:
            assert parse_line(line, "a:1") == expected
        except SqatError:
            assert expected is None
    assert 5_000 < refused < 15_000


def test_a_fault_of_csv_is_told_after_the_rows_before_it(tmp_path: Path) -> None:
    """Records are read some at a time."""
    for count in (0, 1, RECORDS - 2, RECORDS - 1, RECORDS, 3 * RECORDS):
        path, before, places = tmp_path / "a.csv", csv.field_size_limit(), list[str]()
        path.write_text("text\n" + "a\n" * count + '"b"x\n' + "c\n")
        with raises_code("unreadable-file", f"a.csv:{count + 2}: not CSV"):
            for place, _ in read_rows(path, "a.csv"):
                places.append(place)
                assert csv.field_size_limit() == before
        assert places == [f"a.csv:{number}" for number in range(2, count + 2)]
