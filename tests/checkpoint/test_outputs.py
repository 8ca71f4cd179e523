"""A result is written neither over a file of a checkpoint nor over one that no command of sqat made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sqat.checkpoint.outputs import MADE_BY, check_output
from sqat.cli import main
from tests.errors import raises_code


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, data, a model and a run, which no command may change."""
    monkeypatch.chdir(tmp_path)
    stage = tmp_path / "run" / "04-qat"
    (stage / "part").mkdir(parents=True)
    (stage / "sqat.json").write_text(json.dumps({"files": {"model.safetensors": "1"}, "stage": "qat"}))
    for name in ("model.safetensors", "recipe.yaml", "config.json", "part/config.json"):
        (stage / name).write_text("weights")
    (tmp_path / "train.csv").write_text("text,label\na,x\nb,y\n")
    for name in ("mine.html", "mine.json", "mine.png", "mine.yaml", "recipe.schema.json", "model.onnx"):
        (tmp_path / name).write_text("mine")
    for ending in (".json", ".png", ".yaml"):
        (tmp_path / f"folder{ending}").mkdir()
    (tmp_path / "folder.html").write_text("mine")  # a report may be written into a folder
    return tmp_path


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


IN_CHECKPOINT = [f"run/04-qat/{name}" for name in ("model.safetensors", "sqat.json", "config.json", "part/config.json",
                                                   "report.html", "part/new.html", "new.json", "new.png")]  # fmt: skip
ENDINGS = {"report": ".html", "bench": ".json", "plot": ".png", "schema": ".json", "init": ".yaml"}
COMMANDS = {
    "report": ("report", "run", "--output"),
    "bench": ("bench", "nothing.onnx", "--json"),
    "plot": ("bench", "nothing.onnx", "--plot"),
    "schema": ("schema", "--output"),
    "init": ("init", "train.csv", "--task", "classification", "--output"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_leaves_what_is_not_its_own(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqat.report.folder.newest_stage", lambda directory: directory)
    ending, before = ENDINGS[command], snapshot(folder)
    names = [*IN_CHECKPOINT, f"mine{ending}", "train.csv", "model.onnx", "train", f"folder{ending}"]
    for name in (*names, str(folder / f"mine{ending}"), f"run/../mine{ending}"):
        assert main([*COMMANDS[command], name]) == 2, name
        error = capsys.readouterr().err
        assert error.count("error: ") == 1, error
        assert name.rpartition("/")[2] in error.replace("\n", "")
        assert snapshot(folder) == before, name


def test_force_is_for_recipes_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(folder)
    for name in ("train.csv", "model.onnx", "run/04-qat/recipe.yaml", "mine.yaml"):
        assert main(["init", "train.csv", "--task", "classification", "--force", "--output", name]) == 2
    assert snapshot(folder) == before, "recipe.schema.json is not ours either"
    (folder / "recipe.schema.json").unlink()
    for _ in range(2):
        assert main(["init", "train.csv", "--task", "classification", "--force", "--output", "mine.yaml"]) == 0
    assert (folder / "mine.yaml").read_text() != "mine"


@pytest.mark.parametrize("ending", [".html", ".json", ".png", ".svg", ".pdf"])
def test_a_result_may_be_made_again(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{ending}"
    check_output(path, ending)
    path.write_bytes(f"<{MADE_BY}>".encode() + b"\xff")
    check_output(path, ending)
    path.write_bytes(b"\xff")
    with raises_code("output-exists"):
        check_output(path, ending)
    check_output(path, ending, force=True)
    with raises_code("usage"):
        check_output(path, ".other", force=True)


def test_a_file_of_the_manifest_s_name_makes_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "sqat.json").write_text('{"user": "settings"}')
    check_output(tmp_path / "a" / "x.html", ".html")
