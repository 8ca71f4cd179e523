"""`sqat inspect`: the layers of a checkpoint or an ONNX file, and what the linter finds in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sqat.cli.options import Json, Verbose, check_artifact, check_checkpoint
from sqat.errors import SqatError


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="checkpoint folder or .onnx file")],
    target: Annotated[
        str | None, typer.Option("--target", metavar="NAME", help="lint an .onnx file by the rules of this target")
    ] = None,
    fix: Annotated[bool, typer.Option("--fix", help="repair what can be repaired and write a new file")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="file that --fix writes; default: NAME.fixed.onnx"),
    ] = None,
    json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Show each layer, and what keeps it from running sparse."""
    check_artifact(path)
    if output is not None and not fix:
        raise SqatError("needs --fix", "add --fix, or leave out --output", "--output", code="usage")
    if fix or target is not None:
        lint(target or "tensorrt", path, fix, output, json)
        return
    from sqat.cli.tables.layers import print_layers

    if path.is_dir():
        check_checkpoint(path)
        from sqat.evaluation.inspection import inspect_checkpoint

        layers = inspect_checkpoint(path)
    else:
        from sqat.lint.layer_report import inspect_onnx

        layers = inspect_onnx(path)
    print_layers(layers, path, as_json=json)


def lint(target: str, path: Path, fix: bool, output: Path | None, json: bool) -> None:
    """Lint an ONNX file for a target, after its repair if ``fix``; errors that remain end the command."""
    if path.is_dir():
        hint = "name the .onnx file of an export"
        raise SqatError("a checkpoint folder has no graph to lint or fix", hint, str(path), code="usage")
    from sqat.cli.tables.layers import print_findings
    from sqat.lint.apply_rules import parse_target
    from sqat.lint.repair_file import lint_file, repair_file, require

    rules = parse_target(target)
    findings, repair = repair_file(path, rules, output) if fix else (lint_file(path, rules), None)
    print_findings(findings, path, repair=repair, as_json=json)
    require(findings, path, fix)
