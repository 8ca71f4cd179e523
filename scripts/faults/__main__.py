"""Run every kind of fault and write the counts: `scripts/faults/harness --json FILE`."""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from scripts.faults.moments import double, jump, kill, stop
from scripts.faults.places import damage, fill, lock_out
from scripts.faults.project import Ended, Project
from scripts.faults.tally import Tally
from sqat import __version__
from sqat.files.replace import replace_file

Kind = Callable[[Project, int, random.Random, Ended, str], Tally]
# kind -> how many by default, how many with --short
KINDS: dict[str, tuple[Kind, int, int]] = {
    "kill": (kill, 50, 3),
    "stop": (stop, 20, 2),
    "double": (double, 10, 2),
    "jump": (jump, 5, 1),
    "fill": (fill, 20, 1),
    "lock-out": (lock_out, 6, 1),
    "damage": (damage, 200, 4),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/faults/harness", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts here")
    parser.add_argument("--kinds", metavar="NAME,...", default=",".join(KINDS), help="default: all of them")
    parser.add_argument("--short", action="store_true", help="a few faults of each kind, for the tests")
    parser.add_argument("--count", type=int, metavar="N", help="faults of each kind, in place of the usual numbers")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each stage that trains")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if unknown := set(options.kinds.split(",")) - set(KINDS):
        parser.error(f"unknown kinds {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    begun, tallies = time.monotonic(), list[Tally]()
    with tempfile.TemporaryDirectory(prefix="sqat-faults-") as folder:
        for tally in try_all(Path(folder), options):
            tallies.append(tally)
            report = report_of(tallies, options, time.monotonic() - begun)
            if options.json is not None:
                replace_file(options.json, (json.dumps(report, indent=2) + "\n").encode())
    print(f"{report['faults']} faults, {report['violations']} violations, {report['seconds']} s")
    return 1 if report["violations"] else 0


def report_of(tallies: list[Tally], options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What goes into the JSON file; it is written after each kind."""
    return {"sqat": __version__, "torch": torch.__version__, "system": platform.platform(), "seed": options.seed,
            "steps": options.steps, "seconds": round(seconds), "faults": sum(tally.done for tally in tallies),
            "violations": sum(len(tally.violations) for tally in tallies),
            "kinds": [tally.as_json() for tally in tallies]}  # fmt: skip


def try_all(folder: Path, options: argparse.Namespace) -> Iterator[Tally]:
    """An undisturbed run twice, whose results must be equal; then every kind of fault against it."""
    project = Project(folder, options.steps)
    whole = project.run()
    if whole.code:
        sys.exit(f"the undisturbed run fails: {whole.error}")
    expected = project.result()
    project.clear()
    whole = project.run()
    if project.result() != expected:
        sys.exit("two undisturbed runs differ, so that nothing can be compared")
    print(f"an undisturbed run takes {whole.seconds:.1f} s", flush=True)
    for name in options.kinds.split(","):
        trial, full, few = KINDS[name]
        begun = time.monotonic()
        count = options.count or (few if options.short else full)
        tally = trial(project, count, random.Random(f"{options.seed} {name}"), whole, expected)
        ends = ", ".join(f"{count} {end}" for end, count in tally.ends.items()) or f"skipped: {tally.skipped}"
        print(f"{tally.kind}: {ends}; {len(tally.violations)} violations, {time.monotonic() - begun:.0f} s", flush=True)
        for violation in tally.violations:
            print(f"  {violation.strip()}", flush=True)
        yield tally


if __name__ == "__main__":
    sys.exit(main())
