"""Pictures of figures: matplotlib, where it is installed, without its global state."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from sqat.checkpoint.atomic_write import replace_file
from sqat.errors import SqatError


def check_plot(path: Path | None) -> None:
    """Tell before the work begins what would keep its picture from being written.

    Raises:
        SqatError: matplotlib is not installed, or does not know the kind.
    """
    if path is None:
        return
    known = sorted(blank_figure(1, 1).canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in known:
        raise SqatError(f"matplotlib writes no {path.suffix or 'file without an ending'}", "name a .png, .svg or .pdf",
                        str(path))  # fmt: skip


def blank_figure(width: float, height: float) -> Any:
    """A figure of a size in inches.

    Raises:
        SqatError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SqatError("matplotlib is not installed", "pip install 'sqat[report]'", "--plot") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure to a file of the kind that its ending names (PNG, SVG, PDF), whole or not at all.

    Raises:
        SqatError: matplotlib does not know the kind, or the file cannot be written.
    """
    check_plot(path)
    content = BytesIO()
    figure.savefig(content, dpi=150, format=path.suffix.removeprefix(".").lower())
    replace_file(path, content.getvalue())
