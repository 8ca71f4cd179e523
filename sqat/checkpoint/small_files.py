"""Small files that are no checkpoints: written whole or not at all, read as the JSON object they may hold."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqat.checkpoint.disk import write_synced
from sqat.errors import SqatError


def replace_file(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it; folders on the way are made.

    Raises:
        SqatError: it cannot be written; what was there stays as it was.
    """
    fresh = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_synced(fresh, content)
        fresh.replace(path)
    except OSError as error:
        with suppress(OSError):
            fresh.unlink()
        raise SqatError(f"cannot be written: {error.strerror or error}", "free space, or choose another place",
                        str(path)) from error  # fmt: skip


def check_json(path: Path | None) -> None:
    """Refuse to write figures over what is no JSON: `bench --json model.onnx` would cost the model.

    Raises:
        SqatError: the file's name does not end in .json.
    """
    if path is not None and path.suffix != ".json":
        raise SqatError(f"figures are written as JSON, not to a {path.suffix or 'file without an ending'}",
                        "name a .json file", str(path))  # fmt: skip


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is absent, damaged or something else."""
    try:
        parsed: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}
