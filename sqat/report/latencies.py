"""Latencies beside a run: `latency.json` of `scripts/results/make latency` and `bench.json` of `sqat bench --json`.

Both hold ratios with a 95 % bootstrap interval over interleaved rounds. The first names results by label; in the
second a result is found by its file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sqat.bench.intervals import Interval
from sqat.bench.report import Report, size_text

LATENCY, BENCH = "latency.json", "bench.json"
OTHER = "another file,"


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


def read_latencies(directory: Path, files: Mapping[str, Path], missing: list[str]) -> list[LatencySetting]:
    """Read every measured input size.

    Args:
        files: result's label -> its file.
        missing: receives what cannot be shown.
    """
    settings: list[LatencySetting] = []
    for name, parse in ((LATENCY, parse_latency), (BENCH, parse_bench)):
        path = directory / name
        if path.is_file():
            try:
                settings += parse(path.read_text(encoding="utf-8"), files)
            except (OSError, ValidationError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                missing.append(f"latency: {name} cannot be read ({type(error).__name__}); measure again")
    if not settings:
        missing.append(f"latency: no {LATENCY} (scripts/results/make latency) and no {BENCH} (sqat bench --json)")
    return settings


def parse_latency(text: str, files: Mapping[str, Path]) -> list[LatencySetting]:
    """Parse the CPU times of `scripts/results/make latency`; other processes disturb them less than wall times."""
    latency: Any = json.loads(text)
    settings = []
    for setting in latency["settings"]:
        baseline = next((name for row in setting["rows"].values() for name in row["cpu_against"]), "")
        rows = {}
        for label, row in setting["rows"].items():
            ratio = row["cpu_against"].get(baseline)
            speedup = None if ratio is None or label == baseline else Interval.model_validate(ratio)
            rows[label] = Latency(row["cpu_ms"], row["cpu_p95_ms"], speedup)
        machine = f"{latency['threads']} thread on {latency['cpu']}, {setting['rounds']} rounds, load {latency['load']}"
        source = f"CPU time in ONNX Runtime, {machine} ({LATENCY})"
        settings.append(LatencySetting(size_text(setting["batch"], setting["sequence"]), source, baseline, rows))
    return settings


def parse_bench(text: str, files: Mapping[str, Path]) -> list[LatencySetting]:
    """Parse the times of `sqat bench`; a candidate gets the label of every result that is its file."""
    report = Report.model_validate_json(text)
    names = {}
    for name, subject in report.subjects.items():
        labels = [label for label, file in files.items() if file.resolve() == Path(subject.path).resolve()]
        names[name] = [f"{label}@{subject.backend}" for label in labels] or [f"{OTHER} {name}"]
    settings = []
    for setting in report.settings:
        rows = {label: Latency(timing.p50_ms.median, timing.p95_ms, timing.speedup)
                for name, timing in setting.rows.items() for label in names[name]}  # fmt: skip
        load = max(report.load, default=0.0)
        source = f"{report.threads} thread(s) on {report.cpu}, {setting.rounds} rounds, load up to {load} ({BENCH})"
        title = size_text(setting.batch, setting.sequence)
        settings.append(LatencySetting(title, source, names[report.baseline][0], rows))
    return settings
