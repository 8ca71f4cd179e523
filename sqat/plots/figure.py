"""matplotlib figures without its global state."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from sqat.errors import SqatError
from sqat.files.replace import replace_file


def check_plot(path: Path | None) -> None:
    """Check before the work starts that a plot can be written.

    Raises:
        SqatError: matplotlib is not installed, or does not write the format.
    """
    if path is None:
        return
    formats = sorted(blank_figure(1, 1).canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in formats:
        problem = f"matplotlib writes no {path.suffix or 'file without an ending'}"
        raise SqatError(problem, "name a .png, .svg or .pdf", str(path), code="usage")


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
        SqatError: matplotlib does not write the format, or the file cannot be written.
    """
    check_plot(path)
    content = BytesIO()
    figure.savefig(content, dpi=150, format=path.suffix.removeprefix(".").lower())
    replace_file(path, content.getvalue())
