"""The commit that a measurement is of."""

from __future__ import annotations

import subprocess
from pathlib import Path


def current_commit() -> str:
    """Return the commit of the working tree, with a plus where it is changed."""
    return subprocess.run(["git", "describe", "--always", "--abbrev=9", "--dirty=+"], capture_output=True, text=True,
                          check=True, cwd=Path(__file__).parent).stdout.strip()  # fmt: skip
