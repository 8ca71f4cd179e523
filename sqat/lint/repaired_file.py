"""`sqat inspect --target` of a file, and with `--fix` a repaired one beside it: all of it or nothing.

A graph that came with external data is written with external data again. Everything goes into a new neighbouring
folder first and is moved from there, data before the graph that needs it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import ModelProto, TensorProto

from sqat.errors import GateError, SqatError
from sqat.export.onnx_files import data_path, read_onnx, write_onnx
from sqat.lint.findings import Change, plural
from sqat.lint.fixes import fix
from sqat.lint.inspection import Lint, lint
from sqat.lint.rules import Target


@dataclass(frozen=True)
class Repair:
    """What `--fix` did.

    Attributes:
        changes: in order.
        written: the repaired file; None where there was nothing to repair and no place was named.
    """

    changes: list[Change]
    written: Path | None


def lint_file(path: Path, target: Target) -> Lint:
    """Hold a file against the rules of a target.

    Raises:
        SqatError: not a readable ONNX file with layers.
    """
    return lint(read_onnx(path), target, str(path))


def repair_file(path: Path, target: Target, output: Path | None = None) -> tuple[Lint, Repair]:
    """Repair a file and hold the result against the rules.

    Args:
        output: where to write it, the file itself if that is named; default ``<name>.fixed.onnx`` beside it.

    Raises:
        SqatError: not a readable ONNX file with layers, or nowhere to write.
    """
    place = fixed_path(path, output)
    model, changes = fix(read_onnx(path), target)
    found = lint(model, target, str(path))
    if not changes and output is None:
        return found, Repair([], None)
    write_repaired(model, place, external=has_external_data(path))
    return found, Repair(changes, place)


def require(found: Lint, path: Path, repaired: bool) -> None:
    """Fail if errors remain.

    Raises:
        GateError: how many, and how many of them `--fix` would repair.
    """
    if found.errors:
        rules, places = len({finding.rule for finding in found.errors}), len(found.errors)
        fixable = sum(finding.fixable for finding in found.errors)
        raise GateError(
            f"breaks {plural(rules, 'rule')} of target {found.target} in {plural(places, 'place')}",
            f"--fix repairs {fixable} of them" if fixable and not repaired else "",
            str(path),
        )


def fixed_path(path: Path, output: Path | None) -> Path:
    """``model.onnx`` -> ``model.fixed.onnx``, unless another place is named.

    Raises:
        SqatError: the place named is a folder, or in one that does not exist.
    """
    found = output if output is not None else path.with_name(f"{path.stem}.fixed.onnx")
    if found.is_dir():
        raise SqatError("is a folder", "name a file", str(found))
    if not found.parent.is_dir():
        raise SqatError("the folder does not exist", place=str(found.parent))
    return found


def has_external_data(path: Path) -> bool:
    """Whether a file keeps some of its tensors elsewhere."""
    graph = onnx.load(path, load_external_data=False).graph
    return any(tensor.data_location == TensorProto.EXTERNAL for tensor in graph.initializer)


def write_repaired(model: ModelProto, path: Path, *, external: bool) -> None:
    """Write a model, with its tensors in ``<name>.data`` where asked for or where one file cannot hold them."""
    if not external:
        write_onnx(model, path)
        return
    data = data_path(path)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        ir.save(ir.from_proto(model), Path(folder) / path.name, external_data=data.name)
        (Path(folder) / data.name).replace(data)
        (Path(folder) / path.name).replace(path)
