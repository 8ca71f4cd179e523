"""The files beside an exported ONNX file that build an engine from it: settings, a trtexec line, a Python script.

TensorRT times its kernels while it builds, so the machine that serves builds the engine, not the one that exports.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from sqat.errors import SqatError
from sqat.files.read import MAX_JSON, read_bytes

Range = tuple[int, int, int]
Shapes = dict[str, tuple[list[int], list[int], list[int]]]
SETTINGS, SCRIPT, BUILDER = "build_engine.json", "build_engine.sh", "build_engine.py"


class BuildSettings(BaseModel):
    """What an engine is built from and for, as ``build_engine.json`` stores it.

    Attributes:
        file: name of the ONNX file.
        inputs: smallest, usual and largest shape of each input that has free sizes.
        precision: type of what is not int8.
        layers: ``conv1x1`` with ``weights="qdq"`` is the form for TensorRT 8, whose networks are weakly typed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    inputs: Shapes
    batch_range: Range
    sequence_range: Range
    precision: Literal["fp32", "fp16"] = "fp32"
    layers: Literal["matmul", "conv1x1"] = "matmul"
    weights: Literal["dq", "qdq"] = "dq"

    @property
    def is_for_tensorrt_8(self) -> bool:
        """Whether flags give the types, because the file does not."""
        return self.layers == "conv1x1" and self.weights == "qdq"


def make_engine_files(
    onnx_name: str,
    *,
    inputs: Mapping[str, Sequence[int | str]],
    batch: Range,
    sequence: Range,
    precision: Literal["fp32", "fp16"] = "fp32",
    layers: Literal["matmul", "conv1x1"] = "matmul",
    weights: Literal["dq", "qdq"] = "dq",
) -> dict[str, bytes]:
    """Write the files that build an engine from ``onnx_name``.

    Args:
        inputs: shape of each input, free sizes by name.
        batch: smallest, usual and largest batch.
        sequence: the same of the tokens.
        precision: see `BuildSettings`; so are ``layers`` and ``weights``.

    Raises:
        SqatError: a range is not ascending, or another size than batch and sequence is free.
    """
    settings = BuildSettings(
        file=onnx_name,
        inputs=profile_shapes(inputs, batch, sequence),
        batch_range=batch,
        sequence_range=sequence,
        precision=precision,
        layers=layers,
        weights=weights,
    )
    return {
        SETTINGS: (settings.model_dump_json(indent=2) + "\n").encode(),
        SCRIPT: shell_script(settings).encode(),
        BUILDER: resources.files("sqat.tensorrt").joinpath(BUILDER).read_bytes(),
    }


def read_settings(model: Path) -> BuildSettings | None:
    """Read the ``build_engine.json`` beside a model; None where there is none.

    Raises:
        SqatError: it cannot be read.
    """
    path = model.with_name(SETTINGS)
    if not os.path.lexists(path):
        return None
    content = read_bytes(path, limit=MAX_JSON)
    try:
        return BuildSettings.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SqatError(
            f"{where}: {first['msg']}" if where else first["msg"],
            "export again, or give --batch and --sequence and remove it",
            str(path),
            code="unreadable-file",
        ) from error


def profile_shapes(inputs: Mapping[str, Sequence[int | str]], batch: Range, sequence: Range) -> Shapes:
    """Smallest, usual and largest shape of each input that has free sizes; arguments as for `make_engine_files`."""
    check_range("batch", batch)
    check_range("sequence", sequence)
    shapes: Shapes = {}
    for name, sizes in inputs.items():
        free = [axis for axis, size in enumerate(sizes) if isinstance(size, str)]
        ranges = {0: batch} if len(sizes) > 3 else {0: batch, 1: sequence}  # an image has no sequence
        if others := set(free) - set(ranges):
            raise SqatError(
                f"input {name} has a free size {sizes[min(others)]!r}; only batch and sequence may be free",
                "export it with that size fixed",
                code="unsupported-model",
            )
        if free:
            smallest, usual, largest = (
                [ranges[axis][end] if axis in free else int(size) for axis, size in enumerate(sizes)]
                for end in range(3)
            )
            shapes[name] = (smallest, usual, largest)
    return shapes


def check_range(name: str, sizes: Range) -> None:
    """Refuse a range that is not 1 <= smallest <= usual <= largest."""
    if not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
        text = ",".join(str(size) for size in sizes)
        raise SqatError(f"needs three ascending sizes from 1 on, got {text}", place=name, code="usage")


def parse_range(text: str, option: str) -> Range:
    """Read ``1,8,32`` as the smallest, usual and largest size."""
    try:
        smallest, usual, largest = (int(part) for part in text.split(","))
    except ValueError:
        raise SqatError(
            f"needs smallest,usual,largest such as 1,8,32, got {text!r}", place=option, code="usage"
        ) from None
    check_range(option, (smallest, usual, largest))
    return smallest, usual, largest


def shell_script(settings: BuildSettings) -> str:
    """A bash script around trtexec."""
    name, stem, weak = settings.file, settings.file.removesuffix(".onnx"), settings.is_for_tensorrt_8
    types = ["--int8", *(["--fp16"] if settings.precision == "fp16" else [])] if weak else ["--stronglyTyped"]
    ends = ("min", "opt", "max") if settings.inputs else ()
    options = [
        f"--onnx={name}",
        f"--saveEngine={stem}.engine",
        "--sparsity=enable",
        *types,
        *(f"--{end}Shapes={shape_list(settings.inputs, place)}" for place, end in enumerate(ends)),
        "--profilingVerbosity=detailed",
        f"--exportLayerInfo={stem}.layers.json",
        "--verbose",
        # trtexec to 9.3 knows the first, from 8.6 on the second.
        "--buildOnly" if weak else "--skipInference",
    ]
    lines = " \\\n  ".join(['"${TRTEXEC:-trtexec}"', *(shlex.quote(option) for option in options)])
    return SHELL.format(
        name=name,
        versions=WEAK if weak else STRONG,
        command=f"{lines} \\\n  2>&1 | tee {shlex.quote(f'{stem}.build.log')}",
        report=shlex.join(["sqat", "engine", name, "--log", f"{stem}.build.log", "--layers", f"{stem}.layers.json"]),
    )


def shape_list(shapes: Shapes, end: int) -> str:
    """``input_ids:1x16,attention_mask:1x16``."""
    return ",".join(f"{name}:{'x'.join(str(size) for size in ends[end])}" for name, ends in shapes.items())


SHELL = """#!/usr/bin/env bash
# Builds an engine with sparse kernels from {name}. Run it on the GPU that is to serve the engine.
# {versions}
set -euo pipefail
cd "$(dirname "$0")"

{command}

# Which layers run sparse, and why the others do not:
#   {report}
"""
STRONG = "For trtexec 9.0 to 11.x: the file gives the types (11.x accepts --stronglyTyped and needs it no more)."
WEAK = "For trtexec 8.6 to 9.3, whose networks are weakly typed; from 10.0 on, export with weights: dq."
