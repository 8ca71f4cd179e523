"""YAML text as a tree in which every value knows its place, so that an error names the line of its key.

The tree is composed from PyYAML's events. Duplicate keys, tags, alias bombs and a second document are errors. Plain
scalars follow the YAML 1.2 core schema: ``1e-5`` is a number; ``2:4``, ``on`` and ``yes`` are texts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import yaml

from sqat.errors import SqatError

Scalar = str | int | float | bool | None
Plain = Scalar | list["Plain"] | dict[str, "Plain"]

MAX_VALUES = 10_000
MAX_DEPTH = 40
CONSTANTS: dict[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
INTEGER = re.compile(r"[-+]?[0-9]{1,300}|0o[0-7]{1,300}|0x[0-9a-fA-F]{1,300}")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class Place:
    """Where a value stands: a file and a line, or a flag (line 0)."""

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass
class Node:
    """One value of the tree.

    Attributes:
        place: of its key, or of the value itself in a list.
        size: how many values it holds.
        tag: its YAML tag; empty without one.
    """

    place: Place
    value: Scalar | list[Node] | dict[str, Node]
    size: int = 1
    tag: str = ""

    def plain(self) -> Plain:
        """Return the value without places, as ``json`` would read it."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def child(self, key: str | int) -> Node | None:
        """Return the value under ``key`` of a mapping or list; None without one."""
        if isinstance(self.value, dict):
            return self.value.get(str(key)) if isinstance(key, str) else None
        if isinstance(self.value, list) and isinstance(key, int):
            return self.value[key] if 0 <= key < len(self.value) else None
        return None


def error_at(place: Place, problem: str, hint: str = "") -> SqatError:
    """Make an error at a place."""
    return SqatError(problem, hint, str(place), code="invalid-recipe")


def resolve_scalar(text: str, place: Place) -> Scalar:
    """Read a plain scalar by the YAML 1.2 core schema; SqatError for one that is not finite."""
    if text in CONSTANTS:
        return CONSTANTS[text]
    if INTEGER.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if not FLOAT.fullmatch(text):
        return text
    number = math.nan if text[-1] in "nN" else float(text.replace(".inf", "inf").replace(".I", "I"))
    if not math.isfinite(number):
        raise error_at(place, f"got {text}, which is not a finite number")
    return number


def join_surrogates(text: str, place: Place) -> str:
    """Join surrogate pairs, which JSON writes for characters beyond U+FFFF; half a pair is an error."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise error_at(place, "holds half of a surrogate pair, which is no character") from None


def grow_(node: Node, child: Node) -> None:
    """Count the values of a child into its parent; SqatError above the limit, before the rest is read."""
    node.size += child.size
    if node.size > MAX_VALUES:
        raise error_at(node.place, f"holds more than {MAX_VALUES} values once its aliases are followed")


def mappings_of(node: Node, place: Place) -> list[Node]:
    """Return what ``<<`` merges: a mapping, or a list of mappings of which the first one counts."""
    found = node.value if isinstance(node.value, list) else [node]
    if not all(isinstance(each.value, dict) for each in found):
        raise error_at(place, "<< needs a mapping or a list of mappings", "write <<: *anchor")
    return found


class Composer:
    """Compose the events of one document into nodes; anchors are the only state."""

    def __init__(self, text: str, source: str, is_flag: bool, tags: bool) -> None:
        self.events: Iterator[yaml.Event] = iter(yaml.parse(text, Loader=yaml.SafeLoader))
        self.source, self.is_flag, self.tags = source, is_flag, tags
        self.anchors: dict[str, Node] = {}

    def place(self, event: yaml.Event) -> Place:
        mark = event.start_mark
        return Place(self.source, 0 if self.is_flag or mark is None else mark.line + 1)

    def node(self, event: yaml.Event, place: Place, depth: int = 0) -> Node:
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event)
        assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
        if event.tag and not self.tags:
            raise error_at(place, f"the tag {event.tag} is not allowed", "a recipe is plain YAML without tags")
        if depth > MAX_DEPTH:
            raise error_at(place, f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.ScalarEvent):
            node = self.scalar(event, place)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self.sequence(place, depth)
        else:
            node = self.mapping(place, depth)
        node.tag = event.tag or ""
        if event.anchor in self.anchors:
            first = f"first on {self.anchors[event.anchor].place}"
            raise error_at(place, f"the anchor &{event.anchor} is given twice", first)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def alias(self, event: yaml.AliasEvent) -> Node:
        if event.anchor not in self.anchors:
            problem = f"the alias *{event.anchor} has no anchor &{event.anchor} above it"
            raise error_at(self.place(event), problem, "quote the value if it is meant to start with *")
        return self.anchors[event.anchor]

    def scalar(self, event: yaml.ScalarEvent, place: Place) -> Node:
        value = join_surrogates(event.value, place)
        return Node(place, value if event.style else resolve_scalar(value, place))

    def sequence(self, place: Place, depth: int) -> Node:
        node = Node(place, items := [])
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.node(event, self.place(event), depth + 1))
            grow_(node, items[-1])
        return node

    def mapping(self, place: Place, depth: int) -> Node:
        items: dict[str, Node] = {}
        node = Node(place, items)
        merged: list[Node] | None = None
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            where = self.place(event)
            key, is_merge = self.key(event, where)
            value = self.node(next(self.events), where, depth + 1)
            if key in items or (is_merge and merged is not None):
                first = f"first on {items[key].place}" if key in items else "give << one list: << : [*a, *b]"
                raise error_at(where, f"the key {key!r} is given twice", first)
            if is_merge:
                merged = mappings_of(value, where)
                continue
            items[key] = Node(where, value.value, value.size, value.tag)
            grow_(node, items[key])
        inherited = (each.value.items() for each in merged or () if isinstance(each.value, dict))
        for name, child in chain.from_iterable(inherited):
            if name not in items:
                items[name] = child
                grow_(node, child)
        return node

    def key(self, event: yaml.Event, place: Place) -> tuple[str, bool]:
        """Return the text of a key, and whether it is the merge key ``<<``."""
        if not isinstance(event, yaml.ScalarEvent):
            raise error_at(place, "a key must be a plain text, not a list, mapping or alias")
        if not event.value:
            raise error_at(place, "a key is empty")
        return join_surrogates(event.value, place), event.value == "<<" and not event.style


def compose(text: str, source: str, *, is_flag: bool = False, tags: bool = False) -> Node:
    """Read one YAML document into a tree with places.

    Args:
        source: name of the file, or the flag whose value ``text`` is.
        is_flag: ``source`` is a flag, so there are no lines.
        tags: allow tags; they stay texts and construct nothing.

    Raises:
        SqatError: YAML or this reader forbids something, at its line.
    """
    try:
        return compose_document(Composer(text, source, is_flag, tags))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"the character U+{error.character:04X} is not allowed in YAML"
        raise error_at(Place(source, 0 if is_flag else line), problem) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 0 if is_flag or mark is None else mark.line + 1
        raise error_at(Place(source, line), *explain_syntax(error)) from None


def compose_document(composer: Composer) -> Node:
    """Compose the only document; an empty text is a node of None."""
    node: Node | None = None
    for event in composer.events:
        if isinstance(event, yaml.DocumentStartEvent) and node is not None:
            problem, hint = "a second document starts here", "a recipe is one document: remove the '---'"
            raise error_at(composer.place(event), problem, hint)
        if isinstance(event, yaml.NodeEvent):
            node = composer.node(event, composer.place(event))
    return node if node is not None else Node(Place(composer.source, 0 if composer.is_flag else 1), None)


# Part of PyYAML's message -> what it means, what to do; the first that occurs counts.
SYNTAX = (
    ("expected the node content, but found '<stream end>'", "a '[' or '{' is never closed", ""),
    ("'\\t'", "a tab where YAML wants spaces", "indent with spaces"),
    ("mapping values are not allowed", "a second ': ' on one line", "quote the value if it holds ': '"),
    ("cannot start any token", "a value cannot start with this character", "quote the value"),
    ("could not find expected ':'", "a line that is neither 'key: value' nor part of a value", "add the ':'"),
    ("while scanning a quoted scalar", "a quotation mark is never closed", "close it, or double it inside a text"),
    ("expected <block end>", "does not fit the indentation of the lines above", "align it with its neighbours"),
    ("',' or ']'", "a '[' is never closed, or a comma is missing in its list", ""),
    ("',' or '}'", "a '{' is never closed, or a comma is missing in its mapping", ""),
    ("unknown escape", "an unknown escape in a text in double quotes", "use single quotes for a literal backslash"),
)


def explain_syntax(error: yaml.MarkedYAMLError) -> tuple[str, str]:
    """Say what is wrong with the YAML, and what to do."""
    message = f"{error.context or ''} {error.problem or ''}".strip()
    for part, problem, hint in SYNTAX:
        if part in message:
            return f"not valid YAML: {problem}", hint
    return f"not valid YAML: {message}", ""
