"""What the linter says: a problem at a node, the finding under a rule, and a change that a repair made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Problem(NamedTuple):
    """What a check finds at one node.

    Attributes:
        node: its label, empty for the whole model.
        text: what is wrong, one line.
        warning: whether it only costs speed, whatever the rule's severity for the target.
        advice: what to do about it; empty where the rule's own advice holds.
    """

    node: str
    text: str
    warning: bool = False
    advice: str = ""


@dataclass(frozen=True)
class Finding:
    """One broken rule at one node.

    Attributes:
        rule: ``B1`` .. ``T20``, ``checker``, ``shapes``, ``operator``, ``subgraph``, ``float``, ``layers`` or ``fix``.
        node: name of the node, or of its output where it has none; empty for the whole model.
        problem: what is wrong, one line.
        warning: costs speed, not correctness.
        requirement: what the rule requires, in a few words.
        advice: what to do about it, one line.
        fixable: whether `sqat.lint.apply_rules.fix` repairs it without changing the numbers.
    """

    rule: str
    node: str
    problem: str
    warning: bool = False
    requirement: str = ""
    advice: str = ""
    fixable: bool = False

    def __str__(self) -> str:
        return f"{self.rule} {self.node}: {self.problem}" if self.node else f"{self.rule}: {self.problem}"


@dataclass(frozen=True)
class Change:
    """One repair.

    Attributes:
        rule: the rule that it serves.
        node: name of the node or initializer that changed.
        text: what changed, one line.
    """

    rule: str
    node: str
    text: str


def plural(count: int, noun: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
