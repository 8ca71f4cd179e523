"""What the linter says of a file, as lines of text and as plain values for JSON.

What is said of many nodes in the same words is said once, with the first nodes; all of them stand in the JSON.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from sqat.lint.findings import Change, Finding, plural
from sqat.lint.inspection import Lint
from sqat.lint.repaired_file import Repair

SHOWN_NODES = 3
WANTED = {
    "onnx-int8": "in int8",
    "tensorrt": "sparse int8",
    "tensorrt-8": "sparse int8",
    "onnx-fp16": "sparse float16",
    "onnx-fp32": "in float32",
}


def lint_lines(lint: Lint, repair: Repair | None, width: int) -> Iterator[str]:
    """The report, no line wider than the console unless one name is.

    Args:
        repair: what was repaired before, if that was asked for.
    """
    if repair is not None:
        yield from repair_lines(repair, width)
        yield ""
    yield summary(lint)
    if WANTED[lint.target].startswith("sparse") and lint.running + lint.doubtful:
        yield "where that is faster than dense, which the engine's builder finds out by timing"
    if lint.reasons:
        yield ""
    for count, runs, why in lint.reasons:
        yield from hanging(f"{count:>6}  {runs:<13}", why, width)
    for group in grouped(lint.findings):
        yield ""
        yield from group_lines(group, finding_title(group), width)


def finding_title(group: Group) -> str:
    """``B10 error, 18 nodes, --fix repairs it``."""
    first = group.first
    assert isinstance(first, Finding)
    words = [f"{first.rule} {'warning' if first.warning else 'error'}"]
    words += [plural(len(group.nodes), "node")] if any(group.nodes) else []
    words += [f"--fix repairs {'it' if len(group.nodes) == 1 else 'them'}"] if first.fixable else []
    return ", ".join(words)


def repair_lines(repair: Repair, width: int) -> Iterator[str]:
    """What was repaired, and where the result is."""
    if repair.written is None:
        yield "nothing here that --fix can repair, no file written"
        return
    yield f"{repair.written}: {plural(len(repair.changes), 'change')} that keep the numbers"
    for group in grouped(repair.changes):
        yield from group_lines(group, f"{group.first.rule}, {plural(len(group.nodes), 'node')}", width)


def group_lines(group: Group, title: str, width: int) -> Iterator[str]:
    """What is said of several nodes: once, with the first of them and what to do about it."""
    differing = "" if group.alike else " (the first; figures and names differ)"
    yield from hanging(f"{title}:", said(group.first) + differing, width, indent=8)
    nodes = [node for node in group.nodes if node]
    for index, node in enumerate(nodes[:SHOWN_NODES]):
        yield from hanging("" if index else "    at", node, width, indent=8)
    if len(nodes) > SHOWN_NODES:
        yield f"        and {len(nodes) - SHOWN_NODES} more (all with --json)"
    if isinstance(group.first, Finding):
        yield from hanging("  asks", group.first.asks, width, indent=8)
        yield from hanging("   fix", group.first.fix, width, indent=8)


def hanging(head: str, text: str, width: int, indent: int = 0) -> list[str]:
    """A text behind a head, wrapped, its further lines indented to where it began (or by ``indent``)."""
    first = head.ljust(max(len(head) + 1, indent))
    rest = " " * (indent or len(first))
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def summary(lint: Lint) -> str:
    """``34 of 38 layers will run sparse int8 on tensorrt, 2 more may``."""
    more = f", {lint.doubtful} more may" if lint.doubtful else ""
    return (
        f"{lint.running} of {plural(len(lint.layers), 'layer')} will run {WANTED[lint.target]} on {lint.target}{more}"
    )


def lint_values(lint: Lint, path: Path, repair: Repair | None) -> dict[str, object]:
    """All that the linter knows, for JSON."""
    return {
        "path": str(path),
        "target": lint.target,
        "summary": {
            "text": summary(lint),
            "layers": len(lint.layers),
            "running": lint.running,
            "doubtful": lint.doubtful,
            "errors": len(lint.errors),
            "warnings": len(lint.findings) - len(lint.errors),
        },
        "layers": [vars(layer) for layer in lint.layers],
        "findings": [vars(finding) for finding in lint.findings],
        "changes": [vars(change) for change in repair.changes] if repair is not None else [],
        "written": str(repair.written) if repair is not None and repair.written is not None else None,
    }


class Group(NamedTuple):
    """Findings or changes that say the same of several nodes.

    Attributes:
        first: the first of them.
        nodes: all their nodes.
        alike: whether they say it in the same words, numbers and names included.
    """

    first: Finding | Change
    nodes: list[str]
    alike: bool


def grouped(entries: Iterable[Finding | Change]) -> list[Group]:
    """Put together what differs in nodes, names and numbers only, in order; errors before warnings."""
    groups: dict[tuple[object, ...], list[Finding | Change]] = {}
    for entry in entries:
        if isinstance(entry, Finding):
            key: tuple[object, ...] = (entry.rule, entry.warning, entry.fix, entry.fixable, gist(entry.problem))
        else:
            key = (entry.rule, gist(entry.text))
        groups.setdefault(key, []).append(entry)
    found = [Group(some[0], [entry.node for entry in some], len({said(entry) for entry in some}) == 1)
             for some in groups.values()]  # fmt: skip
    return sorted(found, key=lambda group: isinstance(group.first, Finding) and group.first.warning)


def said(entry: Finding | Change) -> str:
    """What an entry says."""
    return entry.problem if isinstance(entry, Finding) else entry.text


def gist(text: str) -> str:
    """A text without its names and numbers."""
    return re.sub(r"\S*[\d/:]\S*", "#", text)
