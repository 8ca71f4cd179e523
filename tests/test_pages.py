"""Every command, recipe and block of Python in a page runs; every link and generated table is in step."""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from transformers import TrainingArguments

from scripts.docs import benchmarks
from sqat.cli import main
from sqat.recipe.loader import load_recipe
from tests.runtime.nodes import needs_library
from tests.tiny import VOCABULARY, MakeModel, Project, classification_rows, write_project

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "recipes").glob("*.md")),
         *sorted((ROOT / "sqat").glob("*/README.md"))]  # fmt: skip
SHOWN = {  # languages of blocks that are not run, and why
    "text": "a drawing or a layout of folders",
    "c": "one line in each of four languages; tests/runtime/test_runtime_example.py compiles a whole program",
}
NOT_HERE = {  # commands that are only checked as far as possible, and why
    "torchrun": "a launcher takes many seconds; tests/pipeline/test_launched.py starts one",
    "accelerate": "a launcher takes many seconds; tests/pipeline/test_launched.py starts one",
    "pip": "needs a package index; the extras must be those of pyproject.toml",
    "scripts/": "needs real models and minutes; the flags must be those of the script",
    "python": "needs real models and minutes; the flags must be those of the script",
}
OTHER_FILES = ("old.yaml", "build.log", "layers.json")  # named by commands, written by the test


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text.strip().splitlines()[0][:50]}"


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        for language, text in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            found.append(Block(page, language, text))
    return [block for block in found if not languages or block.language in languages]


def commands() -> Iterator[list[str]]:
    """The words of every command, in the order of the pages."""
    for block in blocks("sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def test_every_block_has_a_known_language() -> None:
    assert {block.language for block in blocks()} <= {"sh", "python", "yaml", *SHOWN}


def test_every_command_is_run_or_has_a_reason_not_to() -> None:
    for words in commands():
        assert words[0] == "sqat" or any(words[0].startswith(name) for name in NOT_HERE), words


# Commands of sqat: all on one tiny run.


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data, the model and the other files that the pages name."""
    folder = tmp_path_factory.mktemp("pages")
    write_project(folder / "files")
    writers = {"train.jsonl": "to_json", "dev.csv": "to_csv", "test.parquet": "to_parquet"}
    for seed, (name, writer) in enumerate(writers.items()):
        rows = [{"sentence": row["text"], "label": row["label"]} for row in classification_rows(40, seed)]
        getattr(datasets.Dataset.from_list(rows), writer)(str(folder / name))
    (folder / "old.yaml").write_text("modifiers:\n  - !ConstantPruningModifier {mask_type: '2:4'}\n")
    logs = ROOT / "tests" / "tensorrt" / "logs"
    (folder / "build.log").write_bytes((logs / "trtexec-10.log").read_bytes())
    (folder / "layers.json").write_bytes((logs / "inspector-11.json").read_bytes())
    return folder


def the_recipe(folder: Path) -> str:
    """The recipe of the README, with a tiny model."""
    text = next(block.text for block in blocks("yaml") if block.page.name == "README.md" and "model:" in block.text)
    assert len(text.splitlines()) <= 12
    text = text.replace("sentence-transformers/all-MiniLM-L6-v2", str(folder / "files" / "model"))
    text = text.replace("max_length: 128", "max_length: 32").replace("epochs: 3", "epochs: 1")
    return text.replace("[onnx-int8, tensorrt]", "[onnx-int8, tensorrt, torch-semi-structured]")


@pytest.mark.pipeline
def test_every_command_of_sqat_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(workplace)
    run: set[str] = set()
    for _, *words in (each for each in commands() if each[0] == "sqat"):
        if words[1:2] and words[1].startswith("recipes/"):
            check_shipped_recipe(words)
        elif words[0] == "engine":
            check_engine(words)
        elif shlex.join(words) not in run:
            again = ["--force"] if words[0] == "init" else []
            assert main([*words, *again]) == 0, words
            run.add(shlex.join(words))
        if words[:1] == ["init"]:
            (workplace / "recipe.yaml").write_text(the_recipe(workplace))
    assert {words.split()[0] for words in run} >= {
        "doctor", "init", "run", "analyze", "qat", "inspect", "evaluate", "bench", "report", "schema", "export"
    }  # fmt: skip
    assert (workplace / "runs/recipe/05-export/model.int8.onnx").is_file()
    assert (workplace / "runs/no-distill/sqat.json").is_file()
    model = Path("runs/recipe/05-export/semi-structured")
    torch_block = next(block for block in blocks("python") if block.page.name == "DEPLOY.md")
    assert str(model) in torch_block.text
    exec(compile(torch_block.text, str(torch_block), "exec"), names := {})
    assert not names["model"].training


def check_shipped_recipe(words: list[str]) -> None:
    """Load the recipe with the command's overrides; tests/pipeline/test_recipes.py runs it."""
    overrides = [value for flag, value in pairwise(words) if flag == "--set"]
    loaded = load_recipe(ROOT / words[1], overrides)
    if "--to" in words:
        assert words[words.index("--to") + 1] in loaded.recipe.stages


def check_engine(words: list[str]) -> None:
    """Build where TensorRT-RTX is installed; a log of another model ends with one line."""
    if "--log" in words:
        assert main(words) in (0, 2)
    elif importlib.util.find_spec("tensorrt_rtx") is not None:
        assert main(words) == 0


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_launcher_starts_sqat_by_its_module(launcher: str) -> None:
    found = [words for words in commands() if words[0] == launcher]
    assert found
    for words in found:
        module = words.index("-m")
        assert words[module : module + 4] == ["-m", "sqat", "run", "recipe.yaml"]


def test_extras_are_those_of_the_project() -> None:
    extras = metadata("sqat").get_all("Provides-Extra", [])
    named = {name for page in PAGES for name in re.findall(r"\[([\w,-]+)\]\"", page.read_text(encoding="utf-8"))}
    assert named <= set(extras)
    installed = next(block for block in blocks("sh") if "pip install" in block.text)
    listed = next(line for line in installed.page.read_text().splitlines() if line.startswith("Other extras: "))
    assert set(re.findall(r"`([\w-]+)`", listed)) <= set(extras)


SCRIPTS = {shlex.join(words): words for words in commands() if words[0].startswith(("scripts/", "python"))}


class ParsedError(Exception):
    """The command line is right; nothing more is to happen."""


@pytest.mark.parametrize("words", SCRIPTS.values(), ids=[name[:70] for name in SCRIPTS])
def test_a_script_is_there_and_takes_its_arguments(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[:2] == ["python", "-c"]:
        compile(words[2], "command", "exec")
        return
    module, arguments = script_of(words)
    for recipe in (word for word in arguments if word.startswith("recipes/") and word.endswith(".yaml")):
        assert (ROOT / recipe).is_file()
    if module is None or not arguments:
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_only(*given: Any, **options: Any) -> None:
        parse(*given, **options)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [words[0], *arguments])
    with pytest.raises(ParsedError):
        importlib.import_module(module).main()


def script_of(words: list[str]) -> tuple[str | None, list[str]]:
    """The module that a command starts, with its arguments; None for a script that is bash alone."""
    if words[:2] == ["python", "-m"]:
        return words[2], words[3:]
    script, arguments = (words[1], words[2:]) if words[0] == "python" else (words[0], words[1:])
    path = ROOT / script
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return script.removesuffix(".py").replace("/", "."), arguments
    assert path.stat().st_mode & 0o100, "it can be executed"
    module = re.search(r"-m (scripts[\w.]+)", text)
    if module is None:
        return None, arguments
    package = (ROOT / Path(*module[1].split("."))).is_dir()
    return module[1] + (".__main__" if package else ""), arguments


# Recipes and Python.


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_every_block_of_yaml_is_a_recipe_or_part_of_one(block: Block, tmp_path: Path) -> None:
    data = {"train": "train.jsonl", "dev": "dev.jsonl"}
    recipe = {"model": {"source": "tiny"}, "task": {"name": "classification"}, "data": data, "stages": {"train": {}}}
    part = yaml.safe_load(block.text)
    if "stages" in part and "train" not in part["stages"]:
        part["stages"] = {"train": {}, **part["stages"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **part}, sort_keys=False))
    load_recipe(tmp_path / "recipe.yaml")


API_BLOCKS = [block for block in blocks("python") if "import sqat\n" in block.text]


def surroundings(model: Any, folder: Path) -> dict[str, Any]:
    """What the blocks of the API take for granted."""
    ids = torch.randint(5, len(VOCABULARY), (16, 8), generator=torch.Generator().manual_seed(1))
    full = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 1] % 2}
    arguments = TrainingArguments(str(folder), max_steps=4, per_device_train_batch_size=4, report_to="none",
                                  use_cpu=True, disable_tqdm=True, save_strategy="no")  # fmt: skip
    return {
        "model": model.train(),
        "teacher": copy.deepcopy(model).eval(),
        "batches": [{key: value[start : start + 4] for key, value in full.items()} for start in range(0, 16, 4)],
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "rows": [{key: value[row] for key, value in full.items()} for row in range(16)],
        "arguments": arguments,
    }


@pytest.mark.parametrize("block", API_BLOCKS, ids=str)
def test_every_block_of_the_api_runs(
    block: Block, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model(num_hidden_layers=1)
    before = set(model.state_dict())
    exec(compile(block.text, str(block), "exec"), names := surroundings(model, tmp_path))
    masks = names["masks"].kept
    assert len(masks) == 6
    assert set(model.state_dict()) == before
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert bool((mask.reshape(-1, 4).sum(1) == 2).all())
        assert int(torch.count_nonzero(weight[~mask])) == 0
    assert (tmp_path / "model.onnx").is_file() == ("export_onnx" in block.text)


def test_the_blocks_of_python_are_those_that_run() -> None:
    others = [block for block in blocks("python") if block not in API_BLOCKS]
    assert {block.page.parent.name + "/" + block.page.name for block in others} == {
        "recipes/DEPLOY.md", "runtime/README.md"
    }  # fmt: skip
    assert len(next(block.text for block in API_BLOCKS if block.page.parent == ROOT).splitlines()) <= 13


@needs_library
@pytest.mark.pipeline
def test_the_block_of_the_runtime_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = next(block for block in blocks("python") if block.page.parent.name == "runtime")
    project: Project = write_project(tmp_path / "files", placement="cpu")
    target = re.search(r'"(runs/[^"]+)/model\.cpu-sparse\.onnx"', block.text)
    assert target is not None
    monkeypatch.chdir(tmp_path)
    short = [f"stages.{name}={value}" for name, value in {"train.epochs": 0.1, "prune.epochs": 0.1, "qat.epochs": 0.1,
             "calibrate.samples": 16, "export.targets": "[cpu-sparse]"}.items()]  # fmt: skip
    assert (
        main(
            ["run", str(project.recipe), "-q", "--no-rehearsal", *(word for each in short for word in ("--set", each))]
        )
        == 0
    )
    made = project.stage("export")
    (tmp_path / target[1]).parent.mkdir(parents=True)
    made.rename(tmp_path / target[1])
    ids = np.full((2, 8), 7, np.int64)
    names: dict[str, Any] = {"ids": ids, "mask": np.ones_like(ids), "types": np.zeros_like(ids)}
    exec(compile(block.text, str(block), "exec"), names)


# What is written by scripts, and links.


def test_the_tables_are_those_of_the_json_files() -> None:
    advice = "run python -m scripts.docs.benchmarks"
    assert benchmarks.PAGE.read_text(encoding="utf-8") == benchmarks.benchmarks_page(), advice
    text = benchmarks.README.read_text(encoding="utf-8")
    assert text == benchmarks.readme_page(text), advice


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", text):
        assert "://" in target or (page.parent / target).exists(), target
    for path in re.findall(r"`((?:sqat|scripts|tests|recipes)/[\w./-]+)`", text):
        assert "NAME" in path or (ROOT / path).exists(), path


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    assert max(map(len, lines)) <= 120
    assert len((ROOT / "recipes" / "README.md").read_text(encoding="utf-8").splitlines()) <= 60
