"""A few rows of each split, from which each task can learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sqat.data.batch import Processor
from sqat.data.rows import Rows, column
from sqat.recipe.loader import load_recipe
from sqat.tasks.splits import Splits
from tests.tiny import write_rows

LIMIT = 4


class Plain:
    """A processor that adds nothing."""

    def prepare(self, rows: Rows, max_length: int) -> Rows:
        return rows


def candidates(grades: list[int]) -> list[dict[str, Any]]:
    return [{"text": f"passage {number}", "label": grade} for number, grade in enumerate(grades)]


def splits_of(folder: Path, task: str, rows: list[dict[str, Any]]) -> Splits:
    for split in ("train", "dev"):
        write_rows(folder / f"{split}.jsonl", rows)
    columns = ", columns: {candidates: candidates}" if "candidates" in rows[0] else ""
    recipe = folder / "r.yaml"
    recipe.write_text(f"model: {{source: model}}\ntask: {task}\ndata: {{train: train.jsonl, dev: dev.jsonl{columns}}}\n"
                      "stages: {train: {}}\n")  # fmt: skip
    loaded = load_recipe(recipe)
    return Splits(loaded.recipe, folder)


def few_of(splits: Splits, name: Any) -> Rows:
    processor: Processor = Plain()  # type: ignore[assignment]
    return splits.first_rows(LIMIT).prepared(name, processor)


def test_the_first_rows_of_texts(tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "label": ["a", "b", "c"][number // 40]} for number in range(120)]
    splits = splits_of(tmp_path, "classification", rows)
    few = few_of(splits, "train")
    assert few["text"][:] == [f"text {number}" for number in range(LIMIT)]
    assert splits.first_rows(LIMIT).task == splits.task, "with the classes of all rows"
    assert len(splits.first_rows(LIMIT).rows("train")) == len(rows)


@pytest.mark.parametrize("loss", ["pairwise", "pointwise"])
def test_a_querys_passages_are_one_for_each_grade(loss: str, tmp_path: Path) -> None:
    grades = [[0] * 50 + [1] + [0] * 50 + [2] * 3] * 5
    rows = [{"qid": f"q{n}", "query": f"query {n}", "candidates": candidates(each)} for n, each in enumerate(grades)]
    splits = splits_of(tmp_path, f"{{name: relevance, loss: {loss}}}", rows)
    few = few_of(splits, "train")
    assert column(few, "label").tolist() == [0, 1, 2, 0]
    assert splits.epoch_sizes("labels") == (5 * 104, 104 if loss == "pairwise" else 1)
    assert splits.epoch_sizes("queries") == (5 * 104, 104)
    assert splits.epoch_sizes("rows") == (5 * 104, 1)


def test_more_rows_where_the_first_queries_teach_nothing(tmp_path: Path) -> None:
    grades = [[0, 0]] * 20 + [[0, 1]]
    rows = [{"qid": f"q{n}", "query": f"query {n}", "candidates": candidates(each)} for n, each in enumerate(grades)]
    splits = splits_of(tmp_path, "{name: relevance, loss: pairwise}", rows)
    assert splits.task.training_groups(few_of(splits, "train"), 0, 0)
    assert len(few_of(splits, "train")) == 22
    assert len(few_of(splits, "dev")) == 2


def test_a_query_comes_with_its_passages(tmp_path: Path) -> None:
    grades = [[0] * 30 + [1] + [0] * 30] * 3
    rows = [{"qid": f"q{n}", "query": f"query {n}", "candidates": candidates(each)} for n, each in enumerate(grades)]
    splits = splits_of(tmp_path, "retrieval", rows)
    few = few_of(splits, "train")
    assert few["text"][:3] == ["query 0", "passage 0", "passage 30"]
    assert splits.task.training_groups(few, 0, 0)
