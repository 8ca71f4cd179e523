"""Imports go down one ordered list of rooms; what a command imports is in `test_startup`."""

from __future__ import annotations

import ast
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sqat"
# A room may import itself and the rooms named before it.
ROOMS = (
    "errors",
    "compat",
    "progress",
    "distributed",
    "files",
    "runtime",
    "sparsity",
    "quantization",
    "distillation",
    "checkpoint",
    "onnx_files",
    "recipe",
    "hardware",
    "modules",
    "data",
    "models",
    "tasks",
    "training",
    "compress",
    "export",
    "lint",
    "torch_sparse",
    "tensorrt",
    "evaluation",
    "stages",
    "api",
    "pipeline",
    "plots",
    "init",
    "bench",
    "analyze",
    "report",
    "cli",
    "__main__",
)
CORE = ("sparsity", "quantization", "distillation")
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES}


@cache
def imported(path: Path) -> dict[str, int]:
    """Dotted names that a file imports when it runs, each with its line; TYPE_CHECKING blocks do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {inner for node in ast.walk(tree) if is_type_checking(node) for inner in ast.walk(node)}
    names: dict[str, int] = {}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name: node.lineno for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}": node.lineno for alias in node.names}
    return names


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def file_of(dotted: str) -> str | None:
    """``sqat.sparsity.masks`` of ``sqat.sparsity.masks.nm_mask``; None outside the package."""
    while dotted:
        if dotted in NAMES.values():
            return dotted
        dotted = dotted.rpartition(".")[0]
    return None


def room_of(dotted: str) -> str:
    """``sparsity`` of ``sqat.sparsity.masks``; empty for the package itself."""
    return dotted.partition(".")[2].partition(".")[0]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_imports_go_down_the_list(path: Path) -> None:
    own = room_of(NAMES[path])
    if not own:
        return  # the package names what it exports
    assert own in ROOMS, f"say in ROOMS where {own} belongs"
    for name, line in imported(path).items():
        found = file_of(name)
        if found is None or not room_of(found):
            continue
        room = room_of(found)
        assert ROOMS.index(room) <= ROOMS.index(own), f"{path.relative_to(ROOT)}:{line}: {own} is below {room}"


def test_the_list_names_what_there_is() -> None:
    assert set(ROOMS) == {room_of(name) for name in NAMES.values()} - {""}


def test_no_file_imports_itself_by_others() -> None:
    graph = {NAMES[path]: {file for name in imported(path) if (file := file_of(name)) and file != NAMES[path]}
             for path in FILES if NAMES[path] != "sqat"}  # fmt: skip
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError with the files of a cycle


def test_the_package_holds_rooms_and_few_files() -> None:
    files = {path.name for path in PACKAGE.glob("*.py")}
    assert files == {"__init__.py", "__main__.py", "errors.py", "compat.py", "progress.py", "distributed.py"}


@pytest.mark.parametrize("room", CORE)
def test_the_core_is_alone_with_torch(room: str) -> None:
    for path in (PACKAGE / room).rglob("*.py"):
        outside = {name.split(".")[0] for name in imported(path)} - {"sqat"}
        inside = {room_of(name) for name in imported(path) if name.split(".")[0] == "sqat"}
        assert outside <= {"torch"} | set(sys.stdlib_module_names), path
        assert inside <= {room, "runtime", "compat"}, path


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("transformers", {"compat", "models", "api"}),
        ("datasets", {"data"}),
        ("diffusers", {"models"}),
        ("typer", {"cli"}),
        ("rich", {"cli"}),
    ],
)
def test_each_library_has_one_place(library: str, allowed: set[str]) -> None:
    users = {room_of(NAMES[path]) for path in FILES if library in {name.split(".")[0] for name in imported(path)}}
    assert users == allowed


def test_of_the_api_only_the_callback_imports_transformers() -> None:
    users = [path.name for path in (PACKAGE / "api").glob("*.py") if any("transformers" in n for n in imported(path))]
    assert users == ["callback.py"]
