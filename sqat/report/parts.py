"""Parts of a report: what cannot be read or drawn is left out, and the page says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sqat.errors import SqatError, escape_control, first_line

Part = TypeVar("Part")
# What readers and figures raise at files that are damaged, or hold what no run writes.
FAULTS = (SqatError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
LONGEST = 200  # characters of a reason


def read_part(missing: list[str], name: str, default: Part, read: Callable[[], Part]) -> Part:
    """Return what ``read`` returns, or else the default, with a line in ``missing``."""
    try:
        return read()
    except FAULTS as error:
        reason = escape_control(str(error) if isinstance(error, SqatError) else first_line(error))
        missing.append(f"{name}: left out, since it cannot be read or drawn: {reason[:LONGEST]}")
        return default
