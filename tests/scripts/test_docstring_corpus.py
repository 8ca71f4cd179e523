"""The docstring corpus: what becomes of one docstring, which files count, and that equal inputs give equal bytes."""

from __future__ import annotations

import gzip
import json
import random
import sysconfig
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from scripts.data import docstrings as corpus
from sqat.recipe.inputs import Columns, SplitConfig
from sqat.recipe.tasks import RelevanceTask
from sqat.tasks.splits import load_rows

NUMPY_STYLE = """Return the middle of a sorted list of
    numbers. It is found by bisection (i.e. halving) and
    needs no copy of the numbers at all.

    Parameters
    ----------
    numbers : list
        The :class:`~fractions.Fraction` or ``float`` values to look at.

    .. versionadded:: 3.1
       With some words on what was added then.

    See Also
    --------
    mean : Average of all numbers of a list.

    Notes
    -----
    An empty list has no middle, so that asking for it is an error.

    Examples
    --------
    >>> middle([1, 2, 3])
    2

    References
    ----------
    .. [1] A book.
    """


def test_a_docstring_is_split_into_query_and_passage() -> None:
    query, passage = corpus.split_docstring(NUMPY_STYLE, 1000)
    assert query == "Return the middle of a sorted list of numbers"
    assert passage == (
        "It is found by bisection (i.e. halving) and needs no copy of the numbers at all. Parameters numbers : list "
        "The fractions.Fraction or float values to look at. Notes An empty list has no middle, so that asking for it "
        "is an error."
    )


def test_doctests_fences_and_see_also_in_other_styles_are_dropped() -> None:
    text = (
        "Sort the words of a sentence by their length.\n\nWords of equal length keep their order, as in every stable"
        " sort that we know of.\n\n    >>> sort('b aa')\n    ['b', 'aa']\n\nSee also: other_function, which does more\n"
        "and more.\n\n```python\nx = 1\n\ny = 2\n```\nAn empty sentence stays as it is."
    )
    _, passage = corpus.split_docstring(text, 1000)
    assert passage == (
        "Words of equal length keep their order, as in every stable sort that we know of. "
        "An empty sentence stays as it is."
    )


def test_the_summary_is_cut_out_of_the_rest() -> None:
    text = "Open a door with a key.\n\nTo open a door with a key the key must fit the lock, or the door stays shut."
    query, passage = corpus.split_docstring(text, 1000)
    assert query == "Open a door with a key"
    assert query.lower() not in passage.lower()
    assert passage == "To the key must fit the lock, or the door stays shut."


def test_a_passage_is_cut_between_words() -> None:
    text = "Open a door with a key.\n\n" + "abcd efgh " * 50
    _, passage = corpus.split_docstring(text, 103)
    assert len(passage) <= 103
    assert set(passage.split()) == {"abcd", "efgh"}


@pytest.mark.parametrize(
    "text",
    [
        "Open a door with a key.",
        "Open it.\n\nThe key must fit the lock, or else the door stays shut for ever and ever.",
        "Open a door with a key.\n\nIt must fit.",
        "Open a door with a key.\n\nDeprecated since 3.1: the key must fit the lock, or else the door stays shut.",
        "Table of all the doors here.\n\n1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 | 10 | 11 | 12 | words | and | words",
    ],
)
def test_docstrings_that_say_too_little_are_skipped(text: str) -> None:
    assert corpus.split_docstring(text, 1000) is None


VERBS = ["open", "close", "paint", "lift", "break", "mend", "forget"]
SYLLABLES = ["ba", "do", "fi", "gu", "ke", "lo", "mi", "na", "po", "ru", "se", "ti"]
WORDS = ["".join(pair) for pair in product(SYLLABLES, SYLLABLES)]


def source(verb: str, place: str) -> str:
    """A module of six functions; a docstring's rest repeats two words of its summary, among words drawn for it."""
    functions = []
    for number in range(6):
        draw = random.Random(f"{verb} {place} {number}")
        thing = 2 * (SYLLABLES[VERBS.index(verb)] + SYLLABLES[number])
        rest = " ".join(draw.sample(WORDS, 19))
        summary = f"{verb.capitalize()} the {thing} of a {place}"
        text = f"{summary}.\n\n    To {verb} it, a {thing} needs {rest}.\n    "
        functions.append(f'def {verb}_{number}():\n    """{text}"""\n')
    return f'"""Ways to {verb}."""\n' + "".join(functions)


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, Path]:
    """A standard library and a folder of installed packages."""
    library, installed = tmp_path / "lib", tmp_path / "site"
    for verb in VERBS[:6]:
        for folder, place in ((library, "castle"), (installed / "numpy", "farm"), (installed / "torch", "tower")):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{verb}.py").write_text(source(verb, place))
    for folder in (installed / "sqat", installed / "torch" / "tests", installed / "pip", library / "site-packages"):
        folder.mkdir()
        (folder / "secret.py").write_text(source("forget", "secret"))
    (installed / "torch" / "copy.py").write_text(source("open", "castle"))
    (installed / "torch" / "broken.py").write_text('"""Not Python"""\ndef (')
    (installed / "torch" / "latin.py").write_bytes(b'"""\xe4"""')
    return library, installed


def lines(output: Path, split: str) -> list[dict[str, Any]]:
    with gzip.open(output / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_splits_are_packages_and_share_no_text(machine: tuple[Path, Path], tmp_path: Path) -> None:
    told = corpus.build(*machine, tmp_path / "out", corpus.Settings(hard=2, random=2))
    splits = {split: lines(tmp_path / "out", split) for split in ("train", "dev", "test")}
    assert [line.split()[:2] for line in told] == [["train", "36"], ["dev", "36"], ["test", "36"]]
    assert {candidate["id"].split(".")[0] for row in splits["train"] for candidate in row["candidates"]} == {"torch"}
    assert {candidate["id"].split(".")[0] for row in splits["dev"] for candidate in row["candidates"]} == {"numpy"}
    texts = {
        split: {row["query"] for row in rows} | {candidate["text"] for row in rows for candidate in row["candidates"]}
        for split, rows in splits.items()
    }
    assert not any(texts[a] & texts[b] for a, b in product(texts, texts) if a != b)
    assert not any("secret" in text for found in texts.values() for text in found)


def test_a_query_has_one_right_passage_at_any_position(machine: tuple[Path, Path], tmp_path: Path) -> None:
    corpus.build(*machine, tmp_path / "out", corpus.Settings(hard=3, random=2))
    rows = lines(tmp_path / "out", "test")
    assert all(len(row["candidates"]) == 6 for row in rows)
    assert all(sum(candidate["label"] for candidate in row["candidates"]) == 1 for row in rows)
    assert all(len({candidate["text"] for candidate in row["candidates"]}) == 6 for row in rows)
    positions = {[candidate["label"] for candidate in row["candidates"]].index(1) for row in rows}
    assert positions == set(range(6))
    for row in rows:
        right = next(candidate["text"] for candidate in row["candidates"] if candidate["label"])
        verb, _, thing, *_ = row["query"].lower().split()
        assert right.startswith(f"To {verb} it, a {thing} needs")


def test_hard_negatives_are_nearer_than_random_ones(machine: tuple[Path, Path], tmp_path: Path) -> None:
    def shared(settings: Any) -> int:
        corpus.build(*machine, tmp_path / "out", settings)
        return sum(
            len(set(row["query"].lower().split()) & set(candidate["text"].lower().split()))
            for row in lines(tmp_path / "out", "test")
            for candidate in row["candidates"]
        )

    assert shared(corpus.Settings(hard=5, random=0)) > shared(corpus.Settings(hard=0, random=5)) + 20


def test_equal_inputs_give_equal_bytes_and_another_seed_another_order(
    machine: tuple[Path, Path], tmp_path: Path
) -> None:
    told = [
        corpus.build(*machine, tmp_path / name, corpus.Settings(seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    names = ["dev.jsonl.gz", "test.jsonl.gz", "train.jsonl.gz"]
    a, b, c = ([(tmp_path / folder / name).read_bytes() for name in names] for folder in "abc")
    assert a == b
    assert told[0] == told[1]
    assert all(first != second for first, second in zip(a, c, strict=True))
    assert sorted(entry.name for entry in (tmp_path / "a").iterdir()) == names


def test_queries_bounds_every_split(machine: tuple[Path, Path], tmp_path: Path) -> None:
    corpus.build(*machine, tmp_path / "out", corpus.Settings(queries=10))
    assert [len(lines(tmp_path / "out", split)) for split in ("train", "dev", "test")] == [10, 10, 10]


def test_the_toolkit_reads_it(machine: tuple[Path, Path], tmp_path: Path) -> None:
    corpus.build(*machine, tmp_path / "out", corpus.Settings())
    columns, task = Columns(candidates="candidates", group="qid"), RelevanceTask()
    rows = load_rows(SplitConfig(path="train.jsonl.gz"), "train", columns, task, tmp_path / "out")
    assert len(rows) == 36 * 9


def test_a_machine_without_numpy_is_reported_so(machine: tuple[Path, Path], tmp_path: Path) -> None:
    (machine[1] / "numpy").rename(machine[1] / "other")
    with pytest.raises(ValueError, match="dev has 0 usable docstrings, needs at least 2"):
        corpus.build(*machine, tmp_path / "out", corpus.Settings())


def test_the_standard_library_of_this_python_is_rich_enough() -> None:
    """A part of it, for speed: the whole has over a thousand."""
    seen: set[str] = set()
    library = Path(sysconfig.get_paths()["stdlib"])
    records = corpus.collect(library, "", set(), seen, corpus.Settings(queries=150))
    assert len(records) == 150
    assert len({record.passage for record in records}) == 150
    assert len({record.query for record in records}) == 150
    for record in records:
        assert 4 <= len(record.query.split()) <= 25
        assert len(record.passage.split()) >= 12
        assert len(record.passage) <= 320
        assert record.query.lower() not in record.passage.lower()
        assert ">>>" not in record.passage
        assert "See Also" not in record.passage
