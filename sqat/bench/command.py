"""`sqat bench`: checks the options before anything is opened, measures, and writes the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqat.bench.candidates import Candidate, find_candidates, read_artifacts
from sqat.bench.measure import Grid, measure
from sqat.bench.report import Report
from sqat.bench.rounds import Effort
from sqat.errors import SqatError
from sqat.files.replace import replace_file
from sqat.hardware.machine import describe_processor
from sqat.progress import Reporter


@dataclass(frozen=True)
class Options:
    """Options of `sqat bench` as given; ``within`` in percent."""

    artifacts: Sequence[str]
    batch: str = "1,8"
    sequence: str = ""
    threads: int = 1
    baseline: str | None = None
    backends: Sequence[str] = ()
    rounds: int = 10
    min_seconds: float = 0.05
    within: float = 2.0
    max_seconds: float = 60.0


def run_bench(options: Options, reporter: Reporter) -> Report:
    """Measure the artifacts.

    Raises:
        SqatError: an option is wrong, or an artifact cannot be read or run.
    """
    grid = Grid(numbers(options.batch, "--batch"), numbers(options.sequence, "--sequence") if options.sequence else ())
    effort = effort_of(options)
    if options.threads < 0:
        raise SqatError(f"must be 0 or more, got {options.threads}", place="--threads", code="usage")
    candidates, skipped = find_candidates(read_artifacts(options.artifacts), options.backends)
    baseline = find_baseline(candidates, options.baseline)
    threads = options.threads or describe_processor().cores
    return measure(candidates, baseline, grid, effort, threads, reporter, skipped, required=options.backends)


def effort_of(options: Options) -> Effort:
    """Return how long to measure."""
    values = {
        "--rounds": options.rounds,
        "--min-seconds": options.min_seconds,
        "--within": options.within,
        "--max-seconds": options.max_seconds,
    }
    for flag, value in values.items():
        if not 0 < value < float("inf"):
            raise SqatError(f"must be above 0, got {value:g}", place=flag, code="usage")
    return Effort(options.rounds, options.min_seconds, options.within / 100, options.max_seconds)


def numbers(text: str, flag: str) -> list[int]:
    """Parse whole numbers above 0 separated by commas; each counts once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        problem = f"must be whole numbers above 0 separated by commas, got {text!r}"
        raise SqatError(problem, place=flag, code="usage")
    return list(dict.fromkeys(int(part) for part in parts))


def find_baseline(candidates: Sequence[Candidate], name: str | None) -> str:
    """Return the baseline: the first candidate, or the one named ``label`` or ``label@backend``."""
    if name is None:
        return candidates[0].name
    names = [each.name for each in candidates if name in (each.name, each.artifact.label)]
    if name in names or len(names) == 1:
        return name if name in names else names[0]
    hint = f"choose one of {', '.join(names or [each.name for each in candidates])}"
    raise SqatError(f"{len(names) or 'no'} candidates are called {name!r}", hint, "--baseline", code="unknown-name")


def write_report(report: Report, json_file: Path | None, plot: Path | None) -> None:
    """Write the report as JSON and as a plot, to the files that are given."""
    if json_file is not None:
        replace_file(json_file, f"{report.model_dump_json(indent=1)}\n".encode())
    if plot is not None:
        from sqat.bench.plot import save_plot

        save_plot(report, plot)
