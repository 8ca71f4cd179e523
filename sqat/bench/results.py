"""How fast the results of a run are: all files on one batch of its own test rows, in every engine of this machine."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from sqat.bench.candidates import find_candidates, read_artifact
from sqat.bench.inputs import Feeds
from sqat.bench.measure import check_threads, measure_feeds
from sqat.bench.report import Report
from sqat.bench.rounds import Effort
from sqat.checkpoint.outputs import check_output
from sqat.data.rows import SplitName
from sqat.errors import SqatError
from sqat.evaluation.artifacts import config_of
from sqat.files.read import read_bytes
from sqat.files.replace import replace_file
from sqat.models.loading import load_processor
from sqat.pipeline.results import Results
from sqat.progress import Reporter
from sqat.recipe.schema import LoadedRecipe
from sqat.tasks.splits import Splits

BENCH_FILE = "bench.json"  # in the run folder, of the form that `sqat bench --json` writes


def time_results(loaded: LoadedRecipe, results: Results, reporter: Reporter) -> Report | None:
    """Time the results as the recipe's ``latency`` says; files that have not changed are not timed again.

    Returns:
        the report, which is also `BENCH_FILE` in the run folder; None if there is nothing to time.
    """
    config, place = loaded.recipe.latency, results.directory / BENCH_FILE
    if config is None or not results.rows:
        return None
    feeds = first_batch(loaded, results, config.batch_size)
    size = feeds["input_ids"].shape if "input_ids" in feeds else (len(next(iter(feeds.values()))), None)
    if (known := read_current(place, results, size, config.threads)) is not None:
        return known
    artifacts = [read_artifact(row.label, row.path) for row in results.rows]
    candidates, skipped = find_candidates(artifacts, ())
    effort = Effort(seconds=0.0, limit=config.max_seconds)
    baseline = candidates[0].name
    report = measure_feeds(candidates, baseline, [(size, feeds)], effort, config.threads, reporter, skipped)
    replace_file(place, f"{report.model_dump_json(indent=1)}\n".encode())
    return report


def check_latency(loaded: LoadedRecipe) -> None:
    """Refuse before a run what its timing would refuse at the end.

    Raises:
        SqatError: more threads than cores, or no command of sqat wrote the file in the place of `BENCH_FILE`.
    """
    if loaded.recipe.latency is not None:
        check_threads(loaded.recipe.latency.threads, "latency.threads")
        check_output(loaded.run_directory / BENCH_FILE, ".json")


def first_batch(loaded: LoadedRecipe, results: Results, batch_size: int) -> Feeds:
    """Return the inputs of the first rows that the results were measured on."""
    splits = Splits(loaded.recipe, loaded.path.parent)
    processor = load_processor(config_of(results.rows[0].path).parent)
    split: SplitName = "test" if results.split == "test" else "dev"
    rows = splits.prepared(split, processor)
    batch = processor.collate(rows, list(range(min(batch_size, len(rows)))))
    return {name: tensor.numpy() for name, tensor in batch.inputs.items()}


def read_current(place: Path, results: Results, size: tuple[int, int | None], threads: int) -> Report | None:
    """Return the report of an earlier call if it is of the same rows, files, input size and threads; else None."""
    try:
        report = Report.model_validate_json(read_bytes(place, root=place.parent))
    except (SqatError, ValidationError):
        return None
    paths = {row.label: row.path for row in results.rows}
    measured = {(name.rpartition("@")[0], Path(subject.path)) for name, subject in report.subjects.items()}
    without_engine = {name.rpartition("@")[0] for name in report.left_out} - {label for label, _ in measured}
    is_same = measured == {(label, path.resolve()) for label, path in paths.items() if label not in without_engine}
    is_same = is_same and [(s.batch, s.sequence) for s in report.settings] == [size] and report.threads == threads
    written = place.stat().st_mtime
    return report if is_same and all(newest_change(path) < written for path in paths.values()) else None


def newest_change(path: Path) -> float:
    """Return when a file, or a file in a folder, was written last."""
    files = [path, *path.iterdir()] if path.is_dir() else [path]
    return max(file.stat().st_mtime for file in files)


def fastest(report: Report, label: str) -> tuple[str, float] | None:
    """Return the engine in which a result is fastest, and its median milliseconds; None if none ran it."""
    times = {subject.backend: report.settings[0].rows[name].p50_ms.median
             for name, subject in report.subjects.items() if name == f"{label}@{subject.backend}"}  # fmt: skip
    return min(times.items(), key=lambda each: each[1], default=None)
