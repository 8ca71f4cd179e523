"""What errors say of names and values of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from sqat.errors import SqatError, nearest

MAX_COLUMNS = 10_000
GRADES_OF_TRUTH = {"true": 1.0, "false": 0.0}


def check_columns(names: Sequence[str], place: str) -> None:
    """Refuse too many columns, and two of one name, of which only one could be read."""
    if len(names) > MAX_COLUMNS:
        raise SqatError(f"{len(names)} columns, more than {MAX_COLUMNS}", "keep those that are needed", place,
                        code="invalid-data")  # fmt: skip
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise SqatError(
            f"the header has {listed(twice)} more than once",
            "give each column its own name",
            place,
            code="invalid-data",
        )


def listed(names: Iterable[str], most: int = 20) -> str:
    """Join names in quotes: ``"a", "b"``; of many, the first, each shortened."""
    names = sorted(map(str, names))
    shown = ", ".join(f'"{shorten(name)}"' for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def shorten(text: str, most: int = 40) -> str:
    """Return the beginning of a long text."""
    return f"{text[:most]}..." if len(text) > most else text


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a hint with the nearest of some names, or with all of them."""
    names = list(names)
    near = nearest(name, names)
    return f'did you mean "{near}"?' if near else f"there is {listed(names) or 'none at all'}"


def kind(value: object) -> str:
    """Describe a value in the words of the file: ``null``, ``true``, ``the number 3``, ``the text "x"``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"the number {value:.6g}"
    if isinstance(value, int):
        return "a whole number" if abs(value) < 1e18 else f"a whole number of {len(str(abs(value)))} digits"
    if isinstance(value, str):
        return f'the text "{shorten(value)}"'
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, list) else f"a {type(value).__name__}"
