"""From a recipe file to a checked recipe, or to one error with its line, what was got and what is allowed.

The tree of `sqat.recipe.yaml_nodes` knows every line, pydantic finds what is wrong, and `sqat.recipe.validation` says
it in words. ``--set`` values are grafted onto the same tree, so they meet the same checks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from sqat.errors import SqatError, suggest, suggest_file
from sqat.files import read
from sqat.recipe.cross_checks import check_recipe
from sqat.recipe.json_schema import KeyPath, describe, is_open, schema_at, union_of, variant
from sqat.recipe.schema import LoadedRecipe, Recipe
from sqat.recipe.validation import Finding, dotted, make_finding, raise_first, show, validate
from sqat.recipe.yaml_nodes import Node, Place, compose

MAX_BYTES = 1 << 20


def load_recipe(path: Path, overrides: Sequence[str] = (), *, check_files: bool = False) -> LoadedRecipe:
    """Read, override and check a recipe.

    Args:
        overrides: ``a.b=value`` each, the value in YAML; a number is an index of a list.
        check_files: check that the local files of the splits exist.

    Raises:
        SqatError: the first problem, at ``file:line`` or ``--set key``.
    """
    text = read_text(path)
    tree = read_tree(text, path.name, overrides)
    recipe = check_tree(tree)
    if check_files:
        raise_first(find_missing_files(recipe, tree, path.parent), "missing-file")
    if not recipe.name:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip(".-")
        recipe = recipe.model_copy(update={"name": stem or "recipe"})
    return LoadedRecipe(recipe=recipe, path=path, text=text, overrides=tuple(overrides))


def check_tree(tree: Node) -> Recipe:
    """Check a recipe's tree: names, types and bounds, and the rules between its parts.

    Raises:
        SqatError: the first problem, at its line.
    """
    recipe = validate(tree)
    findings = [make_finding(tree, problem.path, problem.text, problem.hint) for problem in check_recipe(recipe)]
    raise_first(findings, "recipe-conflict")
    return recipe


def read_text(path: Path) -> str:
    """Read the text of a recipe file.

    Raises:
        SqatError: it is missing, a folder, too large or not UTF-8.
    """
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in (".yaml", ".yml"))
        hint = f"name a file in it: {', '.join(files[:5])}" if files else "name a YAML file"
        raise SqatError("is a folder, not a recipe", hint, str(path), code="unreadable-file")
    if not path.exists():
        raise SqatError("no such recipe", suggest_file(path), str(path), code="missing-file")
    return read.read_text(path, limit=MAX_BYTES, place=str(path))


def read_tree(text: str, source: str, overrides: Sequence[str]) -> Node:
    """Read the tree of a recipe's text with the overrides in it; only that it is a mapping is checked."""
    tree = compose(text, source)
    if not isinstance(tree.value, dict):
        got = "nothing" if tree.value is None else show(tree)
        problem = f"a recipe is a mapping of keys, got {got}"
        raise SqatError(problem, "sqat init writes one", str(tree.place), code="invalid-recipe")
    for override in overrides:
        graft_(tree, override)
    return tree


def distill_override(
    path: Path, stage_type: str, stage: str | None, overrides: Sequence[str], distill: bool | None
) -> list[str]:
    """Return what ``--distill`` and ``--no-distill`` mean for the stage of a type, as ``--set``.

    It works before any check, since a recipe may be valid only without distillation.
    """
    if distill is None or (match := find_stage(path, stage_type, stage, overrides)) is None:
        return []
    name, node = match
    if not distill:
        return [f"stages.{name}.distill=null"]
    given = node.child("distill")
    is_on = stage_type == "qat" if given is None else given.value is not None
    return [] if is_on else [f"stages.{name}.distill={{}}"]


def targets_override(path: Path, stage: str | None, overrides: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Return what ``--target`` means for the export stage, as ``--set``; results, which name targets, are dropped."""
    match = find_stage(path, "export", stage, overrides)
    return [] if match is None else [f"stages.{match[0]}.targets=[{', '.join(targets)}]", "results={}"]


def find_stage(path: Path, stage_type: str, stage: str | None, overrides: Sequence[str]) -> tuple[str, Node] | None:
    """Find the stage of a type called ``stage``, or the only one, in a recipe that may be invalid yet."""
    stages = read_tree(read_text(path), path.name, overrides).child("stages")
    if stages is None or not isinstance(stages.value, dict):
        return None
    nodes = {
        name: node
        for name, node in stages.value.items()
        if (node.child("type") or Node(node.place, name)).value == stage_type
    }
    name = stage or (next(iter(nodes)) if len(nodes) == 1 else "")
    return (name, nodes[name]) if name in nodes else None


def graft_(tree: Node, override: str) -> None:
    """Set one ``a.b=value`` in the tree, as if the file held it."""
    keys, equals, text = override.partition("=")
    place = Place(f"--set {keys}")
    if not equals or not all(keys.split(".")):
        hint = "for example --set stages.qat.epochs=2"
        raise SqatError("needs key.key=value", hint, f"--set {override}", code="usage")
    *above, last = (int(key) if key.isdecimal() else key for key in keys.split("."))
    node, path = tree, ()  # type: tuple[Node, KeyPath]
    for key in above:
        node, path = descend(tree, node, path, key, place), (*path, key)
    open_mapping_(tree, node, path, place)
    new = compose(text, str(place), is_flag=True)
    new.place = place
    if isinstance(node.value, list):
        node.value[list_index(node, last, place)] = new
    elif isinstance(node.value, dict):
        node.value[str(last)] = new


def descend(tree: Node, node: Node, path: KeyPath, key: str | int, place: Place) -> Node:
    """Return the node under ``key``; make it where the schema knows the key and the recipe does not give it."""
    open_mapping_(tree, node, path, place)
    if isinstance(node.value, list):
        return node.value[list_index(node, key, place)]
    child = node.child(str(key))
    if child is not None:
        return child
    schema = variant(schema_at(path, tree), node, path[-1] if path else None)
    is_user_named = is_open(schema)
    allowed = list(node.value) if is_user_named and isinstance(node.value, dict) else [*schema.get("properties", {})]
    if is_user_named or key not in allowed:
        where = f" in {dotted(path)}" if path else ""
        problem = f"unknown key {str(key)!r}{where}"
        raise SqatError(problem, suggest(str(key), allowed), str(place), code="invalid-recipe")
    child = Node(place, None)
    if isinstance(node.value, dict):
        node.value[str(key)] = child
    return child


def list_index(node: Node, key: str | int, place: Place) -> int:
    """Return ``key`` as an index of the node's list."""
    if isinstance(node.value, list) and isinstance(key, int) and key < len(node.value):
        return key
    size = len(node.value) if isinstance(node.value, list) else 0
    problem = f"{key!r} is no index of a list of {size}"
    raise SqatError(problem, f"allowed: 0 to {size - 1}", str(place), code="invalid-recipe")


def open_mapping_(tree: Node, node: Node, path: KeyPath, place: Place) -> None:
    """Replace a missing value or a short form (``percentile``) by the mapping that it stands for."""
    if isinstance(node.value, dict | list):
        return
    schema = schema_at(path, tree)
    if variant(schema, node, path[-1] if path else None).get("type") != "object":
        problem = f"{dotted(path)} is {describe(schema)} and holds no keys"
        raise SqatError(problem, place=str(place), code="invalid-recipe")
    short, union, default = schema.get("short"), union_of(schema), schema.get("default")
    if isinstance(node.value, str) and short:
        node.value = {short: Node(node.place, node.value)}
    elif node.value is None and union and isinstance(default, dict):
        node.value = {union["propertyName"]: Node(place, default[union["propertyName"]])}
    else:
        node.value = {}


def find_missing_files(recipe: Recipe, tree: Node, folder: Path) -> list[Finding]:
    """Find the local files of the splits that do not exist or are no files."""
    findings = []
    for name in ("train", "dev", "test"):
        split = getattr(recipe.data, name)
        if split is None or split.path is None or (split.streaming and glob(split.path, root_dir=folder)):
            continue
        try:
            read.open_file(folder / split.path, place=split.path).close()
        except SqatError as error:
            text = f"data.{name}: {split.path}: {error.problem}"
            findings.append(make_finding(tree, ("data", name, "path"), text, error.hint))
    return findings
