"""`sqat inspect --target` of a file, and with `--fix` a repaired file beside it: all of it or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from sqat.checkpoint.outputs import check_output
from sqat.errors import GateError, SqatError
from sqat.lint.apply_rules import fix
from sqat.lint.findings import Change, plural
from sqat.lint.layer_report import LintReport, lint
from sqat.lint.rules.table import Target
from sqat.onnx_files.read import read_onnx
from sqat.onnx_files.write import write_onnx


@dataclass(frozen=True)
class RepairResult:
    """What `--fix` did.

    Attributes:
        changes: in order.
        path: the repaired file; None where there was nothing to repair and no place was named.
    """

    changes: list[Change]
    path: Path | None


def lint_file(path: Path, target: Target) -> LintReport:
    """Check a file by the rules of a target.

    Raises:
        SqatError: not a readable ONNX file with layers.
    """
    return lint(read_onnx(path), target, str(path))


def repair_file(path: Path, target: Target, output: Path | None = None) -> tuple[LintReport, RepairResult]:
    """Repair a file and check the result by the rules.

    Args:
        output: where to write it; default ``<name>.fixed.onnx`` beside the file.

    Raises:
        SqatError: not a readable ONNX file with layers, or nowhere to write.
    """
    place = output_path(path, output)
    model, changes = fix(read_onnx(path), target)
    report = lint(model, target, str(path))
    if not changes and output is None:
        return report, RepairResult([], None)
    write_onnx(model, place, external=has_external_data(path))
    return report, RepairResult(changes, place)


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
    graph = onnx.load(path, load_external_data=False).graph
    return any(tensor.data_location == TensorProto.EXTERNAL for tensor in graph.initializer)
