"""From a recipe file to a checked recipe, or to one error with its line, what was got and what is allowed.

The tree of `sqat.recipe.yaml_nodes` knows every line, pydantic finds what is wrong, and `sqat.recipe.json_schema` says
in plain words what is allowed there. ``--set`` values are grafted onto the same tree, so they meet the
same checks. All problems are collected and the first by line is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from difflib import get_close_matches
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from sqat.errors import SqatError, near_files
from sqat.recipe.cross_checks import broken_rules, suggest
from sqat.recipe.json_schema import (
    KeyPath,
    choices,
    describe,
    is_open,
    schema_at,
    union_of,
    variant,
)
from sqat.recipe.schema import LoadedRecipe, Recipe
from sqat.recipe.yaml_nodes import Node, Place, compose, resolve_scalar

MAX_BYTES = 1_000_000


class Finding(NamedTuple):
    """One thing wrong with a recipe; sorts by place."""

    line: float
    place: str
    text: str
    hint: str


def load_recipe(path: Path, overrides: Sequence[str] = (), *, check_files: bool = False) -> LoadedRecipe:
    """Read, override and check a recipe.

    Args:
        overrides: ``a.b=value`` each, the value in YAML; a number is an index of a list.
        check_files: the local files of the splits must exist.

    Raises:
        SqatError: the first problem, at ``file:line`` or ``--set key``.
    """
    text = read_text(path)
    tree = read_tree(text, path.name, overrides)
    recipe = validate(tree)
    findings = [finding(tree, problem.path, problem.text, problem.hint) for problem in broken_rules(recipe)]
    if check_files:
        findings += missing_files(recipe, tree, path.parent)
    raise_first(findings)
    if not recipe.name:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip(".-")
        recipe = recipe.model_copy(update={"name": stem or "recipe"})
    return LoadedRecipe(recipe=recipe, path=path, text=text, overrides=tuple(overrides))


def read_tree(text: str, source: str, overrides: Sequence[str]) -> Node:
    """The tree of a recipe's text with the overrides in it; nothing but its being a mapping is checked."""
    tree = compose(text, source)
    if not isinstance(tree.value, dict):
        got = "nothing" if tree.value is None else show(tree)
        raise SqatError(f"a recipe is a mapping of keys, got {got}", "sqat init writes one", str(tree.place))
    for override in overrides:
        graft_(tree, override)
    return tree


def distill_override(
    path: Path, kind: str, stage: str | None, overrides: Sequence[str], distill: bool | None
) -> list[str]:
    """What ``--distill`` and ``--no-distill`` mean for the stage of ``kind``, as a ``--set``.

    It works before any check, since a recipe may be right only without distillation.
    """
    if distill is None or (found := stage_of_kind(path, kind, stage, overrides)) is None:
        return []
    name, node = found
    if not distill:
        return [f"stages.{name}.distill=null"]
    given = node.child("distill")
    is_on = kind == "qat" if given is None else given.value is not None
    return [] if is_on else [f"stages.{name}.distill={{}}"]


def targets_override(path: Path, stage: str | None, overrides: Sequence[str], targets: Sequence[str]) -> list[str]:
    """What ``--target`` means for the export stage, as ``--set``; the results, which name targets, are dropped."""
    found = stage_of_kind(path, "export", stage, overrides)
    return [] if found is None else [f"stages.{found[0]}.targets=[{', '.join(targets)}]", "results={}"]


def stage_of_kind(path: Path, kind: str, stage: str | None, overrides: Sequence[str]) -> tuple[str, Node] | None:
    """The stage of a kind called ``stage``, or the only one, in a recipe that may not be valid yet."""
    stages = read_tree(read_text(path), path.name, overrides).child("stages")
    if stages is None or not isinstance(stages.value, dict):
        return None
    nodes = {name: node for name, node in stages.value.items()
             if (node.child("type") or Node(node.place, name)).value == kind}  # fmt: skip
    name = stage or (next(iter(nodes)) if len(nodes) == 1 else "")
    return (name, nodes[name]) if name in nodes else None


def read_text(path: Path) -> str:
    """The text of a recipe file; whatever is wrong with the file itself is told here."""
    if path.is_dir():
        found = sorted(file.name for file in path.iterdir() if file.suffix in (".yaml", ".yml"))
        hint = f"name a file in it: {', '.join(found[:5])}" if found else "name a YAML file"
        raise SqatError("is a folder, not a recipe", hint, str(path))
    if not path.exists():
        raise SqatError("no such recipe", near_files(path), str(path))
    if path.stat().st_size > MAX_BYTES:
        raise SqatError(f"is larger than {MAX_BYTES // 1_000_000} MB, which no recipe is", place=str(path))
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise SqatError("is not UTF-8 text", "save it as UTF-8", f"{path.name}:{line}") from None


def graft_(tree: Node, override: str) -> None:
    """Set one ``a.b=value`` in the tree, as if the file had said so."""
    dotted, equals, text = override.partition("=")
    place = Place(f"--set {dotted}")
    if not equals or not all(dotted.split(".")):
        raise SqatError("needs key.key=value", "for example --set stages.qat.epochs=2", f"--set {override}")
    *above, last = (int(key) if key.isdecimal() else key for key in dotted.split("."))
    node, path = tree, ()  # type: tuple[Node, KeyPath]
    for key in above:
        node, path = _descend(tree, node, path, key, place), (*path, key)
    _open_mapping_(tree, node, path, place)
    new = compose(text, str(place), flag=True)
    new.place = place
    if isinstance(node.value, list):
        node.value[_index(node, last, place)] = new
    elif isinstance(node.value, dict):
        node.value[str(last)] = new


def _descend(tree: Node, node: Node, path: KeyPath, key: str | int, place: Place) -> Node:
    """The node under ``key``, made if the schema knows the key and the recipe leaves it out."""
    _open_mapping_(tree, node, path, place)
    if isinstance(node.value, list):
        return node.value[_index(node, key, place)]
    found = node.child(str(key))
    if found is not None:
        return found
    schema = variant(schema_at(path, tree), node, path[-1] if path else None)
    known = list(node.value) if is_open(schema) and isinstance(node.value, dict) else list(schema.get("properties", {}))
    if is_open(schema) or key not in known:
        where = f" in {_dotted(path)}" if path else ""
        raise SqatError(f"unknown key {str(key)!r}{where}", suggest(str(key), known), str(place))
    made = Node(place, None)
    if isinstance(node.value, dict):
        node.value[str(key)] = made
    return made


def _index(node: Node, key: str | int, place: Place) -> int:
    if isinstance(node.value, list) and isinstance(key, int) and key < len(node.value):
        return key
    size = len(node.value) if isinstance(node.value, list) else 0
    raise SqatError(f"{key!r} is no index of a list of {size}", f"allowed: 0 to {size - 1}", str(place))


def _open_mapping_(tree: Node, node: Node, path: KeyPath, place: Place) -> None:
    """Turn a left-out value or a short form (``percentile``) into the mapping it stands for."""
    if isinstance(node.value, dict | list):
        return
    schema = schema_at(path, tree)
    chosen = variant(schema, node, path[-1] if path else None)
    if chosen.get("type") != "object":
        raise SqatError(f"{_dotted(path)} is {describe(schema)} and holds no keys", place=str(place))
    short, union, default = schema.get("short"), union_of(schema), schema.get("default")
    if isinstance(node.value, str) and short:
        node.value = {short: Node(node.place, node.value)}
    elif node.value is None and union and isinstance(default, dict):
        node.value = {union["propertyName"]: Node(place, default[union["propertyName"]])}
    else:
        node.value = {}


def validate(tree: Node) -> Recipe:
    """Check the tree against the schema; all type and name errors of the file are found at once."""
    try:
        return Recipe.model_validate_json(json.dumps(tree.plain()), strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        located = [(*locate(tree, item["loc"]), item) for item in error.errors(include_url=False)]
        paths = [path for path, _, _ in located]
        raise_first([translate(tree, *item) for item in located if not _is_shadow(item[0], item[2]["type"], paths)])
        raise


def _is_shadow(path: KeyPath, kind: str, paths: Sequence[KeyPath]) -> bool:
    """Whether an error only says that something deeper is wrong (the other members of a union, a short list)."""
    return kind != "missing" and any(other[: len(path)] == path and len(other) > len(path) for other in paths)


def locate(tree: Node, loc: tuple[int | str, ...]) -> tuple[KeyPath, tuple[int | str, ...]]:
    """Split a pydantic location into the path in the tree and what pydantic put behind it.

    Pydantic names the chosen member of every union in between; such names are skipped, even if the member has a key
    of that name, as the calibrator ``percentile`` has.
    """
    node, path, rest = tree, [], []  # type: tuple[Node, list[str | int], list[str | int]]
    for key in loc:
        child = node.child(key)
        is_tag = not rest and union_of(schema_at(tuple(path), tree)) is not None
        if child is None or is_tag:
            rest.append(key)
        else:
            node, rest = child, []
            path.append(key)
    return tuple(path), tuple(rest)


def translate(tree: Node, path: KeyPath, rest: KeyPath, error: Any) -> Finding:
    """One pydantic error in plain words, at the line of its key."""
    node, kind, subject = node_at(tree, path), error["type"], _dotted(path) or "a recipe"
    schema = schema_at(path, tree)
    union = union_of(schema) or {}
    if kind == "missing" and isinstance(rest[-1], str):  # else an entry of a list that is too short
        text = variant(schema, node, path[-1] if path else None)["properties"][rest[-1]].get("description", "")
        return finding(tree, path, f"{subject} needs the key {rest[-1]!r}", f"{rest[-1]}: {text}")
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        *above, key = path
        parent = variant(schema_at(tuple(above), tree), node_at(tree, tuple(above)), above[-1] if above else None)
        where = f" in {_dotted(tuple(above))}" if above else ""
        return finding(tree, path, f"unknown key {key!r}{where}", suggest(str(key), parent["properties"]))
    if kind == "union_tag_not_found":
        hint = suggest(str(path[-1]), union["mapping"])
        return finding(tree, path, f"{subject} needs the key {union['propertyName']!r}", hint)
    if kind == "union_tag_invalid":
        key, tag = union["propertyName"], error["ctx"]["tag"]
        at = (*path, key) if node.child(key) else path
        return finding(tree, at, f"{_dotted(at)}: unknown name {tag!r}", suggest(tag, union["mapping"]))
    if kind == "value_error":
        message = str(error["ctx"]["error"])
        word = message.split(" ", 1)[0]
        at = (*path, word) if node.child(word) else path
        return finding(tree, at, f"{_dotted(path)}: {message}", "")
    if rest[-1:] == ("[key]",):
        words = schema_at(path[:-1], tree)["propertyNames"]["words"]
        return finding(tree, path, f"the name {path[-1]!r} may only hold {words}", "")
    hint = _typing_hint(node, choices(schema), describe(schema))
    return finding(tree, path, f"{subject} needs {describe(schema)}, got {show(node)}", hint)


def _typing_hint(node: Node, names: list[str], allowed: str) -> str:
    if isinstance(node.value, int | float) and re.match("a text(?! of)", allowed):
        return "quote it if it is a text"
    if not isinstance(node.value, str):
        return ""
    if names:
        close = get_close_matches(node.value.lower(), names, n=1, cutoff=0.5)
        return f"did you mean {close[0]!r}?" if close else ""
    if "true or false" in allowed and node.value.lower() in ("yes", "no", "on", "off"):
        return f"write {'true' if node.value.lower() in ('yes', 'on') else 'false'}"
    is_quoted = not isinstance(resolve_scalar(node.value, node.place), str)
    return "remove the quotation marks" if is_quoted and re.search("number|true or false", allowed) else ""


def missing_files(recipe: Recipe, tree: Node, folder: Path) -> list[Finding]:
    """Local files of the splits that are not there."""
    found = []
    for name in ("train", "dev", "test"):
        split = getattr(recipe.data, name)
        if split is None or split.path is None or (folder / split.path).is_file():
            continue
        if not (split.streaming and glob(split.path, root_dir=folder)):
            text = f"data.{name}: no file {split.path}"
            found.append(finding(tree, ("data", name, "path"), text, near_files(folder / split.path)))
    return found


def node_at(tree: Node, path: KeyPath) -> Node:
    """The deepest node on the way along ``path``."""
    node = tree
    for key in path:
        child = node.child(key)
        if child is None:
            break
        node = child
    return node


def finding(tree: Node, path: KeyPath, text: str, hint: str) -> Finding:
    """A finding at the deepest key of ``path`` that the recipe holds; flags come after the file's lines."""
    place = node_at(tree, path).place
    return Finding(place.line or float("inf"), str(place), text, hint)


def raise_first(findings: list[Finding]) -> None:
    """Tell the first by line, and how many more there are."""
    if findings:
        first, *others = sorted(dict.fromkeys(findings), key=lambda item: item.line)
        more = f" (and {len(others)} more)" if others else ""
        raise SqatError(first.text + more, first.hint, first.place)


def show(node: Node) -> str:
    """A value as the reader of an error wants it: short, and as YAML has it."""
    if isinstance(node.value, dict | list):
        kind = "mapping" if isinstance(node.value, dict) else "list"
        return f"a {kind}" if node.value else f"an empty {kind}"
    if node.value is None:
        return "nothing"
    text = repr(node.value) if isinstance(node.value, str) else json.dumps(node.value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def _dotted(path: KeyPath) -> str:
    return ".".join(str(key) for key in path)
