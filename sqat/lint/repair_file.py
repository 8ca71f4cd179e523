"""`sqat inspect --target` of a file, and with `--fix` a repaired file beside it: all of it or nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from onnx import TensorProto

from sqat.checkpoint.outputs import check_output
from sqat.errors import GateError, SqatError
from sqat.lint.apply_rules import fix
from sqat.lint.compare import require_equal
from sqat.lint.findings import Change, Finding, plural
from sqat.lint.layer_report import LintReport, lint, refuse_kernels
from sqat.lint.rules.table import Target
from sqat.onnx_files.read import parse_onnx, read_onnx
from sqat.onnx_files.write import write_onnx

ROUNDED = "B12"  # its repair multiplies a factor into a scale, which may round once


@dataclass(frozen=True)
class RepairResult:
    """What `--fix` did.

    Attributes:
        changes: in order.
        path: the repaired file; None where there was nothing to repair and no place was named.
        problem: why no repair is kept; empty if nothing speaks against it.
    """

    changes: list[Change]
    path: Path | None
    problem: str = ""


def lint_file(path: Path, target: Target) -> LintReport:
    """Check a file by the rules of a target.

    Raises:
        SqatError: not a readable ONNX file with layers.
    """
    return lint(read_onnx(path), target, str(path))


def repair_file(path: Path, target: Target, output: Path | None = None) -> tuple[LintReport, RepairResult]:
    """Repair a file and check the result by the rules; it is kept if it computes what the file computes.

    Args:
        output: where to write it; default ``<name>.fixed.onnx`` beside the file.

    Raises:
        SqatError: not a readable ONNX file with layers, or nowhere to write.
    """
    place = output_path(path, output)
    original = read_onnx(path)
    refuse_kernels(original, str(path))
    try:
        model, changes = fix(original, target)
        report = lint(model, target, str(path))
        if not changes and output is None:
            return report, RepairResult([], None)
        is_exact = not any(change.rule == ROUNDED for change in changes)
        compare = partial(require_equal, path, model=original, is_exact=is_exact) if changes else None
        write_onnx(model, place, external=has_external_data(path), check=compare)
    except ValueError as error:
        return keep_findings(lint(original, target, str(path)), str(error))
    return report, RepairResult(changes, place)


def keep_findings(report: LintReport, problem: str) -> tuple[LintReport, RepairResult]:
    """The report of a file that is not repaired, with the reason."""
    findings = [replace(finding, fixable=False) for finding in report.findings if finding.rule != "fix"]
    reason = Finding("fix", "", problem, True, "a repair that keeps the numbers", "repair the file by hand")
    return replace(report, findings=[*findings, reason]), RepairResult([], None, problem)


def require(report: LintReport, path: Path, repaired: bool) -> None:
    """Fail if errors remain.

    Raises:
        GateError: how many, and how many of them `--fix` would repair.
    """
    if report.errors:
        rules, places = len({finding.rule for finding in report.errors}), len(report.errors)
        fixable = sum(finding.fixable for finding in report.errors)
        raise GateError(
            f"breaks {plural(rules, 'rule')} of target {report.target} in {plural(places, 'place')}",
            f"--fix repairs {fixable} of them" if fixable and not repaired else "",
            str(path),
            code="broken-rule",
        )


def output_path(path: Path, output: Path | None) -> Path:
    """``model.onnx`` -> ``model.fixed.onnx``, unless another place is named.

    Raises:
        SqatError: see `check_output`; or the place is in a folder that does not exist.
    """
    check_output(output, ".onnx", force=True)
    place = output if output is not None else path.with_name(f"{path.stem}.fixed.onnx")
    if place.is_dir():
        raise SqatError("is a folder", "name a file", str(place), code="unwritable-file")
    if not place.parent.is_dir():
        raise SqatError("the folder does not exist", place=str(place.parent), code="missing-file")
    return place


def has_external_data(path: Path) -> bool:
    """Whether a file stores some of its tensors outside."""
    return any(tensor.data_location == TensorProto.EXTERNAL for tensor in parse_onnx(path).graph.initializer)
