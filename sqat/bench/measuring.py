"""The measurement as a whole: open every candidate, then for each size of input time them in turn and compare outputs.

A `Report` is all that was found, with the machine and its load; there is no figure in it without its spread.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from sqat.bench.candidates import Candidate, Run, open_all
from sqat.bench.footprint import peak_memory
from sqat.bench.inputs import Feeds, Input, Limits, draw_inputs, limits_of, usual_tokens
from sqat.bench.intervals import Interval, median_interval, median_ratio
from sqat.bench.parity import Parity, compare, is_classifier
from sqat.bench.rounds import Effort, Timed, time_rounds
from sqat.errors import SqatError, first_line
from sqat.hardware.machine import describe_processor, version_of
from sqat.progress import Reporter

STRICT = ConfigDict(extra="forbid")
PACKAGES = ("sqat", "torch", "onnxruntime", "openvino", "transformers")


class Subject(BaseModel):
    """A candidate.

    Attributes:
        path: absolute.
        file_bytes: of the file with its external data, or of the folder's tensors.
        memory_bytes: by which a process grows that serves it at the largest size; None where that was not measured.
    """

    model_config = STRICT

    path: str
    backend: str
    file_bytes: int
    memory_bytes: int | None


class Timing(BaseModel):
    """One candidate at one size.

    Attributes:
        p50_ms: median call with its interval over the rounds.
        p95_ms: of all calls.
        rows_per_second: rows of the batch over the median call.
        speedup: the baseline's time over this one's, None for the baseline itself.
        parity: its output beside the baseline's, None for the baseline itself.
    """

    model_config = STRICT

    p50_ms: Interval
    p95_ms: float
    calls: int
    rows_per_second: float
    speedup: Interval | None
    parity: Parity | None


class Setting(BaseModel):
    """One size of input; ``reached``: every interval is as narrow as asked for."""

    model_config = STRICT

    batch: int
    sequence: int | None
    rounds: int
    reached: bool
    rows: dict[str, Timing]


class Report(BaseModel):
    """What `sqat bench` found.

    Attributes:
        load: processes at work on the machine in the minute before the first call and in the last one; empty where
            that is not told.
        within: half-width of the intervals that was asked for, as a share.
        left_out: candidates that were not measured, with the reason.
        no_memory: those whose memory was not measured, with the reason.
    """

    model_config = STRICT

    format: int = 1
    cpu: str
    cores: int
    threads: int
    load: list[float]
    versions: dict[str, str]
    baseline: str
    within: float
    subjects: dict[str, Subject]
    left_out: dict[str, str]
    no_memory: dict[str, str] = {}
    settings: list[Setting]


class Grid(NamedTuple):
    """Sizes to measure; no sequences: the usual one, where there are tokens at all."""

    batches: Sequence[int]
    sequences: Sequence[int] = ()


def measure(
    candidates: Sequence[Candidate],
    baseline: str,
    grid: Grid,
    effort: Effort,
    threads: int,
    reporter: Reporter,
    left_out: Mapping[str, str],
    *,
    needed: Collection[str] = (),
    memory: Callable[[Candidate, Feeds, int], int] = peak_memory,
    timer: Callable[..., Timed] = time_rounds,
) -> Report:
    """Measure candidates.

    Args:
        baseline: name of the candidate that the others are compared with.
        left_out: what is not among the candidates, to be reported.
        needed: backends whose candidates must all open.
        memory, timer: for tests.

    Raises:
        SqatError: one cannot be opened or does not take inputs of a size.
    """
    inputs, limits = all_inputs(candidates)
    sizes = settings_of(inputs, limits, grid)
    before = load_now()
    largest = max(sizes, key=lambda size: size[0] * (size[1] or 1))
    with ExitStack() as stack:
        stack.enter_context(pinned(threads))
        reporter.info(f"opening {', '.join(candidate.name for candidate in candidates)}")
        runs, failed = open_all(candidates, {baseline, *needed}, threads, stack)
        opened = [candidate for candidate in candidates if candidate.name in runs]
        subjects, unknown = {}, dict[str, str]()
        for candidate in opened:
            reporter.info(f"{candidate.name}: measuring memory")
            try:
                grown = memory(candidate, draw_inputs(inputs, limits, *largest), threads)
            except SqatError as error:
                grown, unknown[candidate.name] = None, error.problem
            subjects[candidate.name] = describe(candidate, grown)
        decides = all(is_classifier(candidate.artifact.config) for candidate in candidates)
        settings = []
        for batch, tokens in sizes:
            feeds = draw_inputs(inputs, limits, batch, tokens)
            reporter.info(f"{size_text(batch, tokens)}: timing, about {effort.limit:g} s at most")
            settings.append(measure_setting(runs, baseline, feeds, (batch, tokens), effort, decides, timer))
            reporter.info(f"{size_text(batch, tokens)}: {settings[-1].rounds} rounds")
    return Report(
        cpu=describe_processor().name,
        cores=describe_processor().cores,
        threads=threads,
        load=[*before, *load_now()],
        versions=versions(),
        baseline=baseline,
        within=effort.within,
        subjects=subjects,
        left_out={**left_out, **failed},
        no_memory=unknown,
        settings=settings,
    )


def measure_setting(
    runs: Mapping[str, Run],
    baseline: str,
    feeds: Feeds,
    size: tuple[int, int | None],
    effort: Effort,
    decides: bool,
    timer: Callable[..., Timed] = time_rounds,
) -> Setting:
    """All candidates at one size: first what they put out, then how long they take."""
    batch, tokens = size
    outputs = {name: call_first(name, run, feeds, size) for name, run in runs.items()}
    parities = {name: compare(outputs[baseline], output, decides) for name, output in outputs.items()}
    timed = timer({name: partial(run, feeds) for name, run in runs.items()}, baseline, effort)
    rows = {}
    for name in runs:
        calls = [seconds for turn in timed.calls[name] for seconds in turn]
        ratio = median_ratio(timed.turns(baseline), timed.turns(name)) if name != baseline else None
        p50 = median_interval(1000 * timed.turns(name))
        rows[name] = Timing(
            p50_ms=p50,
            p95_ms=1000 * float(np.quantile(calls, 0.95)),
            calls=len(calls),
            rows_per_second=1000 * batch / p50.median,
            speedup=ratio,
            parity=parities[name] if name != baseline else None,
        )
    return Setting(batch=batch, sequence=tokens, rounds=timed.rounds, reached=timed.reached, rows=rows)


def call_first(name: str, run: Run, feeds: Feeds, size: tuple[int, int | None]) -> Any:
    """The first call of a candidate at a size; what a library has against it is the user's to know.

    Raises:
        SqatError: it fails.
    """
    try:
        return run(feeds)
    except SqatError:
        raise
    except Exception as error:  # each library has classes of its own
        raise SqatError(
            f"{name} does not run {size_text(*size)}: {first_line(error)}", "leave that size out"
        ) from error


def all_inputs(candidates: Sequence[Candidate]) -> tuple[list[Input], Limits]:
    """Inputs by name that any of the candidates takes, and the limits that all of them keep.

    Raises:
        SqatError: only folders are named whose config does not tell their inputs.
    """
    artifacts = [candidate.artifact for candidate in candidates]
    found = {each.name: each for artifact in reversed(artifacts) for each in artifact.inputs}
    graphs = [artifact for artifact in artifacts if artifact.is_graph]
    if graphs:  # a folder has them from a file beside it, whose inputs are the model's own
        names = {each.name for artifact in graphs for each in artifact.inputs}
        found = {name: each for name, each in found.items() if name in names}
    if not found:
        raise SqatError("its config does not tell the inputs", "name an ONNX file of the same model too",
                        str(artifacts[0].path))  # fmt: skip
    return list(found.values()), limits_of([artifact.config for artifact in artifacts])


def settings_of(inputs: Sequence[Input], limits: Limits, grid: Grid) -> list[tuple[int, int | None]]:
    """Batch and tokens of every setting.

    Raises:
        SqatError: a length where there are no tokens, or beyond the model's positions.
    """
    has_tokens = any(each.has_tokens for each in inputs)
    if grid.sequences and not has_tokens:
        raise SqatError("no input has tokens", "leave it out", "--sequence")
    if limits.tokens is not None and max(grid.sequences, default=0) > limits.tokens:
        raise SqatError(f"the model has positions for {limits.tokens} tokens, not {max(grid.sequences)}",
                        place="--sequence")  # fmt: skip
    lengths: Sequence[int | None] = (grid.sequences or [usual_tokens(limits)]) if has_tokens else [None]
    return [(batch, tokens) for batch in grid.batches for tokens in lengths]


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """While open, this process runs on as many cores as it has threads, the same ones all the time.

    Raises:
        SqatError: there are not so many.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    if not 1 <= threads <= len(cores):
        raise SqatError(f"{threads} threads on {len(cores)} cores", "ask for at most as many", "--threads")
    os.sched_setaffinity(0, sorted(cores)[-threads:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def describe(candidate: Candidate, memory: int | None) -> Subject:
    """What is known of a candidate before it runs."""
    path = candidate.artifact.path
    return Subject(
        path=str(path.resolve()), backend=candidate.backend, file_bytes=file_bytes(path), memory_bytes=memory
    )


def file_bytes(path: Path) -> int:
    """Bytes of an ONNX file with its external data, or of a folder's tensors."""
    files = [path, path.with_name(f"{path.name}.data")] if path.is_file() else list(path.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files if file.exists())


def size_text(batch: int, tokens: int | None) -> str:
    """``batch 8, 128 tokens``."""
    return f"batch {batch}" + (f", {tokens} tokens" if tokens is not None else "")


def load_now() -> list[float]:
    """Processes at work in the last minute; nothing where the system does not tell."""
    return [round(os.getloadavg()[0], 2)] if hasattr(os, "getloadavg") else []


def versions() -> dict[str, str]:
    """Python and those of `PACKAGES` that are installed."""
    found = {name: version_of(name) for name in PACKAGES}
    return {"python": platform.python_version(), **{name: version for name, version in found.items() if version}}
