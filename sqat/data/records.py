"""Records out of rows: every column checked, texts and labels under their own names, candidates flattened.

A row is a dict as the file has it; a record has text, text_pair, label, group and place as `sqat.data.dataset` says,
and of an image its pixels and size. A mistake is told with the row's place, what was found, and the recipe key that
names the column. Left out: defaults; a value that is not there is a mistake.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from sqat.data.image_files import picture_of, same_size
from sqat.data.text_files import Placed, Row, kind, listed
from sqat.errors import SqatError
from sqat.recipe.inputs import Columns
from sqat.recipe.tasks import RelevanceTask, RetrievalTask, TaskSettings

Record = dict[str, Any]

HIGHEST_GRADE = 100
QUERY, LOOSE = -1.0, -2.0  # labels of a retrieval row that is no passage of a query: the query, a text without one


def records_of(
    source: Iterator[Placed], columns: Columns, task: TaskSettings, limit: int | None, folder: Path | None = None
) -> Iterator[Record]:
    """Yield the records of a split's rows, at most ``limit`` (queries, for relevance).

    Args:
        folder: of the file that has the rows, in which the image files they name must lie; None: they name none.

    Raises:
        SqatError: at the first bad row, with its place.
    """
    if isinstance(task, RelevanceTask):
        return _relevance(source, columns, limit, task.highest)
    if isinstance(task, RetrievalTask):
        return _retrieval(source, columns, limit)
    if task.name == "image-classification":
        return islice(_images(source, columns, folder), limit)
    if task.name == "text-to-image":
        return islice(_captioned(source, columns, folder), limit)
    return islice(_texts(source, columns, task), limit)


def _texts(source: Iterator[Placed], columns: Columns, task: TaskSettings) -> Iterator[Record]:
    label_of = LABELS[task.name]
    for place, row in source:
        record: Record = {"text": text_of(row, columns.text, "text", place)}
        if columns.text_pair is not None:
            record["text_pair"] = text_of(row, columns.text_pair, "text_pair", place)
        yield record | {"label": label_of(row, columns.label, "label", place), "place": place}


def _images(source: Iterator[Placed], columns: Columns, folder: Path | None) -> Iterator[Record]:
    """Pictures with a class."""
    for place, row, record in _pixels(source, columns, folder):
        yield record | {"label": class_of(row, columns.label, "label", place), "place": place}


def _captioned(source: Iterator[Placed], columns: Columns, folder: Path | None) -> Iterator[Record]:
    """Pictures with a caption, and no label."""
    for place, row, record in _pixels(source, columns, folder):
        yield record | {"text": text_of(row, columns.text, "text", place), "place": place}


def _pixels(source: Iterator[Placed], columns: Columns, folder: Path | None) -> Iterator[tuple[str, Row, Record]]:
    """Place and row of each image, with its pixels as bytes and the size that all rows share."""
    first = None
    for place, row in source:
        picture = picture_of(field(row, columns.image, "image", place), columns.image, folder, place)
        first = picture if first is None else first
        height, width, channels = same_size(picture, first, columns.image, place).shape
        yield place, row, {"pixels": picture.tobytes(), "height": height, "width": width, "channels": channels}


def _relevance(
    source: Iterator[Placed], columns: Columns, limit: int | None, highest: float | None
) -> Iterator[Record]:
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
                "label": grade_of(passage, columns.label, "label", place, within, highest),
                "group": group,
                "place": place,
            }


def _retrieval(source: Iterator[Placed], columns: Columns, limit: int | None) -> Iterator[Record]:
    """One record a text: each query before its passages, and at the end the texts that have no query.

    A row with neither a query nor a label is such a text. Queries are numbered and limited as for relevance.
    """
    asked: dict[str, tuple[int, str, str]] = {}
    loose: list[Record] = []
    for place, row in source:
        if columns.query not in row and columns.label not in row and columns.passage in row:
            loose.append({"text": text_of(row, columns.passage, "passage", place), "label": LOOSE, "place": place})
            continue
        query = text_of(row, columns.query, "query", place)
        key = query if columns.group is None else class_of(row, columns.group, "group", place)
        if key not in asked:
            if len(asked) == limit:
                continue
            asked[key] = (len(asked), query, place)
            yield {"text": query, "label": QUERY, "group": asked[key][0], "place": place}
        group, known, first = asked[key]
        if query != known:
            problem = f'"{columns.group}" is "{key}", which is another query at {first}'
            raise SqatError(problem, "give each query its own", place)
        for passage, within in _passages(row, columns, place):
            text = text_of(passage, columns.passage, "passage", place, within)
            grade = grade_of(passage, columns.label, "label", place, within)
            yield {"text": text, "label": grade, "group": group, "place": place}
    for group, record in enumerate(loose, len(asked)):
        yield record | {"group": group}


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


def grade_of(row: Row, column: str, key: str, place: str, within: str = "", highest: float | None = None) -> float:
    """Relevance grade of a column: a number, 0 for not relevant.

    Raises:
        SqatError: not a number, below 0, or above ``highest`` (of the recipe, else `HIGHEST_GRADE`).
    """
    grade = number_of(row, column, key, place, within)
    if grade < 0:
        raise SqatError(f'"{within}{column}" is {grade:g}, a grade must be 0 or more', "0 is not relevant", place)
    if highest is not None and grade > highest:
        problem = f'"{within}{column}" is {grade:g}, above task.highest, {highest:g}'
        raise SqatError(problem, "mend the row or raise task.highest", place)
    if grade > HIGHEST_GRADE:
        problem = f'"{within}{column}" is {grade:g}, a grade must be {HIGHEST_GRADE} or less'
        raise SqatError(problem, "its gain in NDCG is 2^grade: number the grades 0, 1, 2, ...", place)
    return grade


def share_of(row: Row, column: str, key: str, place: str, within: str = "") -> float:
    """A ranker's figure of a column: a number from 0 to 1.

    Raises:
        SqatError: not a number, or outside.
    """
    share = number_of(row, column, key, place, within)
    if not 0 <= share <= 1:
        problem = f'"{within}{column}" is {share:g}, but how well a query does is a number from 0 to 1'
        raise SqatError(problem, f"divide it by its highest value, or set data.columns.{key}", place)
    return share


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


LABELS = {"classification": class_of, "regression": number_of, "query-performance": share_of}
