"""The check that a folder is a run's, before any heavy import."""

from __future__ import annotations

from pathlib import Path

from sqat.checkpoint.manifest import MANIFEST, RECIPE
from sqat.errors import SqatError


def newest_stage(directory: Path) -> Path:
    """Return the folder of the stage that a run wrote last.

    Raises:
        SqatError: the folder holds no stage.
    """
    if not directory.is_dir():
        hint = "name the folder of a run, e.g. runs/recipe"
        raise SqatError("no such run folder", hint, str(directory), code="missing-file")
    manifests = [path for path in sorted(directory.glob(f"[0-9][0-9]-*/{MANIFEST}"))
                 if (path.parent / RECIPE).is_file()]  # fmt: skip
    if not manifests:
        hint = "name the folder above it" if (directory / MANIFEST).is_file() else "run the recipe first"
        raise SqatError("the folder holds no stages of a run", hint, str(directory), code="not-a-checkpoint")
    return max(manifests, key=lambda path: path.stat().st_mtime).parent
