"""Take families of transformers through every stage, placement and target: `scripts/families/table --json FILE`.

The file is written after each family; one that holds a family of this commit is continued.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from scripts.commit import current_commit
from scripts.families.registry import FAMILIES
from scripts.families.trial import try_family
from scripts.families.verdicts import count_failures, failures
from sqat.files.replace import replace_file

LIMIT = 600  # seconds for one family
Entry = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/families/table", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", default=Path("recipes/families.json"))
    parser.add_argument("--families", metavar="NAME,...", default=",".join(FAMILIES), help="default: all of them")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    parser.add_argument("--again", action="store_true", help="also those that the file holds of this commit")
    options = parser.parse_args(argv)
    names = options.families.split(",")
    if unknown := set(names) - set(FAMILIES):
        parser.error(f"unknown families {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
    known, commit = read_entries(options.json), current_commit()
    todo = [name for name in names if options.again or known.get(name, {}).get("commit") != commit]
    for entry in try_all(todo, options.jobs):
        known[entry["name"]] = {**entry, "commit": commit}
        replace_file(options.json, text_of(report_of(known)).encode())
        print(f"{entry['name']}: {entry['seconds']:.0f} s", *failures(entry), sep="\n  ", flush=True)
    faults = count_failures([known[name] for name in names])
    print(f"{len(names)} families, {faults} with something that is not expected")
    return 1 if faults else 0


def read_entries(path: Path) -> dict[str, Entry]:
    """Read what is known of each family; empty where there is no file."""
    return {entry["name"]: entry for entry in json.loads(path.read_text())["families"]} if path.is_file() else {}


def report_of(known: dict[str, Entry]) -> dict[str, Any]:
    """Return the content of the JSON file, families in the order of the registry."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {**versions, "families": [known[name] for name in FAMILIES if name in known]}


def text_of(report: dict[str, Any]) -> str:
    """Return a report as JSON with one line for each family."""
    *others, (name, families) = report.items()
    head = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in others)
    lines = ",\n".join(json.dumps(entry) for entry in families)
    return f"{{{head}{json.dumps(name)}: [\n{lines}\n]}}\n"


def try_all(names: Iterable[str], jobs: int) -> Iterator[Entry]:
    """Try families, each in a process of its own."""
    with ThreadPoolExecutor(jobs) as pool:
        for tried in as_completed([pool.submit(try_apart, name) for name in names]):
            yield tried.result()


def try_apart(name: str) -> Entry:
    """Try a family in a forked process: what it loads, spends or breaks ends with it."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sqat-families-") as folder:
        process = multiprocessing.get_context("fork").Process(target=write_record, args=(name, Path(folder)))
        process.start()
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            process.join()
        path = Path(folder) / "record.json"
        family = FAMILIES[name]
        end = f"no result within {LIMIT} s" if process.exitcode == -9 else f"exit code {process.exitcode}"
        entry: Entry = {"name": name, "model_type": family.model_type, "kind": family.kind, "died": end}
        if path.is_file():
            entry = json.loads(path.read_text())
    return {**entry, "seconds": round(time.monotonic() - begun, 1)}


def write_record(name: str, folder: Path) -> None:
    """Try a family and write its record into the folder."""
    record = asdict(try_family(name, folder))
    (folder / "record.json").write_text(json.dumps(record))


if __name__ == "__main__":
    sys.exit(main())
