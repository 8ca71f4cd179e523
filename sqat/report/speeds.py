"""Latencies that lie beside a run: `latency.json` of `scripts/results/make`, `bench.json` of `sqat bench --json`.

Both time candidates in interleaved rounds and give ratios with a 95 % bootstrap interval. Results are found by their
labels in the first, by their files in the second; what else was timed is marked as another file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sqat.bench.intervals import Interval
from sqat.bench.measuring import Report, size_text

LATENCY, BENCH = "latency.json", "bench.json"
OTHER = "another file,"


@dataclass(frozen=True)
class Speed:
    """Time of a call, and how many times as fast as the baseline (None: it is the baseline, or there is no ratio)."""

    p50_ms: float
    p95_ms: float
    ratio: Interval | None


@dataclass(frozen=True)
class SpeedSetting:
    """All results at one size.

    Attributes:
        title: the size.
        how: where the figures come from and what they were measured on.
        baseline: what ratios are against.
        rows: result's label (and ``@backend``, from `sqat bench`) -> figures.
    """

    title: str
    how: str
    baseline: str
    rows: Mapping[str, Speed]


def read_speeds(directory: Path, files: Mapping[str, Path], missing: list[str]) -> list[SpeedSetting]:
    """Every setting that was measured.

    Args:
        files: result's label -> its file.
        missing: gets what cannot be shown.
    """
    found: list[SpeedSetting] = []
    for name, read in ((LATENCY, read_latency), (BENCH, read_bench)):
        path = directory / name
        if path.is_file():
            try:
                found += read(path.read_text(encoding="utf-8"), files)
            except (OSError, ValidationError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                missing.append(f"latency: {name} is there and cannot be read ({type(error).__name__}); measure again")
    if not found:
        missing.append(
            f"latency: neither {LATENCY} (scripts/results/make latency) nor {BENCH} (sqat bench --json) tells any"
        )
    return found


def read_latency(text: str, files: Mapping[str, Path]) -> list[SpeedSetting]:
    """CPU times of `scripts/results/make latency`, which other work on the machine disturbs less than wall times."""
    latency: Any = json.loads(text)
    found = []
    for setting in latency["settings"]:
        baseline = next((name for row in setting["rows"].values() for name in row["cpu_against"]), "")
        rows = {
            label: Speed(row["cpu_ms"], row["cpu_p95_ms"], interval(row["cpu_against"].get(baseline), label, baseline))
            for label, row in setting["rows"].items()
        }
        where = f"{latency['threads']} thread on {latency['cpu']}, {setting['rounds']} rounds, load {latency['load']}"
        how = f"CPU time in ONNX Runtime, {where} ({LATENCY})"
        found.append(SpeedSetting(size_text(setting["batch"], setting["sequence"]), how, baseline, rows))
    return found


def interval(ratio: Any, label: str, baseline: str) -> Interval | None:
    """A ratio against another row."""
    return None if ratio is None or label == baseline else Interval.model_validate(ratio)


def read_bench(text: str, files: Mapping[str, Path]) -> list[SpeedSetting]:
    """Times of `sqat bench`; a candidate that is a result's file has the label of every result that it is."""
    report = Report.model_validate_json(text)
    names = {}
    for name, subject in report.subjects.items():
        labels = [label for label, file in files.items() if file.resolve() == Path(subject.path).resolve()]
        names[name] = [f"{label}@{subject.backend}" for label in labels] or [f"{OTHER} {name}"]
    found = []
    for setting in report.settings:
        rows = {shown: Speed(timing.p50_ms.median, timing.p95_ms, timing.speedup)
                for name, timing in setting.rows.items() for shown in names[name]}  # fmt: skip
        load = max(report.load, default=0.0)
        how = f"{report.threads} thread(s) on {report.cpu}, {setting.rounds} rounds, load up to {load} ({BENCH})"
        found.append(SpeedSetting(size_text(setting.batch, setting.sequence), how, names[report.baseline][0], rows))
    return found
