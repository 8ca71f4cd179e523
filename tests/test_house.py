"""The size of files, packages and functions, and the form of module docstrings."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sqat"
FILES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(path.relative_to(PACKAGE)) for path in FILES]


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_file_has_at_most_400_lines(path: Path) -> None:
    assert lines_of(path) <= 400


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda folder: folder.name)
def test_a_package_has_at_most_3000_lines(folder: Path) -> None:
    assert sum(map(lines_of, folder.glob("*.py"))) <= 3000


def test_few_functions_have_over_50_lines() -> None:
    functions = [
        f"{path.relative_to(PACKAGE)}: {node.name}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 50
    ]
    assert len(functions) <= 5, functions


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_module_docstring_is_short(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert path.name == "__main__.py" or text, "says what the file is for"
    prose = [line for line in text.splitlines() if not line.startswith("    ")]  # tables and commands are indented
    assert len(" ".join(prose).split()) <= 60
    assert "Left out" not in text
