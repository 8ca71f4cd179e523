"""What of a family's record was not to be expected: faults, late refusals, new refusals, refusals that are gone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scripts.families.expected import Refusal, expected_refusal

Entry = Mapping[str, Any]


def failures(entry: Entry) -> list[str]:
    """Return a line for each outcome of a record that is not expected; equal ones of a placement stand together."""
    lines = [f"died: {entry['died']}"] if "died" in entry else []
    told: dict[tuple[str, str], list[str]] = {}
    for placement, part, outcome in outcomes(entry):
        if line := unexpected(outcome, expected_refusal(entry["name"], placement, part)):
            told.setdefault((placement, line), []).append(part)
    return [*lines, *(f"{placement} -> {', '.join(parts)}: {line}" for (placement, line), parts in told.items())]


def outcomes(entry: Entry) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """Yield every outcome of a record with its placement and target; default distillation counts as a target.

    A family that no placement calibrates has not tried it.
    """
    if any("float" in result for result in entry.get("placements", {}).values()):
        yield "qat", "distillation", entry["distillation"]
    for placement, result in entry.get("placements", {}).items():
        for target, outcome in result["targets"].items():
            yield placement, target, outcome


def unexpected(outcome: Mapping[str, str], refusal: Refusal | None) -> str:
    """Return what is not expected of an outcome; empty where all is."""
    if outcome["end"] == "works":
        return f"works, but a refusal is expected: {refusal.reason}" if refusal else ""
    if outcome["end"] == "refused" and refusal and outcome["code"] == refusal.code:
        return ""
    return line_of(outcome)


def line_of(outcome: Mapping[str, str]) -> str:
    """Return an outcome in one line."""
    where = f" at {outcome['where']}" if "where" in outcome else ""
    stage = f" in {outcome['stage']}" if "stage" in outcome else ""
    message = outcome.get("message", "").removeprefix(f"rehearsal of stage {outcome.get('stage')}: ")
    return f"{outcome['end']}{stage}: {outcome['code']}: {message}{where}"


def count_failures(entries: Sequence[Entry]) -> int:
    """Count the families with a failure."""
    return sum(bool(failures(entry)) for entry in entries)
