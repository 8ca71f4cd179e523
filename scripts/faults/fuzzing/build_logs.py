"""Build logs and layer information with lines repeated, cut, mixed and very long, for `sqat engine`."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.faults.fuzzing.case import HOSTILE_TEXTS, Action, cut, flip_bytes
from scripts.faults.fuzzing.onnx_files import quantized_layer

NAMES = ("y", "w", "a + y", "y_myl0_1", "{ForeignNode[y...z]}", *HOSTILE_TEXTS)
PRODUCT = "node_of_p"  # what TensorRT calls the model's layer
PIECES = (
    "Name: ",
    ", LayerType: ",
    "TacticName: ",
    "Constants: [",
    "[ONNX Layer: ",
    "Dimensions: [",
    "\x1e",
    "\r",
    ", ",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    10**20,
    1.5,
    float("inf"),
    float("nan"),
    "",
    "Int8",
    [],
    {},
    [None],
    [[1]],
    {"Count": "x"},
)


def make_case(draw: random.Random, folder: Path) -> Sequence[Action]:
    """Write a model with a changed log, layer information, or both."""
    (folder / "model.onnx").write_bytes(quantized_layer().SerializeToString())
    command = ["engine", "model.onnx"]
    which = draw.choice((1, 2, 3))
    if which & 1:
        raw = make_log(draw).encode("utf-8", "surrogatepass")
        (folder / "build.log").write_bytes(change_bytes(draw, raw))
        command += ["--log", "build.log"]
    if which & 2:
        (folder / "layers.json").write_bytes(change_bytes(draw, json.dumps(make_layers(draw)).encode()))
        command += ["--layers", "layers.json"]
    return [command]


def change_bytes(draw: random.Random, raw: bytes) -> bytes:
    """Change a few bytes, or cut them off, in one of five inputs."""
    return draw.choice((flip_bytes, cut))(draw, raw) if draw.random() < 0.2 else raw


def make_log(draw: random.Random) -> str:
    """Make a log of up to three builds."""
    lines: list[str] = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        names = draw.sample(NAMES, draw.randint(0, 4))
        if draw.random() < 0.7:
            names.insert(0, PRODUCT)
        some = names[: draw.randint(0, len(names))]
        lines += draw.choice(
            (
                [f"(Sparsity) Layers eligible for sparse math: {', '.join(names)}",
                 f"(Sparsity) TRT inference plan picked sparse implementation for layers: {', '.join(some)}"],
                [f"(Sparsity) Found {len(names)} layer(s) eligible to use sparse tactics: {', '.join(names)}",
                 f"(Sparsity) Chose {len(some)} layer(s) using sparse tactics: {', '.join(some)}"],
            )
        )  # fmt: skip
        lines += [f"Name: {name}, LayerType: gemm, TacticName: sparse, StreamId: 0" for name in some]
        lines.append(draw.choice(("", "&&&& RUNNING TensorRT.trtexec", "Engine built in 3 sec.", "tensorrt_rtx 1.3")))
    for _ in range(draw.choice((0, 0, 1, 3))):
        lines.insert(draw.randint(0, len(lines)), draw.choice(PIECES) * draw.choice((1, 10, 100_000)))
    return "\n".join(lines)


def make_layers(draw: random.Random) -> object:
    """Make layer information with odd values."""
    entries = []
    for name in (PRODUCT, *draw.sample(NAMES, draw.randint(0, 4))):
        entry: dict[str, object] = {"Name": name, "LayerType": "gemm", "TacticName": "sm80_sparse", "Metadata": ""}
        if draw.random() < 0.5:
            key = draw.choice(
                ("Name", "LayerType", "TacticName", "Metadata", "Constants", "Weights", "HasSparseWeights")
            )
            entry[key] = draw.choice(VALUES)
        entries.append(entry)
    return {"Layers": entries} if draw.random() < 0.9 else draw.choice(VALUES)
