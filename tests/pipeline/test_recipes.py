"""Every shipped recipe on a tiny model, and every command of the README as it stands there."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import datasets
import pytest
import torch

from sqat.cli import main
from tests.pipeline.shipped import RECIPES, ROOT, replace_model, replace_rows, run_shipped
from tests.tiny import classification_rows, relevance_rows, write_project

pytestmark = pytest.mark.pipeline
README = (ROOT / "README.md").read_text()


ELSEWHERE = {  # recipes of other tasks, whose tests have data of their own
    "digits": "pipeline/test_image_recipes.py",
    "emoji-vit": "pipeline/test_image_recipes.py",
    "query-performance": "pipeline/test_performance_recipe.py",
    "retrieval": "pipeline/test_retrieval_recipe.py",
    "text-to-image": "models/test_diffusion.py",
}


def test_every_shipped_recipe_has_a_test() -> None:
    assert set(ELSEWHERE) <= set(RECIPES)
    for name, file in ELSEWHERE.items():
        assert f'"{name}' in (ROOT / "tests" / file).read_text()


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in ELSEWHERE])
def test_every_relevance_recipe_runs(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    overrides = replace_model(tmp_path, 32)
    overrides += replace_rows(tmp_path, [relevance_rows(24, seed) for seed in range(3)])
    rows = run_shipped(recipe, tmp_path, overrides, capsys)
    assert all(0 <= row["metrics"]["ndcg@10"] <= 1 for row in rows)


COMMANDS = {"init", "run", "analyze", "qat", "export", "inspect"}
COMMANDS |= {"engine", "evaluate", "schema", "doctor", "bench", "report"}


def readme_commands() -> list[list[str]]:
    """Lines of the README's shell blocks that call sqat."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("sqat ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_every_readme_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    project = write_project(tmp_path / "model-files")
    monkeypatch.chdir(tmp_path)
    for seed, split in enumerate(("train", "dev", "test")):
        rows = classification_rows(40, seed)
        renamed = datasets.Dataset.from_list([{"sentence": row["text"], "label": row["label"]} for row in rows])
        {"train": renamed.to_json, "dev": renamed.to_csv, "test": renamed.to_parquet}[split](
            str(tmp_path / {"train": "train.jsonl", "dev": "dev.csv", "test": "test.parquet"}[split])
        )
    recipe = re.search(r"```yaml\n(model:.*?)```", README, flags=re.DOTALL)
    assert recipe is not None
    assert len(recipe[1].splitlines()) <= 12
    text = recipe[1].replace("sentence-transformers/all-MiniLM-L6-v2", str(project.folder / "model"))
    text = text.replace("max_length: 128", "max_length: 32")
    (tmp_path / "old.yaml").write_text("modifiers:\n  - !ConstantPruningModifier {mask_type: '2:4'}\n")
    commands = readme_commands()
    assert {command[0] for command in commands} >= COMMANDS
    if importlib.util.find_spec("tensorrt_rtx") is None:
        commands = [command for command in commands if command[0] != "engine"]
    for command in commands:
        assert main(command) == 0, command
        if command[:2] == ["init", "train.jsonl"] and len(command) == 2:
            assert "sentence" in (tmp_path / "recipe.yaml").read_text()
            (tmp_path / "recipe.yaml").write_text(text)
    assert (tmp_path / "runs/recipe/05-export/model.int8.onnx").is_file()
    assert (tmp_path / "runs/no-distill/sqat.json").is_file()
