"""matplotlib figures without its global state."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from sqat.checkpoint.outputs import MADE_BY, PLOTS, check_output
from sqat.errors import SqatError
from sqat.files.replace import replace_file


def check_plot(path: Path | None) -> None:
    """Check before the work starts that a plot can be written.

    Raises:
        SqatError: matplotlib is not installed, or see `check_output`.
    """
    if path is None:
        return
    blank_figure(1, 1)
    check_output(path, *PLOTS)


def blank_figure(width: float, height: float) -> Any:
    """Create a figure of a size in inches.

    Raises:
        SqatError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        hint = "pip install 'sqat[report]'"
        raise SqatError("matplotlib is not installed", hint, "--plot", code="missing-package") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure to a PNG, SVG or PDF file, atomically.

    Raises:
        SqatError: see `check_plot`; or the file cannot be written.
    """
    check_plot(path)
    content, ending = BytesIO(), path.suffix.removeprefix(".").lower()
    figure.savefig(content, dpi=150, format=ending, metadata={"Software" if ending == "png" else "Creator": MADE_BY})
    replace_file(path, content.getvalue())
