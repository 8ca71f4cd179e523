"""The command `scripts/benchmarks/compare_modelopt`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from scripts.benchmarks.beside_modelopt import __doc__ as about
from scripts.benchmarks.beside_modelopt.rows import CHAINS, METRICS, MODEL, SEEDS, Budget, Comparison, read
from scripts.benchmarks.beside_modelopt.table import render
from sqat.checkpoint.outputs import check_output
from sqat.errors import SqatError
from sqat.hardware.machine import describe_processor, version_of

MISTAKE = 2
PACKAGES = ("sqat", "nvidia-modelopt", "torch", "transformers")


def main(words: Sequence[str] | None = None) -> int:
    """Run, or show an earlier run; returns the exit code, 2 for a user's mistake."""
    arguments = parser().parse_args(words)
    try:
        if arguments.table is not None:
            print(render(read(arguments.table)), end="")
        else:
            compare(arguments)
    except SqatError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    return 0


def parser() -> argparse.ArgumentParser:
    """All options."""
    whole = argparse.ArgumentParser(
        "scripts/benchmarks/compare_modelopt", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = whole.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--json", type=Path, metavar="FILE", help="run, and keep everything here; what it has is not done again"
    )
    what.add_argument("--table", type=Path, metavar="FILE", help="show a file of --json as Markdown instead")
    whole.add_argument(
        "--wikiqa", type=Path, default=Path("runs/wikiqa"), help="what scripts/data/wikiqa.py wrote (runs/wikiqa)"
    )
    whole.add_argument("--sst2", type=Path, default=Path("runs/sst2"), help="folder of train, dev and test.jsonl.gz: "
                       "text and label a line (runs/sst2)")  # fmt: skip
    whole.add_argument("--sets", nargs="+", choices=tuple(METRICS), default=list(METRICS))
    whole.add_argument("--chains", nargs="+", choices=CHAINS, default=list(CHAINS))
    whole.add_argument(
        "--seeds", type=int, nargs="+", default=list(SEEDS), help="the first of them searches the settings"
    )
    whole.add_argument("--model", default=MODEL, help="another model, as model.source of a recipe")
    whole.add_argument("--work", type=Path, default=Path("runs/compare_modelopt"), help="folder of the dense models")
    for name, value in Budget().model_dump().items():
        if name.endswith("_steps"):
            whole.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"{value}")
    return whole


def compare(arguments: argparse.Namespace) -> None:
    """Run all that the file has not yet.

    Raises:
        SqatError: Model Optimizer or a data set is missing, or the file is of another budget.
    """
    check_output(arguments.json, ".json", force=True)
    budget = Budget(
        dense_steps=arguments.dense_steps, sparse_steps=arguments.sparse_steps, qat_steps=arguments.qat_steps
    )
    record = begin(arguments.json, budget, arguments.model)
    from scripts.benchmarks.beside_modelopt.comparing import Comparing, chains  # torch and all that, not for --table
    from scripts.benchmarks.beside_modelopt.sets import digests, open_trial

    warnings.filterwarnings("ignore", module="modelopt")  # versions of transformers, modules that are left alone
    folders = {name: getattr(arguments, name) for name in arguments.sets}
    comparing = Comparing(record, arguments.json, arguments.work, chains(tuple(arguments.chains)))
    for name, folder in folders.items():
        comparing.know(digests(name, folder))
    for seed in arguments.seeds:
        for name, folder in folders.items():
            trial = open_trial(name, folder, seed, budget, arguments.model)
            comparing.run(trial, first=seed == arguments.seeds[0])


def begin(path: Path, budget: Budget, model: str) -> Comparison:
    """The file as it is, or a new one."""
    versions = {name: found for name in PACKAGES if (found := version_of(name))}
    if not path.is_file():
        return Comparison(budget=budget, model=model, versions=versions, machine=describe_processor().name)
    old = read(path)
    if old.model != model:
        raise SqatError(
            f"the file has rows of {old.model}", "name another file, or that model", str(path), code="usage"
        )
    if old.budget != budget:
        raise SqatError(
            "the file has rows of another budget",
            "name another file, or the steps it was made with",
            str(path),
            code="usage",
        )
    if old.versions != versions:
        raise SqatError(
            "the file has rows of other versions",
            "name another file, or install what it names",
            str(path),
            code="usage",
        )
    return old


if __name__ == "__main__":
    sys.exit(main())
