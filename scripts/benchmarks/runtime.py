"""Latency of one encoder in sqat's runtime, ONNX Runtime and OpenVINO, interleaved in one process.

    scripts/benchmarks/runtime --float fp32.onnx --int8 int8.onnx --sparse cpu-sparse.onnx --json rows.json
    scripts/benchmarks/runtime --table rows.json --chart rows.svg   # rows of earlier runs

`sqat-dense` runs the file of `sqat-sparse` with 2:4 weights expanded. `onnxruntime-dynamic` quantizes the float file
dynamically. Each number of threads has its own process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np

from sqat import runtime
from sqat.bench.candidates import openvino_core
from sqat.errors import SqatError
from sqat.files.replace import replace_file

Run = Callable[[dict[str, Any]], object]
SHAPES = "1x16,1x128,8x128,32x64,8x384"
REST = 0.05
POSITIONS = {"Embed": 4, "EmbedInt8": 5}  # which input of an operator has the table of positions


@dataclass(frozen=True)
class Row:
    threads: int
    batch: int
    sequence: int
    width: int
    engine: str
    median_ms: float
    p95_ms: float


@dataclass(frozen=True)
class Files:
    """ONNX files of one checkpoint; what is None has no engine."""

    float32: Path | None
    int8: Path | None
    dynamic: Path | None
    sparse: Path


def onnxruntime_engine(path: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return feeding(session)


def sqat_engine(path: Path, threads: int, sparse: bool) -> Run:
    with patch.dict(os.environ, {"SQAT_RUNTIME_SPARSE": str(int(sparse))}):
        return feeding(runtime.session(path, threads=threads))


def feeding(session: Any) -> Run:
    names = {each.name for each in session.get_inputs()}
    return lambda feeds: session.run(None, {name: feeds[name] for name in names})


def openvino_engine(path: Path, threads: int) -> Run:
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino_core().compile_model(str(path), "CPU", settings)
    names = {name for each in model.inputs for name in each.names}
    request = model.create_infer_request()
    return lambda feeds: request.infer({name: feeds[name] for name in feeds.keys() & names})


def engines(files: Files, threads: int) -> dict[str, Run]:
    runs_by_engine: dict[str, Run] = {}
    for kind, path in {"fp32": files.float32, "int8": files.int8, "dynamic": files.dynamic}.items():
        if path is None:
            continue
        runs_by_engine[f"onnxruntime-{kind}"] = onnxruntime_engine(path, threads)
        if kind != "dynamic" and find_spec("openvino"):
            runs_by_engine[f"openvino-{kind}"] = openvino_engine(path, threads)
    runs_by_engine["sqat-dense"] = sqat_engine(files.sparse, threads, sparse=False)
    runs_by_engine["sqat-sparse"] = sqat_engine(files.sparse, threads, sparse=True)
    return runs_by_engine


def random_feeds(batch: int, sequence: int, vocabulary: int) -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(0, vocabulary, (batch, sequence))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def time_turn(run: Run, feeds: dict[str, Any], seconds: float) -> list[float]:
    """Times of calls in milliseconds, at least two of them."""
    time.sleep(REST)
    run(feeds)
    times: list[float] = []
    while len(times) < 2 or sum(times) < seconds * 1e3:
        start = time.perf_counter()
        run(feeds)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def turns(names: list[str], number: int) -> list[str]:
    """Engines in the order of a round: each comes first in its turn."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def measure(files: Files, threads: int, shapes: list[tuple[int, int]], rounds: int, seconds: float) -> list[Row]:
    runs_by_engine = engines(files, threads)
    size = size_of(files.sparse)
    rows = []
    for batch, sequence in shapes:
        feeds = random_feeds(batch, sequence, size.vocabulary)
        times: dict[str, list[float]] = {name: [] for name in runs_by_engine}
        for number in range(rounds):
            for name in turns(list(runs_by_engine), number):
                times[name] += time_turn(runs_by_engine[name], feeds, seconds)
        for name, each in times.items():
            median, p95 = (round(float(np.percentile(each, q)), 3) for q in (50, 95))
            rows.append(Row(threads, batch, sequence, size.width, name, median, p95))
        print(line(rows[-len(runs_by_engine) :]), flush=True)
    return rows


def line(rows: list[Row]) -> str:
    """One size: medians, then how often faster the sparse tiles are than each other engine."""
    median = {row.engine: row.median_ms for row in rows}
    others = {name: value for name, value in median.items() if name != "sqat-sparse"}
    ratios = "  ".join(f"{name} {value:.2f} ({value / median['sqat-sparse']:.2f}x)" for name, value in others.items())
    first = rows[0]
    size = f"{first.threads} threads {first.batch}x{first.sequence} width {first.width}"
    return f"{size}: sqat-sparse {median['sqat-sparse']:.2f} ms; {ratios}"


Point = tuple[int, int, int, int]  # width, threads, batch, sequence


def medians_of(rows: list[Row]) -> dict[Point, dict[str, float]]:
    """Medians of all engines at each point that was measured."""
    found: dict[Point, dict[str, float]] = {}
    for row in rows:
        found.setdefault((row.width, row.threads, row.batch, row.sequence), {})[row.engine] = row.median_ms
    return found


def table(rows: list[Row]) -> str:
    """Medians as a Markdown table, a line for each size, with the two factors."""
    engines = list(dict.fromkeys(row.engine for row in rows if not row.engine.startswith("sqat-")))
    heads = [
        "width",
        "threads",
        "batch x tokens",
        *engines,
        "sqat-dense",
        "sqat-sparse",
        "against the best other",
        "against sqat-dense",
    ]
    lines = [heads, ["---"] * len(heads)]
    for (width, threads, batch, sequence), median in medians_of(rows).items():
        sparse, dense, others = median["sqat-sparse"], median["sqat-dense"], [median[name] for name in engines]
        factors = [f"{min(others, default=dense) / sparse:.2f}x", f"{dense / sparse:.2f}x"]
        lines.append(
            [str(width), str(threads), f"{batch} x {sequence}", *map(milliseconds, (*others, dense, sparse)), *factors]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw_chart(rows: list[Row], path: Path) -> None:
    """Speed of every engine as bars, ONNX Runtime's int8 being 1: a panel for each width and number of threads."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sqat"  # the same file of the same rows
    from matplotlib import pyplot

    points = medians_of(rows)
    panels = list(dict.fromkeys(point[:2] for point in points))
    columns = max(1, len({threads for _, threads in panels}))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(11, 3.1 * lines), squeeze=False, sharey=True)
    for (width, threads), axis in zip(panels, axes.flat, strict=False):
        draw_panel(axis, {point[2:]: each for point, each in points.items() if point[:2] == (width, threads)})
        axis.set_title(f"width {width}, {threads} thread{'s' if threads > 1 else ''}", fontsize=10)
        axis.set_ylabel("times as fast as ONNX Runtime int8", fontsize=8)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="lower center", ncols=len(COLOURS), fontsize=8)
    figure.tight_layout(rect=(0, 0.4 / (3.1 * lines), 1, 1))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def draw_panel(axis: Any, points: dict[tuple[int, int], dict[str, float]]) -> None:
    """Groups of bars, one group for each size of input; the last bar's height is written above it."""
    share = 0.8 / len(COLOURS)
    for place, median in enumerate(points.values()):
        for number, (engine, colour) in enumerate(COLOURS.items()):
            if engine not in median:
                continue
            speed, at = median[BASE] / median[engine], place - 0.4 + (number + 0.5) * share
            axis.bar(at, speed, share * 0.92, color=colour, label=engine if place == 0 else None)
            if engine == "sqat-sparse":
                axis.annotate(f"{speed:.1f}", (at, speed), ha="center", va="bottom", fontsize=7)
    axis.axhline(1, color="0.4", linewidth=0.7)
    axis.set_xticks(range(len(points)), [f"{batch} x {sequence}" for batch, sequence in points], fontsize=8)
    axis.set_axisbelow(True)
    axis.grid(axis="y", color="0.9")
    axis.spines[["top", "right"]].set_visible(False)


BASE = "onnxruntime-int8"
COLOURS = {
    "onnxruntime-fp32": "#c6c6c6",
    "openvino-fp32": "#9a9a9a",
    "openvino-int8": "#8fb8de",
    BASE: "#3f7fbf",
    "sqat-dense": "#f2b880",
    "sqat-sparse": "#d9541e",
}


def milliseconds(value: float) -> str:
    """Three digits."""
    return f"{value:.{max(0, 2 - int(np.log10(max(value, 1.0))))}f}"


class Size(NamedTuple):
    """What bounds the inputs of an encoder, and its width."""

    vocabulary: int
    tokens: int
    width: int


def size_of(path: Path) -> Size:
    """The sizes of an encoder's embedding tables.

    Raises:
        SqatError: the file is not of target cpu-sparse.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        graph = onnx.load(path, format="protobuf").graph
    except (OSError, DecodeError) as error:
        raise SqatError(
            "cannot be read as ONNX", "name a file of target cpu-sparse", str(path), code="unreadable-file"
        ) from error
    dims = {each.name: each.dims for each in graph.initializer}
    for node in graph.node:
        if node.op_type in POSITIONS:
            word, position = dims[node.input[3]], dims[node.input[POSITIONS[node.op_type]]]
            return Size(word[0], position[0], word[1])
    raise SqatError(
        "has no embeddings of sqat's", "name a file of target cpu-sparse", str(path), code="unreadable-file"
    )


def quantize_dynamically(path: Path, folder: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    runs_by_engine = folder / "dynamic.onnx"
    quantize_dynamic(path, runs_by_engine, weight_type=QuantType.QInt8)
    return runs_by_engine


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "scripts/benchmarks/runtime", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--sparse", type=Path, help="of target cpu-sparse")
    what.add_argument("--table", type=Path, nargs="+", metavar="JSON", help="show rows of earlier runs instead")
    parser.add_argument("--chart", type=Path, metavar="SVG", help="draw those of --table too")
    parser.add_argument("--float", type=Path, dest="float32", help="of target onnx-fp32")
    parser.add_argument("--int8", type=Path, help="of target onnx-int8")
    parser.add_argument("--dynamic", action="store_true", help="also ONNX Runtime's dynamic quantization of --float")
    parser.add_argument("--threads", type=numbers, default=[1, 2], help="numbers of threads, each in its own process")
    parser.add_argument("--shapes", type=shapes, default=shapes(SHAPES), help="batch x sequence, separated by commas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a turn, at least")
    parser.add_argument("--json", type=Path, help="where the rows go")
    return parser.parse_args(words)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def shapes(text: str) -> list[tuple[int, int]]:
    return [(int(batch), int(sequence)) for batch, _, sequence in (part.partition("x") for part in text.split(","))]


def main(words: Sequence[str] | None = None) -> int:
    """Measure, or show what was measured; returns the exit code."""
    arguments = parse(words)
    try:
        if arguments.table:
            rows = [row for path in arguments.table for row in read_rows(path)]
            print(table(rows))
            if arguments.chart:
                draw_chart(rows, arguments.chart)
        else:
            run(arguments)
    except SqatError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON file.

    Raises:
        SqatError: it has others or cannot be read.
    """
    try:
        return [Row(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise SqatError(
            "holds no rows of this benchmark", "name what --json wrote", str(path), code="unreadable-file"
        ) from error


def run(arguments: argparse.Namespace) -> None:
    """Measure with each number of threads."""
    for path in (arguments.float32, arguments.int8):
        if path is not None and not path.is_file():
            raise SqatError("there is no such file", place=str(path), code="missing-file")
    runtime.instruction_set()
    size, longest = size_of(arguments.sparse), max(sequence for _, sequence in arguments.shapes)
    if longest > size.tokens:
        problem = f"--shapes asks for {longest} tokens, and the model has positions for {size.tokens}"
        raise SqatError(problem, "leave the longer ones out", str(arguments.sparse), code="usage")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        quantize = arguments.dynamic and arguments.float32
        dynamic = quantize_dynamically(arguments.float32, Path(folder)) if quantize else None
        files = Files(arguments.float32, arguments.int8, dynamic, arguments.sparse)
        for threads in arguments.threads:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows += pool.apply(measure, (files, threads, arguments.shapes, arguments.rounds, arguments.seconds))
    if arguments.json:
        replace_file(arguments.json, (json.dumps([asdict(row) for row in rows], indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
