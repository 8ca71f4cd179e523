"""What a kind of fault did: how often, how the runs ended, and every violation in words."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from scripts.faults.project import Ended, Project

BEFORE = "finished before"  # the run was over when the fault came
INTERRUPTED = 130
SAVED = "stopped and saved at step"


@dataclass
class Tally:
    """Counts of one kind of fault; ``done`` are those that came while a run was under way."""

    kind: str
    how: str
    done: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    stages: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    skipped: str = ""

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "how": self.how, "done": self.done, "ends": dict(self.ends),
                "stages": dict(self.stages), "violations": self.violations, "skipped": self.skipped}  # fmt: skip

    def note(self, ended: Ended, stage: str, allowed: dict[int, str]) -> None:
        """Count one fault at a stage, unless it came too late.

        An end that is not allowed, or not told in one line, is a violation.
        """
        end = allowed.get(ended.code, f"exit code {ended.code}")
        if ended.code == INTERRUPTED and SAVED not in ended.error:
            end = "interrupted where nothing trains"
        self.ends[end] += 1
        if end == BEFORE:
            return
        self.done += 1
        self.stages[stage] += 1
        if ended.code not in allowed:
            self.violations.append(f"{stage}: exit code {ended.code}: {ended.error[-300:]}")
        elif ended.code > 0 and not ended.is_clear:
            self.violations.append(f"{stage}: not one clear line: {ended.error[-300:]}")

    def check_folder(self, project: Project) -> None:
        """Nothing half-written stands under a final name."""
        self.violations += project.unsound()

    def check_result(self, project: Project, ended: Ended, expected: str) -> None:
        """The run that was not disturbed ended well, with the same bits and nothing left over."""
        if ended.code:
            self.violations.append(f"resuming: exit code {ended.code}: {ended.error[-300:]}")
            return
        if project.result() != expected:
            self.violations.append("the result differs from that of the undisturbed run")
        if found := project.left_over():
            self.violations.append(f"left over: {', '.join(found)}")
