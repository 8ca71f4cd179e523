"""Validate a recipe's tree and say pydantic's errors in words, each at the line of its key.

All errors of a file are collected, and the first by line is raised.
"""

from __future__ import annotations

import json
import re
from difflib import get_close_matches
from typing import Any, NamedTuple

from pydantic import ValidationError

from sqat.errors import ErrorCode, SqatError, suggest
from sqat.recipe.json_schema import KeyPath, choices, describe, schema_at, union_of, variant
from sqat.recipe.schema import Recipe
from sqat.recipe.yaml_nodes import Node, resolve_scalar


class Finding(NamedTuple):
    """One error of a recipe; sorts by line."""

    line: float
    place: str
    text: str
    hint: str


def validate(tree: Node) -> Recipe:
    """Check the tree against the schema.

    Raises:
        SqatError: the first type or name error by line.
    """
    try:
        return Recipe.model_validate_json(json.dumps(tree.plain()), strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        located = [(*locate(tree, item["loc"]), item) for item in error.errors(include_url=False)]
        # An error only repeats a deeper one where unions and short lists are tried.
        outer = {path[:length] for path, _, _ in located for length in range(len(path))}
        findings = [translate(tree, *item) for item in located if item[2]["type"] == "missing" or item[0] not in outer]
        raise_first(findings, "invalid-recipe")
        raise


def locate(tree: Node, loc: tuple[int | str, ...]) -> tuple[KeyPath, tuple[int | str, ...]]:
    """Split a pydantic location into the path in the tree and the rest.

    Pydantic puts the tag of the chosen member behind every union. Tags are skipped, even where the member has a key
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
    """Say one pydantic error in words."""
    node, error_type, subject = node_at(tree, path), error["type"], dotted(path) or "a recipe"
    schema = schema_at(path, tree)
    union = union_of(schema) or {}
    if error_type == "missing" and isinstance(rest[-1], str):  # else an entry of a list that is too short
        key = rest[-1]
        words = variant(schema, node, path[-1] if path else None)["properties"][key].get("description", "")
        return make_finding(tree, path, f"{subject} needs the key {key!r}", f"{key}: {words}")
    if error_type in ("extra_forbidden", "unexpected_keyword_argument"):
        return unknown_key(tree, path)
    if error_type == "union_tag_not_found":
        hint = suggest(str(path[-1]), union["mapping"])
        return make_finding(tree, path, f"{subject} needs the key {union['propertyName']!r}", hint)
    if error_type == "union_tag_invalid":
        key, tag = union["propertyName"], error["ctx"]["tag"]
        at = (*path, key) if node.child(key) else path
        return make_finding(tree, at, f"{dotted(at)}: unknown name {tag!r}", suggest(tag, union["mapping"]))
    if error_type == "value_error":
        message = str(error["ctx"]["error"])
        key = message.split(" ", 1)[0]
        return make_finding(tree, (*path, key) if node.child(key) else path, f"{dotted(path)}: {message}", "")
    if error_type == "too_long":
        size = len(node.value) if isinstance(node.value, dict | list) else 0
        return make_finding(tree, path, f"{subject} has {size} entries", f"at most {error['ctx']['max_length']}")
    if rest[-1:] == ("[key]",):
        words = schema_at(path[:-1], tree)["propertyNames"]["words"]
        return make_finding(tree, path, f"the name {path[-1]!r} may only hold {words}", "")
    hint = type_hint(node, choices(schema), describe(schema))
    return make_finding(tree, path, f"{subject} needs {describe(schema)}, got {show(node)}", hint)


def unknown_key(tree: Node, path: KeyPath) -> Finding:
    """Say that the schema has no such key, and which it has."""
    *above, key = path
    parent = tuple(above)
    schema = variant(schema_at(parent, tree), node_at(tree, parent), parent[-1] if parent else None)
    where = f" in {dotted(parent)}" if parent else ""
    return make_finding(tree, path, f"unknown key {key!r}{where}", suggest(str(key), schema["properties"]))


def type_hint(node: Node, names: list[str], allowed: str) -> str:
    """Guess how a value of the wrong type was meant."""
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


def node_at(tree: Node, path: KeyPath) -> Node:
    """Return the deepest node on the way along ``path``."""
    node = tree
    for key in path:
        child = node.child(key)
        if child is None:
            break
        node = child
    return node


def make_finding(tree: Node, path: KeyPath, text: str, hint: str) -> Finding:
    """Make a finding at the deepest key of ``path`` that the recipe holds; flags come after the file's lines."""
    place = node_at(tree, path).place
    return Finding(place.line or float("inf"), str(place), text, hint)


def raise_first(findings: list[Finding], code: ErrorCode) -> None:
    """Raise the first finding by line, with the number of the others."""
    if findings:
        first, *others = sorted(dict.fromkeys(findings), key=lambda finding: finding.line)
        more = f" (and {len(others)} more)" if others else ""
        raise SqatError(first.text + more, first.hint, first.place, code=code)


def show(node: Node) -> str:
    """Show a value in an error: short, and as YAML writes it."""
    if isinstance(node.value, dict | list):
        name = "mapping" if isinstance(node.value, dict) else "list"
        return f"a {name}" if node.value else f"an empty {name}"
    if node.value is None:
        return "nothing"
    text = repr(node.value) if isinstance(node.value, str) else json.dumps(node.value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def dotted(path: KeyPath) -> str:
    """Join a path with dots."""
    return ".".join(str(key) for key in path)
