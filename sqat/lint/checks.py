"""The gate an exported file must pass: ONNX's own checks, the graph rules, and N:M on the stored values.

What: `find` collects findings, each naming its rule and node; `verify` fails on those that make the file wrong
for a target and hands back those that only cost speed. Left out: parity with the torch model, which the export stage
measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from onnx import ModelProto

from sqat.errors import GateError, SqatError
from sqat.export.onnx_files import check_file
from sqat.lint.findings import Finding
from sqat.lint.fixes import REPAIRED, fix
from sqat.lint.inference import structure_error, typing_error
from sqat.lint.layer_rules import near_patterns, told_patterns
from sqat.lint.rules import RULES, TARGETS, Target
from sqat.lint.wiring import Wiring


def known_target(name: str) -> Target:
    """A target of the linter by name.

    Raises:
        SqatError: no such target.
    """
    found = next((target for target in TARGETS if target == name), None)
    if found is None:
        raise SqatError(f"no target {name!r} to lint for", f"allowed: {', '.join(TARGETS)}", "--target")
    return found


def verify(
    model: ModelProto, pruned: Mapping[str, str] | None = None, target: str = "onnx-int8", path: Path | None = None
) -> list[Finding]:
    """Fail on a model that breaks a rule of a target.

    Args:
        pruned: layer -> pattern (``2:4``) that its weight must have; None if nobody said.
        path: the model as it was written, which ONNX's checker shall read too.

    Returns:
        What only costs speed.

    Raises:
        GateError: naming the first broken rule and its node.
        SqatError: no such target.
    """
    found = [invalid(fault) for fault in check_file(path)] if path is not None else []
    found += find_in(Wiring(model), pruned, known_target(target))
    broken = [finding for finding in found if not finding.warning]
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise GateError(f"the exported graph breaks rule {broken[0]}{more}")
    return found


def find(model: ModelProto, pruned: Mapping[str, str] | None = None, target: str = "onnx-int8") -> list[Finding]:
    """All findings about a model, the ONNX checker's first; arguments as for `verify`.

    Each says whether `fix` repairs it, which is found out by doing it.
    """
    rules = known_target(target)
    found = find_in(Wiring(model), pruned, rules)
    if not any(finding.rule in REPAIRED for finding in found) or is_broken(found):
        return found
    try:
        fixed, _ = fix(model, rules)
    except ValueError as error:
        return [*found, Finding("fix", "", str(error), True, "a graph that can be repaired", "please report it")]
    left = {(finding.rule, finding.node) for finding in find_in(Wiring(fixed), pruned, rules)}
    return [replace(entry, fixable=entry.rule in REPAIRED and (entry.rule, entry.node) not in left) for entry in found]


def find_in(wiring: Wiring, pruned: Mapping[str, str] | None, target: Target) -> list[Finding]:
    """All findings; a graph that is not built as ONNX asks is not looked into any further."""
    fault = structure_error(wiring.model)
    if fault:
        return [invalid(fault)]
    found = []
    if fault := typing_error(wiring.model):
        advice = "export again: types or shapes contradict each other"
        found.append(Finding("shapes", "", fault, asks="types and shapes that agree", fix=advice))
    for rule in RULES:
        if pruned is not None and rule.check is near_patterns:
            found += [Finding("B6", *problem[:3], rule.title, rule.fix) for problem in told_patterns(wiring, pruned)]
        else:
            found += rule.findings(wiring, target)
    return found


def invalid(fault: str) -> Finding:
    """What the ONNX checker has to say."""
    return Finding("checker", "", fault, asks="valid ONNX", fix="export again: no engine can read this file")


def is_broken(findings: list[Finding]) -> bool:
    """Whether the graph could not be looked into."""
    return any(finding.rule == "checker" for finding in findings)
