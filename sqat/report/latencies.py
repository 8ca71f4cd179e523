"""Latencies beside a run: `latency.json` of `scripts/results/make latency` and `bench.json` of `sqat bench --json`.

Both hold ratios with a 95 % bootstrap interval over interleaved rounds. The first names results by label; in the
second a result is found by its file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from os.path import realpath
from pathlib import Path
from typing import Any

from sqat.bench.intervals import Interval
from sqat.bench.report import Report, size_text
from sqat.files.read import read_json
from sqat.report.parts import read_part

LATENCY, BENCH = "latency.json", "bench.json"
OTHER = "another file,"
LARGEST = 1e12  # milliseconds


@dataclass(frozen=True)
class Latency:
    """Milliseconds per call, and the speed-up over the baseline; None for the baseline itself."""

    p50_ms: float
    p95_ms: float
    speedup: Interval | None


@dataclass(frozen=True)
class LatencySetting:
    """All results at one input size.

    Attributes:
        title: the input size.
        source: the file and the machine that the latencies come from.
        baseline: the row that ratios compare with.
        rows: result's label (and ``@backend`` for `sqat bench`) -> latency.
    """

    title: str
    source: str
    baseline: str
    rows: Mapping[str, Latency]


Parse = Callable[[Any, Mapping[str, Path]], list[LatencySetting]]


def read_latencies(directory: Path, files: Mapping[str, Path], missing: list[str]) -> list[LatencySetting]:
    """Read every measured input size.

    Args:
        files: result's label -> its file.
        missing: receives what cannot be shown.
    """
    settings: list[LatencySetting] = []
    for name, parse in ((LATENCY, parse_latency), (BENCH, parse_bench)):
        path = directory / name
        if os.path.lexists(path):
            read = partial(read_settings, path, parse, files)
            settings += read_part(missing, f"latency: {name}", list[LatencySetting](), read)
    if not settings:
        missing.append(f"latency: no {LATENCY} (scripts/results/make latency) and no {BENCH} (sqat bench --json)")
    return settings


def read_settings(path: Path, parse: Parse, files: Mapping[str, Path]) -> list[LatencySetting]:
    """Read one of the two files."""
    return parse(read_json(path, root=path.parent), files)


def parse_latency(latency: Any, files: Mapping[str, Path]) -> list[LatencySetting]:
    """Parse the CPU times of `scripts/results/make latency`; other processes disturb them less than wall times."""
    settings = []
    for setting in latency["settings"]:
        baseline = next((name for row in setting["rows"].values() for name in row["cpu_against"]), "")
        rows = {}
        for label, row in setting["rows"].items():
            ratio = row["cpu_against"].get(baseline)
            speedup = None if ratio is None or label == baseline else Interval.model_validate(ratio)
            rows[label] = make_latency(row["cpu_ms"], row["cpu_p95_ms"], speedup)
        machine = f"{latency['threads']} thread on {latency['cpu']}, {setting['rounds']} rounds, load {latency['load']}"
        source = f"CPU time in ONNX Runtime, {machine} ({LATENCY})"
        settings.append(LatencySetting(size_text(setting["batch"], setting["sequence"]), source, baseline, rows))
    return settings


def parse_bench(content: Any, files: Mapping[str, Path]) -> list[LatencySetting]:
    """Parse the times of `sqat bench`; a candidate gets the label of every result that is its file."""
    report = Report.model_validate(content)
    names = {}
    for name, subject in report.subjects.items():
        labels = [label for label, file in files.items() if realpath(file) == realpath(subject.path)]
        names[name] = [f"{label}@{subject.backend}" for label in labels] or [f"{OTHER} {name}"]
    settings = []
    for setting in report.settings:
        rows = {label: make_latency(timing.p50_ms.median, timing.p95_ms, timing.speedup)
                for name, timing in setting.rows.items() for label in names[name]}  # fmt: skip
        load = max(report.load, default=0.0)
        source = f"{report.threads} thread(s) on {report.cpu}, {setting.rounds} rounds, load up to {load} ({BENCH})"
        title = size_text(setting.batch, setting.sequence)
        settings.append(LatencySetting(title, source, names[report.baseline][0], rows))
    return settings


def make_latency(p50_ms: float, p95_ms: float, speedup: Interval | None) -> Latency:
    """Make a latency of numbers that can be drawn.

    Raises:
        ValueError: one is not finite, or not positive.
    """
    numbers = [p50_ms, p95_ms, *([] if speedup is None else [speedup.median, speedup.low, speedup.high])]
    if not all(math.isfinite(number) and 0 < number < LARGEST for number in numbers):
        raise ValueError(f"holds a time or ratio that is no positive number: {numbers}")
    return Latency(float(p50_ms), float(p95_ms), speedup)
