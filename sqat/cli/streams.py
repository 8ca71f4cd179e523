"""Standard output and standard error: their width, their encoding, and the messages that libraries write there."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from io import TextIOWrapper

from sqat.errors import escape_control

MIN_WIDTH, MAX_WIDTH = 40, 1000  # columns
LOG_HANDLER = "sqat"


def prepare_streams() -> None:
    """Bound the width of what is printed, and escape characters that the encoding lacks.

    A terminal may have no columns or one, and COLUMNS may say anything.
    """
    width = shutil.get_terminal_size().columns
    if "COLUMNS" in os.environ or width < MIN_WIDTH:
        os.environ["COLUMNS"] = str(min(max(width, MIN_WIDTH), MAX_WIDTH))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def show_log(level: int) -> None:
    """Show the libraries' messages from a level on, on standard error; each begins with the library's name."""
    root = logging.getLogger()
    for handler in [each for each in root.handlers if each.name == LOG_HANDLER]:
        root.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.name = LOG_HANDLER
    handler.setFormatter(logging.Formatter("%(levelname)s:%(name)s:%(message)s"))
    handler.addFilter(escape_record)
    handler.setLevel(level)
    root.addHandler(handler)
    root.setLevel(level)


def escape_record(record: logging.LogRecord) -> bool:
    """Escape a message of a library; its further lines are indented, so that none looks like a line of its own."""
    lines = record.getMessage().splitlines()
    record.msg, record.args = "\n    ".join(escape_control(line) for line in lines), ()
    record.name = escape_control(record.name)
    return True
