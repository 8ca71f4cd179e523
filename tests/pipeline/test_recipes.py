"""Every shipped recipe on a tiny model, and every command of the README as it stands there."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import datasets
import pytest
import torch

from sqat.cli import main
from tests.tiny import classification_rows, relevance_rows, write_model, write_project, write_rows

pytestmark = pytest.mark.pipeline
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
ELSEWHERE = {  # recipes of other tasks, whose tests have data of their own
    "digits": "pipeline/test_image_recipes.py",
    "emoji-vit": "pipeline/test_image_recipes.py",
    "query-performance": "pipeline/test_performance_recipe.py",
    "retrieval": "pipeline/test_search_pipeline.py",
    "text-to-image": "models/test_diffusion.py",
}


def test_every_shipped_recipe_has_a_test() -> None:
    assert set(ELSEWHERE) <= {path.stem for path in RECIPES}
    for name, file in ELSEWHERE.items():
        assert f'"{name}' in (ROOT / "tests" / file).read_text()


@pytest.mark.parametrize("recipe", [path for path in RECIPES if path.stem not in ELSEWHERE], ids=lambda path: path.stem)
def test_every_relevance_recipe_runs(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe as shipped but for the model, the data files and the length of its fits."""
    from sqat.recipe.loader import load_recipe

    torch.set_num_threads(1)
    write_model(tmp_path / "model", num_hidden_layers=1)
    overrides = [f"output={tmp_path / 'runs'}", f"model.source={tmp_path / 'model'}", "model.sha256=null"]
    overrides.append("model.max_length=32")
    for seed, split in enumerate(("train", "dev", "test")):
        write_rows(tmp_path / f"{split}.jsonl", relevance_rows(24, seed))
        overrides.append(f"data.{split}.path={tmp_path / f'{split}.jsonl'}")
    for name, config in load_recipe(recipe).recipe.stages.items():
        if config.type in ("train", "prune", "qat"):
            overrides += [f"stages.{name}.epochs=null", f"stages.{name}.steps=3"]
    arguments = [part for override in overrides for part in ("--set", override)]
    assert main(["run", str(recipe), "--json", "--quiet", *arguments]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["label"] for row in rows] == list(load_recipe(recipe).recipe.results)
    assert all(0 <= row["metrics"]["ndcg@10"] <= 1 and Path(row["path"]).exists() for row in rows)


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
    assert {command[0] for command in commands} >= {
        "init",
        "run",
        "analyze",
        "qat",
        "export",
        "inspect",
        "engine",
        "evaluate",
        "schema",
        "doctor",
        "bench",
        "report",
    }
    if importlib.util.find_spec("tensorrt_rtx") is None:
        commands = [command for command in commands if command[0] != "engine"]
    for command in commands:
        assert main(command) == 0, command
        if command[:2] == ["init", "train.jsonl"] and len(command) == 2:
            assert "sentence" in (tmp_path / "recipe.yaml").read_text()
            (tmp_path / "recipe.yaml").write_text(text)
    assert (tmp_path / "runs/recipe/05-export/model.int8.onnx").is_file()
    assert (tmp_path / "runs/no-distill/sqat.json").is_file()
