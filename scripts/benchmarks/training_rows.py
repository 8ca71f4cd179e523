"""Rows of the training benchmark: candidates that take turns, their ratios, the file and its table."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sqat.bench.intervals import Interval, median_interval
from sqat.errors import SqatError

Call = Callable[[], object]
MODEL_OPTIMIZER = "modelopt"  # its module


@dataclass(frozen=True)
class Row:
    """One candidate.

    Attributes:
        median_ms: of the processor's time; None in rows of memory.
        megabytes: of memory at most, above what the imported libraries take; None in rows of time.
        ratio: median over the rounds of this candidate / ``against``.
        low: lower end of the ratio's 95 % interval; the ratio itself where it was measured once.
        high: upper end.
        against: name of the row that the ratio is against.
        goal: what is wanted, empty where nothing is.
    """

    name: str
    median_ms: float | None
    megabytes: float | None
    ratio: float
    low: float
    high: float
    against: str
    goal: str = ""


@dataclass(frozen=True)
class Report:
    """What the JSON file holds beside the rows: where and how they were measured."""

    processor: str
    cores: int
    load: list[float]
    shape: str
    rounds: int
    versions: dict[str, str]
    missing: list[str]
    rows: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class Group:
    """Candidates that have their turns together.

    Attributes:
        calls: name -> what is timed; the first one is what ratios are against.
        goals: name -> the goal in words.
    """

    calls: Mapping[str, Call]
    goals: Mapping[str, str]


def time_group(group: Group, rounds: int, clock: Callable[[], float] = time.process_time) -> dict[str, list[float]]:
    """Milliseconds of every candidate in every round but the first, which is not kept."""
    random, names = np.random.default_rng(0), list(group.calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for index in random.permutation(len(names)):
            start = clock()
            group.calls[names[index]]()
            times[names[index]].append((clock() - start) * 1e3)
        print(f"round {number} of {rounds}", end="\r", file=sys.stderr, flush=True)
    return {name: each[1:] for name, each in times.items()}


def rows_of(times: Mapping[str, Sequence[float]], goals: Mapping[str, str]) -> list[Row]:
    """Rows of a group, whose first candidate is what the others are compared to."""
    first = next(iter(times))
    base, rows = np.array(times[first]), []
    for name, each in times.items():
        ratio = round_interval(median_interval(np.array(each) / base))
        median = round(float(np.median(each)), 1)
        rows.append(Row(name, median, None, ratio.median, ratio.low, ratio.high, first, goals.get(name, "")))
    return rows


def round_interval(interval: Interval) -> Interval:
    return Interval(**{name: round(value, 3) for name, value in interval.model_dump().items()})


def memory_row(name: str, megabytes: float, base: float, against: str, goal: str = "") -> Row:
    ratio = round(megabytes / base, 3)
    return Row(name, None, round(megabytes, 1), ratio, ratio, ratio, against, goal)


def table(report: Report) -> str:
    """The rows as a Markdown table, and below it what has no row."""
    heads = ["one core", "ms", "MB at most", "times as much", "95 %", "as", "goal"]
    lines = [heads, ["---"] * len(heads), *map(cells, report.rows)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([text, *(f"{each}." for each in report.missing)])


def cells(row: Row) -> list[str]:
    """A row of the table; one that the others are compared to has a 1."""
    median = "" if row.median_ms is None else f"{row.median_ms:.0f}"
    megabytes = "" if row.megabytes is None else f"{row.megabytes:.0f}"
    if row.name == row.against:
        return [row.name, median, megabytes, "1", "", "", row.goal]
    interval = "" if row.low == row.high else f"{row.low:.3f} to {row.high:.3f}"
    return [row.name, median, megabytes, f"{row.ratio:.3f}", interval, row.against, row.goal]


def read_report(path: Path) -> Report:
    """What `--json` wrote.

    Raises:
        SqatError: it is something else or cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Report(**{**content, "rows": [Row(**row) for row in content["rows"]]})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SqatError(
            "holds no rows of this benchmark", "name what --json wrote", str(path), code="unreadable-file"
        ) from error
