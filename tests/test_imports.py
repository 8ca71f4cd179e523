"""Imports go one way, the core is alone with torch and its passes; what a command imports is in `test_startup`."""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FRAMEWORKS = {"transformers", "datasets", "accelerate", "typer", "rich", "pydantic", "onnx", "onnxruntime", "yaml"}
CORE = ("sparsity", "quantization", "distillation")
# Each layer may import itself, the layers named later, and what is open to all above the core.
LAYERS = [
    ["__main__"],
    ["cli", "console", "tables", "machine_tables", "starter", "sparseml"],
    ["report"],
    ["pipeline", "inspection", "analysis"],
    ["results", "plan", "gates", "run_lock"],
    ["library"],
    ["stages"],
    [
        "evaluation",
        "artifacts",
        "bench",
        "choosing",
        "plots",
        "small_files",
        "doctor",
        "machine",
        "keys",
        "layers",
        "tasks",
        "models",
        "architectures",
        "sources",
        "data",
        "tracking",
        "training",
        "feed",
        "spreading",
        "mid_stage",
        "processes",
        "sharding",
        "soundness",
        "stopping",
        "engine",
        "export",
        "lint",
        "serving",
        "metrics",
        "retrieval",
        "insertion",
        "readers",
        "columnar",
        "shards",
        "streaming",
        "records",
        "images",
        "pixels",
        "sampling",
        "job",
        "splits",
        "result_files",
    ],
    [*CORE],
    ["passes", "runtime"],
]
OPEN = {"recipe", "recipe_file", "recipe_gates", "recipe_rules", "recipe_schema", "yaml_tree", "checkpoint", "errors"}
OPEN |= {"manifest", "disk", "display", "report_row", "__init__"}


@cache
def imported(path: Path) -> set[str]:
    """Dotted names a file imports when it runs; blocks under TYPE_CHECKING are for the type checker alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {inner for node in ast.walk(tree) if is_type_checking(node) for inner in ast.walk(node)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def area(dotted: str) -> str:
    """``sparsity`` of ``sqat.sparsity.masks``; ``__init__`` of names in the package itself."""
    part = dotted.partition(".")[2].partition(".")[0] or "__init__"
    return part if (ROOT / "sqat" / part).is_dir() or (ROOT / "sqat" / f"{part}.py").is_file() else "__init__"


FILES = sorted((ROOT / "sqat").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_imports_go_one_way(path: Path) -> None:
    own = path.relative_to(ROOT / "sqat").parts[0].removesuffix(".py")
    inside = {area(name) for name in imported(path) if name.split(".")[0] == "sqat"} - {own}
    outside = {name.split(".")[0] for name in imported(path)} - {"sqat"}
    if own in CORE:
        assert outside <= {"torch"} | set(sys.stdlib_module_names), "the core imports torch and nothing else"
        assert inside <= {"passes"}, "the parts of the core do not know each other"
        return
    if own in OPEN:
        assert inside <= OPEN | set(CORE)
        return
    level = next((number for number, layer in enumerate(LAYERS) if own in layer), None)
    assert level is not None, f"say in LAYERS where {own} belongs"
    below = {name for layer in LAYERS[level:] for name in layer}
    assert inside <= below | OPEN, f"{own} imports what lies above it"


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("transformers", {"models", "architectures", "library"}),
        ("datasets", {"data"}),
        ("diffusers", {"architectures"}),
        ("typer", {"cli"}),
        ("rich", {"console", "tables", "machine_tables"}),
    ],
)
def test_each_library_has_one_place(library: str, allowed: set[str]) -> None:
    users = {
        path.relative_to(ROOT / "sqat").parts[0].removesuffix(".py")
        for path in FILES
        if library in {name.split(".")[0] for name in imported(path)}
    }
    assert users == allowed


def test_of_the_library_only_the_callback_imports_transformers() -> None:
    users = [
        path.name for path in (ROOT / "sqat/library").glob("*.py") if any("transformers" in n for n in imported(path))
    ]
    assert users == ["trainer.py"]
