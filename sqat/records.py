"""Records out of rows: every column checked, texts and labels under their own names, candidates flattened.

A row is a dict as the file has it; a record has text, text_pair, label, group and place as `sqat.data` says.
A mistake is told with the row's place, what was found, and the recipe key that names the column. Left out:
defaults; a value that is not there is a mistake.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import islice
from typing import Any

from sqat.errors import SqatError
from sqat.readers import Placed, Row, kind, listed
from sqat.recipe import Columns, RelevanceTask, Task

Record = dict[str, Any]


def records_of(source: Iterator[Placed], columns: Columns, task: Task, limit: int | None) -> Iterator[Record]:
    """Yield the records of a split's rows, at most ``limit`` (queries, for relevance).

    Raises:
        SqatError: at the first bad row, with its place.
    """
    if isinstance(task, RelevanceTask):
        return _relevance(source, columns, limit)
    return islice(_texts(source, columns, task), limit)


def _texts(source: Iterator[Placed], columns: Columns, task: Task) -> Iterator[Record]:
    label_of = class_of if task.name == "classification" else number_of
    for place, row in source:
        record: Record = {"text": text_of(row, columns.text, "text", place)}
        if columns.text_pair is not None:
            record["text_pair"] = text_of(row, columns.text_pair, "text_pair", place)
        yield record | {"label": label_of(row, columns.label, "label", place), "place": place}


def _relevance(source: Iterator[Placed], columns: Columns, limit: int | None) -> Iterator[Record]:
    """Flatten candidates and number the queries as they are first seen; the first ``limit`` are kept.

    Reading stops early only where a query cannot come back, which no file promises: the whole file is read.
    """
    numbers: dict[str, int] = {}
    for place, row in source:
        query = text_of(row, columns.query, "query", place)
        key = query if columns.group is None else class_of(row, columns.group, "group", place)
        if key not in numbers and len(numbers) == limit:
            continue
        group = numbers.setdefault(key, len(numbers))
        for passage, within in _passages(row, columns, place):
            yield {
                "text": query,
                "text_pair": text_of(passage, columns.passage, "passage", place, within),
                "label": grade_of(passage, columns.label, "label", place, within),
                "group": group,
                "place": place,
            }


def _passages(row: Record, columns: Columns, place: str) -> Iterator[tuple[Record, str]]:
    """The row itself, or each of its candidates, with what it is called in an error."""
    if columns.candidates is None:
        yield row, ""
        return
    candidates = field(row, columns.candidates, "candidates", place)
    if not isinstance(candidates, list):
        problem = f'"{columns.candidates}" must be a list of objects, got {kind(candidates)}'
        raise SqatError(problem, "for one passage a row leave data.columns.candidates out", place)
    if not candidates:
        raise SqatError(f'"{columns.candidates}" is empty', "give the query a passage or leave the row out", place)
    for number, candidate in enumerate(candidates):
        within = f"{columns.candidates}[{number}]"
        if not isinstance(candidate, dict):
            hint = f'with "{columns.passage}" and "{columns.label}" in it'
            raise SqatError(f'"{within}" must be an object, got {kind(candidate)}', hint, place)
        yield candidate, f"{within}."


def field(row: Row, column: str, key: str, place: str, within: str = "") -> Any:
    """Value of a column that must be there.

    Args:
        column: the column's name in the file.
        key: the recipe key that names it, for the hint.
        within: what the row is part of, e.g. ``candidates[2].``.

    Raises:
        SqatError: no such column; the hint has the nearest one.
    """
    if column in row:
        return row[column]
    near = get_close_matches(column, list(row), n=1)
    hint = f'did you mean "{near[0]}"?' if near else f"there is {listed(list(row)) or 'none at all'}"
    raise SqatError(f'no column "{within}{column}"', f"{hint} (data.columns.{key})", place)


def text_of(row: Row, column: str, key: str, place: str, within: str = "") -> str:
    """Text of a column: not empty, nothing but spaces counts as empty.

    Raises:
        SqatError: missing, not a text, empty, or half of a surrogate pair (no UTF-8 for it).
    """
    value = field(row, column, key, place, within)
    name = f'"{within}{column}"'
    if not isinstance(value, str):
        raise SqatError(f"{name} must be a text, got {kind(value)}", f"set data.columns.{key}", place)
    if not value.strip():
        raise SqatError(f"{name} is empty", "give it a text or leave the row out", place)
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise SqatError(f"{name} holds half of a surrogate pair", "write the character whole", place)
    return value


def number_of(row: Row, column: str, key: str, place: str, within: str = "") -> float:
    """Number of a column; digits in a text count as a number (CSV knows nothing else).

    Raises:
        SqatError: missing, null, a truth value, not a number, or not finite.
    """
    value = field(row, column, key, place, within)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise SqatError(
            f'"{within}{column}" must be a finite number, got {kind(value)}',
            f"mend the row or set data.columns.{key}",
            place,
        )
    return number


def grade_of(row: Row, column: str, key: str, place: str, within: str = "") -> float:
    """Relevance grade of a column: a number, 0 for not relevant.

    Raises:
        SqatError: not a number, or below 0.
    """
    grade = number_of(row, column, key, place, within)
    if grade < 0:
        raise SqatError(f'"{within}{column}" is {grade:g}, a grade must be 0 or more', "0 is not relevant", place)
    return grade


def class_of(row: Row, column: str, key: str, place: str, within: str = "") -> str:
    """Class of a column as text: whole numbers become their digits, so ``1`` in JSON is ``1`` in CSV.

    Raises:
        SqatError: missing, null, empty, a truth value, a fraction, or not a single value.
    """
    value = field(row, column, key, place, within)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value
    got = "an empty text" if isinstance(value, str) else kind(value)
    raise SqatError(
        f'"{within}{column}" must be a class (a text or a whole number), got {got}',
        f"mend the row or set data.columns.{key}",
        place,
    )
