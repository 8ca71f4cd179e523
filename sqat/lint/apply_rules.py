"""Check a graph by the rules of a target, and repair what can be repaired without changing its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from onnx import ModelProto

from sqat.errors import GateError, SqatError
from sqat.lint.findings import Change, Finding
from sqat.lint.graph_editor import GraphEditor
from sqat.lint.graph_view import GraphView
from sqat.lint.rules.table import RULES, TARGETS, Target
from sqat.lint.rules.weights import check_almost_sparse, check_claimed_patterns
from sqat.onnx_files.checks import check_file, structure_error, typing_error

REPAIRABLE = frozenset(rule.id for rule in RULES if rule.repair is not None)


def parse_target(name: str) -> Target:
    """A target of the linter by name.

    Raises:
        SqatError: no such target.
    """
    target = next((target for target in TARGETS if target == name), None)
    if target is None:
        allowed = f"allowed: {', '.join(TARGETS)}"
        raise SqatError(f"no target {name!r} to lint for", allowed, "--target", code="unknown-name")
    return target


def verify(
    model: ModelProto, pruned: Mapping[str, str] | None = None, target: str = "onnx-int8", path: Path | None = None
) -> list[Finding]:
    """Fail on a model that breaks a rule of a target.

    Args:
        pruned: layer -> pattern (``2:4``) that its weight must have; None where nobody claims one.
        path: the written model, which ONNX's checker reads too.

    Returns:
        Warnings, which only cost speed.

    Raises:
        GateError: naming the first broken rule and its node.
        SqatError: no such target.
    """
    findings = [checker_finding(fault) for fault in check_file(path)] if path is not None else []
    findings += apply_rules(GraphView(model), pruned, parse_target(target))
    errors = [finding for finding in findings if not finding.warning]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise GateError(f"the exported graph breaks rule {errors[0]}{more}", errors[0].advice, code="broken-rule")
    return findings


def list_findings(
    model: ModelProto, pruned: Mapping[str, str] | None = None, target: str = "onnx-int8"
) -> list[Finding]:
    """List all findings about a model, the ONNX checker's first; arguments as for `verify`.

    It runs `fix` to say which of them that repairs.
    """
    rules = parse_target(target)
    findings = apply_rules(GraphView(model), pruned, rules)
    is_invalid = any(finding.rule == "checker" for finding in findings)
    if is_invalid or not any(finding.rule in REPAIRABLE for finding in findings):
        return findings
    try:
        repaired, _ = fix(model, rules)
    except ValueError as error:
        return [*findings, Finding("fix", "", str(error), True, "a graph that can be repaired", "please report it")]
    remaining = {(finding.rule, finding.node) for finding in apply_rules(GraphView(repaired), pruned, rules)}
    return [
        replace(entry, fixable=entry.rule in REPAIRABLE and (entry.rule, entry.node) not in remaining)
        for entry in findings
    ]


def apply_rules(view: GraphView, pruned: Mapping[str, str] | None, target: Target) -> list[Finding]:
    """List all findings about a graph; rules read no graph that ONNX's checker refuses."""
    if fault := structure_error(view.model):
        return [checker_finding(fault)]
    findings = []
    if fault := typing_error(view.model):
        advice = "export again: types or shapes contradict each other"
        findings.append(Finding("shapes", "", fault, requirement="types and shapes that agree", advice=advice))
    for rule in RULES:
        if pruned is not None and rule.check is check_almost_sparse:
            findings += [rule.finding(problem, "E") for problem in check_claimed_patterns(view, pruned)]
        else:
            findings += rule.findings(view, target)
    return findings


def checker_finding(fault: str) -> Finding:
    """A fault from ONNX's checker, as a finding."""
    advice = "export again: no engine can read this file"
    return Finding("checker", "", fault, requirement="valid ONNX", advice=advice)


def fix(model: ModelProto, target: Target) -> tuple[ModelProto, list[Change]]:
    """Repair what can be repaired without changing what a graph computes.

    A repair puts the same products of the same integers and scales in another place.

    Args:
        model: any graph with its external data loaded; it is not changed.
        target: only its rules are repaired.

    Returns:
        The repaired graph and the changes, in order; the model itself if ONNX's checker refuses it.

    Raises:
        ValueError: a repair made a graph that the checker refuses, a fault of the repair.
    """
    if structure_error(model):
        return model, []
    editor = GraphEditor(model)
    repairs = [rule.repair for rule in RULES if rule.repair is not None and rule.severity(target) != "-"]
    for repair in sorted(repairs, key=lambda repair: repair.order):
        repair.function(editor)
        editor.commit()
    if fault := structure_error(editor.model) or (not typing_error(model) and typing_error(editor.model)):
        raise ValueError(f"the repaired graph is not valid: {fault}")
    return editor.model, editor.changes
