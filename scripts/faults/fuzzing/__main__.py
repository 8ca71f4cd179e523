"""Hostile inputs by the thousand: each is accepted, or refused in one line.

    scripts/faults/fuzz --inputs 20000 --json FILE

No exit code but 0, 2 and 3, no traceback, no raw control character, nothing written outside the input's folder, and an
answer within 10 seconds. Exit code 1, and seed and number of each input, where anything else happens.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, cast

import psutil

from scripts.faults.fuzzing.generators import GENERATORS

LIMIT = 10.0  # seconds for one input
START = 120.0  # seconds until a process has imported the libraries


class Worker:
    """A process that tries inputs; it is started again after a hang or a crash."""

    def __init__(self, seed: int, place: Path) -> None:
        self.command = [sys.executable, "-m", "scripts.faults.fuzzing.worker", str(seed), str(place)]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        """Start the process, unless it runs."""
        if self.process is None:
            environment = {**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
            if self.read(START) != "ready":
                raise RuntimeError(f"{' '.join(self.command)} does not start")
        return self.process

    def try_input(self, kind: str, number: int) -> dict[str, str]:
        """Return the outcome of one input: `hang` after the limit, `crash` where the process ends."""
        process = self.start()
        assert process.stdin is not None
        process.stdin.write(f"{kind} {number}\n".encode())
        process.stdin.flush()
        line = self.read(LIMIT)
        if line:
            return cast("dict[str, str]", json.loads(line))
        crashed = process.poll()
        self.stop()
        return {"outcome": f"no answer within {LIMIT:.0f} s" if crashed is None else f"crash: {crashed}", "action": ""}

    def read(self, limit: float) -> str:
        """Read a line; empty where the process has ended, or takes more than ``limit`` seconds.

        On a busy machine the processor's seconds count, up to six times as many of the clock.
        """
        process = self.process
        assert process is not None
        assert process.stdout is not None
        begun, used = time.monotonic(), processor_seconds(process.pid)
        while not select.select([process.stdout], [], [], 1.0)[0]:
            clock = time.monotonic() - begun
            if clock > 6 * limit or (clock > limit and processor_seconds(process.pid) - used > limit):
                return ""
        return process.stdout.readline().decode().strip()

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def processor_seconds(pid: int) -> float:
    """Return how many seconds a process has kept the processor busy."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def fuzz(
    kinds: Sequence[str], numbers: range, seed: int, place: Path
) -> tuple[dict[str, Counter[str]], list[dict[str, Any]]]:
    """Try the numbered inputs of each kind; returns how many had each outcome, and the wrong ones."""
    counts = {kind: Counter[str]() for kind in kinds}
    wrong, worker = list[dict[str, Any]](), Worker(seed, place)
    try:
        for kind, number in product(kinds, numbers):
            answer = worker.try_input(kind, number)
            is_right = answer["outcome"] in ("accepted", "refused")
            counts[kind][answer["outcome"] if is_right else "wrong"] += 1
            if not is_right:
                wrong.append({"kind": kind, "seed": seed, "number": number, **answer})
                print(json.dumps(wrong[-1]), file=sys.stderr, flush=True)
    finally:
        worker.stop()
    return counts, wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/faults/fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=20_000, help="of all kinds together")
    parser.add_argument("--kinds", metavar="NAME,...", default=",".join(GENERATORS), help="default: all of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first input of each kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go")
    options = parser.parse_args(argv)
    kinds = options.kinds.split(",")
    if unknown := set(kinds) - set(GENERATORS):
        parser.error(f"unknown kinds {', '.join(sorted(unknown))}; there are {', '.join(GENERATORS)}")
    begun, each = time.monotonic(), -(-options.inputs // len(kinds))
    with tempfile.TemporaryDirectory(prefix="sqat-fuzz-") as folder:
        numbers = range(options.first, options.first + each)
        counts, wrong = fuzz(kinds, numbers, options.seed, Path(folder))
    figures = {
        "inputs": each * len(kinds),
        "seed": options.seed,
        "seconds": round(time.monotonic() - begun, 1),
        "kinds": {kind: dict(sorted(counted.items())) for kind, counted in counts.items()},
        "wrong": wrong,
    }
    print(json.dumps(figures, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
