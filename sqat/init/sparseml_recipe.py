"""Read the modifiers of a recipe of SparseML or llm-compressor, from YAML or from the front matter of Markdown.

YAML tags create no objects, and ``eval(num_epochs - 2)`` knows four operations and the recipe's own numbers only.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqat.errors import SqatError
from sqat.files.read import read_text
from sqat.recipe.yaml_nodes import Node, compose

MAX_BYTES = 1 << 20
MAX_NUMBER = 1e9  # of epochs, rates and shares
FENCE = re.compile(r"^---[ \t]*$", re.MULTILINE)
OPERATIONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True)
class Modifier:
    """One modifier: class name, arguments, and line in the file.

    Attributes:
        is_tagged: an entry ``!Kind`` of SparseML's lists; llm-compressor has mappings.
        is_one_shot: its stage has ``run_type: oneshot``.
    """

    kind: str
    values: Mapping[str, Any]
    line: int
    is_tagged: bool = True
    is_one_shot: bool = False

    @property
    def label(self) -> str:
        """What notes call it."""
        return f"line {self.line}: {self.kind}"

    def number(self, name: str, default: float) -> float:
        """Return an argument that must be a number."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_NUMBER:
            problem = f"{self.kind}.{name} needs a number, got {value!r}"
            raise SqatError(problem, place=f"line {self.line}", code="invalid-recipe")
        return float(value)

    def start(self, default: float = 0.0) -> float:
        """Return the first epoch; SparseML writes values below 0 for the beginning."""
        return max(self.number("start_epoch", self.number("start", default)), 0.0)

    def end(self, default: float = 0.0) -> float:
        """Return the last epoch; values below 0 stand for the end of training."""
        return self.number("end_epoch", self.number("end", default))


def read_modifiers(path: Path) -> list[Modifier]:
    """Read every modifier of a file, in order.

    Raises:
        SqatError: the file cannot be read, or holds no modifier.
    """
    text = read_text(path, limit=MAX_BYTES)
    if path.suffix == ".md":
        text = front_matter(text)
    modifiers = list(find_modifiers(compose(text, path.name, tags=True), {}))
    if not modifiers:
        problem = "holds no list or mapping named ...modifiers"
        raise SqatError(problem, "is it a recipe of SparseML?", code="invalid-recipe")
    return modifiers


def front_matter(text: str) -> str:
    """Return the YAML between the first two lines ``---`` of a page, at its own line numbers."""
    fences = list(FENCE.finditer(text.replace("\r\n", "\n")))
    if not fences:
        hint = "name the recipe's .yaml"
        raise SqatError("has no front matter between two lines ---", hint, code="unreadable-file")
    text = text.replace("\r\n", "\n")
    end = fences[1].start() if len(fences) > 1 else len(text)
    return "\n" * text.count("\n", 0, fences[0].start()) + text[fences[0].start() : end]


def find_modifiers(node: Node, variables: Mapping[str, Any], is_one_shot: bool = False) -> Iterator[Modifier]:
    """Yield the modifiers below a node: tagged ones in lists (SparseML) and entries of mappings (llm-compressor)."""
    if not isinstance(node.value, dict):
        return
    variables = {**variables, **{name: child.value for name, child in node.value.items()}}
    run_type = node.value.get("run_type")
    is_one_shot = is_one_shot or (run_type is not None and run_type.value == "oneshot")
    for name, child in node.value.items():
        if not name.endswith("modifiers"):
            yield from find_modifiers(child, variables, is_one_shot)
            continue
        for kind, each in entries_of(child):
            values = arguments(each, variables)
            yield Modifier(kind, values, each.place.line, bool(each.tag), is_one_shot)


def entries_of(node: Node) -> Iterator[tuple[str, Node]]:
    """Yield the kind and the arguments of each entry of a list or mapping of modifiers.

    Raises:
        SqatError: an entry is no modifier.
    """
    if isinstance(node.value, dict):
        yield from node.value.items()
        return
    for each in node.value if isinstance(node.value, list) else [node] if node.value is not None else []:
        if each.tag:
            yield each.tag.removeprefix("!").rpartition(":")[2], each
        elif isinstance(each.value, dict) and len(each.value) == 1:
            yield from each.value.items()
        else:
            raise SqatError("an entry that is no modifier", "write !Kind and its arguments",
                            f"line {each.place.line}", code="invalid-recipe")  # fmt: skip


def arguments(node: Node, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a modifier, with ``eval(...)`` computed."""
    plain = node.plain()
    return {name: evaluate(value, variables) for name, value in plain.items()} if isinstance(plain, dict) else {}


def evaluate(value: Any, variables: Mapping[str, Any], depth: int = 0) -> Any:
    """Return a value, or the number of an ``eval(...)``."""
    match = re.fullmatch(r"\s*eval\((.*)\)\s*", value, re.DOTALL) if isinstance(value, str) else None
    if match is None:
        return value
    name = match[1].strip()
    if isinstance(variables.get(name), str) and not str(variables[name]).lstrip().startswith("eval("):
        return variables[name]
    try:
        return compute(ast.parse(name[:200], mode="eval").body, variables, depth)
    except (SyntaxError, ValueError, TypeError, ZeroDivisionError, OverflowError, RecursionError, MemoryError) as error:
        problem = f"{value!r} is no expression of numbers and variables"
        raise SqatError(problem, "write the number", code="invalid-recipe") from error


def compute(tree: ast.expr, variables: Mapping[str, Any], depth: int) -> float:
    """Compute an expression of four operations."""
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int | float):
        return tree.value
    if isinstance(tree, ast.Name) and tree.id in variables and depth < 20:
        return float(evaluate(variables[tree.id], variables, depth + 1))
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -compute(tree.operand, variables, depth)
    if isinstance(tree, ast.BinOp) and type(tree.op) in OPERATIONS:
        left, right = (compute(part, variables, depth) for part in (tree.left, tree.right))
        return float(OPERATIONS[type(tree.op)](left, right))
    raise ValueError(ast.dump(tree))
