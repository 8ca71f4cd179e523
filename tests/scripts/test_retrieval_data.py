"""Rows of retrieval: a text each, in order, and a mistake told for each thing that can be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sqat.data.rows import Rows, SplitName
from sqat.errors import SqatError
from sqat.recipe.inputs import Columns, SplitConfig
from sqat.recipe.tasks import RetrievalTask
from sqat.tasks.retrieval import LOOSE, QUERY
from sqat.tasks.splits import load_rows

NESTED = Columns(group="qid", candidates="candidates")
FLAT = Columns(passage="passage")


def question(number: int, *labels: Any) -> dict[str, Any]:
    candidates = [{"text": f"passage {number}.{i}", "label": label} for i, label in enumerate(labels)]
    return {"qid": f"q{number}", "query": f"query {number}", "candidates": candidates}


def load(
    folder: Path,
    rows: list[dict[str, Any]],
    columns: Columns = NESTED,
    name: SplitName = "dev",
    limit: int | None = None,
) -> Rows:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows(SplitConfig(path="rows.jsonl", limit=limit), name, columns, RetrievalTask(), folder)


def test_every_text_is_a_row_and_the_query_stands_first(tmp_path: Path) -> None:
    rows = load(tmp_path, [question(1, 0, 1), question(2, 1)])
    assert rows["text"][:] == ["query 1", "passage 1.0", "passage 1.1", "query 2", "passage 2.0"]
    assert rows["label"][:] == [QUERY, 0.0, 1.0, QUERY, 1.0]
    assert rows["group"][:] == [0, 0, 0, 1, 1]
    assert rows["place"][3] == "rows.jsonl:2"


def test_flat_rows_of_a_query_come_together(tmp_path: Path) -> None:
    flat = [{"query": q, "passage": p, "label": label} for q, p, label in (("a", "x", 0), ("b", "y", 1), ("a", "z", 1))]
    rows = load(tmp_path, flat, FLAT)
    assert rows["text"][:] == ["a", "x", "z", "b", "y"]
    assert rows["label"][:] == [QUERY, 0.0, 1.0, QUERY, 1.0]


def test_texts_without_a_query_stand_at_the_end(tmp_path: Path) -> None:
    rows = load(tmp_path, [{"text": "alone"}, question(1, 1), {"text": "too"}])
    assert rows["text"][:] == ["query 1", "passage 1.0", "alone", "too"]
    assert rows["label"][:] == [QUERY, 1.0, LOOSE, LOOSE]
    assert rows["group"][:] == [0, 0, 1, 2]


def test_train_may_hold_texts_alone(tmp_path: Path) -> None:
    assert load(tmp_path, [{"text": "alone"}], name="train")["label"][:] == [LOOSE]
    with pytest.raises(SqatError, match="no row has a query"):
        load(tmp_path, [{"text": "alone"}])


def test_the_limit_counts_queries(tmp_path: Path) -> None:
    rows = load(tmp_path, [question(1, 1), question(2, 1), question(1, 1)], limit=1)
    assert rows["text"][:] == ["query 1", "passage 1.0", "passage 1.0"]


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


MISTAKES = [
    ([question(1, 0), question(2, 0)], "rows.jsonl: none of 2 queries has a passage of grade 1 or more; the highest"),
    ([question(1, 1), question(2, -1)], 'rows.jsonl:2: "candidates[0].label" is -1, a grade must be 0 or more'),
    ([question(1, 1, "good")], 'rows.jsonl:1: "candidates[1].label" must be a finite number, got the text "good"'),
    ([question(1, 1) | {"query": " "}], 'rows.jsonl:1: "query" is empty; give it a text or leave the row out'),
    ([question(1, 1) | {"candidates": [{"text": "", "label": 1}]}], 'rows.jsonl:1: "candidates[0].text" is empty'),
    ([question(1, 1) | {"candidates": []}], 'rows.jsonl:1: "candidates" is empty'),
    ([question(1, 1), question(2, 1) | {"qid": "q1"}], 'rows.jsonl:2: "qid" is "q1", which is another query at rows'),
    ([question(1, 1), without(question(2, 1), "query")], 'rows.jsonl:2: no column "query"'),
    (
        [question(1, 1) | {"candidates": [{"text": "same", "label": 1}, {"text": "same", "label": 0}]}],
        'rows.jsonl:1: a query has the passage "same" with the grades 0 and 1',
    ),
]


@pytest.mark.parametrize(("rows", "told"), MISTAKES)
def test_a_mistake_is_reported_with_its_place(rows: list[dict[str, Any]], told: str, tmp_path: Path) -> None:
    with pytest.raises(SqatError) as error:
        load(tmp_path, rows)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_query_that_repeats_its_passage_is_no_contradiction(tmp_path: Path) -> None:
    row = question(1, 1) | {"query": "passage 1.0"}
    assert load(tmp_path, [row])["label"][:] == [QUERY, 1.0]
