"""Relevance: mistakes in the rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqat.data.rows import Rows, SplitName
from sqat.errors import SqatError
from sqat.pipeline.runner import run
from sqat.recipe.inputs import Columns, SplitConfig
from sqat.recipe.loader import load_recipe
from sqat.recipe.tasks import RelevanceTask
from sqat.tasks.splits import load_rows


def passages(*candidates: tuple[str, Any], qid: str = "q") -> dict[str, Any]:
    return {"qid": qid, "query": f"about {qid}", "candidates": [{"text": t, "label": n} for t, n in candidates]}


def load(folder: Path, *rows: dict[str, Any], name: SplitName = "train", **task: Any) -> Rows:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = Columns(group="qid", candidates="candidates")
    return load_rows(SplitConfig(path="a.jsonl"), name, columns, RelevanceTask(**task), folder)


LABEL_RIGHT = "is data.columns.label right, is limit too low?"


SOUND = passages(("yes", 1), ("no", 0))


MISTAKES: dict[str, tuple[list[dict[str, Any]], SplitName, dict[str, Any], str]] = {
    "nothing relevant in train": (
        [passages(("a", 0), ("b", 0)), passages(("c", 0), qid="r")],
        "train",
        {},
        f"a.jsonl: all 3 passages of 2 queries have the grade 0; there must be two grades; {LABEL_RIGHT}",
    ),
    "nothing relevant in dev": (
        [passages(("a", 0), ("b", 0))],
        "dev",
        {"loss": "pointwise"},
        f"a.jsonl: all 2 passages of 1 queries have the grade 0; there must be two grades; {LABEL_RIGHT}",
    ),
    "everything relevant": (
        [passages(("a", 1), ("b", 1))],
        "test",
        {},
        f"a.jsonl: all 2 passages of 1 queries have the grade 1; there must be two grades; {LABEL_RIGHT}",
    ),
    "nothing relevant enough": (
        [passages(("a", 0), ("b", 0.5))],
        "dev",
        {},
        "a.jsonl: no passage of 1 queries has a grade of at least 1; the highest is 0.5: lower task.relevant_from",
    ),
    "no query has both": (
        [passages(("a", 0), ("b", 0)), passages(("c", 1), qid="r")],
        "train",
        {},
        "a.jsonl: none of the 2 queries has passages of two different grades (task.loss pairwise); "
        "are data.columns.group and label right, is limit too low?",
    ),
    "no dev query has both": (
        [passages(("a", 0), ("b", 0)), passages(("c", 1), qid="r")],
        "dev",
        {},
        "a.jsonl: none of the 2 queries has passages of a grade of at least 1 (task.relevant_from) and one below it; "
        "are data.columns.group and label right, is limit too low?",
    ),
    "empty passage": (
        [SOUND, passages(("", 1), ("b", 0))],
        "train",
        {},
        'a.jsonl:2: "candidates[0].text" is empty; give it a text or leave the row out',
    ),
    "empty query": (
        [SOUND, {**SOUND, "query": "\t"}],
        "train",
        {},
        'a.jsonl:2: "query" is empty; give it a text or leave the row out',
    ),
    "negative": (
        [SOUND, passages(("a", 1), ("b", -1))],
        "train",
        {},
        'a.jsonl:2: "candidates[1].label" is -1, a grade must be 0 or more; 0 is not relevant',
    ),
    "nan": (
        [SOUND, passages(("a", 1), ("b", math.nan))],
        "train",
        {},
        'a.jsonl:2: "candidates[1].label" must be a finite number, got the number nan; '
        "mend the row or set data.columns.label",
    ),
    "above highest": (
        [SOUND, passages(("a", 3), ("b", 0))],
        "train",
        {"highest": 2},
        'a.jsonl:2: "candidates[0].label" is 3, above task.highest, 2; mend the row or raise task.highest',
    ),
    "no gain so large": (
        [SOUND, passages(("a", 2000), ("b", 0))],
        "train",
        {},
        'a.jsonl:2: "candidates[0].label" is 2000, a grade must be 100 or less; '
        "its gain in NDCG is 2^grade: number the grades 0, 1, 2, ...",
    ),
    "two grades in one row": (
        [SOUND, passages(("a", 1), ("b", 0), ("a", 0), qid="r")],
        "train",
        {},
        'a.jsonl:2: a query has the passage "a" with the grades 0 and 1 (first at a.jsonl:2); '
        "keep the row that is right",
    ),
    "two grades in two rows": (
        [SOUND, passages(("a", 1), ("b", 0), qid="r"), passages(("no", 1), ("c", 0))],
        "dev",
        {},
        'a.jsonl:3: a query has the passage "no" with the grades 0 and 1 (first at a.jsonl:1); '
        "keep the row that is right",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_data_is_one_line_with_place_and_remedy(tmp_path: Path, mistake: str) -> None:
    rows, name, task, line = MISTAKES[mistake]
    with pytest.raises(SqatError) as caught:
        load(tmp_path, *rows, name=name, **task)
    assert str(caught.value) == line


def test_a_passage_twice_with_one_grade_and_in_two_queries_with_two_is_no_mistake(tmp_path: Path) -> None:
    rows = load(tmp_path, passages(("a", 1), ("b", 0), ("a", 1)), passages(("a", 0), ("b", 1), qid="r"))
    assert len(rows) == 5


def test_train_may_lack_what_only_the_metrics_need(tmp_path: Path) -> None:
    assert len(load(tmp_path, passages(("a", 0), ("b", 0.5)))) == 2
    assert len(load(tmp_path, passages(("a", 0)), passages(("b", 1), qid="r"), loss="pointwise")) == 2


def test_dev_rows_that_are_not_measured_are_counted_aloud(
    tmp_path: Path, make_source: Callable[..., Path], recorder: Any
) -> None:
    query = {"query": "red", "candidates": [{"text": "red w1", "label": 1}, {"text": "w2", "label": 0}]}
    idle = {"query": "blue", "candidates": [{"text": "w3", "label": 0}] * 3}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(query)}\n{json.dumps(idle)}\n")
    recipe = {
        "model": {"source": str(make_source()), "max_length": 16},
        "task": "relevance",
        "data": {"train": "rows.jsonl", "dev": "rows.jsonl", "columns": {"candidates": "candidates"}},
        "output": str(tmp_path / "runs"),
        "stages": {"train": {"steps": 1}},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    run(load_recipe(tmp_path / "recipe.yaml"), recorder)
    assert "1 of 2 queries have passages of one grade only: left out" in recorder.lines
    assert "3 of 5 dev rows are not measured: no metric depends on them" in recorder.lines
