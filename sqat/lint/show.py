"""What the linter says of a file, as lines of text and as plain values for JSON.

Lines name a problem of many nodes once, with the first nodes; the JSON holds all of them.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from sqat.lint.findings import Change, Finding, plural
from sqat.lint.layer_report import LintReport
from sqat.lint.repair_file import RepairResult
from sqat.lint.verdicts import GOALS

Entry = TypeVar("Entry", Finding, Change)
SHOWN_NODES = 3


@dataclass(frozen=True)
class Group(Generic[Entry]):
    """Findings or changes that differ in nodes, names and numbers only.

    Attributes:
        nodes: of all of them.
        same_text: whether their texts are equal, names and numbers included.
    """

    first: Entry
    nodes: list[str]
    same_text: bool


def group_findings(findings: Iterable[Finding]) -> list[Group[Finding]]:
    """Group findings in order, errors before warnings."""

    def key(entry: Finding) -> tuple[object, ...]:
        return entry.rule, entry.warning, entry.advice, entry.fixable, without_names(entry.problem)

    return sorted(make_groups(findings, key, lambda entry: entry.problem), key=lambda group: group.first.warning)


def group_changes(changes: Iterable[Change]) -> list[Group[Change]]:
    """Group changes in order."""
    return make_groups(changes, lambda entry: (entry.rule, without_names(entry.text)), lambda entry: entry.text)


def make_groups(
    entries: Iterable[Entry], key: Callable[[Entry], tuple[object, ...]], text: Callable[[Entry], str]
) -> list[Group[Entry]]:
    """Group entries by key, in order."""
    groups: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return [
        Group(some[0], [entry.node for entry in some], len({text(entry) for entry in some}) == 1)
        for some in groups.values()
    ]


def without_names(text: str) -> str:
    """A text without its names and numbers."""
    return re.sub(r"\S+", lambda word: "#" if re.search(r"[\d/:]", word[0]) else word[0], text)


def report_lines(report: LintReport, repair: RepairResult | None, width: int) -> Iterator[str]:
    """The report, no line wider than the console unless one name is.

    Args:
        repair: what `--fix` did before, if the user asked for it.
    """
    if repair is not None:
        yield from repair_lines(repair, width)
        yield ""
    yield summary(report)
    if GOALS[report.target].name.startswith("sparse") and report.running + report.doubtful:
        yield "where that is faster than dense, which the engine's builder finds out by timing"
    if report.reasons:
        yield ""
    for count, runs, reason in report.reasons:
        yield from hanging(f"{count:>6}  {runs:<13}", reason, width)
    for group in group_findings(report.findings):
        yield ""
        yield from text_and_nodes(finding_title(group), group.first.problem, group.nodes, group.same_text, width)
        yield from hanging("  asks", group.first.requirement, width, indent=8)
        yield from hanging("   fix", group.first.advice, width, indent=8)


def finding_title(group: Group[Finding]) -> str:
    """``B10 error, 18 nodes, --fix repairs it``."""
    first, count = group.first, len(group.nodes)
    words = [f"{first.rule} {'warning' if first.warning else 'error'}"]
    words += [plural(count, "node")] if any(group.nodes) else []
    words += [f"--fix repairs {'it' if count == 1 else 'them'}"] if first.fixable else []
    return ", ".join(words)


def repair_lines(repair: RepairResult, width: int) -> Iterator[str]:
    """What was repaired, and where the result is."""
    if repair.problem:
        yield from hanging("no file written:", repair.problem, width)
        return
    if repair.path is None:
        yield "nothing here that --fix can repair, no file written"
        return
    yield f"{repair.path}: {plural(len(repair.changes), 'change')} that keep the numbers"
    for group in group_changes(repair.changes):
        title = f"{group.first.rule}, {plural(len(group.nodes), 'node')}"
        yield from text_and_nodes(title, group.first.text, group.nodes, group.same_text, width)


def text_and_nodes(title: str, text: str, nodes: Sequence[str], same_text: bool, width: int) -> Iterator[str]:
    """A text about several nodes, with the first of them."""
    yield from hanging(
        f"{title}:", text + ("" if same_text else " (the first; figures and names differ)"), width, indent=8
    )
    names = [node for node in nodes if node]
    for index, node in enumerate(names[:SHOWN_NODES]):
        yield from hanging("" if index else "    at", node, width, indent=8)
    if len(names) > SHOWN_NODES:
        yield f"        and {len(names) - SHOWN_NODES} more (all with --json)"


def hanging(head: str, text: str, width: int, indent: int = 0) -> list[str]:
    """A text behind a head, wrapped; further lines start where it starts, or at ``indent``."""
    first = head.ljust(max(len(head) + 1, indent))
    rest = " " * (indent or len(first))
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def summary(report: LintReport) -> str:
    """``34 of 38 layers will run sparse int8 on tensorrt, 2 more may``."""
    more = f", {report.doubtful} more may" if report.doubtful else ""
    layers, goal = plural(len(report.layers), "layer"), GOALS[report.target].name
    return f"{report.running} of {layers} will run {goal} on {report.target}{more}"


def report_values(report: LintReport, path: Path, repair: RepairResult | None) -> dict[str, object]:
    """The whole report, for JSON."""
    return {
        "path": str(path),
        "target": report.target,
        "summary": {
            "text": summary(report),
            "layers": len(report.layers),
            "running": report.running,
            "doubtful": report.doubtful,
            "errors": len(report.errors),
            "warnings": len(report.findings) - len(report.errors),
        },
        "layers": [vars(layer) for layer in report.layers],
        "findings": [vars(finding) for finding in report.findings],
        "changes": [vars(change) for change in repair.changes] if repair is not None else [],
        "not_written_because": repair.problem if repair is not None else "",
        "written": str(repair.path) if repair is not None and repair.path is not None else None,
    }
