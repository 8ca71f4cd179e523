"""What a run changes in its folder, checked first: nothing that sqat did not write, nothing through a link."""

from __future__ import annotations

from pathlib import Path

from sqat.checkpoint.manifest import MANIFEST
from sqat.errors import SqatError
from sqat.files.read import read_json
from sqat.files.replace import check_place, check_replaceable, not_ours
from sqat.pipeline.bootstrap import BOOTSTRAP_FILE
from sqat.pipeline.quality_gates import rejected_folder
from sqat.pipeline.result_files import LOG_FILE, REHEARSED_FILE, RESULTS_FILE
from sqat.training.metrics_log import METRICS_FILE
from sqat.training.tracking import FOLDER as TRACKING


def check_run_folder(folder: Path) -> None:
    """Refuse a run folder whose files a run would change though they are not its own.

    Raises:
        SqatError: it names what lies there.
    """
    for name in (LOG_FILE, METRICS_FILE, REHEARSED_FILE, RESULTS_FILE, BOOTSTRAP_FILE):
        check_place(folder / name, "file")
    check_place(folder / TRACKING, "folder")
    if not holds_results(folder / RESULTS_FILE):
        raise not_ours(folder / RESULTS_FILE, "is no results file of sqat")


def check_stage_folder(directory: Path) -> None:
    """Refuse a stage's places that hold something else: its folder, the one for rejected results, its state.

    Raises:
        SqatError: it names what lies there.
    """
    for place in (directory, rejected_folder(directory)):
        check_replaceable(place, MANIFEST)
    check_place(state_folder(directory), "folder")


def state_folder(directory: Path) -> Path:
    """Return the folder of the state from which a stage resumes."""
    return directory.with_name(f".{directory.name}.state")


def holds_results(path: Path) -> bool:
    """Whether a file is missing, cut short, or holds what the results table remembers."""
    try:
        entries = read_json(path, root=path.parent)
    except SqatError:
        return True
    return isinstance(entries, dict) and all(isinstance(entry, dict) and "key" in entry for entry in entries.values())
