"""What the linter says: a problem at a node, the finding it becomes under a rule, and a change that `fix` made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Problem(NamedTuple):
    """What a rule has to say about one node; a warning costs speed, not correctness.

    Attributes:
        node: its label, empty for the whole model.
        text: what is wrong, one line.
        warning: whether it only costs speed, whatever the rule's severity for the target.
        fix: what to do about it; empty where the rule's own advice holds.
    """

    node: str
    text: str
    warning: bool = False
    fix: str = ""


@dataclass(frozen=True)
class Finding:
    """One broken rule.

    Attributes:
        rule: ``B1`` .. ``T20``, ``checker``, ``shapes``, ``operator``, ``subgraph``, ``float``,
            ``layers`` or ``fix``.
        node: name of the node (of its output, where it has none), empty for the whole model.
        problem: what is wrong, one line.
        warning: costs speed, not correctness.
        asks: what the rule asks for, in a few words.
        fix: what to do about it, one line.
        fixable: whether `sqat.lint.fixes.fix` repairs it without changing the numbers.
    """

    rule: str
    node: str
    problem: str
    warning: bool = False
    asks: str = ""
    fix: str = ""
    fixable: bool = False

    def __str__(self) -> str:
        return f"{self.rule} {self.node}: {self.problem}" if self.node else f"{self.rule}: {self.problem}"


@dataclass(frozen=True)
class Change:
    """One repair.

    Attributes:
        rule: the rule it serves.
        node: name of the node or initializer that was changed.
        text: what was done, one line.
    """

    rule: str
    node: str
    text: str


def plural(count: int, noun: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
