"""What `sqat init` writes, `sqat run --dry-run` accepts with the same data; what run would refuse, init refuses."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sqat.data.text_files import read_rows
from sqat.errors import SqatError
from sqat.init.from_sparseml import translate
from sqat.init.starter import write_starter
from sqat.pipeline.plan import make_plan
from sqat.recipe.loader import load_recipe
from sqat.recipe.schema import Recipe
from tests.errors import raises_code

Rows = list[dict[str, Any]]


def classes(*labels: object, count: int = 40, **more: object) -> Rows:
    return [{"text": f"a few words {n}", "label": labels[n % len(labels)], **more} for n in range(count)]


def nested(candidates: int, grade: Callable[[int], object], queries: int = 6) -> Rows:
    return [
        {
            "qid": f"Q{n}",
            "query": f"what is number {n}",
            "candidates": [{"text": f"passage {n} {i}", "label": grade(i)} for i in range(candidates)],
        }
        for n in range(queries)
    ]


def flat(candidates: int, grade: Callable[[int], object]) -> Rows:
    return [
        {"query": row["query"], "passage": each["text"], "label": each["label"]}
        for row in nested(candidates, grade)
        for each in row["candidates"]
    ]


# Rows, the task of the recipe, and settings that init must have found.
GOOD: dict[str, tuple[Rows, str, dict[str, object]]] = {
    "texts": (classes("good", "bad"), "classification", {}),
    "truth values": (classes(True, False), "classification", {}),
    "truth values as texts": (classes("True", "False"), "classification", {}),
    "numbers": (classes(0, 1, 2), "classification", {}),
    "whole decimals": (classes(0.0, 1.0), "classification", {}),
    "whole decimals as texts": (classes("0.0", "1.0"), "classification", {}),
    "labels with spaces": (classes("pos", "pos ", "neg"), "classification", {}),
    "scores": (classes(0.5, 1.25, 3), "regression", {}),
    "scores as texts": (classes("0.5", "1.25"), "regression", {}),
    "a column with quotes": (classes("a", "b", **{'x"y: #': "z\u2028"}), "classification", {}),
    "short lists": (nested(4, lambda i: i % 2), "relevance", {"candidates": None}),
    "long lists": (nested(300, lambda i: i % 2), "relevance", {"candidates": 32}),
    "33 candidates": (nested(33, lambda i: i % 3), "relevance", {"candidates": 32}),
    "32 candidates": (nested(32, lambda i: i % 3), "relevance", {"candidates": None}),
    "truth grades": (nested(5, lambda i: i == 0), "relevance", {}),
    "grades below 1": (nested(5, lambda i: i / 10), "relevance", {"relevant_from": 0.396}),
    "long flat lists": (flat(50, lambda i: i % 2), "relevance", {"candidates": 32}),
    "flat truth grades": (flat(5, lambda i: i == 0), "relevance", {}),
}


def write(folder: Path, rows: Rows, ending: str = "jsonl", name: str = "train") -> Path:
    path = folder / f"{name}.{ending}"
    if ending == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=";")
            writer.writeheader()
            writer.writerows(rows)
    elif ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dry_run(recipe: Path) -> Recipe:
    """Load a recipe and plan its run as `sqat run --dry-run` does."""
    loaded = load_recipe(recipe, check_files=True)
    assert len(make_plan(loaded)) == len(loaded.recipe.stages)
    return loaded.recipe


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("case", GOOD)
def test_a_written_recipe_runs(case: str, ending: str, tmp_path: Path) -> None:
    rows, task, settings = GOOD[case]
    if ending == "csv" and "candidates" in rows[0]:
        return  # CSV holds no lists
    if ending == "parquet" and any(type(row["label"]) is not type(rows[0]["label"]) for row in rows if "label" in row):
        return  # Parquet has one type a column
    write_starter(write(tmp_path, rows, ending), tmp_path / "new" / "r.yaml", model="tiny")
    recipe = dry_run(tmp_path / "new" / "r.yaml")
    assert recipe.task.name == task
    assert {name: getattr(recipe.task, name) for name in settings} == settings


@pytest.mark.parametrize("candidates", [4, 300])
@pytest.mark.parametrize("grade", [lambda i: i % 2, lambda i: i == 0, lambda i: i / 1000])
def test_a_written_recipe_of_retrieval_runs(candidates: int, grade: Callable[[int], object], tmp_path: Path) -> None:
    write_starter(write(tmp_path, nested(candidates, grade)), tmp_path / "r.yaml", model="tiny", task="retrieval")
    assert dry_run(tmp_path / "r.yaml").task.name == "retrieval"


NAN = float("nan")
BAD: dict[str, tuple[Rows, str | None]] = {
    "NaN among classes": ([*classes("a", "b"), *classes(NAN, count=1)], None),
    "NaN among numbers": ([*classes(1, 2), *classes(NAN, count=1)], "classification"),
    "NaN among scores": ([*classes(0.5, 1.5), *classes(NAN, count=1)], None),
    "infinite scores": ([*classes(0.5, 1.5), *classes(float("inf"), count=1)], None),
    "null": ([*classes("a", "b"), *classes(None, count=1)], None),
    "late null": ([*classes("a", "b", count=600), *classes(None, count=1)], None),
    "late empty text": ([*classes("a", "b", count=600), {"text": " ", "label": "a"}], None),
    "one class": (classes("a"), "classification"),
    "a list of no rows": ([*nested(3, lambda i: i % 2), {"qid": "x", "query": "q", "candidates": "text"}], None),
    "huge numbers": ([*classes(1.5, 2), *classes(10**400, count=1)], "regression"),
    "grades of one kind": (nested(3, lambda _: 1), None),
}


@pytest.mark.parametrize("case", BAD)
def test_what_run_refuses_init_refuses(case: str, tmp_path: Path) -> None:
    rows, task = BAD[case]
    data = write(tmp_path, rows)
    with pytest.raises(SqatError) as caught:
        write_starter(data, tmp_path / "r.yaml", model="tiny", task=task)
    assert caught.value.exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.jsonl"]


def test_dev_has_classes_that_train_lacks(tmp_path: Path) -> None:
    data = write(tmp_path, classes("a", "b"))
    write(tmp_path, classes("a", "c"), name="dev")
    with raises_code("invalid-data", match='dev.jsonl:2: unknown class "c"'):
        write_starter(data, tmp_path / "r.yaml", model="tiny")
    (tmp_path / "r.yaml").write_text("model: {source: x}\ntask: classification\n"
                                     "data: {train: train.jsonl, dev: dev.jsonl}\nstages: {train: {}}\n")  # fmt: skip
    with raises_code("invalid-data", match='dev.jsonl:2: unknown class "c"'):
        dry_run(tmp_path / "r.yaml")


def test_a_test_file_without_labels_is_left_out_and_named(tmp_path: Path) -> None:
    data = write(tmp_path, classes("a", "b"))
    write(tmp_path, [{"text": "no label here"}], name="test")
    lines = write_starter(data, tmp_path / "r.yaml", model="tiny")
    assert any(line.startswith("test: ") and "left out" in line and 'no column "label"' in line for line in lines)
    assert dry_run(tmp_path / "r.yaml").data.test is None


def test_separators_and_near_labels_are_told(tmp_path: Path) -> None:
    rows = classes("pos", "pos ", "Pos", "caf\u00e9", "cafe\u0301", "neg")
    lines = write_starter(write(tmp_path, rows, "csv"), tmp_path / "r.yaml", model="tiny")
    assert "train.csv: read as fields separated by semicolons" in lines
    assert sum("differ only by white space, case or Unicode form" in line for line in lines) == 3


@pytest.mark.parametrize("text", [
    "modifiers: {SparseGPTModifier: {mask_structure: '2:4', targets: ['re:.*(query|key)']}}",
    "modifiers: [!GMPruningModifier {start_epoch: 0, end_epoch: 1, init_lr: 0}]",
    "modifiers: {\"odd\\nkind: x\": {a: 1}, SparseGPTModifier: {}}",
])  # fmt: skip
def test_the_stages_of_sparseml_run(text: str, tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(text)
    write_starter(
        write(tmp_path, nested(300, lambda i: i % 2)),
        tmp_path / "r.yaml",
        model="tiny",
        sparseml=tmp_path / "old.yaml",
    )
    assert list(dry_run(tmp_path / "r.yaml").stages) == list(translate(tmp_path / "old.yaml").stages)


def test_a_rate_that_no_recipe_takes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(
        "modifiers: [!SetLearningRateModifier {learning_rate: -1}, !ConstantPruningModifier {}]"
    )
    with raises_code("invalid-recipe"):
        write_starter(
            write(tmp_path, classes("a", "b")), tmp_path / "r.yaml", model="tiny", sparseml=tmp_path / "old.yaml"
        )
    assert not (tmp_path / "r.yaml").exists()
    assert len(list(read_rows(tmp_path / "train.jsonl", "x"))) == 40
