"""`sqat init`: the guess for the shapes of files people have, and a recipe that loads and says what was guessed."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from sqat.errors import SqatError
from sqat.init.guess_task import guess_task
from sqat.init.recipe_text import scalar
from sqat.init.starter import default_model, write_starter
from sqat.recipe.loader import load_recipe
from tests.errors import raises_code

TEXT = "a few words number {}"


def rows_of(count: int, **columns: Any) -> list[dict[str, Any]]:
    return [{key: make(number) for key, make in columns.items()} for number in range(count)]


def words(number: int) -> str:
    return TEXT.format(number)


SHAPES: dict[str, tuple[list[dict[str, Any]], str, dict[str, str]]] = {
    "classes by number": (
        rows_of(40, id=str, text=words, label=lambda n: n % 3, label_name=lambda n: f"the class {n % 3}"),
        "classification",
        {"text": "text", "label": "label"},
    ),
    "classes by name": (
        rows_of(40, body=words, sentiment=lambda n: "good" if n % 2 else "bad"),
        "classification",
        {"text": "body", "label": "sentiment"},
    ),
    "pairs with classes": (
        rows_of(40, premise=words, hypothesis=words, label=lambda n: n % 3),
        "classification",
        {"text": "premise", "text_pair": "hypothesis", "label": "label"},
    ),
    "pairs with scores": (
        rows_of(40, text_a=words, text_b=words, score=lambda n: n / 8),
        "regression",
        {"text": "text_a", "text_pair": "text_b", "label": "score"},
    ),
    "scores as text, as CSV has them": (
        rows_of(40, review=words, stars=lambda n: str(n % 9 / 2)),
        "regression",
        {"text": "review", "label": "stars"},
    ),
    "a label without a name": (
        rows_of(40, comment=words, outcome=lambda n: n % 2),
        "classification",
        {"text": "comment", "label": "outcome"},
    ),
    "nested candidates": (
        rows_of(
            8,
            qid=lambda n: f"Q{n}",
            query=words,
            title=words,
            candidates=lambda n: [{"id": f"D{i}", "text": words(i), "label": i % 2} for i in range(3)],
        ),
        "relevance",
        {"query": "query", "candidates": "candidates", "passage": "text", "label": "label", "group": "qid"},
    ),
    "flat relevance": (
        rows_of(40, query=lambda n: words(n // 5), passage=words, relevance=lambda n: n % 3),
        "relevance",
        {"query": "query", "passage": "passage", "label": "relevance"},
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_guess_is_right_and_its_recipe_loads(shape: str, tmp_path: Path) -> None:
    rows, task, columns = SHAPES[shape]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "dev.jsonl").write_text(data.read_text())
    write_starter(data, tmp_path / "deep" / "recipe.yaml", model="tiny")
    recipe = load_recipe(tmp_path / "deep" / "recipe.yaml", check_files=True).recipe
    assert recipe.task.name == task
    assert {key: getattr(recipe.data.columns, key) for key in recipe.data.columns.model_fields_set} == columns
    assert recipe.data.train.path == "../train.jsonl"
    assert recipe.data.dev.path == "../dev.jsonl"
    assert recipe.data.test is None
    assert recipe.model.source == "tiny"
    assert recipe.model.max_length in (32, 64, 128, 256)
    assert list(recipe.stages) == ["train", "dense-calibrate", "dense", "prune", "calibrate", "qat", "export"]


def test_csv_gz_and_a_missing_dev_file(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "all.csv.gz", "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["comment", "class"])
        writer.writerows([[words(number), number % 2] for number in range(30)])
    lines = write_starter(tmp_path / "all.csv.gz", tmp_path / "r.yaml", model="tiny")
    assert "dev: none found" in lines
    assert any(line.startswith("warning: no dev file found, so dev is train") for line in lines)
    text = (tmp_path / "r.yaml").read_text()
    assert "# WARNING: no dev file was found" in text
    recipe = load_recipe(tmp_path / "r.yaml", check_files=True).recipe
    assert (recipe.data.dev.path, recipe.data.dev.limit) == ("all.csv.gz", 500)


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows, task, _ = SHAPES["nested candidates"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    lines = write_starter(tmp_path / "train.parquet", tmp_path / "r.yaml", model="tiny")
    assert lines[0].startswith(f"task: {task} ")


def test_a_given_task_wins(tmp_path: Path) -> None:
    rows, _, _ = SHAPES["pairs with scores"]
    assert guess_task(rows, "classification", "x").task == "classification"
    rows, _, _ = SHAPES["classes by number"]
    assert guess_task(rows, "regression", "x").task == "regression"


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([{"text": "some words", "id": 3}] * 3,
         'x: no column looks like a label; rename it to "label"; there is "id", "text"'),
        ([{"id": 3, "x_id": 4}] * 3, 'x: no column looks like a label; rename it to "label"; there is "id", "x_id"'),
        ([{"label": 3, "n": 4}] * 3, 'x: no text column; there is "label", "n"'),
    ],
)  # fmt: skip
def test_what_cannot_be_guessed_is_an_error(rows: list[dict[str, Any]], line: str) -> None:
    with pytest.raises(SqatError) as caught:
        guess_task(rows, None, "x")
    assert str(caught.value) == line


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    rows, _, _ = SHAPES["classes by number"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.yaml").write_text("mine")
    with raises_code("output-exists"):
        write_starter(tmp_path / "t.jsonl", tmp_path / "r.yaml")
    assert (tmp_path / "r.yaml").read_text() == "mine"
    write_starter(tmp_path / "t.jsonl", tmp_path / "r.yaml", force=True)
    assert (tmp_path / "r.yaml").read_text() != "mine"


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("\n")
    with raises_code("no-rows"):
        write_starter(tmp_path / "t.jsonl", tmp_path / "r.yaml")


@pytest.mark.parametrize(
    "name", ["plain", "on", "3", "1e5", "null", "a: b", "# x", "*x", "Überschrift", "it's", '"', "", " x"]
)
def test_any_column_name_survives(name: str, tmp_path: Path) -> None:
    rows = [{name: words(number), "label": number % 2} for number in range(20)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_starter(tmp_path / "t.jsonl", tmp_path / "r.yaml", model="tiny")
    assert load_recipe(tmp_path / "r.yaml").recipe.data.columns.text == name


def test_scalars_are_quoted_only_where_needed() -> None:
    assert [scalar(text) for text in ("../a b.jsonl", "true", "1.5", "a:b")] == [
        "../a b.jsonl",
        '"true"',
        '"1.5"',
        '"a:b"',
    ]


def test_the_default_model_is_a_name_or_a_package() -> None:
    assert default_model() == "sentence-transformers/all-MiniLM-L6-v2" or default_model().startswith("package:")


@pytest.mark.parametrize("shape", ["nested candidates", "flat relevance"])
def test_the_rows_of_relevance_serve_retrieval_where_it_is_asked_for(shape: str, tmp_path: Path) -> None:
    rows, _, columns = SHAPES[shape]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_starter(data, tmp_path / "recipe.yaml", task="retrieval")
    recipe = load_recipe(tmp_path / "recipe.yaml").recipe
    assert recipe.task.name == "retrieval"
    assert {name: getattr(recipe.data.columns, name) for name in columns} == columns
    for stage in ("prune", "qat"):
        assert recipe.stages[stage].distill.output_weight == 10
        assert recipe.stages[stage].distill.task_weight == 0


def test_a_terminal_asks_for_the_task(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(40, text=words, label=lambda n: n % 3)))
    asked: list[str] = []

    def answer(guess: str) -> str:
        asked.append(guess)
        return "regression"

    lines = write_starter(data, tmp_path / "r.yaml", ask=answer)
    assert asked == ["classification"]
    assert lines[0].startswith("task: regression")
    assert load_recipe(tmp_path / "r.yaml").recipe.task.name == "regression"
    write_starter(data, tmp_path / "s.yaml", task="classification", ask=answer)
    assert asked == ["classification"], "whoever has said it is not asked"
    with raises_code("unknown-name"):
        write_starter(data, tmp_path / "t.yaml", ask=lambda _: "guessing")
    assert not (tmp_path / "t.yaml").exists()


def write_text_data(folder: Path, name: str = "train", count: int = 60) -> Path:
    rows = rows_of(count, text=words, label=lambda n: n % 2)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_steps_are_shared_by_the_stages(tmp_path: Path) -> None:
    write_starter(write_text_data(tmp_path), tmp_path / "recipe.yaml", steps=100)
    stages = load_recipe(tmp_path / "recipe.yaml").recipe.stages
    assert {name: stages[name].steps for name in ("train", "prune", "qat")} == {"train": 50, "prune": 30, "qat": 20}


def test_minutes_choose_steps_and_rows_by_the_time_of_a_step(
    tmp_path: Path, make_source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqat.init import budget

    data, _ = write_text_data(tmp_path), write_text_data(tmp_path, "dev", count=600)
    monkeypatch.setattr(budget, "time_step", lambda splits: (0.5, 32.0, 10_000))
    lines = write_starter(data, tmp_path / "recipe.yaml", model=str(make_source("bert")), minutes=2)
    recipe = load_recipe(tmp_path / "recipe.yaml").recipe
    # 84 s of training: dense steps of 0.5 s, those of prune cost 1.85 times as much, those of QAT 1.45 times
    steps = {name: recipe.stages[name].steps for name in budget.SHARES}
    assert steps == {"train": 62, "prune": 37, "qat": 25}
    assert recipe.stages["prune"].reconstruct.steps_per_block == 30
    # 2 s for each pass over dev; a row takes a third of 0.5 s / 32
    assert recipe.data.dev.limit == 384
    assert any(line.startswith("2 minutes on this machine: train 62,") for line in lines)


def test_little_time_still_leaves_rows_to_judge_by(
    tmp_path: Path, make_source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqat.init import budget

    data, _ = write_text_data(tmp_path), write_text_data(tmp_path, "dev", count=600)
    monkeypatch.setattr(budget, "time_step", lambda splits: (0.5, 32.0, 10_000))
    write_starter(data, tmp_path / "recipe.yaml", model=str(make_source("bert")), minutes=0.001)
    assert load_recipe(tmp_path / "recipe.yaml").recipe.data.dev.limit == budget.LEAST_ROWS


def test_minutes_are_measured_on_the_model_and_its_rows(tmp_path: Path, make_source: Any) -> None:
    data = write_text_data(tmp_path)
    lines = write_starter(data, tmp_path / "recipe.yaml", model=str(make_source("bert")), minutes=60)
    stages = load_recipe(tmp_path / "recipe.yaml").recipe.stages
    assert {name: stages[name].steps for name in ("train", "prune", "qat")} == {"train": 6, "prune": 12, "qat": 6}
    assert any(line.startswith("60 minutes on this machine: train 6") for line in lines)


BUDGETS: list[dict[str, Any]] = [
    *({"minutes": 0.0}, {"minutes": float("nan")}, {"minutes": 1e308}, {"steps": 2}),
    *({"minutes": 1.0, "steps": 9}, {"steps": 9, "sparseml": Path("old.yaml")}),
]


@pytest.mark.parametrize("options", BUDGETS)
def test_a_budget_that_cannot_be_kept_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with raises_code("usage"):
        write_starter(write_text_data(tmp_path), tmp_path / "recipe.yaml", **options)
    assert not (tmp_path / "recipe.yaml").exists()
