"""Hostile inputs by the thousand: each is accepted, or refused in one line.

    scripts/faults/fuzz --inputs 20000 --json FILE

No exit code but 0, 2 and 3, no traceback, no raw control character, nothing written outside the input's folder, and an
answer within 10 seconds. Exit code 1, and seed and number of each input, where anything else happens. A FILE with
the same seed, first number and processor is continued: kinds of this commit where they ended, others afresh.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import psutil

from scripts.commit import current_commit
from scripts.faults.fuzzing.generators import GENERATORS
from sqat.hardware.machine import describe_processor

LIMIT = 10.0  # seconds for one input
START = 120.0  # seconds until a process has imported the libraries
OUTCOMES = ("accepted", "refused", "wrong")
SAVED = 100  # inputs between two writes of the figures


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


class Figures:
    """How many inputs of each kind were accepted, refused or wrong, in a file that a later run continues."""

    def __init__(self, path: Path | None, commit: str, **settings: str | int) -> None:
        self.path, self.commit, self.settings = path, commit, settings
        self.kinds: dict[str, dict[str, Any]] = {}
        self.wrong: list[dict[str, Any]] = []
        known = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}
        if all(known.get(name) == value for name, value in settings.items()):
            self.kinds, self.wrong = known["kinds"], known["wrong"]

    def begin(self, kind: str) -> int:
        """Return how many inputs of a kind were tried at this commit; forget those of another one."""
        if self.kinds.get(kind, {}).get("commit") != self.commit:
            self.kinds[kind] = {"commit": self.commit, **dict.fromkeys(OUTCOMES, 0), "seconds": 0.0}
            self.wrong = [each for each in self.wrong if each["kind"] != kind]
        return self.tried(kind)

    def tried(self, kind: str) -> int:
        """Return how many inputs of a kind were tried."""
        return sum(self.kinds[kind][outcome] for outcome in OUTCOMES)

    def add(self, kind: str, number: int, answer: dict[str, str], seconds: float) -> None:
        """Count one input."""
        outcome = answer["outcome"] if answer["outcome"] in OUTCOMES else "wrong"
        if outcome == "wrong":
            self.wrong.append({"kind": kind, "number": number, **answer})
            print(json.dumps(self.wrong[-1]), file=sys.stderr, flush=True)
        counted = self.kinds[kind]
        counted[outcome] += 1
        counted["seconds"] = round(counted["seconds"] + seconds, 3)
        if self.tried(kind) % SAVED == 0:
            self.save()

    def text(self) -> str:
        """Return the content of the file."""
        kinds = {kind: self.kinds[kind] for kind in GENERATORS if kind in self.kinds}
        total = {"inputs": sum(map(self.tried, kinds)), "kinds": kinds, "wrong": self.wrong}
        return json.dumps({**self.settings, **total}, indent=1) + "\n"

    def save(self) -> None:
        """Write the file, if there is one."""
        if self.path is not None:
            self.path.write_text(self.text(), encoding="utf-8")


def share_of(kind: str, kinds: Sequence[str], inputs: int) -> int:
    """Return how many of the inputs are of a kind."""
    return -(-inputs * GENERATORS[kind].share // sum(GENERATORS[each].share for each in kinds))


def fuzz(kinds: Sequence[str], inputs: int, first: int, worker: Worker, figures: Figures) -> None:
    """Try the inputs that the figures do not know yet."""
    for kind in kinds:
        for number in range(first + figures.begin(kind), first + share_of(kind, kinds, inputs)):
            worker.start()
            begun = time.monotonic()
            figures.add(kind, number, worker.try_input(kind, number), time.monotonic() - begun)


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
    cpu = describe_processor()
    figures = Figures(options.json, current_commit(), cpu=cpu.name, seed=options.seed, first=options.first)
    with tempfile.TemporaryDirectory(prefix="sqat-fuzz-") as folder:
        worker = Worker(options.seed, Path(folder))
        try:
            fuzz(kinds, options.inputs, options.first, worker, figures)
        finally:
            worker.stop()
            figures.save()
    print(figures.text(), end="")
    return 1 if figures.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
