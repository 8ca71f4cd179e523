"""Guess the task and the columns of a data file from its first rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqat.data.text_files import Row
from sqat.data.wording import GRADES_OF_TRUTH, listed, shorten
from sqat.errors import SqatError

RANKING_TASKS = ("relevance", "retrieval")  # both read the same rows; relevance is the guess
# Column names that are clear by themselves, the clearest first.
LABELS = (
    *("label", "score", "grade", "relevance", "relevant", "similarity", "rating", "stars"),
    *("target", "class", "category", "intent", "sentiment", "y"),
)
QUERIES = ("query", "question", "search", "q")
PASSAGES = ("passage", "document", "doc", "text", "answer", "body", "content")
GROUPS = ("qid", "query_id", "question_id", "group", "group_id")
PAIRS = (
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("sentence_a", "sentence_b"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "answer"),
)


@dataclass(frozen=True)
class Guess:
    """The guess about a data file.

    Attributes:
        columns: keys of data.columns -> names in the file.
        reason: why this task, for the user.
        max_length: tokens that hold 95 % of the texts.
    """

    task: str
    columns: dict[str, str]
    reason: str
    max_length: int


def guess_task(rows: Sequence[Row], task: str | None, place: str) -> Guess:
    """Guess task and columns from names and values of the first rows.

    Args:
        task: the task if the user has named it.
        place: the file, for error messages.

    Raises:
        SqatError: no column fits.
    """
    if task in RANKING_TASKS:
        return replace(guess_ranking(rows, place), task=task)
    nested = next((key for key, value in rows[0].items() if is_candidates(value)), None)
    if nested is not None and task is None:
        return guess_nested(rows, nested, place)
    label = find_label(rows, list(rows[0]), place)
    values = [row.get(label) for row in rows]
    texts = find_texts(rows, exclude=label)
    if not texts:
        raise SqatError("no text column", f"there is {listed(rows[0])}", place, code="invalid-data")
    query = first_name(QUERIES, texts)
    repeated = query is not None and len({str(row.get(query)) for row in rows}) < 0.7 * len(rows)
    if task is None and repeated and len(texts) > 1 and are_numbers(values):
        return guess_flat(rows, query or texts[0], texts, label, place)
    columns = find_pair(texts) | {"label": label}
    lengths = [sum(len(str(row.get(key, ""))) for key in columns.values()) for row in rows]
    if task == "regression" or (task is None and are_scores(values)):
        reason = f"{label!r} holds numbers such as {shorten(str(values[0]))}"
        return Guess("regression", columns, reason, tokens_for(lengths))
    reason = f"{label!r} has {len(set(map(str, values)))} different values in the first {len(rows)} rows"
    return Guess("classification", columns, reason, tokens_for(lengths))


def guess_ranking(rows: Sequence[Row], place: str) -> Guess:
    """Guess the columns of queries and passages, in lists of candidates or one pair per row."""
    nested = next((key for key, value in rows[0].items() if is_candidates(value)), None)
    if nested is not None:
        return guess_nested(rows, nested, place)
    label = find_label(rows, list(rows[0]), place)
    texts = find_texts(rows, exclude=label)
    if not texts:
        raise SqatError("no text column", f"there is {listed(rows[0])}", place, code="invalid-data")
    return guess_flat(rows, first_name(QUERIES, texts) or texts[0], texts, label, place)


def guess_nested(rows: Sequence[Row], nested: str, place: str) -> Guess:
    """Guess the columns of rows that hold a list of candidates."""
    candidates = [candidate for row in rows if is_candidates(row.get(nested)) for candidate in row[nested]]
    label = find_label(candidates, list(candidates[0]), place)
    passages, texts = find_texts(candidates, exclude=label), find_texts(rows, exclude=nested)
    if not passages or not texts:
        problem = f"{nested!r} looks like candidates, but there is no text beside or in it"
        raise SqatError(problem, place=place, code="invalid-data")
    query = first_name(QUERIES, texts) or texts[0]
    columns = {
        "query": query,
        "candidates": nested,
        "passage": first_name(PASSAGES, passages) or passages[0],
        "label": label,
    }
    group = first_name(GROUPS, list(rows[0]))
    longest = max(len(str(row.get(query, ""))) for row in rows)
    lengths = [longest + len(str(candidate.get(columns["passage"], ""))) for candidate in candidates]
    grouped = {"group": group} if group else {}
    return Guess("relevance", columns | grouped, f"{nested!r} holds a list of candidates", tokens_for(lengths))


def guess_flat(rows: Sequence[Row], query: str, texts: list[str], label: str, place: str) -> Guess:
    """Guess the columns of rows that hold one passage each."""
    passages = [key for key in texts if key != query]
    if not passages:
        hint = f"there is {listed(rows[0])}"
        raise SqatError("no column of passages beside the query", hint, place, code="invalid-data")
    passage = first_name(PASSAGES, passages) or passages[0]
    group = first_name(GROUPS, list(rows[0]))
    columns = {"query": query, "passage": passage, "label": label, **({"group": group} if group else {})}
    lengths = [len(str(row.get(query, ""))) + len(str(row.get(passage, ""))) for row in rows]
    return Guess("relevance", columns, f"{query!r} repeats with different {passage!r}", tokens_for(lengths))


def is_candidates(value: Any) -> bool:
    """Return whether a value is a list of rows."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and item for item in value)


def first_name(names: Sequence[str], columns: Sequence[str]) -> str | None:
    """Return the column that has the first of several names, whatever its case."""
    lower = {column.lower(): column for column in columns}
    return next((lower[name] for name in names if name in lower), None)


def find_label(rows: Sequence[Row], columns: list[str], place: str) -> str:
    """Return the label column: by its name, or else numbers, or else few different values."""
    named = first_name(LABELS, columns)
    if named is not None:
        return named
    numeric = [key for key in columns if not is_id(key) and are_numbers([row.get(key) for row in rows])]
    counts = {key: len({str(row.get(key)) for row in rows}) for key in columns if not is_id(key)}
    few = [key for key, count in counts.items() if 2 <= count <= max(2, len(rows) // 10)]
    if not numeric and not few:
        hint = f'rename it to "label"; there is {listed(columns)}'
        raise SqatError("no column looks like a label", hint, place, code="invalid-data")
    return (numeric or few)[0]


def find_texts(rows: Sequence[Row], exclude: str) -> list[str]:
    """Return the text columns: not ids, not names of the label; many of their values have spaces."""
    columns = []
    for key in rows[0]:
        values = [value for row in rows if isinstance(value := row.get(key), str)]
        prose = sum(" " in value.strip() for value in values) > len(values) / 4
        if (
            key != exclude
            and not is_id(key)
            and not key.startswith(exclude)
            and values
            and (prose or key.lower() in ("text", *QUERIES))
        ):
            columns.append(key)
    return columns


def is_id(column: str) -> bool:
    """Return whether a column is an id by its name."""
    return re.fullmatch(r"(id|idx|index|uid|guid|.*[_-]id|[a-z]id)", column.lower()) is not None


def find_pair(texts: list[str]) -> dict[str, str]:
    """Return the columns of a pair of texts, or of one text."""
    for names in PAIRS:
        pair = [first_name((name,), texts) for name in names]
        if pair[0] and pair[1]:
            return {"text": pair[0], "text_pair": pair[1]}
    return {"text": first_name(PASSAGES, texts) or texts[0]}


def parse_numbers(values: Sequence[Any]) -> list[float] | None:
    """Parse values as numbers, without true and false, which are grades; None if one is no number."""
    try:
        return [float(value) for value in values if str(value).lower() not in GRADES_OF_TRUTH]
    except (TypeError, ValueError, OverflowError):
        return None


def are_numbers(values: Sequence[Any]) -> bool:
    """Return whether all values are numbers."""
    return parse_numbers(values) is not None


def are_scores(values: Sequence[Any]) -> bool:
    """Return whether values are scores, not classes: some number has a fraction."""
    numbers = parse_numbers(values)
    return numbers is not None and any(number % 1 for number in numbers)


def tokens_for(lengths: Sequence[int]) -> int:
    """Return a maximum length, from 32 to 256, that holds 95 % of the texts; a token is four characters."""
    needed = sorted(lengths)[int(0.95 * (len(lengths) - 1))] / 4 + 3
    return next((size for size in (32, 64, 128) if size >= needed), 256)
