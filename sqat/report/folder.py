"""Whether a folder is a run's: looked at before anything that a report is made with is imported."""

from __future__ import annotations

from pathlib import Path

from sqat.checkpoint.manifest import MANIFEST, RECIPE
from sqat.errors import SqatError


def newest_stage(directory: Path) -> Path:
    """The folder of the stage that a run wrote last.

    Raises:
        SqatError: no stage is there.
    """
    if not directory.is_dir():
        raise SqatError("no such run folder", "name the folder of a run, e.g. runs/recipe", str(directory))
    found = sorted(path for path in directory.glob(f"[0-9][0-9]-*/{MANIFEST}") if (path.parent / RECIPE).is_file())
    if not found:
        hint = "name the folder above it" if (directory / MANIFEST).is_file() else "run the recipe first"
        raise SqatError("the folder holds no stages of a run", hint, str(directory))
    return max(found, key=lambda path: path.stat().st_mtime).parent
