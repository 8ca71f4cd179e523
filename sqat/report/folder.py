"""The check that a folder is a run's, before any heavy import."""

from __future__ import annotations

from pathlib import Path

from sqat.checkpoint.manifest import MANIFEST, RECIPE, load_manifest
from sqat.errors import SqatError


def newest_stage(directory: Path) -> Path:
    """Return the folder of the stage that a run wrote last, if possible one whose manifest is sound.

    Raises:
        SqatError: the folder holds no stage.
    """
    if not directory.is_dir():
        hint = "name the folder of a run, e.g. runs/recipe"
        raise SqatError("no such run folder", hint, str(directory), code="missing-file")
    manifests = [path for path in sorted(directory.glob(f"[0-9][0-9]-*/{MANIFEST}"))
                 if (path.parent / RECIPE).is_file() and not path.parent.is_symlink()]  # fmt: skip
    if not manifests:
        hint = "name the folder above it" if (directory / MANIFEST).is_file() else "run the recipe first"
        raise SqatError("the folder holds no stages of a run", hint, str(directory), code="not-a-checkpoint")
    newest_first = sorted(manifests, key=lambda path: -path.stat().st_mtime)
    return next((path.parent for path in newest_first if is_sound(path.parent)), newest_first[0].parent)


def is_sound(directory: Path) -> bool:
    """Whether a stage's manifest can be read."""
    try:
        load_manifest(directory)
    except SqatError:
        return False
    return True
