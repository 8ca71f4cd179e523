"""The words of the command line as a measurement: checked before anything is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqat.bench.candidates import Candidate, candidates_of, read_artifacts
from sqat.bench.measuring import Grid, Report, measure
from sqat.bench.rounds import Effort
from sqat.checkpoint.atomic_write import replace_file
from sqat.errors import SqatError
from sqat.hardware.machine import describe_processor
from sqat.progress import Reporter


@dataclass(frozen=True)
class Options:
    """Flags of `sqat bench` as they were typed; ``within`` in percent."""

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
    """Measure what the options name.

    Raises:
        SqatError: a flag that cannot be, an artifact that cannot be read or run.
    """
    grid = Grid(numbers(options.batch, "--batch"), numbers(options.sequence, "--sequence") if options.sequence else ())
    effort = effort_of(options)
    if options.threads < 0:
        raise SqatError(f"must be 0 or more, got {options.threads}", place="--threads")
    found, left_out = candidates_of(read_artifacts(options.artifacts), options.backends)
    baseline = find_baseline(found, options.baseline)
    threads = options.threads or describe_processor().cores
    return measure(found, baseline, grid, effort, threads, reporter, left_out, needed=options.backends)


def effort_of(options: Options) -> Effort:
    """How long to measure.

    Raises:
        SqatError: a number that is not above zero.
    """
    values = {
        "--rounds": options.rounds,
        "--min-seconds": options.min_seconds,
        "--within": options.within,
        "--max-seconds": options.max_seconds,
    }
    for flag, value in values.items():
        if not 0 < value < float("inf"):
            raise SqatError(f"must be above 0, got {value:g}", place=flag)
    return Effort(options.rounds, options.min_seconds, options.within / 100, options.max_seconds)


def numbers(text: str, flag: str) -> list[int]:
    """Whole numbers above zero, separated by commas, each once.

    Raises:
        SqatError: they are not.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise SqatError(f"must be whole numbers above 0 separated by commas, got {text!r}", place=flag)
    return list(dict.fromkeys(int(part) for part in parts))


def find_baseline(candidates: Sequence[Candidate], wanted: str | None) -> str:
    """Name of the candidate that others are compared with: the first, or the one called ``label`` or ``label@backend``.

    Raises:
        SqatError: none is called so, or several.
    """
    if wanted is None:
        return candidates[0].name
    names = [each.name for each in candidates if wanted in (each.name, each.artifact.label)]
    if wanted in names or len(names) == 1:
        return wanted if wanted in names else names[0]
    shown = ", ".join(names or [each.name for each in candidates])
    raise SqatError(f"{len(names) or 'no'} candidates are called {wanted!r}", f"choose one of {shown}", "--baseline")


def write_report(report: Report, json_file: Path | None, plot: Path | None) -> None:
    """Write the figures as JSON and as a plot, where files are named.

    Raises:
        SqatError: a file cannot be written, or the plot not be drawn here.
    """
    if json_file is not None:
        replace_file(json_file, f"{report.model_dump_json(indent=1)}\n".encode())
    if plot is not None:
        from sqat.bench.plot import save_plot

        save_plot(report, plot)
