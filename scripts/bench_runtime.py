"""Latency of one encoder served by sqat's runtime, ONNX Runtime and OpenVINO, interleaved in one process.

    scripts/bench_runtime --float fp32.onnx --int8 int8.onnx --sparse cpu-sparse.onnx --json rows.json

The files are what targets onnx-fp32, onnx-int8 and cpu-sparse write of one checkpoint. Rows of the JSON file: threads,
batch, sequence, width, engine, median_ms, p95_ms. One process for each number of threads; in it every engine has a turn
in each round, in an order that rotates. Idle sessions of other runtimes spin: a turn begins with 50 ms of rest and one
call that is not timed.

Engines: `sqat-sparse` and `sqat-dense` run the same file, the second with 2:4 weights expanded: their ratio is what
sparsity gives, and the ratio of `sqat-dense` to the others what the fused int8 graph gives. `onnxruntime-dynamic` is
the float file through ONNX Runtime's own dynamic quantization. Left out: throughput with several clients.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

Run = Callable[[dict[str, Any]], object]
SHAPES = "1x16,1x128,8x128,32x64,8x384"
REST = 0.05


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
    from sqat import runtime

    with patch.dict(os.environ, {"SQAT_RUNTIME_SPARSE": str(int(sparse))}):
        return feeding(runtime.session(path, threads=threads))


def feeding(session: Any) -> Run:
    names = {each.name for each in session.get_inputs()}
    return lambda feeds: session.run(None, {name: feeds[name] for name in names})


def openvino_engine(path: Path, threads: int) -> Run:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(str(path), "CPU", settings)
    names = {name for each in model.inputs for name in each.names}
    request = model.create_infer_request()
    return lambda feeds: request.infer({name: feeds[name] for name in feeds.keys() & names})


def engines(files: Files, threads: int) -> dict[str, Run]:
    made: dict[str, Run] = {}
    for kind, path in {"fp32": files.float32, "int8": files.int8, "dynamic": files.dynamic}.items():
        if path is None:
            continue
        made[f"onnxruntime-{kind}"] = onnxruntime_engine(path, threads)
        if kind != "dynamic" and find_spec("openvino"):
            made[f"openvino-{kind}"] = openvino_engine(path, threads)
    made["sqat-dense"] = sqat_engine(files.sparse, threads, sparse=False)
    made["sqat-sparse"] = sqat_engine(files.sparse, threads, sparse=True)
    return made


def random_feeds(batch: int, sequence: int) -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(1000, 20000, (batch, sequence))
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
    made = engines(files, threads)
    width = hidden_size(files.sparse)
    rows = []
    for batch, sequence in shapes:
        feeds = random_feeds(batch, sequence)
        times: dict[str, list[float]] = {name: [] for name in made}
        for number in range(rounds):
            for name in turns(list(made), number):
                times[name] += time_turn(made[name], feeds, seconds)
        for name, each in times.items():
            median, p95 = (round(float(np.percentile(each, q)), 3) for q in (50, 95))
            rows.append(Row(threads, batch, sequence, width, name, median, p95))
        print(line(rows[-len(made) :]), flush=True)
    return rows


def line(rows: list[Row]) -> str:
    """One size: medians, then how often faster the sparse tiles are than each other engine."""
    median = {row.engine: row.median_ms for row in rows}
    others = {name: value for name, value in median.items() if name != "sqat-sparse"}
    ratios = "  ".join(f"{name} {value:.2f} ({value / median['sqat-sparse']:.2f}x)" for name, value in others.items())
    first = rows[0]
    size = f"{first.threads} threads {first.batch}x{first.sequence} width {first.width}"
    return f"{size}: sqat-sparse {median['sqat-sparse']:.2f} ms; {ratios}"


def hidden_size(path: Path) -> int:
    """The width of an encoder: the channels of its first LayerNorm."""
    import onnx

    graph = onnx.load(path).graph
    sizes = {each.name: each.dims for each in graph.initializer}
    embed = next(node for node in graph.node if node.op_type.startswith("Embed"))
    return int(sizes[embed.input[-1]][0])


def quantize_dynamically(path: Path, folder: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    made = folder / "dynamic.onnx"
    quantize_dynamic(path, made, weight_type=QuantType.QInt8)
    return made


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparse", type=Path, required=True, help="of target cpu-sparse")
    parser.add_argument("--float", type=Path, dest="float32", help="of target onnx-fp32")
    parser.add_argument("--int8", type=Path, help="of target onnx-int8")
    parser.add_argument("--dynamic", action="store_true", help="also ONNX Runtime's dynamic quantization of --float")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, each in a process of its own")
    parser.add_argument("--shapes", default=SHAPES, help="batch x sequence, separated by commas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a turn, at least")
    parser.add_argument("--json", type=Path, help="where the rows go")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    shapes = [(int(batch), int(sequence)) for batch, sequence in (s.split("x") for s in arguments.shapes.split(","))]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        wanted = arguments.dynamic and arguments.float32
        dynamic = quantize_dynamically(arguments.float32, Path(folder)) if wanted else None
        files = Files(arguments.float32, arguments.int8, dynamic, arguments.sparse)
        for threads in map(int, arguments.threads.split(",")):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows += pool.apply(measure, (files, threads, shapes, arguments.rounds, arguments.seconds))
    if arguments.json:
        content: list[Mapping[str, Any]] = [asdict(row) for row in rows]
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
