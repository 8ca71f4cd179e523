"""The build recipe that goes beside an exported ONNX file: a trtexec line and a Python script.

What: `build_files` writes both for the shapes an engine has to serve. Why files and not an engine: TensorRT times
its kernels on the GPU that will serve, which seldom is the machine that exports. Left out: more than one
optimization profile.

Flags, read in trtexec's own sources from 8.2 to 11.1: ``--stronglyTyped`` is there from 9.0 on (from 11.0 on every
network is, and the flag does nothing), ``--int8`` and ``--fp16`` went with 11.0, ``--buildOnly`` (to 9.3) became
``--skipInference`` (from 8.6 on); the others hold for all of them.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from sqat.errors import SqatError

Range = tuple[int, int, int]
Shapes = dict[str, list[list[int]]]
SCRIPT, BUILDER = "build_engine.sh", "build_engine.py"
SETTINGS = re.compile(r"^# Settings, as `sqat export` writes them\.\n(.*?)^# End of the settings\.$", re.M | re.S)


def build_files(
    onnx_name: str,
    *,
    inputs: Mapping[str, Sequence[int | str]],
    batch: Range,
    sequence: Range,
    precision: Literal["fp32", "fp16"] = "fp32",
    layers: Literal["matmul", "conv1x1"] = "matmul",
    weights: Literal["dq", "qdq"] = "dq",
) -> dict[str, bytes]:
    """The files that build an engine from ``onnx_name``, to be laid beside it.

    Args:
        inputs: shape of each input, free sizes by name.
        batch: smallest, usual and largest batch.
        sequence: the same of the tokens.
        precision: type of what is not int8.
        layers: ``conv1x1`` with ``weights="qdq"`` is the form for TensorRT 8.x, whose networks are weakly typed.

    Raises:
        SqatError: a range is not ascending, or another size than batch and sequence is free.
    """
    shapes = profile_shapes(inputs, batch, sequence)
    precisions = ["INT8", "FP16"] if precision == "fp16" else ["INT8"]
    version_8 = layers == "conv1x1" and weights == "qdq"
    return {
        SCRIPT: shell_script(onnx_name, shapes, precisions if version_8 else []).encode(),
        BUILDER: python_script(onnx_name, shapes, precisions).encode(),
    }


def profile_shapes(inputs: Mapping[str, Sequence[int | str]], batch: Range, sequence: Range) -> Shapes:
    """Smallest, usual and largest shape of each input that has free sizes; arguments as for `build_files`."""
    check_range("batch", batch)
    check_range("sequence", sequence)
    shapes: Shapes = {}
    for name, sizes in inputs.items():
        free = [axis for axis, size in enumerate(sizes) if isinstance(size, str)]
        ranges = {0: batch} if len(sizes) > 3 else {0: batch, 1: sequence}
        if other := set(free) - set(ranges):
            raise SqatError(
                f"input {name} has a free size {sizes[min(other)]!r}; only batch and sequence may be free",
                "export it with that size fixed",
            )
        if free:
            shapes[name] = [[ranges[axis][end] if axis in free else int(sizes[axis]) for axis in range(len(sizes))]
                            for end in range(3)]  # fmt: skip
    return shapes


def check_range(name: str, sizes: Range) -> None:
    """Refuse a range that is not smallest <= usual <= largest."""
    if not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
        text = ",".join(str(size) for size in sizes)
        raise SqatError(f"needs three sizes from 1 on, none smaller than the one before it, got {text}", place=name)


def parse_range(text: str, option: str) -> Range:
    """``1,8,32`` as the smallest, usual and largest size."""
    try:
        smallest, usual, largest = (int(part) for part in text.split(","))
    except ValueError:
        raise SqatError(f"needs smallest,usual,largest such as 1,8,32, got {text!r}", place=option) from None
    check_range(option, (smallest, usual, largest))
    return smallest, usual, largest


def written_ranges(model: Path) -> dict[str, Range]:
    """``batch`` and ``sequence`` as in the ``build_engine.py`` beside a model; empty where there is none to read."""
    try:
        ends = next(iter(written_settings(model).get("SHAPES", {}).values()))
        ranges = [(int(low), int(usual), int(high)) for low, usual, high in zip(*ends, strict=True)]
    except (ValueError, TypeError, AttributeError, StopIteration):
        return {}
    return dict(zip(("batch", "sequence"), ranges, strict=False))


def written_half(model: Path) -> bool | None:
    """Whether the ``build_engine.py`` made for a model asks for float16; None where there is none to read."""
    settings = written_settings(model)
    precisions = settings.get("PRECISIONS")
    return "FP16" in precisions if settings.get("MODEL") == model.name and isinstance(precisions, list) else None


def written_settings(model: Path) -> dict[str, Any]:
    """The settings in the ``build_engine.py`` beside a model; empty where they are no literals any more."""
    path = model.with_name(BUILDER)
    found = SETTINGS.search(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    try:
        lines = ast.parse(found[1] if found else "").body
        return {ast.unparse(line.target): ast.literal_eval(line.value)
                for line in lines if isinstance(line, ast.AnnAssign) and line.value is not None}  # fmt: skip
    except (SyntaxError, ValueError):
        return {}


def shell_script(onnx_name: str, shapes: Shapes, precisions: Sequence[str]) -> str:
    """A bash script around trtexec; ``precisions`` are of a weakly typed network, none for a strongly typed one."""
    stem = onnx_name.removesuffix(".onnx")
    types = [f"--{name.lower()}" for name in precisions] or ["--stronglyTyped"]
    options = [
        f"--onnx={onnx_name}",
        f"--saveEngine={stem}.engine",
        "--sparsity=enable",
        *types,
        *(f"--{name}Shapes={shape_list(shapes, end)}" for end, name in enumerate(("min", "opt", "max")) if shapes),
        "--profilingVerbosity=detailed",
        f"--exportLayerInfo={stem}.layers.json",
        "--verbose",
        "--buildOnly" if precisions else "--skipInference",
    ]
    lines = " \\\n  ".join(['"${TRTEXEC:-trtexec}"', *(shlex.quote(option) for option in options)])
    return SHELL.format(
        name=onnx_name,
        versions=WEAK if precisions else STRONG,
        command=f"{lines} \\\n  2>&1 | tee {shlex.quote(f'{stem}.build.log')}",
        report=shlex.join(
            ["sqat", "engine", onnx_name, "--log", f"{stem}.build.log", "--layers", f"{stem}.layers.json"]
        ),
    )


def shape_list(shapes: Shapes, end: int) -> str:
    """``input_ids:1x16,attention_mask:1x16``."""
    return ",".join(f"{name}:{'x'.join(str(size) for size in ends[end])}" for name, ends in shapes.items())


def python_script(onnx_name: str, shapes: Shapes, precisions: Sequence[str]) -> str:
    """`sqat.export.builder` with its settings replaced."""
    settings = SETTINGS_TEXT.format(
        model=json.dumps(onnx_name),
        shapes="".join(f"    {json.dumps(name)}: {ends},\n" for name, ends in shapes.items()),
        precisions=json.dumps(precisions),
    )
    source = resources.files("sqat.export").joinpath("builder.py").read_text(encoding="utf-8")
    text, replaced = SETTINGS.subn(lambda _: settings, source)
    assert replaced == 1
    return text


SETTINGS_TEXT = """# Settings, as `sqat export` writes them.
MODEL: str = {model}
SHAPES: dict[str, list[list[int]]] = {{  # of each input with free sizes: smallest, usual, largest
{shapes}}}
PRECISIONS: list[str] = {precisions}  # for TensorRT 8, whose networks do not carry their types
# End of the settings."""
SHELL = """#!/usr/bin/env bash
# Builds an engine with sparse kernels from {name}. Run it on the GPU that is to serve the engine.
# {versions}
set -euo pipefail
cd "$(dirname "$0")"

{command}

# Which layers run sparse, and why the others do not:
#   {report}
"""
STRONG = "For trtexec 9.0 to 11.x: the types are those of the file (11.x knows --stronglyTyped and needs it no more)."
WEAK = "For trtexec 8.6 to 9.3, whose networks are weakly typed; from 10.0 on, export with weights: dq."
