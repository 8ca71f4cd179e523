"""Latency of the exported files of one seed, on one core.

Each round calls each file in a random order: once untimed, so that its weights are in the cache, then timed. ONNX
Runtime has one thread. Ratios are of times of one round. Inputs are random, every token valid.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.results.applications import DENSE, display_of
from scripts.results.collecting import LATENCY, Run, collect_seed, digests
from scripts.results.running import versions
from scripts.results.schema import Latency, Setting, Timing, write
from sqat.bench.intervals import median_ratio
from sqat.errors import SqatError
from sqat.evaluation.artifacts import open_onnx
from sqat.export.names import file_needs_kernels
from sqat.hardware.machine import describe_processor
from sqat.pipeline.graph import resolve_graph
from sqat.pipeline.result_files import result_artifacts
from sqat.recipe.schema import LoadedRecipe

WARM_UP = 3
Times = NDArray[np.float64]
Inputs = dict[str, NDArray[Any]]


def measure(run: Run, rounds: int) -> str:
    """Time one seed's files, write them to the run's folder, and return a line about it.

    Raises:
        SqatError: no row of this seed is an ONNX file.
    """
    loaded = run.load()
    files, left_out = files_of(loaded)
    if not files:
        raise SqatError(
            "no row of this seed is an ONNX file to time", "run the recipe", str(loaded.run_directory), code="no-rows"
        )
    before = digests(loaded, files)
    cpu, load = describe_processor().name, os.getloadavg()[0]
    with pin():
        sessions = {label: open_onnx(file, threads=1) for label, file in files.items()}
        sizes = display_of(run.recipe.stem).sizes
        settings = [time_setting(sessions, files, batch, tokens, rounds) for batch, tokens in sizes]
    latency = Latency(seed=run.seed, cpu=cpu, threads=1, load=round(load, 2), versions=versions(), settings=settings,
                      made_from=before, left_out=left_out,
                      skipping=[label for label, file in files.items() if file_needs_kernels(file)])  # fmt: skip
    write(latency, loaded.run_directory / LATENCY)
    return "; ".join(f"{label} {timing.cpu_ms:.1f} ms" for label, timing in settings[0].rows.items())


def files_of(loaded: LoadedRecipe) -> tuple[dict[str, Path], dict[str, str]]:
    """The ONNX files of a run's rows, and row -> why it is not timed."""
    files, left_out = {}, dict(collect_seed(loaded)[1])
    for label, (_, artifact) in result_artifacts(resolve_graph(loaded)).items():
        if artifact.suffix != ".onnx":
            left_out[label] = "no ONNX file"
        elif label not in left_out:
            files[label] = artifact
    return files, left_out


@contextmanager
def pin() -> Iterator[None]:
    """While open, this process runs on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def time_setting(
    sessions: Mapping[str, Any], files: Mapping[str, Path], batch: int, tokens: int | None, rounds: int
) -> Setting:
    """All files at one size of input."""
    inputs = {label: draw_inputs(each, files[label], batch, tokens) for label, each in sessions.items()}
    times = time_rounds(sessions, inputs, rounds)
    low = next((label for label in times if label.startswith("dense ") and label != DENSE), None)
    baselines = [label for label in (DENSE, low) if label in times]
    rows = {label: summarise(label, times, [str(name) for name in baselines]) for label in times}
    return Setting(batch=batch, sequence=tokens, rounds=rounds, rows=rows)


def time_rounds(sessions: Mapping[str, Any], inputs: Mapping[str, Inputs], rounds: int) -> dict[str, Times]:
    """Seconds [R,2] of every file, CPU and wall, a round each; the order within a round is drawn anew."""
    random, labels = np.random.default_rng(0), list(sessions)
    times: dict[str, list[tuple[float, float]]] = {label: [] for label in labels}
    for number in range(WARM_UP + rounds):
        for label in random.permutation(labels):
            sessions[label].run(None, inputs[label])
            cpu, wall = time.process_time(), time.perf_counter()
            sessions[label].run(None, inputs[label])
            taken = (time.process_time() - cpu, time.perf_counter() - wall)
            if number >= WARM_UP:
                times[label].append(taken)
    return {label: np.array(taken) for label, taken in times.items()}


def summarise(label: str, times: Mapping[str, Times], baselines: list[str]) -> Timing:
    """Medians, 95th percentiles and ratios of one file."""
    cpu, wall = 1000 * times[label].T
    return Timing(
        cpu_ms=float(np.median(cpu)),
        cpu_p95_ms=float(np.quantile(cpu, 0.95)),
        wall_ms=float(np.median(wall)),
        wall_p95_ms=float(np.quantile(wall, 0.95)),
        cpu_against={name: median_ratio(times[name][:, 0], times[label][:, 0]) for name in baselines},
        wall_against={name: median_ratio(times[name][:, 1], times[label][:, 1]) for name in baselines},
    )


def draw_inputs(model: Any, file: Path, batch: int, tokens: int | None) -> Inputs:
    """Random inputs of a session: ids below the vocabulary, masks of ones, types of zeros, normal floats."""
    random = np.random.default_rng(0)
    return {entry.name: draw(random, entry, largest_id(file), batch, tokens) for entry in model.get_inputs()}


def draw(random: np.random.Generator, entry: Any, ids: int, batch: int, tokens: int | None) -> NDArray[Any]:
    """One input; its first open dimension is the batch, others are tokens.

    Raises:
        SqatError: it has tokens and the setting none.
    """
    if tokens is None and not all(isinstance(size, int) for size in entry.shape[1:]):
        raise SqatError(
            f"input {entry.name} has a dimension of tokens: {entry.shape}",
            "give the application's sizes in scripts/results/applications.py",
            code="usage",
        )
    shape = [size if isinstance(size, int) else tokens or 1 for size in entry.shape]
    if entry.shape and not isinstance(entry.shape[0], int):
        shape[0] = batch
    kind = KINDS[entry.type]
    if "mask" in entry.name:
        return np.ones(shape, kind)
    if np.issubdtype(kind, np.floating):
        return random.standard_normal(shape).astype(kind)
    return np.zeros(shape, kind) if "type" in entry.name else random.integers(0, ids, shape).astype(kind)


def largest_id(file: Path) -> int:
    """One more than the largest token id of a model, by the config beside it; 100 where that does not say."""
    try:
        config: Any = json.loads(file.with_name("config.json").read_bytes())
        return int(config["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return 100


KINDS: dict[str, type[np.generic]] = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bool)": np.bool_,
}
