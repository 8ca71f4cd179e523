"""The measurement: opens every candidate, then times all of them and compares their outputs at each input size."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from sqat.bench.candidates import Artifact, Candidate, Run, open_all
from sqat.bench.inputs import Feeds, Input, Limits, default_tokens, draw_inputs, limits_of
from sqat.bench.intervals import median_interval, median_ratio
from sqat.bench.memory import peak_memory
from sqat.bench.parity import compare, is_classifier
from sqat.bench.report import Report, Setting, Subject, Timing, size_text
from sqat.bench.rounds import Effort, RoundTimes, time_rounds
from sqat.errors import SqatError, first_line
from sqat.hardware.machine import describe_processor, version_of
from sqat.progress import Reporter

PACKAGES = ("sqat", "torch", "onnxruntime", "openvino", "transformers")
Size = tuple[int, int | None]  # batch and tokens


class Grid(NamedTuple):
    """Input sizes to measure; without sequence lengths, the default one if the model has tokens."""

    batches: Sequence[int]
    sequences: Sequence[int] = ()


def measure(
    candidates: Sequence[Candidate],
    baseline: str,
    grid: Grid,
    effort: Effort,
    threads: int,
    reporter: Reporter,
    skipped: Mapping[str, str],
    *,
    required: Collection[str] = (),
    memory: Callable[[Candidate, Feeds, int], int] = peak_memory,
    timer: Callable[..., RoundTimes] = time_rounds,
) -> Report:
    """Measure candidates on random inputs; see `measure_feeds`."""
    inputs, limits = all_inputs([candidate.artifact for candidate in candidates])
    settings = [(size, draw_inputs(inputs, limits, *size)) for size in all_sizes(inputs, limits, grid)]
    return measure_feeds(
        candidates,
        baseline,
        settings,
        effort,
        threads,
        reporter,
        skipped,
        required=required,
        memory=memory,
        timer=timer,
    )


def measure_feeds(
    candidates: Sequence[Candidate],
    baseline: str,
    inputs: Sequence[tuple[Size, Feeds]],
    effort: Effort,
    threads: int,
    reporter: Reporter,
    skipped: Mapping[str, str],
    *,
    required: Collection[str] = (),
    memory: Callable[[Candidate, Feeds, int], int] | None = None,
    timer: Callable[..., RoundTimes] = time_rounds,
) -> Report:
    """Measure candidates on given inputs.

    Args:
        baseline: name of the candidate that the others are compared with.
        inputs: of each setting, with their size.
        skipped: candidates that are only reported, with the reason.
        required: backends whose candidates must all open.
        memory: measures what a process that serves a candidate needs; None: not measured.
        timer: replaced by tests.

    Raises:
        SqatError: a candidate cannot be opened or does not take inputs of a size.
    """
    load = current_load()
    with ExitStack() as stack:
        stack.enter_context(pinned(threads))
        reporter.info(f"opening {', '.join(candidate.name for candidate in candidates)}")
        runs, failed = open_all(candidates, {baseline, *required}, threads, stack)
        candidates = [candidate for candidate in candidates if candidate.name in runs]
        _, feeds = max(inputs, key=lambda each: each[0][0] * (each[0][1] or 1))
        subjects, no_memory = describe(candidates, feeds, threads, memory, reporter)
        decides = all(is_classifier(candidate.artifact.config) for candidate in candidates)
        settings = []
        for size, feeds in inputs:
            reporter.info(f"{size_text(*size)}: timing, about {effort.limit:g} s at most")
            settings.append(measure_setting(runs, baseline, feeds, size, effort, decides, timer))
            reporter.info(f"{size_text(*size)}: {settings[-1].rounds} rounds")
    return Report(
        cpu=describe_processor().name,
        cores=describe_processor().cores,
        threads=threads,
        load=[load, current_load()],
        versions=installed_versions(),
        baseline=baseline,
        within=effort.within,
        subjects=subjects,
        left_out={**skipped, **failed},
        no_memory=no_memory,
        settings=settings,
    )


def describe(
    candidates: Sequence[Candidate],
    feeds: Feeds,
    threads: int,
    memory: Callable[[Candidate, Feeds, int], int] | None,
    reporter: Reporter,
) -> tuple[dict[str, Subject], dict[str, str]]:
    """Measure size and memory of each candidate; return them, and name -> reason of an unknown memory."""
    subjects, no_memory = {}, {}
    for candidate in candidates:
        growth = None
        if memory is not None:
            reporter.info(f"{candidate.name}: measuring memory")
            try:
                growth = memory(candidate, feeds, threads)
            except SqatError as error:
                no_memory[candidate.name] = error.problem
        path = candidate.artifact.path
        subjects[candidate.name] = Subject(
            path=str(path.resolve()), backend=candidate.backend, file_bytes=file_bytes(path), memory_bytes=growth
        )
    return subjects, no_memory


def measure_setting(
    runs: Mapping[str, Run],
    baseline: str,
    feeds: Feeds,
    size: Size,
    effort: Effort,
    decides: bool,
    timer: Callable[..., RoundTimes] = time_rounds,
) -> Setting:
    """Compare the outputs of all candidates at one size, then time them."""
    outputs = {name: call_first(name, run, feeds, size) for name, run in runs.items()}
    times = timer({name: partial(run, feeds) for name, run in runs.items()}, baseline, effort)
    rows = {}
    for name in runs:
        is_baseline = name == baseline
        p50 = median_interval(1000 * times.turns(name))
        calls = [seconds for turn in times.calls[name] for seconds in turn]
        rows[name] = Timing(
            p50_ms=p50,
            p95_ms=1000 * float(np.quantile(calls, 0.95)),
            calls=len(calls),
            rows_per_second=1000 * size[0] / p50.median,
            speedup=None if is_baseline else median_ratio(times.turns(baseline), times.turns(name)),
            parity=None if is_baseline else compare(outputs[baseline], outputs[name], decides),
        )
    return Setting(batch=size[0], sequence=size[1], rounds=times.rounds, reached=times.reached, rows=rows)


def call_first(name: str, run: Run, feeds: Feeds, size: Size) -> Any:
    """Run a candidate for the first time at a size."""
    try:
        return run(feeds)
    except SqatError:
        raise
    except Exception as error:  # each library has its own classes
        problem = f"{name} does not run {size_text(*size)}: {first_line(error)}"
        raise SqatError(problem, "leave that size out", code="usage") from error


def all_inputs(artifacts: Sequence[Artifact]) -> tuple[list[Input], Limits]:
    """Return the inputs that any artifact takes, and the limits of all."""
    inputs = {each.name: each for artifact in reversed(artifacts) for each in artifact.inputs}
    graphs = [artifact for artifact in artifacts if artifact.is_graph]
    if graphs:  # the inputs of a folder are those of the ONNX files
        names = {each.name for artifact in graphs for each in artifact.inputs}
        inputs = {name: each for name, each in inputs.items() if name in names}
    if not inputs:
        raise SqatError("its config does not say its inputs", "add an ONNX file of the same model",
                        str(artifacts[0].path), code="unsupported-model")  # fmt: skip
    return list(inputs.values()), limits_of([artifact.config for artifact in artifacts])


def all_sizes(inputs: Sequence[Input], limits: Limits, grid: Grid) -> list[Size]:
    """Return batch and tokens of every setting."""
    has_tokens = any(each.has_tokens for each in inputs)
    if grid.sequences and not has_tokens:
        raise SqatError("no input has tokens", "leave it out", "--sequence", code="usage")
    if limits.tokens is not None and max(grid.sequences, default=0) > limits.tokens:
        problem = f"the model has positions for {limits.tokens} tokens, not {max(grid.sequences)}"
        raise SqatError(problem, place="--sequence", code="usage")
    lengths: Sequence[int | None] = (grid.sequences or [default_tokens(limits)]) if has_tokens else [None]
    return [(batch, tokens) for batch in grid.batches for tokens in lengths]


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Pin this process to as many cores as it has threads, until the block ends."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    check_threads(threads, "--threads")
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[-threads:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def check_threads(threads: int, place: str) -> None:
    """Raise SqatError for more threads than this process has cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else threads
    if not 1 <= threads <= cores:
        raise SqatError(f"{threads} threads on {cores} cores", "give at most one thread per core", place, code="usage")


def file_bytes(path: Path) -> int:
    """Return the size of an ONNX file with its external data, or of a folder's tensors."""
    files = [path, path.with_name(f"{path.name}.data")] if path.is_file() else list(path.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files if file.exists())


def current_load() -> float:
    """Return the number of processes at work, mean of the last minute."""
    return round(float(psutil.getloadavg()[0]), 2)


def installed_versions() -> dict[str, str]:
    """Return the version of Python and of the installed ones of `PACKAGES`."""
    versions = {name: version_of(name) for name in PACKAGES}
    return {"python": platform.python_version(), **{name: version for name, version in versions.items() if version}}
